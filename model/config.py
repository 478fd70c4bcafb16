"""ModelConfig: the hyperparameters of a model, saved in every .pth, and presets for them.

Only 1-pretrain.py has flags for these fields; later stages read the config from their parent checkpoint.
Read next: rope.py (rope_scaling), transformer.py.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from common.cli import flag
from common.flag_types import NumberType, float_between, int_between, parse_bool


def _number(default: float, help: str, minimum: float, maximum: float, **options: Any) -> Any:
    """A field with limits. Whether a config fits a checkpoint's tensors: checkpoint_schema.check_shapes."""
    make_type: Any = int_between if isinstance(default, int) else float_between
    return flag(default, help, type=make_type(minimum, maximum), **options)


def _switch(default: bool, help: str) -> Any:
    return flag(default, help, type=parse_bool, nargs="?", const=True)


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of a LLaMA-style decoder."""

    vocab_size: int = _number(6400, "number of tokens", 1, 2**24)
    dim: int = _number(512, "width of the residual stream", 1, 2**16)
    n_layers: int = _number(8, "number of decoder layers", 1, 1024)
    n_heads: int = _number(16, "query heads", 1, 4096)
    n_kv_heads: int = _number(8, "key/value heads, each shared by n_heads / n_kv_heads query heads", 1, 4096)
    hidden_dim: int = _number(0, "width of the feed-forward (0: 8/3 of dim); with MoE, of each expert", 0, 2**20)
    max_seq_len: int = _number(512, "longest sequence in tokens", 1, 2**23)
    rope_theta: float = _number(10_000.0, "base of the RoPE angles", 1.000001, 1e12)
    norm_eps: float = _number(1e-5, "epsilon of RMSNorm", 1e-30, 1)
    dropout: float = _number(
        0.0, "dropout on attention weights and on the output of attention and feed-forward", 0, 0.999999
    )
    tie_embeddings: bool = _switch(True, "the output layer shares the embedding matrix")
    qk_norm: bool = _switch(False, "RMSNorm on queries and keys (as Qwen3)")
    use_moe: bool = _switch(False, "mixture-of-experts feed-forward")
    n_shared_experts: int = _number(2, "experts that process every token", 0, 1024)
    n_routed_experts: int = _number(4, "experts that the router selects from", 0, 4096)
    n_active_experts: int = _number(2, "routed experts per token (top-k)", 0, 4096)
    balance_loss_coef: float = _number(
        0.01, "weight of the router's load-balancing loss", 0, 1e6, name="aux_loss_coef", aliases=("balance_loss_coef",)
    )
    head_dim: int = _number(0, "width of a head (0: dim / n_heads)", 0, 2**14)
    qkv_bias: bool = _switch(False, "biases on queries, keys and values (as Qwen2)")
    rope_scaling: dict[str, Any] = field(default_factory=dict, hash=False)  # {}: none; else see ROPE_KEYS

    def __post_init__(self) -> None:
        """Raises ValueError for the first field with a wrong type, a value out of range or an invalid combination."""
        if problem := field_problem(self):
            raise ValueError(f"model config: {problem}")
        if not self.hidden_dim:
            object.__setattr__(self, "hidden_dim", 64 * ((8 * self.dim // 3 + 63) // 64))
        given, scaling = self.head_dim, rope_scaling_problem(self.rope_scaling)
        if not given:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        experts = self.n_shared_experts + self.n_routed_experts if self.use_moe else 0
        step = 2 * self.n_heads  # RoPE rotates pairs of elements of a head
        below = self.dim // step * step
        near = f"dim {' or '.join(str(dim) for dim in (below, below + step) if dim)}"
        for problem, wrong in {
            f"dim {self.dim} is not a multiple of n_heads {self.n_heads}: give {near}, or head_dim": not given
            and self.dim % self.n_heads,
            "head_dim must be positive": self.head_dim < 1,
            f"head_dim {self.head_dim} is odd, but RoPE rotates pairs: give {near}, or an even head_dim": self.head_dim
            % 2,
            f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}": self.n_heads
            % self.n_kv_heads,
            f"n_active_experts {self.n_active_experts} must be from 1 to {self.n_routed_experts}": self.use_moe
            and not 1 <= self.n_active_experts <= self.n_routed_experts,
            f"n_layers times experts must be at most {MAX_EXPERTS}": self.n_layers * experts > MAX_EXPERTS,
            f"max_seq_len times head_dim must be at most {MAX_ROPE_ELEMENTS}": self.max_seq_len * self.head_dim
            > MAX_ROPE_ELEMENTS,
            "rope_scaling dynamic needs a head_dim of at least 4": self.head_dim < 4
            and bool(self.rope_scaling)
            and not scaling
            and self.rope_scaling["rope_type"] == "dynamic",
            scaling: scaling,
        }.items():
            if wrong:
                raise ValueError(f"model config: {problem}")

    @property
    def trained_len(self) -> int | None:
        """max_seq_len before RoPE scaling, in tokens; None if an imported config does not state it."""
        return self.rope_scaling.get("original_max_position_embeddings") if self.rope_scaling else self.max_seq_len

    @property
    def name(self) -> str:
        """`512` or `512_moe`: the size in the file names of checkpoints."""
        return f"{self.dim}_moe" if self.use_moe else str(self.dim)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


FIELD_LIMITS: dict[str, NumberType] = {
    known.name: known.metadata["flag"]["options"]["type"]
    for known in dataclasses.fields(ModelConfig)
    if isinstance(known.default, (int, float)) and not isinstance(known.default, bool)
}
MAX_EXPERTS = 2**15  # over all layers; building a module takes time even on the meta device
MAX_ROPE_ELEMENTS = 2**30  # elements of the table of cosines


def field_problem(config: ModelConfig) -> str:
    """Message about the first field with a wrong type or a value out of range; "" if there is none."""
    for known in dataclasses.fields(config):
        value, limits = getattr(config, known.name), FIELD_LIMITS.get(known.name)
        if isinstance(known.default, bool):
            if not isinstance(value, bool):
                return f"{known.name} must be true or false, not {value!r:.60}"
        elif limits:
            kinds = (int,) if isinstance(known.default, int) else (int, float)
            if type(value) not in kinds or not limits.accepts(value):
                return f"{known.name} must be {limits.rule}, not {value!r:.60}"
    return ""


# rope_type -> (required keys, optional keys) of rope_scaling, named as in config.json of transformers.
# original_max_position_embeddings is max_seq_len before scaling. Formulas: rope.py.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, {"original_max_position_embeddings"}),
    "dynamic": ({"factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
}


def rope_scaling_problem(scaling: Any) -> str:
    """Message about an invalid rope_scaling; "" if it is valid."""
    if not isinstance(scaling, dict):
        return "rope_scaling must be a dict"
    if not scaling:
        return ""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        return f"rope_scaling must be of type {', '.join(ROPE_KEYS)}, not {kind!r:.60}"
    if not all(isinstance(name, str) for name in scaling):
        return f"rope_scaling {kind}: keys must be text"
    needed, optional = ROPE_KEYS[kind]
    keys = scaling.keys() - {"rope_type"}
    if keys - needed - optional or needed - keys:
        return f"rope_scaling {kind} has the keys {', '.join(sorted(needed))}, not {', '.join(sorted(keys)) or 'none'}"
    for name in sorted(keys - {"truncate"}):
        value = scaling[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            return f"rope_scaling {kind}: {name} must be a positive number below 1e12, not {value!r:.60}"
    if scaling["factor"] < 1:
        return f"rope_scaling {kind}: factor must be at least 1, not {scaling['factor']!r}"
    if not isinstance(scaling.get("original_max_position_embeddings", 1), int):
        return f"rope_scaling {kind}: original_max_position_embeddings must be a whole number"
    if not isinstance(scaling.get("truncate", True), bool):
        return f"rope_scaling {kind}: truncate must be true or false"
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        return "rope_scaling llama3: low_freq_factor must be below high_freq_factor"
    return ""


# vocab_size here is used by --plan only; training takes the size of the tokenizer's vocabulary.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128},
    "small": {"dim": 512, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8},
    "small-moe": {"dim": 512, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8, "use_moe": True},
    "base": {"dim": 768, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8},
    # The size of MindLLM-1.3B (arXiv:2310.15777; model_type gpt_neo on its hub page: layers, width, heads, vocabulary
    # of GPT-Neo 1.3B). It has learned positions, GELU and LayerNorm; this one RoPE, SwiGLU of equal size and RMSNorm.
    "mindllm-1.3b": {
        "dim": 2048, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16, "max_seq_len": 1024, "vocab_size": 50_257,
    },
    # The size of Xiangxin-3B (model card: Phi-2 architecture, 2.78 B parameters from scratch). Phi-2 has parallel
    # attention and feed-forward, RoPE on 32 of 80 dimensions, GELU and biases; this one is that of transformer.py.
    "xiangxin-3b": {
        "dim": 2560, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "max_seq_len": 2048, "vocab_size": 51_200,
        "tie_embeddings": False,
    },
    # The size of MindLLM-3B (arXiv:2310.15777: 3.1 B parameters, RoPE, RMSNorm, DeepNorm, GeGLU). The paper does not
    # state these layers, width and vocabulary: they are chosen to give 3.1 B with the 24 layers of MindLLM-1.3B. It has
    # SwiGLU and pre-norm instead of GeGLU and DeepNorm.
    "mindllm-3b": {
        "dim": 3072, "n_layers": 24, "n_heads": 24, "n_kv_heads": 24, "max_seq_len": 2048, "vocab_size": 125_700,
    },
}  # fmt: skip
