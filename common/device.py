"""Selection of device and dtype, and autocast. Imports torch, so scripts import this module after parsing flags.

Read next: cli.py (the flags), ../trainer/distributed.py (several processes).
"""

import contextlib
import ctypes
import sys
from typing import Any

import torch

from common.errors import UserError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Return the device; `auto`: cuda, else mps, else cpu. Raises UserError if the device is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA GPU; use --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; use --device auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs; start fewer processes")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones: CUDA from sm80 on, CPUs with AMX, AMD's AVX512-bf16.

    Intel's AVX512-bf16 without AMX does not count: its bf16 products measured half as fast as its fp32 ones (LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # functions that a version of torch lacks count as False
        cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        is_intel = cpu.get("cpu_name", "").startswith("Intel")
        probes = ["_is_amx_tile_supported"] + ["_is_avx512_bf16_supported"] * (not is_intel)
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype; `auto`: bf16 where it is faster, else fp16 on CUDA (with a gradient scaler), else fp32.

    Raises UserError for an unknown name.
    """
    if name == "auto":
        if has_fast_bf16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in TORCH_DTYPES:
        raise UserError(f"--dtype {name}: unknown; use auto, {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory instead of returning it: fewer page faults in a training step on a CPU.

    Without effect on other systems and C libraries.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before it shrinks
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the highest value: a larger block is mapped on its own


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which matrix products use `dtype` while the weights stay fp32. fp32: no autocast."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products with this tensor: that of the enclosing autocast context, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
