"""Writes RoPE scaling to a GGUF file, where llama.cpp computes the same.

    linear     rope.scaling.type linear, factor
    yarn       rope.scaling.type yarn, factor, original_context_length, attn_factor
    llama3     the tensor rope_freqs.weight: a divisor for each frequency; architectures llama and granitemoe only
    dynamic    rejected: llama.cpp has one RoPE table for all sequence lengths

llama.cpp multiplies YaRN's default factor on cos and sin, 0.1 ln(factor) + 1, by attn_factor. In these architectures it
always rounds the ends of the ramp and does not read beta_fast and beta_slow, so other values are rejected.
Source: llama.cpp, src/llama-context.cpp and ggml's rope_yarn.
Read next: ../model/rope.py, gguf_export.py.
"""

import dataclasses
import math
from typing import Any

from torch import Tensor

from common.errors import UserError
from model.config import ModelConfig
from model.rope import attention_factor, rope_frequencies


def check_rope_supported(config: ModelConfig, architecture: str) -> None:
    """Raises UserError if llama.cpp does not compute the RoPE scaling of `config` in this architecture."""
    kind, scaling = config.rope_scaling.get("rope_type"), config.rope_scaling
    ramp = (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1), scaling.get("truncate", True))
    for problem, wrong in {
        "dynamic RoPE scaling": kind == "dynamic",
        "YaRN with beta_fast, beta_slow and truncate other than 32, 1 and true": ramp != (32, 1, True),
        f"llama3 RoPE scaling in the architecture {architecture}": kind == "llama3"
        and architecture not in ("llama", "granitemoe"),
    }.items():
        if wrong:
            raise UserError(f"--gguf: llama.cpp does not compute {problem}: leave out --gguf")


def write_rope_scaling(gguf: Any, writer: Any, config: ModelConfig) -> None:
    """Write the metadata keys of linear and yarn scaling."""
    scaling = config.rope_scaling
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    if config.trained_len:
        writer.add_rope_scaling_orig_ctx_len(config.trained_len)
    if kind == "yarn":
        default_factor = 0.1 * math.log(scaling["factor"]) + 1.0
        writer.add_rope_scaling_attn_factors(attention_factor(scaling) / default_factor)


def llama3_rope_factors(config: ModelConfig) -> Tensor:
    """The divisors (head_dim / 2,) that llama3's scaling applies to the RoPE frequencies."""
    unscaled, _ = rope_frequencies(dataclasses.replace(config, rope_scaling={}))
    return unscaled / rope_frequencies(config)[0]
