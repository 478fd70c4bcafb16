"""Flags that several scripts share, as configurations to inherit from.

Imports no torch.
Read next: cli.py, device.py (resolves "auto").
"""

from dataclasses import dataclass

from common.cli import Config, flag
from common.flag_types import DTYPE_NAMES, device_name


@dataclass(frozen=True)
class DeviceFlags(Config):
    """Where a model runs, and in which dtype."""

    device: str = flag("auto", "auto (cuda, mps, cpu), cpu, cuda, cuda:1, mps", type=device_name, group="machine")
    dtype: str = flag("auto", "auto, float32, bfloat16, float16", choices=DTYPE_NAMES, group="machine")


@dataclass(frozen=True)
class InferenceFlags(DeviceFlags):
    """Of commands that do not train."""

    quantize: str = flag(
        "none", "int8: round the weights to 8 bits after loading; a CPU decodes faster",
        choices=("none", "int8"), group="machine",
    )  # fmt: skip
