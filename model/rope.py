"""Rotary position embedding (RoPE) and its scaling for longer contexts.

    default    f_i = theta^(-2i / head_dim)                               angle = position * f_i
    linear     f_i / factor                                               position interpolation, arXiv:2306.15595
    dynamic    theta grows with the sequence length                       NTK-aware scaling, see `dynamic_rope`
    yarn       f_i / factor for low frequencies, f_i for high ones,       arXiv:2309.00071, section 3.2; cos and sin are
               a linear ramp between them                                 multiplied by `attention_factor`, section 3.3
    llama3     f_i / factor for low frequencies, f_i for high ones,       reference implementation of Llama 3.1; no
               interpolated between them                                  factor on cos and sin

Settings: ModelConfig.rope_scaling, named as in config.json of transformers; the values equal those of transformers.
All types except dynamic use one table that depends only on the config. `dynamic` does not change sequences up to the
original length. For n tokens beyond it, one forward pass uses theta(n) at all positions; with a KV cache each new token
uses theta of the current length and cached keys keep their rotation, as in transformers' generate. Cache rows of
different lengths each use their own theta.
Read next: transformer.py (Attention applies it).
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from common.errors import require
from model.config import ModelConfig
from model.rope_flags import check_rope_factor


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies f_i in radians per position, (head_dim / 2,), and the factor on cos and sin.

    For dynamic: the unscaled frequencies, which apply up to the original length.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    base_frequencies, scaling = 1.0 / config.rope_theta**exponents, config.rope_scaling
    kind = scaling.get("rope_type")
    if kind == "linear":
        return base_frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(base_frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(config, config.rope_theta**exponents), attention_factor(scaling)
    return base_frequencies, 1.0


def _llama3(base_frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Divides frequencies of fewer than low_freq_factor rotations in the original length by factor; keeps those of more
    than high_freq_factor rotations."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / base_frequencies
    slow = torch.where(wavelength > original / low, base_frequencies / scaling["factor"], base_frequencies)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * slow / scaling["factor"] + smooth * slow
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, between, slow)


def _yarn(config: ModelConfig, periods: Tensor) -> Tensor:
    """arXiv:2309.00071, eq. 17 to 19. periods: 1 / f_i, (head_dim / 2,)."""
    scaling, dim = config.rope_scaling, config.head_dim
    length = scaling["original_max_position_embeddings"]

    def pair_with_rotations(rotations: float) -> float:
        """The (fractional) index of the pair that makes this many rotations in the original length."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with_rotations(scaling.get("beta_fast", 32)), pair_with_rotations(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    unscaled_weight = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    factor: float = scaling["factor"]
    return (1.0 / (factor * periods)) * (1 - unscaled_weight) + (1.0 / periods) * unscaled_weight


def attention_factor(scaling: dict[str, Any]) -> float:
    """YaRN's factor on cos and sin: attention_factor if given, else 0.1 ln(factor) + 1, or the ratio of the mscales."""
    factor, mscale, all_dim = (scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))

    def scaled(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if factor is not None:
        return float(factor)
    return scaled(mscale) / scaled(all_dim) if mscale and all_dim else scaled(1)


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at every position, each (max_seq_len, head_dim). arXiv:2104.09864, section 3.4.2.

    Half-split layout of transformers: dimensions i and i + head_dim / 2 form a pair.
    """
    frequencies, factor = rope_frequencies(config)
    return _cos_sin(torch.arange(config.max_seq_len, dtype=torch.float32), frequencies, factor)


def dynamic_rope(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for positions (..., seq) that end at the last token of a sequence, each (..., seq, head_dim).

    theta' = theta * (factor * n / original - factor + 1)^(head_dim / (head_dim - 2)), n = max(length, original).
    """
    dim, factor = config.head_dim, config.rope_scaling["factor"]
    original = config.rope_scaling["original_max_position_embeddings"]
    lengths = positions[..., -1:] + 1
    growth = factor * lengths.clamp(min=original) / original - (factor - 1)
    theta = config.rope_theta * growth ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return _cos_sin(positions, 1.0 / theta[..., None] ** exponents)  # frequencies (..., 1, head_dim / 2)


def _cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x (batch, heads, seq, head_dim). cos, sin broadcast to it: (seq, head_dim) at the end."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def extend_context(config: ModelConfig, kind: str, factor: float) -> ModelConfig:
    """The config for --rope_scaling KIND --rope_factor N: max_seq_len is multiplied by `factor`.

    Raises UserError if the factor is out of range or the config already has RoPE scaling.
    """
    check_rope_factor(factor)
    problem = f"--rope_scaling: the model already has RoPE scaling ({rope_summary(config)}): leave out the flag"
    require(not config.rope_scaling, problem)
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": config.max_seq_len}
    return dataclasses.replace(config, rope_scaling=scaling, max_seq_len=int(factor * config.max_seq_len))


def rope_summary(config: ModelConfig) -> str:
    """The scaling as text: `yarn x 4, 2048 tokens, trained with 512`; "" without scaling."""
    if not config.rope_scaling:
        return ""
    kind, factor = config.rope_scaling["rope_type"], config.rope_scaling["factor"]
    trained = f"trained with {config.trained_len}" if config.trained_len else "the length of training is not stated"
    if kind == "llama3":  # trained with scaled RoPE
        trained = f"{config.trained_len} before scaling"
    return f"{kind} x {factor:g}, {config.max_seq_len} tokens, {trained}"
