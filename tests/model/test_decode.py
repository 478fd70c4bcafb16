"""The decoding step against its plain form, `Transformer.forward` with a cache.

Promises: equal logits and cache for every kind of model, for rows of equal and of different lengths, to rounding; the
tokens follow later changes of the weights; int8 weights decode what `round_to_int8` leaves in the model; the compiled
step is one graph for all lengths.
"""

import copy
import math

import pytest
import torch

import model.decode
from common.device import autocast
from model.decode import DecodeModel, Int8Product, SharedProduct, int8_weight, round_to_int8
from model.generate import generate
from model.lora import LoRAConfig, attach
from model.sampling import SamplingParams
from model.transformer import KVCache
from tests.helpers import one_line_error, tiny_model

CPU = torch.device("cpu")
TRAINED = {"original_max_position_embeddings": 8, "factor": 4.0}
VARIANTS = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "head_dim": {"head_dim": 16},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": True},
    "untied": {"tie_embeddings": False},
    "moe": {"use_moe": True},
    "moe-without-shared": {"use_moe": True, "n_shared_experts": 0, "n_active_experts": 1, "qk_norm": True},
    "linear": {"rope_scaling": {"rope_type": "linear", **TRAINED}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", **TRAINED}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", **TRAINED}},
}
LENGTHS = {"one": [6], "equal": [6, 6, 6], "different": [3, 9, 5], "many": [*range(1, 11)]}


