"""Adapters are exchanged with the peft library: equal logits on the stock model; unsupported options are rejected."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from export.peft_adapter import read_peft, write_peft
from model.checkpoint import load_model
from model.lora import LoRAConfig, adapter_state, attach, merge
from tests.helpers import IGNORE_TOKEN_FOLDERS, load_weights, run_script
from tests.model.test_hf_parity import TOLERANCE, granite_names, hf_settings, make_random_model
from tests.model.test_lora import FLAGS, randomize_adapter, write_parent

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "llama": {},
    "untied": {"tie_embeddings": False, "n_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "qwen2": {"qkv_bias": True, "head_dim": 16},
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}


def make_hf_model(ours):
    """A transformers model with the weights of `ours`."""
    import transformers

    family = "Qwen3" if ours.config.qk_norm else "Qwen2" if ours.config.qkv_bias else "Llama"
    config = getattr(transformers, f"{family}Config")(**hf_settings(ours.config))
    hf_model = getattr(transformers, f"{family}ForCausalLM")(config)
    hf_model.load_state_dict(ours.state_dict(), strict=True)
    hf_model.tie_weights()
    return hf_model.eval()


def granite_model(ours):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.GraniteMoeSharedConfig(
        **hf_settings(ours.config),
        shared_intermediate_size=ours.config.n_shared_experts * ours.config.hidden_dim,
        num_local_experts=ours.config.n_routed_experts,
        num_experts_per_tok=ours.config.n_active_experts,
        attention_multiplier=ours.config.head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )
    hf_model = transformers.GraniteMoeSharedForCausalLM(config)
    hf_model.set_experts_implementation("eager")
    hf_model.load_state_dict(granite_names(ours.state_dict()), strict=True)
    hf_model.tie_weights()
    return hf_model.eval()


CASES = [*((name, ("all",)) for name in SHAPES), ("llama", ("q_proj", "down_proj")), ("moe", ("attention",))]


def model_pair(shape):
    ours = make_random_model(use_moe=True) if shape == "moe" else make_random_model(**SHAPES[shape])
    return ours, granite_model(ours) if shape == "moe" else make_hf_model(ours)


@pytest.mark.parametrize(("shape", "targets"), CASES)
def test_peft_opens_our_adapter(shape, targets, tmp_path):
    from peft import PeftModel

    ours, hf_model = model_pair(shape)
    plain = ours.logits(IDS)
    attach(ours, LoRAConfig(3, 7.5, 0.1, targets))
    write_peft(tmp_path / "adapter", randomize_adapter(ours))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = PeftModel.from_pretrained(hf_model, tmp_path / "adapter").eval()
    torch.testing.assert_close(ours.logits(IDS), theirs(IDS).logits, **TOLERANCE)
    assert (plain - ours.logits(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("shape", "targets"), CASES)
def test_read_peft_opens_a_peft_adapter(shape, targets, rslora, tmp_path):
    from peft import LoraConfig, get_peft_model

    ours, hf_model = model_pair(shape)
    plain = ours.logits(IDS)
    names = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "all": "all-linear"}.get(targets[0], list(targets))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=names, use_rslora=rslora,
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    theirs = get_peft_model(hf_model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(IDS).logits
    read_peft(tmp_path / "adapter", ours)
    torch.testing.assert_close(ours.logits(IDS), expected, **TOLERANCE)
    assert (plain - expected).abs().max() > 0.1 and ours.adapter["dropout"] == 0.1
    merge(ours)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours.logits(IDS), merged(IDS).logits, **TOLERANCE)
    their_tensors = merged.state_dict()
    for name, tensor in ours.state_dict().items():
        if ".mlp." not in name or shape != "moe":
            torch.testing.assert_close(tensor, their_tensors[name], **TOLERANCE)


def test_a_written_adapter_reads_back_bit_equal(tmp_path):
    ours = make_random_model()
    attach(ours, LoRAConfig(2, 3.0, 0.0, ("mlp",)))
    write_peft(tmp_path, randomize_adapter(ours))
    again = make_random_model()
    read_peft(tmp_path, again)
    assert again.adapter == {**ours.adapter, "targets": ["down_proj", "gate_proj", "up_proj"]}
    assert all(torch.equal(tensor, adapter_state(ours)[name]) for name, tensor in adapter_state(again).items())


def test_lora_script_writes_and_reads_peft_folders(monkeypatch, sft_dir, tokenizer, tmp_path, capsys):
    parent = write_parent(tmp_path / "out", tokenizer)
    chats = shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)
    flags = [*FLAGS, "--max_steps", "2", "--data_path", chats]
    run_script(monkeypatch, "4-lora_sft.py", *flags, "--out_dir", parent.parent, "--peft_dir", tmp_path / "peft")
    hf_model = make_hf_model(load_model(parent)[0])
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(hf_model, tmp_path / "peft").eval()
    model, _, _ = load_model(parent.parent / "lora_sft_32.pth")
    torch.testing.assert_close(model.logits(IDS[:, :30]), theirs(IDS[:, :30]).logits, **TOLERANCE)
    begin = ["--init_from", parent, "--init_adapter", tmp_path / "peft", "--learning_rate", "1e-30"]
    with pytest.raises(UserError, match=r"brings its own .* leave out --rank"):
        run_script(monkeypatch, "4-lora_sft.py", *flags, *begin, "--out_dir", tmp_path / "two")
    flags = [*FLAGS[: FLAGS.index("--rank")], "--max_steps", "2", "--data_path", chats]
    run_script(monkeypatch, "4-lora_sft.py", *flags, *begin, "--out_dir", tmp_path / "two")
    one, two = (load_weights(folder / "lora_sft_32.pth") for folder in (parent.parent, tmp_path / "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), "learning rate 0"
    moe = write_parent(tmp_path / "moe", tokenizer, use_moe=True)
    with pytest.raises(UserError, match=r"experts of an MoE .*--targets attention"):
        run_script(monkeypatch, "4-lora_sft.py", *flags, "--init_from", moe, "--peft_dir", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """A valid peft folder; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model = make_random_model(n_layers=1)
    attach(model, LoRAConfig(2, 4, 0.0, ("q_proj",)))
    write_peft(folder, model)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1"),
        ({"r": 3}, r"rank \[2\], adapter_config.json says 3"),
        ({"r": "2"}, "rank must be"),
        ({"lora_alpha": None}, "alpha must be"),
    ],
)
def test_unsupported_options_are_rejected_by_name(change, named, adapter_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=named):
        read_peft(folder, make_random_model(n_layers=1))


