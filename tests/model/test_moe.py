"""Mixture of experts: outputs, balance loss, gradients and dtypes.

Promises: a single expert equals the dense feed-forward; the layer equals a plain loop over tokens; the balance loss is
1 for uniform routing and the number of experts for collapsed routing, its gradient reaches the router, and padding is
excluded. (Parity of the whole MoE model with transformers: test_hf_parity.py.)
"""

import pytest
import torch

from model.config import ModelConfig
from model.lora import LoRAConfig, attach
from model.moe import MoEFeedForward
from model.transformer import FeedForward, Transformer


def moe(**changes):
    torch.manual_seed(0)
    settings = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "hidden_dim": 24, "use_moe": True, "n_routed_experts": 4}
    config = ModelConfig(**{**settings, **changes})
    layer = MoEFeedForward(config, lambda: FeedForward(config.dim, config.hidden_dim))
    for weight in layer.parameters():
        weight.data.normal_(std=0.3)
    return layer


def test_one_expert_is_the_dense_feed_forward():
    layer = moe(n_routed_experts=1, n_active_experts=1, n_shared_experts=0)
    x = torch.randn(2, 5, 16)
    out, aux_loss = layer(x)
    torch.testing.assert_close(out, layer.experts[0](x))
    assert aux_loss.item() == pytest.approx(1)


