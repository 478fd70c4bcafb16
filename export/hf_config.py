"""Converts config.json of a transformers folder to a ModelConfig. Rejects unsupported settings by name.

    llama, mistral     a plain decoder (mistral only without a sliding window that is shorter than its context)
    qwen2              qkv_bias
    qwen3              qk_norm
    qwen3_moe          qk_norm; experts in every layer, the weights of the top k sum to 1 (norm_topk_prob)
    granitemoeshared   routed and shared experts; multipliers must have no effect (granite_moe.py)

RoPE scaling is read from `rope_parameters` (transformers 5) or `rope_scaling` (4). If a file has both, `rope_scaling`
is used, as in transformers 5. longrope and RoPE that differs between layers are rejected.
Read next: ../model/rope.py, hf_folder.py (the tensors), hf_export.py (the export).
"""

import json
import math
from pathlib import Path
from typing import Any

from common.errors import UserError
from export.granite_moe import MODEL_TYPE as GRANITE
from export.granite_moe import granite_multipliers
from model.config import ROPE_KEYS, ModelConfig, rope_scaling_problem

QWEN3_MOE = "qwen3_moe"
MODEL_TYPES: dict[str, dict[str, bool]] = {  # model_type -> ModelConfig fields that differ from Llama's
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    QWEN3_MOE: {"qk_norm": True},
    GRANITE: {},
}
MISTRAL_WINDOW, QWEN3_HEAD_DIM = 4096, 128  # defaults of transformers for keys that config.json lacks

Settings = dict[str, Any]