def test_other_shapes_and_damaged_files_are_rejected_by_name(adapter_folder, tmp_path):
    for model, named in (
        (make_random_model(n_layers=2), "missing model.layers.1.self_attn.q_proj.lora_A.weight"),
        (make_random_model(n_layers=1, dim=48), r"lora_A.weight is \(2, 32\), expected \(2, 48\)"),
    ):
        with pytest.raises(UserError, match=named):
            read_peft(adapter_folder, model)
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    for content in (
        b"",
        b"not safetensors",
        b"\xff" * 64,
        (adapter_folder / "adapter_model.safetensors").read_bytes()[:-9],
    ):
        (folder / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*adapter_model.safetensors"):
            read_peft(folder, make_random_model(n_layers=1))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*adapter_model.safetensors"):
        read_peft(folder, make_random_model(n_layers=1))
    with pytest.raises(UserError, match=r"cannot read .*adapter_config.json"):
        read_peft(tmp_path, make_random_model())


def test_an_adapter_on_the_output_layer_or_the_router_is_rejected(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    for name in ("lm_head", "model.layers.0.mlp.gate", "model.layers.0.self_attn.qkv_proj"):
        tensors = {f"base_model.model.{name}.lora_{ab}.weight": torch.zeros(2, 2) for ab in "AB"}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=rf"unknown LoRA targets {name.split('.')[-1]}"):
            read_peft(tmp_path, make_random_model(use_moe=True))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*CONFIG, "use_rslora", "lora_dropout", "use_dora", "x"]), JSON))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_rejected_in_one_line(adapter_folder, tmp_path, change):
    assert_read_or_rejected(adapter_folder, tmp_path, json.dumps({**CONFIG, **change}).encode())


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_rejected_in_one_line(adapter_folder, tmp_path, content):
    assert_read_or_rejected(adapter_folder, tmp_path, content)


SMALL_MODEL = make_random_model(n_layers=1, vocab_size=8)


def assert_read_or_rejected(adapter_folder, folder, content):
    shutil.copy(adapter_folder / "adapter_model.safetensors", folder)
    (folder / "adapter_config.json").write_bytes(content)
    try:
        read_peft(folder, SMALL_MODEL)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        assert not SMALL_MODEL.adapter
    else:
        merge(SMALL_MODEL)


def test_a_damaged_adapter_ends_the_script_in_one_line_with_exit_code_2(
    tmp_path, monkeypatch, sft_dir, tokenizer, capsys
):
    from common.errors import fail_in_one_line

    parent = write_parent(tmp_path, tokenizer)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(SystemExit) as stop, fail_in_one_line():
        run_script(monkeypatch, "4-lora_sft.py", "--init_from", parent, "--init_adapter", tmp_path)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: cannot read ") and message.count("\n") == 1