@pytest.mark.parametrize(("k", "shared"), [(1, 0), (2, 2), (4, 1)])
def test_equals_a_plain_loop_over_tokens(k, shared):
    layer = moe(n_active_experts=k, n_shared_experts=shared)
    x = torch.randn(2, 7, 16, requires_grad=True)
    out, _ = layer(x)
    rows = []
    for token in x.reshape(-1, 16):
        p = (layer.gate.weight @ token).softmax(0)
        best = sorted(range(4), key=lambda i: -p[i].item())[:k]
        row = sum(p[i] / sum(p[j] for j in best) * layer.experts[i](token[None])[0] for i in best)
        rows.append(row + sum(expert(token[None])[0] for expert in layer.shared_experts))
    plain = torch.stack(rows).view_as(x)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((plain * weights).sum(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


def by_index_add(layer, x, token_mask=None):
    """The layer's outputs in a plain form: each expert looks up its tokens and adds its results to them."""
    tokens = x.reshape(-1, x.shape[-1])
    probabilities = (tokens @ layer.gate.weight.T).softmax(-1)
    weights, chosen = probabilities.topk(layer.n_active, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for i, expert in enumerate(layer.experts):
        rows, slots = (chosen == i).nonzero(as_tuple=True)
        out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
    out = out + sum(expert(tokens) for expert in layer.shared_experts)
    return out.view_as(x), layer.compute_aux_loss(probabilities, chosen, token_mask)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("k", "used"), [(1, 8), (2, 8), (3, 5), (8, 8), (1, 1)])
def test_sorted_rows_equal_lookups_by_expert(monkeypatch, k, used, masked, grouped):
    """Outputs and all gradients, with experts that get no token (`used` of 8 are selected)."""
    layer = moe(n_routed_experts=8, n_active_experts=k)
    monkeypatch.setattr(layer, "uses_grouped_mm", lambda rows: grouped)
    x = torch.randn(3, 7, 16)
    x[..., 0] = 1
    layer.gate.weight.data[used:, 0] = -100
    x.requires_grad_()
    token_mask = torch.arange(7).expand(3, -1) < 5 if masked else None
    weights, results = torch.randn(3, 7, 16), []
    for forward in (layer, lambda *inputs: by_index_add(layer, *inputs)):
        out, aux_loss = forward(x, token_mask)
        gradients = torch.autograd.grad((out * weights).sum() + aux_loss, [x, *layer.parameters()])
        results.append([out, aux_loss, *gradients])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_grouped_products_are_used_where_torch_has_them():
    rows = torch.empty(4, 16, dtype=torch.bfloat16, device="meta")
    assert moe().uses_grouped_mm(rows)
    assert not moe().uses_grouped_mm(rows.float()) and not moe().uses_grouped_mm(torch.empty(4, 16).bfloat16())
    assert not moe(hidden_dim=20).uses_grouped_mm(rows), "its rows are 40 bytes long"
    sharded = moe()
    sharded.has_sharded_weights = True
    assert not sharded.uses_grouped_mm(rows)
    model = Transformer(ModelConfig(50, 16, 2, 2, 1, max_seq_len=8, use_moe=True))
    assert model.model.layers[0].mlp.uses_grouped_mm(rows)
    attach(model, LoRAConfig(targets=("experts",)))
    assert not model.model.layers[0].mlp.uses_grouped_mm(rows), "a LoRALinear computes more than a product"


def aux_loss_of(layer, preferred, token_mask=None):
    """Balance loss if token i has almost all its probability on expert preferred[i]."""
    probabilities = torch.nn.functional.one_hot(torch.tensor(preferred), 4).float()
    chosen = probabilities.topk(layer.n_active).indices
    return layer.compute_aux_loss(probabilities, chosen, token_mask).item()


def test_aux_loss_equals_the_formula():
    layer = moe(n_active_experts=1)
    assert aux_loss_of(layer, [0, 1, 2, 3] * 3) == pytest.approx(1)
    assert aux_loss_of(layer, [2] * 12) == pytest.approx(4)
    assert aux_loss_of(layer, [0, 0, 0, 1]) == pytest.approx(4 * (0.75**2 + 0.25**2))

    top_two = moe(n_active_experts=2)  # every assignment counts: f = (1/2, 1/4, 1/4, 0), P = (.6, .2, .15, .05)
    probabilities = torch.tensor([[0.6, 0.2, 0.15, 0.05]] * 2)
    chosen = torch.tensor([[0, 1], [0, 2]])
    expected = 4 * (0.5 * 0.6 + 0.25 * 0.2 + 0.25 * 0.15)
    assert top_two.compute_aux_loss(probabilities, chosen, None).item() == pytest.approx(expected)
    even = torch.full((4, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
    assert top_two.compute_aux_loss(even, chosen, None).item() == pytest.approx(1)


def test_padding_does_not_count_in_the_aux_loss():
    layer = moe(n_active_experts=1)
    token_mask = torch.tensor([[True, True, True, True, False, False]])
    assert aux_loss_of(layer, [0, 1, 2, 3, 3, 3], token_mask) == pytest.approx(1)
    assert aux_loss_of(layer, [0, 1, 2, 3, 3, 3]) > 1.1
    assert aux_loss_of(layer, [0] * 6, torch.zeros(1, 6, dtype=torch.bool)) == 0  # only padding: no NaN


def test_padding_changes_neither_outputs_nor_aux_loss():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, 16, 2, 2, 2, max_seq_len=12, use_moe=True)).eval()
    ids = torch.randint(0, 50, (2, 8))
    padded = torch.cat((ids, torch.randint(0, 50, (2, 4))), dim=1)
    hidden, aux_loss = model(ids)
    padded_hidden, padded_aux_loss = model(padded, token_mask=torch.arange(12).expand(2, -1) < 8)
    torch.testing.assert_close(padded_hidden[:, :8], hidden)
    torch.testing.assert_close(padded_aux_loss, aux_loss)


def test_every_expert_and_the_router_get_a_gradient():
    layer = moe(n_active_experts=1)
    layer.gate.weight.data[3] = -100.0  # with positive inputs expert 3 gets no token
    out, aux_loss = layer(torch.rand(1, 6, 16) + 0.1)
    out.sum().backward(retain_graph=True)
    assert all(weight.grad is not None for weight in layer.parameters())  # DDP needs all of them
    assert all(weight.grad.count_nonzero() == 0 for weight in layer.experts[3].parameters())
    layer.zero_grad()
    aux_loss.backward()
    assert layer.gate.weight.grad.abs().max() > 1e-4
    assert all(weight.grad is None for weight in layer.experts.parameters())


def test_aux_loss_balances_the_router():
    """Gradient descent on the balance loss alone makes a collapsed router uniform."""
    layer = moe(n_active_experts=1, dim=16)
    x = torch.randn(1, 256, 16) + 1
    layer.gate.weight.data[0] += 0.6
    optimizer = torch.optim.SGD([layer.gate.weight], lr=1.0)
    losses = []
    for _ in range(100):
        aux_loss = layer(x)[1]
        losses.append(aux_loss.item())
        optimizer.zero_grad()
        aux_loss.backward()
        optimizer.step()
    assert losses[0] > 2 and losses[-1] < 1.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_moe_trains_in_every_dtype(dtype, way):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, 16, 2, 2, 1, max_seq_len=8, use_moe=True, qk_norm=True))
    ids = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        exact = model.logits(ids)
    model = model.to(dtype) if way == "cast" else model
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        hidden, aux_loss = model(ids)
        logits = model.lm_head(hidden)
    assert logits.dtype == dtype and aux_loss.isfinite()
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)
    (logits.float().logsumexp(-1).mean() + aux_loss).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
