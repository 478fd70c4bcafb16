"""Every architecture and RoPE scaling that ../../export/hf_import.py reads gives the results of transformers.

Promises: logits and gradients equal transformers' (1e-5, fp32), also beyond the length before scaling; a greedy answer
with the KV cache equals its generate(); rows of a batch give the answers of single rows; export, import and export
again give the same bytes; both spellings of RoPE in config.json give the same model; published config.json files give
the published numbers of parameters.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from export.hf_config import MODEL_TYPES, convert_hf_config
from export.hf_folder import unstack_experts
from export.hf_import import open_model
from export.verify_hf import greedy_decode
from model.config import ModelConfig
from model.generate import generate
from model.parameters import count_parameters
from model.rope import extend_context
from model.sampling import SamplingParams
from model.transformer import KVCache
from tests.export.test_hf_export import assert_same_folders, run_export
from tests.export.test_hf_import import edit_json, make_folder
from tests.helpers import run_script

ORIGINAL = 32  # the length before scaling; make_folder writes 96 positions


def rope_settings(length=96, **scaling):
    """Settings of a folder with scaled RoPE, for transformers 4 and 5."""
    parameters = {**scaling, "rope_theta": 5000.0}
    return {"max_position_embeddings": length, "rope_scaling": scaling, "rope_parameters": parameters}


LLAMA3 = {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": ORIGINAL}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
CASES = {
    "llama wide": ("Llama", {"head_dim": 16}),
    "llama narrow": ("Llama", {"head_dim": 4}),
    "qwen3 wide": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 wide": ("Qwen2", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("Mistral", {"sliding_window": 96}),
    "qwen3 moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "linear": ("Llama", rope_settings(rope_type="linear", factor=3.0)),
    "dynamic": ("Llama", rope_settings(ORIGINAL, rope_type="dynamic", factor=3.0)),
    "llama3": ("Llama", rope_settings(**LLAMA3, original_max_position_embeddings=ORIGINAL)),
    "yarn": ("Llama", rope_settings(ORIGINAL, **YARN)),
    "yarn long": ("Qwen3", rope_settings(**YARN)),
    "yarn options": ("Qwen2", rope_settings(ORIGINAL, **YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3)),
    "yarn mscale": ("Llama", rope_settings(**YARN, mscale=1.2, mscale_all_dim=0.6, truncate=False)),
    "yarn moe": ("Qwen3Moe", {**EXPERTS, **rope_settings(ORIGINAL, **YARN)}),
}
MAX_TOKENS = 96  # every case supports this length


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """model_folder(kind) -> (folder, transformers' model), created once per kind."""
    cache = {}

    def make(kind):
        if kind not in cache:
            family, changes = CASES[kind]
            pytest.importorskip("transformers", minversion="4.51" if "Qwen3" in family else "4.50")
            folder = tmp_path_factory.mktemp("kind") / "theirs"
            hf_model, _ = make_folder(folder, family, "1GB", **changes)
            cache[kind] = (folder, hf_model)
        return cache[kind]

    return make


def logits_and_gradients(model, logits_of, ids):
    """Logits (batch, seq, vocab) and the gradients of the next-token loss, by parameter name."""
    model.zero_grad()
    logits = logits_of(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("length", [20, MAX_TOKENS])
@pytest.mark.parametrize("kind", CASES)
def test_logits_and_gradients_equal_transformers(kind, length, model_folder):
    folder, hf_model = model_folder(kind)
    ours, _, _ = open_model(folder)
    assert ours.config.max_seq_len >= MAX_TOKENS
    ids = torch.randint(0, 300, (2, length + 1), generator=torch.Generator().manual_seed(length))
    logits, gradients = logits_and_gradients(ours, ours.logits, ids)
    hf_logits, hf_gradients = logits_and_gradients(hf_model, lambda ids: hf_model(ids).logits, ids)
    torch.testing.assert_close(logits, hf_logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.3
    hf_gradients = unstack_experts(hf_gradients, ours.config)
    assert gradients.keys() == hf_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, hf_gradients[name], rtol=1e-5, atol=1e-5, msg=name)
    for part in ("q_proj", "k_proj"):  # RoPE acts on these: their gradients must not vanish
        assert max(g.abs().max() for name, g in gradients.items() if part in name) > 1e-4


@pytest.mark.parametrize("kind", CASES)
def test_a_cached_greedy_answer_equals_generate(kind, model_folder):
    folder, hf_model = model_folder(kind)
    ours, _, _ = open_model(folder)
    prompt = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(3))
    tokens, _ = greedy_decode(ours, prompt[0].tolist(), MAX_TOKENS - 12)  # exceeds the length before scaling
    hf_model.generation_config.eos_token_id = hf_model.generation_config.pad_token_id = None
    found = hf_model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_TOKENS - 12
    )
    assert found[0, 12:].tolist() == tokens
    assert len(set(tokens)) > 3


