"""Somebody else's model: a transformers folder of the Llama, Qwen3 or GraniteMoeShared kind becomes one of this house.

    config.json, model*.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja  ->  model, tokenizer

The architecture is the same and so are the names of the parameters (transformer.py), so the tensors are read as they
are, in fp32, and logits equal transformers'. What this model cannot do (scaled RoPE, biases, sliding windows, heads of
another size, quantised weights) is refused by name, never left out silently. A folder that was exported from here
(../export/stock_folder.py) comes back with its stage and its lineage.

Used by checkpoint.load_model for a folder: `3-full_sft.py --init_from DIR`, `2-eval.py --checkpoint DIR`.
Read next: checkpoint.py (our own files), chat_templates.py (its chat template).
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corpus.errors import UserError
from model.chat import ChatTokenizer, load_tokenizer
from model.checkpoint import FORMAT, Checkpoint, load_state
from model.config import ModelConfig
from model.granite import MODEL_TYPE as MOE
from model.granite import from_granite, multipliers
from model.lineage import read_note
from model.transformer import Transformer

KINDS = {"llama": False, "qwen3": True, MOE: False}  # model_type -> whether queries and keys are normalised
STAGE = "transformers"


def open_folder(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[Transformer, ChatTokenizer, Checkpoint]:
    """The model (fp32, in eval mode), its tokenizer, and a checkpoint's other entries.

    Raises UserError naming what is missing, damaged, or beyond this architecture.
    """
    folder = Path(path)
    settings = read_json(folder, "config.json")
    state = read_tensors(folder)
    tied = "lm_head.weight" not in state or bool(settings.get("tie_word_embeddings"))
    config = model_config(folder, settings, tied)
    if tied:
        state.pop("lm_head.weight", None)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: write it with transformers, "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {config.vocab_size}"
        )
    model = Transformer(config)
    load_state(model, from_granite(state, config) if config.use_moe else state, folder)
    checkpoint = describe_folder(folder, settings, config, tokenizer)
    return model.to(device).eval(), tokenizer, checkpoint


def describe_folder(
    folder: Path, settings: dict[str, Any], config: ModelConfig, tokenizer: ChatTokenizer
) -> Checkpoint:
    """A checkpoint's entries beside the tensors; stage and lineage are those of the model that was exported, if any."""
    note = read_note(folder) or {}
    foreign = [{"stage": STAGE, "source": str(folder), "model_type": settings["model_type"]}]
    return {
        "format": FORMAT,
        "stage": note.get("stage", STAGE),
        "config": config.to_dict(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": tokenizer.files},
        "lineage": note.get("chain", foreign),
    }


def model_config(folder: Path, settings: dict[str, Any], tied: bool) -> ModelConfig:
    """Our config for theirs. Raises UserError for every property that this model does not have."""
    kind, heads, dim = (settings.get(name) for name in ("model_type", "num_attention_heads", "hidden_size"))
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    sliding = settings.get("use_sliding_window") or (kind == "llama" and settings.get("sliding_window"))
    layer_types = set(settings.get("layer_types") or ()) - {"full_attention"}
    for name, refused in {
        f"model_type {kind!r}": kind not in KINDS,
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
        "attention_bias": settings.get("attention_bias"),
        "mlp_bias": settings.get("mlp_bias"),
        f"RoPE scaling {rope_type!r}": rope_type != "default" or any(isinstance(v, dict) for v in rope.values()),
        "a partial rotary factor": (settings.get("partial_rotary_factor") or 1) != 1,
        "a sliding window": sliding or layer_types,
        "quantised weights": settings.get("quantization_config"),
        f"head_dim {settings.get('head_dim')} (only hidden_size / num_attention_heads)": isinstance(dim, int)
        and isinstance(heads, int)
        and (settings.get("head_dim") or dim // max(heads, 1)) * heads != dim,
        **unusual_multipliers(settings),
    }.items():
        if refused:
            raise UserError(
                f"{folder}/config.json: {name} is not supported: models of type {', '.join(KINDS)} are read"
            )

    def number(name: str, default: Any = None) -> Any:
        value = settings.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{folder}/config.json: {name} must be a positive number, not {value!r}")
        return value

    try:
        return ModelConfig(
            vocab_size=number("vocab_size"),
            dim=number("hidden_size"),
            n_layers=number("num_hidden_layers"),
            n_heads=number("num_attention_heads"),
            n_kv_heads=number("num_key_value_heads", heads),
            hidden_dim=number("intermediate_size"),
            max_seq_len=number("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or number("rope_theta", 10_000.0)),
            norm_eps=float(number("rms_norm_eps", 1e-6)),
            tie_embeddings=tied,
            qk_norm=KINDS[str(kind)],
            **(moe_fields(folder, settings, number) if kind == MOE else {}),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder}/config.json: {error}") from None


def unusual_multipliers(settings: dict[str, Any]) -> dict[str, Any]:
    """Granite's factors that are not what a plain decoder has, by name."""
    heads, dim = settings.get("num_attention_heads"), settings.get("hidden_size")
    if settings.get("model_type") != MOE or not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 < dim):
        return {}
    plain = multipliers(dim // heads)
    given = {name: settings.get(name, 1.0) for name in plain}
    return {f"{name} {value!r}": not same(value, plain[name]) for name, value in given.items()}


def same(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-6)


def moe_fields(folder: Path, settings: dict[str, Any], number: Callable[..., Any]) -> dict[str, Any]:
    """The experts of a GraniteMoeShared: its one shared feed-forward is as many of ours as it is wide."""
    width, shared = number("intermediate_size"), settings.get("shared_intermediate_size", 0)
    if not isinstance(shared, int) or shared < 0 or shared % width:
        raise UserError(
            f"{folder}/config.json: shared_intermediate_size {shared!r} is not supported: a multiple of "
            f"intermediate_size {width} is"
        )
    return {
        "use_moe": True,
        "n_shared_experts": shared // width,
        "n_routed_experts": number("num_local_experts"),
        "n_active_experts": number("num_experts_per_tok"),
        "balance_loss_coef": float(settings.get("router_aux_loss_coef") or 0.0),
    }


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files, in fp32. Raises UserError when one is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / "model.safetensors.index.json").is_file():
        index = read_json(folder, "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{folder}/model.safetensors.index.json has no weight_map: download it again")
        names = sorted({str(name) for name in index.values()})
    else:
        names = ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            hint = "safetensors are read; save_pretrained(DIR) writes them" if len(names) == 1 else "download it again"
            raise UserError(f"{folder} has no {name}: {hint}")
        try:
            state |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / name} ({str(error)[:120]}): download it again") from None
    # Old checkpoints carry the rotary table, which is computed here.
    return {name: tensor.float() for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no transformers model: it has no {name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / name} ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} is not a JSON object: download it again")
    return content
