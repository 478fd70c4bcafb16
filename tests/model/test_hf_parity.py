"""Logits and gradients equal those of transformers' models with the same weights.

Promises: the weights of a dense model load into LlamaForCausalLM, with QK-norm into Qwen3ForCausalLM, those of an MoE
(experts stacked) into GraniteMoeSharedForCausalLM. Parameter names and counts do not change, because existing
checkpoints depend on them.
"""

import pytest
import torch
import torch.nn.functional as F

from model.config import PRESETS, ModelConfig
from model.transformer import Transformer

TINY = {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 40}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make_random_model(**changes):
    """A tiny model with weights large enough that every part affects the logits."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 if weight.dim() > 1 else 1 + 0.2 * torch.randn_like(weight))
    return model.eval()


def hf_settings(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # for transformers 4; version 5 reads the next one
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }


def logits_and_gradients(model, logits_of):
    """Logits (2, 40, vocab) of a fixed batch and the gradients of its next-token loss, by parameter name."""
    ids = torch.randint(0, TINY["vocab_size"], (2, 41), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    logits = logits_of(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_equal_models(ours, hf_model, translate=lambda tensors: tensors):
    logits, gradients = logits_and_gradients(ours, ours.logits)
    stock_logits, stock_gradients = logits_and_gradients(hf_model, lambda ids: hf_model(ids).logits)
    torch.testing.assert_close(logits, stock_logits, **TOLERANCE)
    assert logits.std() > 0.3  # the logits are not trivially equal
    gradients = translate(gradients)
    assert gradients.keys() == stock_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(
            gradient, stock_gradients[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_dense_equals_transformers(kv_heads, tied, qk_norm):
    import transformers

    ours = make_random_model(
        n_kv_heads=kv_heads, tie_embeddings=tied, qk_norm=qk_norm, rope_theta=5000.0, norm_eps=1e-4
    )
    family = "Qwen3" if qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(**hf_settings(ours.config))
    hf_model = getattr(transformers, f"{family}ForCausalLM")(config)
    hf_model.load_state_dict(ours.state_dict(), strict=True)
    hf_model.tie_weights()
    assert_equal_models(ours, hf_model.eval())


def granite_names(tensors):
    """Our MoE tensors (weights or gradients), renamed and stacked as in GraniteMoeShared."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer in range(TINY["n_layers"]):
        old, new = f"model.layers.{layer}.mlp.", f"model.layers.{layer}."

        def experts(kind, matrix, old=old):
            names = (f"{old}{kind}.{i}.{matrix}.weight" for i in range(9))
            return [tensors[name] for name in names if name in tensors]

        gates, ups, downs = (experts("experts", f"{matrix}_proj") for matrix in ("gate", "up", "down"))
        stacked[new + "block_sparse_moe.router.weight"] = tensors[old + "gate.weight"]
        gate_up = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        stacked[new + "block_sparse_moe.experts.gate_up_proj"] = torch.stack(gate_up)
        stacked[new + "block_sparse_moe.experts.down_proj"] = torch.stack(downs)
        gates, ups, downs = (experts("shared_experts", f"{matrix}_proj") for matrix in ("gate", "up", "down"))
        stacked[new + "shared_mlp.input_linear.weight"] = torch.cat([*gates, *ups])
        stacked[new + "shared_mlp.output_linear.weight"] = torch.cat(downs, dim=1)
    return stacked


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_moe_equals_transformers(tied):
    transformers = pytest.importorskip("transformers", minversion="5")
    ours = make_random_model(use_moe=True, tie_embeddings=tied)
    settings = hf_settings(ours.config) | {
        "shared_intermediate_size": ours.config.n_shared_experts * ours.config.hidden_dim,
        "num_local_experts": ours.config.n_routed_experts,
        "num_experts_per_tok": ours.config.n_active_experts,
        "attention_multiplier": ours.config.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    hf_model = transformers.GraniteMoeSharedForCausalLM(transformers.GraniteMoeSharedConfig(**settings))
    hf_model.set_experts_implementation("eager")
    hf_model.load_state_dict(granite_names(ours.state_dict()), strict=True)
    hf_model.tie_weights()
    assert_equal_models(ours, hf_model.eval(), granite_names)


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("small", 26_878_464, 26_878_464),
        ("small-moe", 113_402_368, 78_799_360),
        ("base", 108_749_568, 108_749_568),
    ],
)
def test_preset_parameter_counts(preset, total, active):
    with torch.device("meta"):
        model = Transformer(ModelConfig(**PRESETS[preset]))
    assert model.count_parameters() == (total, active)


def test_parameter_names_do_not_change():
    model = make_random_model(n_layers=1, qk_norm=True, use_moe=True, n_routed_experts=1, n_active_experts=1)
    attention = {f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    expert = {f"{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
    experts = {f"mlp.{e}.{name}" for e in ("experts.0", "shared_experts.0", "shared_experts.1") for name in expert}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    layer = {f"model.layers.0.{name}" for name in attention | experts | norms | {"mlp.gate.weight"}}
    assert model.state_dict().keys() == layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    dense = make_random_model(n_layers=1)
    mlp = {name for name in dense.state_dict() if ".mlp." in name}
    assert mlp == {f"model.layers.0.mlp.{name}" for name in expert}