@pytest.mark.parametrize("kind", CASES)
def test_export_of_an_imported_folder_is_byte_equal(kind, model_folder, monkeypatch, capsys, tmp_path):
    folder, _ = model_folder(kind)
    run_export(monkeypatch, folder, tmp_path / "a")
    assert "greedy tokens equal" in capsys.readouterr().out
    run_export(monkeypatch, tmp_path / "a", tmp_path / "b")
    assert_same_folders(tmp_path / "a", tmp_path / "b")
    theirs, back = open_model(folder)[0], open_model(tmp_path / "a")[0]
    assert dataclasses.replace(back.config, rope_scaling={}) == dataclasses.replace(theirs.config, rope_scaling={})
    assert torch.equal(back.rope_cos, theirs.rope_cos)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == {"Mistral": "llama"}.get(
        CASES[kind][0], CASES[kind][0].lower().replace("qwen3moe", "qwen3_moe")
    )


@pytest.mark.parametrize("kind", ["qwen2 wide", "qwen3 moe", "dynamic", "llama3"])
def test_training_from_a_folder_keeps_its_architecture(kind, model_folder, monkeypatch, sft_dir, capsys, tmp_path):
    folder, out = model_folder(kind)[0], tmp_path / "out"
    flags = ["--device", "cpu", "--dtype", "float32", "--batch_size", 4, "--max_steps", 2, "--init_from", folder]
    run_script(monkeypatch, "3-full_sft.py", *flags, "--data_path", sft_dir, "--out_dir", out)
    assert ("RoPE scaling: " in capsys.readouterr().out) == (kind in ("dynamic", "llama3"))
    parent, (child, _, _) = open_model(folder)[0], open_model(next(out.glob("*.pth")))
    assert child.config == parent.config
    before = dict(parent.named_parameters())
    assert all(not torch.equal(weight, before[name]) for name, weight in child.named_parameters()), (
        "all weights are trained"
    )


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_both_spellings_of_rope_are_the_same(kind, model_folder, tmp_path):
    folder, _ = model_folder(kind)
    theirs = json.loads((folder / "config.json").read_text())
    scaling = dict(CASES[kind][1]["rope_scaling"])
    plain = {n: v for n, v in theirs.items() if n not in ("rope_parameters", "rope_scaling", "rope_theta")}
    old = {"type": scaling.pop("rope_type"), **scaling}
    spellings = [
        {**plain, "rope_theta": 5000.0, "rope_scaling": old},
        {**plain, "rope_parameters": CASES[kind][1]["rope_parameters"]},
        {**plain, "rope_theta": 5000.0, "rope_scaling": CASES[kind][1]["rope_scaling"], "rope_parameters": None},
    ]
    configs = [convert_hf_config(folder, spelling, False) for spelling in spellings]
    assert configs[0] == configs[1] == configs[2] == open_model(folder)[0].config


def test_stacked_experts_are_read(model_folder, tmp_path):
    """transformers 5 stacks experts in memory and can save them stacked."""
    from safetensors.torch import load_file, save_file

    folder, _ = model_folder("qwen3 moe")
    wanted = open_model(folder)[0].state_dict()
    state = load_file(folder / "model.safetensors")
    stacked = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        of = {part: [state[f"{prefix}{i}.{part}_proj.weight"] for i in range(4)] for part in ("gate", "up", "down")}
        pairs = zip(of["gate"], of["up"], strict=True)
        stacked[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        stacked[f"{prefix}down_proj"] = torch.stack(of["down"])
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_model(tmp_path)[0].state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- dynamic RoPE: depends on the sequence length --------------------------------------------------------------------
def test_batched_answers_equal_single_answers(model_folder):
    ours, tokenizer, _ = open_model(model_folder("dynamic")[0])
    prompts = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (8, 31, 60)]
    greedily = SamplingParams(temperature=0, max_new_tokens=30)
    expected = [generate(ours, [prompt], greedily, tokenizer)[0].ids for prompt in prompts]
    assert [answer.ids for answer in generate(ours, prompts, greedily, tokenizer)] == expected


