"""--dtype auto: bf16 only where its matrix products are faster than those of fp32."""

import pytest
import torch

from common.device import pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cpu_name", "has_amx", "has_avx512_bf16", "dtype"),
    [
        ("Intel Xeon", True, True, torch.bfloat16),
        ("Intel Xeon", False, True, torch.float32),
        ("AMD EPYC", False, True, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32),
        ("", False, True, torch.bfloat16),  # a torch without get_capabilities
    ],
)
def test_auto_is_bf16_where_its_products_are_faster(monkeypatch, cpu_name, has_amx, has_avx512_bf16, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16, raising=False)
    if cpu_name:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu_name}, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_dtype("auto", CPU) == dtype
