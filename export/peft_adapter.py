"""Reads and writes LoRA adapters in the format of the peft library.

    adapter_config.json          {"peft_type": "LORA", "r", "lora_alpha", "lora_dropout", "target_modules", ...}
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...

After the prefix the names equal ours, because ours are those of transformers. Options with the same meaning in both
are converted; any other option is an error that names it. transformers stacks the experts of an MoE, so peft has no
names for them: of an MoE only the attention adapters can be exchanged.
Read next: ../model/lora.py, ../4-lora_sft.py (--peft_dir, --init_adapter).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from common.errors import UserError, escape_controls
from common.files import atomic_write
from model.checkpoint import load_state
from model.checkpoint_schema import tensor_problem
from model.lora import LoRAConfig, adapter_state, attach, lora_layers
from model.transformer import Transformer

PEFT_PREFIX = "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Options of peft that do not change the output of a trained adapter. The tensors' names give `target_modules`.
IGNORED_OPTIONS = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "init_lora_weights",
    "megatron_core", "qalora_group_size", "layers_pattern", "ensure_weight_tying",
}  # fmt: skip


def peft_settings(model: Transformer) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError if the adapter has experts of an MoE among its targets."""
    names = [name for name in lora_layers(model) if "experts." in name]
    if names:
        raise UserError(
            f"--peft_dir: peft supports no adapters on experts of an MoE ({names[0]} and {len(names) - 1} others): "
            "leave out --peft_dir, or use --targets attention"
        )
    alpha = model.adapter["alpha"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.adapter.get("parent"),
        "r": model.adapter["rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": model.adapter["dropout"],
        "target_modules": sorted({name.split(".")[-1] for name in lora_layers(model)}),
        "bias": "none",
        "inference_mode": True,
    }


def write_peft(folder: str | os.PathLike[str], model: Transformer) -> None:
    """Write the adapter attached to the model. Each file is written atomically, the config last."""
    from safetensors.torch import save

    settings = json.dumps(peft_settings(model), indent=2) + "\n"
    tensors = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    contents = {ADAPTER_WEIGHTS: save(tensors, metadata={"format": "pt"}), ADAPTER_CONFIG: settings.encode()}
    for name, content in contents.items():
        with atomic_write(Path(folder) / name, "free some space or choose another folder") as file:
            file.write(content)


def read_peft(folder: str | os.PathLike[str], model: Transformer) -> None:
    """Attach the adapter of a peft folder to the model, for further training or merging.

    Raises UserError that names the file if it is damaged, not LoRA, uses an unsupported option, or has tensors that do
    not fit this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / ADAPTER_WEIGHTS
    config = read_peft_config(Path(folder) / ADAPTER_CONFIG)
    try:
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path} ({_first_line(error)}): save the adapter as safetensors") from None
    for name, tensor in state.items():
        if problem := tensor_problem(tensor):
            raise UserError(f"{path}: {escape_controls(name)} is {problem}: not supported")
    targets = {name.split(".")[-3] for name in state if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight") and tensor.dim()}
    if ranks != {config["rank"]}:
        raise UserError(f"{path} has matrices of rank {sorted(ranks)}, {ADAPTER_CONFIG} says {config['rank']}")
    attach(model, LoRAConfig(**config, targets=tuple(sorted(targets))))
    load_state(model, state, path)


def read_peft_config(path: Path) -> dict[str, Any]:
    """rank, alpha and dropout of an adapter_config.json. Raises UserError for an unsupported option."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({_first_line(error)})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path} does not describe a LoRA adapter of peft (peft_type must be LORA)")
    if config.get("init_lora_weights", True) not in (
        True,
        False,
        "gaussian",
    ):  # pissa and others change the base weights
        raise UserError(f"{path}: init_lora_weights={config['init_lora_weights']!r} is not supported")
    unsupported = sorted(name for name in config.keys() - IGNORED_OPTIONS if config[name] and config[name] != "none")
    if unsupported:
        shown = ", ".join(f"{name}={config[name]!r}" for name in unsupported)
        raise UserError(f"{path}: these options are not supported: {shown[:200]}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    try:
        lora = LoRAConfig(rank, alpha, config.get("lora_dropout", 0.0))  # type: ignore[arg-type]  # LoRAConfig checks
        scale = math.sqrt(lora.rank) if config.get("use_rslora") else 1.0  # alpha / sqrt(r), arXiv:2312.03732
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return {"rank": lora.rank, "alpha": lora.alpha * scale, "dropout": lora.dropout}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