def test_dynamic_rope_uses_the_length_of_each_row(model_folder):
    ours, _, _ = open_model(model_folder("dynamic")[0])
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    lengths, joined = [20, 59], KVCache(ours.config, 2, 96, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            ours.logits(ids[row : row + 1, :length], joined.view(row, row + 1))
        step = torch.stack([ids[row, length] for row, length in enumerate(lengths)])[:, None]
        both = ours.logits(step, joined.view(0, 2, lengths))
        for row, length in enumerate(lengths):
            cache = KVCache(ours.config, 1, 96, torch.device("cpu"), torch.float32)
            ours.logits(ids[row : row + 1, :length], cache)
            expected = ours.logits(step[row : row + 1], cache)
            torch.testing.assert_close(both[row], expected[0], rtol=1e-5, atol=1e-5)


# ---- our own models beyond their trained length ----------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_an_extended_context_equals_transformers_with_the_same_scaling(kind, model_folder, monkeypatch, tmp_path):
    """scale_rope on a model without scaling equals transformers with the scaling in config.json."""
    import transformers

    folder, _ = model_folder("llama wide")
    ours, _, _ = open_model(folder)
    ours.scale_rope(kind, 2.0)
    assert ours.config.max_seq_len == 192 and ours.config.trained_len == 96
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    scaling = {"rope_type": kind, "factor": 2.0}
    edit_json(tmp_path, "config.json", rope_scaling=scaling, rope_theta=5000.0, rope_parameters=None)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 300, (1, 192), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for length in (50, 97, 192):
            expected = hf_model(ids[:, :length]).logits
            torch.testing.assert_close(ours.logits(ids[:, :length]), expected, rtol=1e-5, atol=2e-5)
        with pytest.raises(ValueError, match="192"):
            ours.logits(torch.zeros(1, 193, dtype=torch.long))


def test_scaling_is_applied_once_with_a_valid_factor():
    config = ModelConfig(100, 32, 1, 2, 2, max_seq_len=64)
    for factor in (1.0, 0.5, 65, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--rope_factor"):
            extend_context(config, "yarn", factor)
    with pytest.raises(UserError, match="already has RoPE scaling"):
        extend_context(extend_context(config, "yarn", 4), "linear", 2)


# ---- any config.json ------------------------------------------------------------------------------------------------
JUNK_VALUES = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
)
ROPE_NAMES = ["rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
              "rope_theta", "truncate", "beta_fast"]  # fmt: skip
ROPES = st.dictionaries(
    st.sampled_from(ROPE_NAMES), JUNK_VALUES | st.sampled_from(["yarn", "llama3", "dynamic", "linear"])
)
SOUND = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1e4,
    "rms_norm_eps": 1e-5, "head_dim": 8, "layer_types": None, "sliding_window": None, "rope_scaling": None,
    "shared_intermediate_size": 48, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True, "partial_rotary_factor": 1.0,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODEL_TYPES)),
    changes=st.dictionaries(st.sampled_from(sorted(SOUND)), JUNK_VALUES | ROPES, max_size=3),
)
def test_any_config_is_read_or_rejected_in_one_line(kind, changes):
    try:
        config = convert_hf_config(Path("folder"), {**SOUND, "model_type": kind, **changes}, True)
    except UserError as error:
        assert str(error).startswith("folder/config.json: ") and "\n" not in str(error)
    else:
        sizes = (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.hidden_dim, config.head_dim)
        assert all(type(size) is int and size > 0 for size in (*sizes, config.max_seq_len, config.n_routed_experts))


# ---- published sizes -------------------------------------------------------------------------------------------------
def qwen3(dim, hidden, layers, heads):
    return {
        "model_type": "qwen3", "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "rope_theta": 1_000_000, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "rope_scaling": None,
        "max_window_layers": layers, "hidden_act": "silu",
    }  # fmt: skip


PUBLISHED = {  # (config.json on the hub, without keys that do not affect the model; number of parameters)
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16), 596_049_920),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32), 4_022_468_096),
    "Qwen3-30B-A3B": (
        {
            **qwen3(2048, 6144, 48, 32), "model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
            "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "sliding_window": 32_768, "use_sliding_window": False, "max_window_layers": 24,
        },
        494_032_768,
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
            "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_768, "tie_word_embeddings": False,
            "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "sliding_window": None,
        },
        7_248_023_552,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_parameters(name, tmp_path):
    theirs, parameters = PUBLISHED[name]
    config = convert_hf_config(tmp_path, theirs, theirs["tie_word_embeddings"])
    assert count_parameters(config).total == parameters
    assert config.max_seq_len == theirs["max_position_embeddings"]


def test_qwen3_0_6b_scaled_down_opens_and_answers(monkeypatch, capsys, tmp_path):
    """Its proportions (16 heads of twice hidden_size / 16, 8 key heads, tied) with a hidden_size of 64."""
    make_folder(tmp_path / "Qwen3", "Qwen3", "1GB", hidden_size=64, num_attention_heads=16, num_key_value_heads=8,
                head_dim=8, intermediate_size=192, tie_word_embeddings=True, max_position_embeddings=128)  # fmt: skip
    run_script(monkeypatch, "2-eval.py", "--checkpoint", tmp_path / "Qwen3", "--prompt", "1?", "--max_new_tokens", 5)
    assert "transformers, 0.1 M" in capsys.readouterr().out
    assert open_model(tmp_path / "Qwen3")[0].model.layers[0].self_attn.q_proj.weight.shape == (128, 64)
