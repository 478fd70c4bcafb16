"""Flags that several scripts share, as configurations to inherit from.

Imports no torch.
Read next: cli.py, device.py (resolves "auto").
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import Config, flag
from common.flag_types import DTYPE_NAMES, device_name, folder_name, path_string


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


@dataclass(frozen=True)
class RunFlags(Config):
    """Where models are read and written. Runs with a name live beside one another in subfolders of --out_dir."""

    out_root: str = flag("out", "folder of the models", name="out_dir", type=path_string, group="models")
    run_name: str = flag(
        "", "name of the run: its models are in the subfolder NAME of --out_dir",
        type=folder_name, metavar="NAME", group="models",
    )  # fmt: skip

    @property
    def out_dir(self) -> str:
        """The folder of the run: --out_dir, or its subfolder --run_name."""
        return str(Path(self.out_root, self.run_name))