def read_hf_json(folder: Path, name: str) -> Settings:
    """The content of a JSON file of a transformers folder. Raises UserError if it is missing or damaged."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a transformers model: it has no {name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {folder / name} ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} is not a JSON object: download it again")
    return content


def convert_hf_config(folder: Path, settings: Settings, tied: bool) -> ModelConfig:
    """Return the ModelConfig of a transformers config. Raises UserError for an invalid or unsupported setting.

    settings: the content of config.json. tied: whether the output layer shares the embedding's weights.
    """
    try:
        for name, is_present in unsupported_features(settings).items():
            if is_present:
                known = f"of type {', '.join(MODEL_TYPES)}" if name.startswith("model_type") else "without it"
                raise ValueError(f"not supported: {name}; choose a model {known}")
        return ModelConfig(tie_embeddings=tied, **model_fields(settings))
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{folder}/config.json: {(str(error).splitlines() or ['?'])[0][:300]}") from None


def model_fields(settings: Settings) -> dict[str, Any]:
    """Return the fields of ModelConfig. Raises ValueError for an invalid setting."""
    kind = settings["model_type"]
    dim, heads = read_number(settings, "hidden_size"), read_number(settings, "num_attention_heads")
    scaling, length = convert_rope_scaling(settings, read_number(settings, "max_position_embeddings", 2048))
    theta = read_rope_settings(settings).get("rope_theta") or read_number(settings, "rope_theta", 10_000.0, float)
    return {
        "vocab_size": read_number(settings, "vocab_size"),
        "dim": dim,
        "n_layers": read_number(settings, "num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": read_number(settings, "num_key_value_heads", heads),
        "head_dim": explicit_head_dim(settings) or dim // heads,
        "hidden_dim": read_number(settings, "moe_intermediate_size" if kind == QWEN3_MOE else "intermediate_size"),
        "max_seq_len": length,
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "norm_eps": float(read_number(settings, "rms_norm_eps", 1e-6, float)),
        **MODEL_TYPES[kind],
        **moe_fields(settings),
    }


def read_number(settings: Settings, name: str, default: float | None = None, kind: type = int) -> Any:
    """Return a positive number of config.json. `kind`: int, or float for any number. Raises ValueError."""
    value = settings.get(name)
    value = default if value is None else value
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < math.inf:
        expected = "whole number" if kind is int else "number"
        raise ValueError(f"{name} must be a positive {expected}, not {value!r}")
    return value


def unsupported_features(settings: Settings) -> dict[str, Any]:
    """Return {description of an unsupported setting: a true value if config.json contains it}."""
    kind, rope, rope_type = settings.get("model_type"), read_rope_settings(settings), read_rope_type(settings)
    rotary = settings.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1
    return {
        f"model_type {kind!r}": kind not in MODEL_TYPES,
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
        "attention_bias (o_proj has a bias too)": settings.get("attention_bias") and kind != "qwen2",
        "mlp_bias": settings.get("mlp_bias"),
        f"RoPE scaling {rope_type!r}": rope_type not in ("default", *ROPE_KEYS),
        "RoPE that differs between layers": any(isinstance(value, dict) for value in rope.values()),
        "a partial rotary factor": rotary != 1,
        "a sliding window": has_sliding_window(settings),
        "quantised weights": settings.get("quantization_config"),
        **unsupported_multipliers(settings),
        **unsupported_expert_settings(settings),
    }


def has_sliding_window(settings: Settings) -> bool:
    """Whether a layer limits attention to recent tokens. In mistral, a window as long as the context does not."""
    kind, window = settings.get("model_type"), settings.get("sliding_window")
    if settings.get("use_sliding_window") or set(settings.get("layer_types") or ()) - {"full_attention"}:
        return True
    if kind == "mistral":
        window = settings.get("sliding_window", MISTRAL_WINDOW)
        length = settings.get("max_position_embeddings") or math.inf
        is_extended = read_rope_type(settings) in ("dynamic", "yarn")  # max_seq_len exceeds max_position_embeddings
        return window is not None and (is_extended or not window >= length)
    return kind == "llama" and bool(window)


def explicit_head_dim(settings: Settings) -> int:
    """Return head_dim of config.json or the default of its model_type; 0 means hidden_size / num_attention_heads."""
    head_dim = settings.get("head_dim", QWEN3_HEAD_DIM if settings.get("model_type") == "qwen3" else 0) or 0
    if not isinstance(head_dim, int):
        raise ValueError(f"head_dim must be a whole number, not {head_dim!r}")
    return head_dim


# ---- RoPE ------------------------------------------------------------------------------------------------------------
def read_rope_settings(settings: Settings) -> Settings:
    """Return the RoPE settings of config.json, {} if it has none."""
    for name in ("rope_scaling", "rope_parameters"):
        if found := settings.get(name):
            return found if isinstance(found, dict) else {"rope_type": found}
    return {}


def read_rope_type(settings: Settings) -> Any:
    rope = read_rope_settings(settings)
    return rope.get("rope_type", rope.get("type", "default"))


def convert_rope_scaling(settings: Settings, length: int) -> tuple[dict[str, Any], int]:
    """Return (ModelConfig.rope_scaling, max_seq_len). `length` is max_position_embeddings of config.json.

    For dynamic, `length` is the length before scaling and max_seq_len the length after it. For yarn, `length` may be
    either of the two and max_seq_len is the longer one. Other types keep `length`. Raises ValueError if invalid.
    """
    kind, rope = read_rope_type(settings), read_rope_settings(settings)
    if kind == "default":
        return {}, length
    scaling = {"rope_type": kind} | {name: rope[name] for name in set().union(*ROPE_KEYS[kind]) if name in rope}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    if kind == "linear":  # linear scaling does not depend on the original length
        scaling.pop("original_max_position_embeddings", None)
    elif kind == "dynamic":
        scaling["original_max_position_embeddings"] = length
    else:
        scaling.setdefault("original_max_position_embeddings", length)
    if kind == "yarn" and "factor" not in scaling:
        scaling["factor"] = length / scaling["original_max_position_embeddings"]
    if problem := rope_scaling_problem(scaling):
        raise ValueError(problem)
    if kind in ("dynamic", "yarn"):
        length = max(length, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
    return scaling, length


# ---- experts ---------------------------------------------------------------------------------------------------------
def moe_fields(settings: Settings) -> dict[str, Any]:
    """Return the ModelConfig fields of a mixture of experts; {} for a dense model.

    GraniteMoeShared has one shared feed-forward, as wide as all shared experts together.
    """
    kind, shared = settings.get("model_type"), 0
    if kind not in (GRANITE, QWEN3_MOE):
        return {}
    if kind == QWEN3_MOE:
        routed = read_number(settings, "num_experts", settings.get("num_local_experts"))
    else:
        routed = read_number(settings, "num_local_experts")
        width, shared_width = read_number(settings, "intermediate_size"), settings.get("shared_intermediate_size", 0)
        if not isinstance(shared_width, int) or shared_width < 0 or shared_width % width:
            problem = f"shared_intermediate_size {shared_width!r} is not supported"
            raise ValueError(f"{problem}: it must be a multiple of intermediate_size {width}")
        shared = shared_width // width
    return {
        "use_moe": True,
        "n_shared_experts": shared,
        "n_routed_experts": routed,
        "n_active_experts": read_number(settings, "num_experts_per_tok"),
        "balance_loss_coef": float(settings.get("router_aux_loss_coef") or 0.0),
    }


def unsupported_expert_settings(settings: Settings) -> dict[str, Any]:
    """The part of unsupported_features() for Qwen3-MoE; {} for other types."""
    if settings.get("model_type") != QWEN3_MOE:
        return {}
    return {
        "norm_topk_prob false": not settings.get("norm_topk_prob", False),
        f"decoder_sparse_step {settings.get('decoder_sparse_step')!r}": settings.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": settings.get("mlp_only_layers"),
    }


def unsupported_multipliers(settings: Settings) -> dict[str, Any]:
    """The part of unsupported_features() for Granite: head_dim and multipliers that have an effect."""
    heads, dim = settings.get("num_attention_heads"), settings.get("hidden_size")
    if settings.get("model_type") != GRANITE or not (
        isinstance(heads, int) and isinstance(dim, int) and heads > 0 < dim
    ):
        return {}
    width, neutral = explicit_head_dim(settings), granite_multipliers(dim // heads)
    given = {name: settings.get(name, 1.0) for name in neutral}
    return {
        f"head_dim {width} ({GRANITE} requires hidden_size / num_attention_heads)": width not in (0, dim // heads),
        **{f"{name} {value!r}": not is_close_to(value, neutral[name]) for name, value in given.items()},
    }


def is_close_to(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-6)
