"""RoPE, RMSNorm, CPU attention, activation checkpointing and the limits of the config.

Promises: RoPE scores depend only on the distance; attention_cpu equals F.scaled_dot_product_attention, forward and
backward; activation checkpointing changes no gradient; tied embeddings are one tensor.
"""

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.rope import apply_rope, rope_table
from model.transformer import RMSNorm, Transformer, attention_cpu


def test_rope_depends_only_on_the_distance():
    config = ModelConfig(dim=64, n_heads=2, n_kv_heads=2, max_seq_len=64)
    cos, sin = rope_table(config)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 32)

    def score(i, j):
        return (apply_rope(q, cos[i], sin[i]) * apply_rope(k, cos[j], sin[j])).sum()

    torch.testing.assert_close(score(5, 2), score(60, 57), rtol=1e-4, atol=1e-4)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3
    torch.testing.assert_close(apply_rope(q, cos[40], sin[40]).norm(), q.norm())  # a rotation keeps norms
    torch.testing.assert_close(apply_rope(q, cos[0], sin[0]), q)


def test_rms_norm_equals_the_formula():
    norm = RMSNorm(8, 1e-5)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 8) * 5
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("seq", [1, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_cpu_attention_equals_the_library(seq, heads, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, seq, 16, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    ours = attention_cpu(q, k, v, 0.0)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("before", "seq"), [(1, 1), (200, 1), (130, 129), (5, 300)])
def test_cpu_attention_sees_all_keys_of_a_cache(before, seq):
    torch.manual_seed(0)
    q = torch.randn(2, 4, seq, 16)
    k, v = torch.randn(2, 2, 2, before + seq, 16)
    seen = torch.arange(before + seq) <= before + torch.arange(seq)[:, None]
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(attention_cpu(q, k, v, 0.0), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 150])
def test_cpu_attention_applies_the_mask(seq):
    torch.manual_seed(0)
    q = torch.randn(3, 4, seq, 16)
    k, v = torch.randn(2, 3, 2, 70 + seq, 16)
    ends = torch.tensor([20, 60, 71])  # rows of different lengths, as in a cache of several sequences
    mask = (torch.arange(70 + seq) < ends[:, None, None] + torch.arange(seq)[:, None])[:, None]
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attention_cpu(q, k, v, 0.0, mask), theirs, rtol=1e-5, atol=1e-5)


def test_cpu_attention_applies_dropout():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 256, 2)
    out = attention_cpu(q, k, torch.ones(1, 1, 256, 2), 0.5)
    assert out.std() > 0.01 and abs(out[:, :, 64:].mean() - 1) < 0.1  # random, with the right mean


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_activation_checkpointing_changes_no_gradient(use_moe):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(50, 32, 2, 4, 2, max_seq_len=16, dropout=0.1, use_moe=use_moe)).train()
        model.activation_checkpointing = recompute
        torch.manual_seed(1)  # the same dropout
        hidden, aux_loss = model(torch.randint(0, 50, (2, 16)))
        (model.lm_head(hidden).logsumexp(-1).sum() + aux_loss).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_config_raises_for_invalid_values():
    for wrong in (
        {"dim": 30, "n_heads": 4},
        {"dim": 12, "n_heads": 4},
        {"n_heads": 16, "n_kv_heads": 3},
        {"use_moe": True, "n_active_experts": 5},
        {"dropout": 1.0},
        {"head_dim": 15},
        {"head_dim": -2},
        {"rope_theta": 1.0},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": True}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8.5}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}, "head_dim": 2},
        {"rope_scaling": "yarn"},
    ):
        with pytest.raises(ValueError, match="model config") as error:
            ModelConfig(**wrong)
        assert "\n" not in str(error.value)


def test_head_dim_sets_the_width_of_a_head():
    config = ModelConfig(50, 32, 1, 4, 2, head_dim=24, qkv_bias=True, max_seq_len=16)
    attention = Transformer(config).model.layers[0].self_attn
    shapes = {name: tuple(weight.shape) for name, weight in attention.named_parameters()}
    assert shapes["q_proj.weight"] == (96, 32) and shapes["o_proj.weight"] == (32, 96)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (48, 32)
    biases = {name: weight for name, weight in attention.named_parameters() if name.endswith(".bias")}
    assert sorted(biases) == ["k_proj.bias", "q_proj.bias", "v_proj.bias"]
    assert all((weight == 0).all() for weight in biases.values())


def test_a_config_of_an_older_checkpoint_is_the_same_model():
    """Checkpoints of earlier versions lack three fields that were added later."""
    config = ModelConfig(50, 32, 1, 4, 2, max_seq_len=16)
    old = {n: v for n, v in config.to_dict().items() if n not in ("head_dim", "qkv_bias", "rope_scaling")}
    assert ModelConfig(**old) == config and config.head_dim == 8 and config.trained_len == 16 and config.name == "32"