def make_model(**config):
    """A model in which every parameter matters: norm weights and biases are random too."""
    model = tiny_model(**config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def compare(model, decoder, lengths, steps=4, tolerance=1e-5, dtype=torch.float32):
    """Decode the same tokens with `decoder` and with model.logits; compare logits and what the caches hold."""
    ids = torch.randint(0, 272, (len(lengths), max(lengths) + steps))
    with autocast(CPU, dtype):
        cache = KVCache(model.config, len(lengths), max(lengths) + steps, CPU, dtype)
        model(ids[:, : max(lengths)], cache)
        expected = copy.deepcopy(cache)
        view = expected.view(0, len(lengths), lengths)
        for step in range(steps):
            now = [length + step for length in lengths]
            tokens = [int(row[length]) for row, length in zip(ids, now, strict=True)]
            logits = decoder.step(tokens, now, cache)
            assert logits.dtype == torch.float32 and logits.shape == (len(lengths), 272)
            plain = model.logits(torch.tensor(tokens)[:, None], view)[:, 0].float()
            torch.testing.assert_close(logits, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache.keys, expected.keys, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache.values, expected.values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_the_forward_pass(variant, lengths):
    model = make_model(**VARIANTS[variant])
    compare(model, DecodeModel(model, torch.float32), lengths)


@pytest.mark.parametrize("variant", ["gqa", "qk_norm", "qkv_bias", "moe", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_step_in_16_bits_equals_autocast(dtype, variant, lengths):
    """Within the rounding of the dtype, with 16-bit copies and (for many rows on some CPUs) in fp32."""
    model = tiny_model(**VARIANTS[variant])
    compare(model, DecodeModel(model, dtype), lengths, tolerance=40 * torch.finfo(dtype).eps, dtype=dtype)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
def test_bf16_weights_equal_autocast_with_and_without_packing(is_packed, monkeypatch):
    monkeypatch.setattr(model.decode, "HAS_PACKED_BF16", is_packed and model.decode.HAS_PACKED_BF16)
    monkeypatch.setattr(model.decode, "max_fast_rows", lambda *_: math.inf)
    decoder = DecodeModel(decoded := tiny_model(qkv_bias=True), torch.bfloat16)
    assert decoder.lm_head.is_packed == model.decode.HAS_PACKED_BF16
    compare(decoded, decoder, [3, 9, 5], tolerance=40 * torch.finfo(torch.bfloat16).eps, dtype=torch.bfloat16)


@pytest.mark.parametrize(("native", "instructions", "packed", "rows"), [
    (True, True, True, math.inf), (False, True, True, 16), (False, False, True, 1), (False, False, False, 0),
])  # fmt: skip
def test_bf16_is_used_for_the_rows_for_which_it_is_fast(native, instructions, packed, rows, monkeypatch):
    monkeypatch.setattr(model.decode, "has_fast_bf16", lambda _: native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions, raising=False)
    monkeypatch.setattr(model.decode, "HAS_PACKED_BF16", packed and model.decode.HAS_PACKED_BF16)
    decoder = DecodeModel(tiny_model(), torch.bfloat16)
    used = {}
    for count in (1, 2, 16, 17):
        for name, form in (("bf16", decoder), ("fp32", decoder.plain)):
            if form:
                monkeypatch.setattr(form, "forward", lambda ids, _, name=name: used.setdefault(len(ids), name))
        decoder.step([5] * count, [0] * count, KVCache(tiny_model().config, count, 4, CPU, torch.bfloat16))
    has_copies = not isinstance(decoder.lm_head, SharedProduct)
    assert [used[count] == "bf16" and has_copies for count in used] == [count <= rows for count in used]
    assert has_copies == (rows > 0)


def test_a_model_in_bf16_decodes():
    model = tiny_model().to(torch.bfloat16)
    logits = DecodeModel(model, torch.bfloat16).step([5, 6], [0, 0], KVCache(model.config, 2, 4, CPU, torch.bfloat16))
    plain = model.logits(torch.tensor([[5], [6]]))[:, 0].float()
    torch.testing.assert_close(logits, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_decodes_as_it_stands(dtype):
    model = make_model(use_moe=True)
    attach(model, LoRAConfig(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    compare(model.eval(), DecodeModel(model, dtype), [4, 7], tolerance=tolerance, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_follow_the_weights(dtype, tokenizer):
    """Training between two calls: no weights of the first call remain."""
    greedy = SamplingParams(max_new_tokens=8)
    model, other = tiny_model(), make_model()
    with autocast(CPU, dtype):
        generate(model, [[50, 60]], greedy, tokenizer)
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
                parameter.data.copy_(new)
        expected = generate(other, [[50, 60]], greedy, tokenizer)
        assert generate(model, [[50, 60]], greedy, tokenizer) == expected


def test_the_models_own_dtype_needs_no_copies():
    model = tiny_model(use_moe=True)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in own for parameter in DecodeModel(model, torch.float32).parameters())


# -------------------------------------------------------------------------------------------------------------- int8


def test_int8_rounds_to_the_nearest_of_255_values():
    weight = torch.randn(40, 64) * torch.logspace(-6, 3, 40)[:, None]
    weight[7] = 0
    integers, scale = int8_weight(weight)
    rounded = integers.float() * scale.float()[:, None]
    # The scale is rounded to bf16: the largest value may lie outside by half of that rounding.
    limit = scale.float() * 0.5 + weight.abs().amax(1) * 2**-8
    assert ((rounded - weight).abs() <= limit[:, None]).all()
    assert all(torch.equal(a, b) for a, b in zip(int8_weight(rounded), (integers, scale), strict=True))


@pytest.mark.parametrize("with_kernel", [True, False], ids=["kernel", "plain"])
@pytest.mark.parametrize("variant", ["gqa", "qkv_bias", "untied", "moe"])
def test_int8_decodes_the_rounded_model(variant, with_kernel, monkeypatch):
    if not with_kernel:
        monkeypatch.setattr(model.decode, "KERNEL_MULTIPLE", 1000)
    rounded = tiny_model(**VARIANTS[variant])
    exact = copy.deepcopy(rounded)
    round_to_int8(rounded)
    if variant == "moe":
        assert torch.equal(rounded.model.layers[0].mlp.gate.weight, exact.model.layers[0].mlp.gate.weight)
    assert not torch.equal(rounded.lm_head.weight, exact.lm_head.weight)
    decoder = DecodeModel(rounded, torch.float32, int8=True)
    assert isinstance(decoder.lm_head, Int8Product) == with_kernel
    compare(rounded, decoder, [3, 9, 5], tolerance=0.1 if with_kernel else 1e-5)


def test_an_adapter_is_merged_before_rounding():
    model = tiny_model()
    attach(model, LoRAConfig(rank=2))
    with one_line_error("merge the adapter first"):
        round_to_int8(model)


# ---------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("variant", ["gqa", "qk_norm", "moe", "dynamic"])
def test_the_compiled_step_is_one_graph(variant):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(**VARIANTS[variant])
    compiled = DecodeModel(model, torch.float32, backend="aot_eager")
    for lengths in ([0, 3, 1], [2] * 4):  # three rows run as four, the last one free
        cache, plain = (KVCache(model.config, 4, 32, CPU, torch.float32) for _ in range(2))
        for step in range(5):
            now, ids = [length + step for length in lengths], [17 + length for length in lengths]
            logits = compiled.step(ids, now, cache)
            expected = DecodeModel(model, torch.float32).step(ids, now, plain)
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
