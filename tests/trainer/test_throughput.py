"""FLOP/s and MFU of a run: peaks by the name of the GPU, the arithmetic, LoRA."""

import types

import pytest
import torch

from model.config import ModelConfig
from model.parameters import count_parameters
from model.transformer import Transformer
from trainer import throughput
from trainer.distributed import DistContext
from trainer.throughput import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12), ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
     ("NVIDIA GeForce RTX 3090", torch.float16, 71e12), ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
     ("NVIDIA H100 PCIe", torch.bfloat16, None), ("NVIDIA H100 80GB HBM3", torch.float32, None),
     ("Unknown 4090x", torch.bfloat16, None)],
)  # fmt: skip
def test_the_peak_is_known_by_the_name_of_the_gpu(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    dist = DistContext(torch.device("cuda", 0), dtype, world_size=2)
    assert peak_flops(dist) == (2 * peak if peak else None)
    assert peak_flops(DistContext(torch.device("cpu"), dtype)) is None


def test_mfu_is_the_fraction_of_the_peak(monkeypatch):
    config = ModelConfig(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=16, vocab_size=100, max_seq_len=10)
    data = types.SimpleNamespace(lengths=lambda: None)
    stage = types.SimpleNamespace(model=Transformer(config), data=data, loss_unit="token")
    monkeypatch.setattr(throughput, "peak_flops", lambda dist: 1e6)
    speed = throughput.Throughput(stage, None)
    flops = flops_per_token(config, 10)
    assert speed.step_metrics(50, 2.0) == {"tflops": 25 * flops / 1e12, "mfu": 25 * flops / 1e6}
    speed.step_metrics(150, 2.0)
    assert speed.summary(2048).startswith("200 tokens in 0.1 minutes, 50 tok/s, ")
    assert f"(MFU {50 * flops / 1e6:.1%}), peak memory 2.0 GiB" in speed.summary(2048)
    for parameter in stage.model.parameters():
        parameter.requires_grad_(False)
    stage.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    matmul = count_parameters(config).matmul
    assert throughput.stage_flops_per_token(stage)[0] == flops - 2 * matmul + 2 * 64, "LoRA trains few matrices"
