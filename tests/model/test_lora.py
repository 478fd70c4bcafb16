"""LoRA: formula, targets, merging; adapter checkpoints load only with the parent that they were trained on."""

import json
import re
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from export import hf_import
from model.checkpoint import load_model, model_fingerprint, model_state_dict, read_checkpoint, record_parent, save_model
from model.config import ModelConfig
from model.lora import LoRAConfig, LoRALinear, adapter_state, adapter_summary, attach, lora_layers, merge
from model.transformer import Transformer
from tests.helpers import (
    IGNORE_TOKEN_FOLDERS,
    ROOT,
    load_script,
    load_weights,
    read_jsonl,
    run_here,
    run_process,
    run_script,
)
from tests.model.test_hf_parity import make_random_model
from trainer.optim import make_optimizers

KINDS = {
    "dense": {},
    "qk_norm": {"qk_norm": True},
    "biases, wide heads": {"qkv_bias": True, "head_dim": 16},
    "moe": {"use_moe": True, "n_routed_experts": 3, "n_shared_experts": 1},
}
CONFIG = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32, "dropout": 0.1}
FLAGS = ["--device", "cpu", "--dtype", "float32", "--batch_size", "4", "--log_interval", "1", "--rank", "2"]
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def model(request):
    return make_random_model(**KINDS[request.param])


def randomize_adapter(model):
    """Set B to random values, as after training."""
    random = torch.Generator().manual_seed(9)
    for name, tensor in adapter_state(model).items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.1)
    return model


def test_lora_output_equals_the_formula():
    """W = [1 2; 3 4], A = [1 -1], B = [2; 1/2], alpha = 4, r = 1, x = (1, 2):
    W x = (5, 11), B A x = -(2, 1/2), h = (5 - 8, 11 - 2); W + 4 B A = [9 -6; 5 2]."""
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer = LoRALinear(linear, LoRAConfig(1, 4.0), torch.Generator())
    layer.lora_A.weight.data, layer.lora_B.weight.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.5]])
    x = torch.tensor([1.0, 2.0])
    assert layer(x).tolist() == [-3.0, 9.0]
    merged = layer.merged_linear()
    assert merged.weight.tolist() == [[9.0, -6.0], [5.0, 2.0]] and merged(x).tolist() == [-3.0, 9.0]


def test_a_fresh_adapter_changes_no_output(model):
    before = model.logits(IDS)
    attach(model, LoRAConfig(3, dropout=0.5), seed=1)
    assert torch.equal(model.logits(IDS), before)
    assert all(t.any() != (".lora_B." in name) for name, t in adapter_state(model).items()), "A is random, B is zero"
    model.train()
    with_dropout = randomized_copy(model).train()(IDS)[0]
    assert torch.equal(model(IDS)[0], with_dropout), "what A computes is multiplied by zero"


def randomized_copy(model):
    """A copy of the model without LoRA."""
    plain = Transformer(model.config)
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if ".lora_" not in name})
    return plain


def test_merged_model_equals_the_adapted_model(model):
    names = list(model.state_dict())
    randomize_adapter(attach_copy(model)).eval()
    before, parent = model.logits(IDS), randomized_copy(model).eval().logits(IDS)
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if ".lora_" not in name)
    merge(model)
    torch.testing.assert_close(model.logits(IDS), before, rtol=1e-5, atol=1e-5)
    assert (before - parent).abs().max() > 0.1, "and the change was one"
    assert list(model.state_dict()) == names and not lora_layers(model), "an ordinary model again"
    assert all(weight.requires_grad for weight in model.parameters()), "that may be trained"
    with pytest.raises(UserError, match="merged already"):
        merge(model)


def attach_copy(model, **config):
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, **config}))
    return model


def test_target_names_select_matrices():
    experts = {"use_moe": True, "n_routed_experts": 3, "n_shared_experts": 2, "n_layers": 2}
    per_layer = {"all": 4 + 5 * 3, "all-linear": 4 + 5 * 3, "attention": 4, "mlp": 15}
    per_layer |= {"experts": 9, "shared_experts": 6, "up_proj": 5}
    for target, count in per_layer.items():
        layers = lora_layers(attach_copy(make_random_model(**experts), targets=(target,)))
        assert len(layers) == 2 * count and all(target[:3] in ("all", "att", "mlp") or target in n for n in layers)
    some = lora_layers(attach_copy(make_random_model(n_layers=1), targets=("attention", "down_proj")))
    assert {name.split(".")[-1] for name in some} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    for targets in (("gate",), ("lm_head",), ("embed_tokens",), ("q_proj", "0"), ("experts",)):
        with pytest.raises(UserError, match=r"unknown LoRA targets .*attention"):
            attach_copy(make_random_model(), targets=targets)
    with pytest.raises(UserError, match="already has an adapter"):
        attach_copy(attach_copy(make_random_model()))


@given(st.tuples(*[st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) for _ in range(3)]))
@settings(max_examples=60, deadline=None)
def test_invalid_lora_settings_are_one_line_errors(numbers):
    try:
        config = LoRAConfig(*numbers, targets=("q_proj",))
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("LoRA: ")
    else:
        assert config.rank >= 1 and 0 < config.alpha / config.rank < 1e7 and 0 <= config.dropout < 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_adapter_trains(model, optimizer):
    before = {name: tensor.clone() for name, tensor in model_state_dict(model).items()}
    attach_copy(model).train()
    first = None
    optimizers = make_optimizers(model, optimizer, 1e-2, 0.1)
    for _ in range(8):
        hidden, aux_loss = model(IDS[:, :-1])
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), IDS[:, 1:].flatten()) + aux_loss
        loss.backward()
        first = first or loss.item()
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert loss.item() < first - 0.1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the parent is the same to the bit"
    assert all(tensor.any() for tensor in adapter_state(model).values())


# The training stage: files, several processes, resume.


def write_parent(folder, tokenizer, stage="full_sft", seed=0, **changes):
    """Save an untrained model as {stage}_32.pth, as stage 3 does."""
    torch.manual_seed(seed)
    parent = Transformer(ModelConfig(tokenizer.vocab_size, **{**CONFIG, **changes}))
    path = folder / f"{stage}_{parent.config.name}.pth"
    save_model(path, parent, stage, tokenizer, [{"stage": stage}])
    return path


@pytest.fixture
def out(tmp_path, tokenizer):
    return write_parent(tmp_path / "out", tokenizer).parent


@pytest.fixture(scope="module")
def chats(sft_dir, tmp_path_factory):
    return shutil.copytree(sft_dir, tmp_path_factory.mktemp("lora") / "sft", ignore=IGNORE_TOKEN_FOLDERS)


@pytest.fixture
def lora(monkeypatch, chats, out):
    def run(*flags, out_dir=out):
        run_script(monkeypatch, "4-lora_sft.py", *FLAGS, "--data_path", chats, "--out_dir", out_dir, *flags)
        return out_dir / "lora_sft_32.pth"

    return run


def test_targets_are_separated_by_commas_or_spaces(lora, out):
    for written in (["q_proj,v_proj"], ["q_proj", "v_proj"], ["q_proj,", "v_proj"]):
        path = lora("--max_steps", "1", "--resume", "never", "--targets", *written)
        assert torch.load(path, weights_only=True)["adapter"]["targets"] == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match=r"unknown LoRA targets k, qproj: choose from all, .*v_proj$"):
        lora("--targets", "qproj,k,v_proj")


def test_max_seq_len_flag_limits_the_data(lora, chats):
    lora("--max_steps", "1", "--max_seq_len", "30")
    (meta,) = chats.glob("tokens-*/meta.json")
    assert json.loads(meta.read_text())["max_seq_len"] == 30


def test_adapter_checkpoint_has_only_adapter_tensors(lora, out, capsys):
    parent = (out / "full_sft_32.pth").read_bytes()
    path = lora("--max_steps", "3", "--eval_interval", "2")
    said = capsys.readouterr().out
    assert (out / "full_sft_32.pth").read_bytes() == parent
    tensors = load_weights(path)
    assert len(tensors) == 2 * 2 * 7 and all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors)
    count = sum(tensor.numel() for tensor in tensors.values())
    assert f"{count:,} parameters train" in said and "holds the adapter alone" in said
    checkpoint = read_checkpoint(path)
    assert path.stat().st_size < 4 * count + 60_000 and checkpoint["stage"] == "lora_sft"
    assert checkpoint["adapter"] == {
        "rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": ["all"],
        "parent": str(out / "full_sft_32.pth"), "parent_fingerprint": model_fingerprint(out / "full_sft_32.pth"),
    }  # fmt: skip
    assert [entry["stage"] for entry in checkpoint["lineage"]] == ["full_sft", "lora_sft"]
    assert read_jsonl(path.with_suffix(".jsonl"))[-1]["val_loss"].keys() == {"zh", "en"}
    assert not path.with_suffix(".resume").exists()


def test_load_model_returns_the_merged_model(lora, out, monkeypatch, capsys):
    path = lora("--max_steps", "3", "--learning_rate", "0.1")
    model, tokenizer, checkpoint = load_model(path)
    by_hand, _, _ = load_model(out / "full_sft_32.pth")
    attach(by_hand, LoRAConfig(2))
    by_hand.load_state_dict({**by_hand.state_dict(), **load_weights(path)})
    ids = IDS[:, :20]
    torch.testing.assert_close(model.logits(ids), by_hand.eval().logits(ids), rtol=1e-5, atol=1e-5)
    assert not model.adapter and not model.training and checkpoint["stage"] == "lora_sft"
    assert model.state_dict().keys() == load_model(out / "full_sft_32.pth")[0].state_dict().keys()
    save_model(out / "dpo_32.pth", model, "dpo", tokenizer, [])  # the next stage saves a full model
    assert torch.equal(load_model(out / "dpo_32.pth")[0].logits(ids), model.logits(ids))
    (out / "dpo_32.pth").unlink()
    flags = ["--out_dir", out, "--prompt", "你好", "--max_new_tokens", "3", "--device", "cpu"]
    run_script(monkeypatch, "2-eval.py", *flags)
    assert "lora_sft_32.pth: lora_sft, 0." in capsys.readouterr().out, "it is the latest stage"
    run_script(monkeypatch, "2-eval.py", "--stage", "lora_sft", *flags)


def test_the_parent_is_found_and_its_fingerprint_checked(lora, out, tokenizer, tmp_path):
    path = lora("--max_steps", "1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = shutil.copy(path, elsewhere)
    load_model(moved)  # at the path recorded in the adapter
    wrong = write_parent(elsewhere, tokenizer, seed=5)
    load_model(moved)  # the file in its folder is another model, the recorded path is right
    original = (out / "full_sft_32.pth").rename(tmp_path / "renamed.pth")
    both = rf"{re.escape(str(moved))} is an adapter for .*full_sft_32.pth with fingerprint \w+, but {wrong} is \w+"
    with pytest.raises(UserError, match=both):
        load_model(moved)
    with pytest.raises(UserError, match=rf"but {wrong} is "):
        load_model(moved, parent=wrong)
    load_model(moved, parent=original)
    with pytest.raises(UserError, match="is a full model"):
        load_model(wrong, parent=original)
    wrong.unlink()
    with pytest.raises(UserError, match=r"full_sft_32.pth, which is not there: put it beside"):
        load_model(moved)
    shutil.copy(original, elsewhere / "full_sft_32.pth")
    load_model(moved)  # in the same folder


def test_a_merged_model_is_refused_as_parent(lora, out, tokenizer):
    """Otherwise the adapter would be merged a second time."""
    path = lora("--max_steps", "2")
    model, _, _ = load_model(path)
    save_model(out / "full_sft_32.pth", model, "full_sft", tokenizer, [])
    with pytest.raises(UserError, match="with fingerprint"):
        load_model(path)


def test_an_adapter_trains_on_an_adapter(lora, out, tmp_path):
    first = lora("--max_steps", "2")
    with pytest.raises(UserError, match=r"overwrite its parent .*--out_dir"):
        lora("--init_from", first)
    second = lora("--init_from", first, "--max_steps", "2", "--targets", "attention", out_dir=tmp_path / "two")
    model, _, checkpoint = load_model(second)
    assert [entry["stage"] for entry in checkpoint["lineage"]] == ["full_sft", "lora_sft", "lora_sft"]
    parent = model_state_dict(load_model(first)[0])
    changed = {n.split(".")[-2] for n, t in model_state_dict(model).items() if not torch.equal(t, parent[n])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    lora("--max_steps", "3", "--resume", "never")  # replaces the first adapter
    with pytest.raises(UserError, match="with fingerprint"):
        load_model(second)


def test_damaged_adapters_are_one_line_errors(lora):
    path = lora("--max_steps", "1")
    checkpoint = torch.load(path, weights_only=True)
    for change, message in (
        ({"adapter": {"rank": 2}}, "another version"),
        ({"adapter": {**checkpoint["adapter"], "rank": "two"}}, "LoRA: rank"),
        ({"adapter": {**checkpoint["adapter"], "targets": ["attention"]}}, "does not fit"),
        ({"adapter": {**checkpoint["adapter"], "rank": 4}}, "does not fit"),
    ):
        torch.save({**checkpoint, **change}, path)
        with pytest.raises(UserError, match=message):
            load_model(path)


class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_bit_equal(monkeypatch, lora, out, tokenizer, tmp_path, optimizer):
    from trainer import loop
    from trainer.state_files import SavedState

    flags = ["--max_steps", "12", "--save_interval", "3", "--lora_dropout", "0.2", "--accumulation_steps", "2"]
    flags += ["--optimizer", optimizer, "--targets", "q_proj", "mlp"]
    whole = lora(*flags)
    write_parent(tmp_path / "parts", tokenizer)
    real_step, done = loop.train_step, 0

    def step_then_kill(*positional):
        nonlocal done
        done += 1
        if done == 8:
            raise Killed
        return real_step(*positional)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_then_kill)
        with pytest.raises(Killed):
            lora(*flags, out_dir=tmp_path / "parts")
    resume = tmp_path / "parts" / "lora_sft_32.resume"
    names = set(SavedState(resume / "step_000000006", 1, "").tensors)
    kept = {name.removeprefix("model.") for name in names if not name.startswith("optimizer.")}
    assert kept == load_weights(whole).keys(), "the adapter, no more"
    with pytest.raises(UserError, match=r"the adapter's rank was 2, is 4"):
        lora(*flags, "--rank", "4", out_dir=tmp_path / "parts")
    parts = lora(*flags, out_dir=tmp_path / "parts")
    assert not resume.exists()
    ours, theirs = load_weights(whole), load_weights(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[row.get("loss") for row in read_jsonl(path.with_suffix(".jsonl"))] for path in (whole, parts)]
    assert losses[0] == losses[1]


def test_lora_on_two_processes_equals_one(lora, out, chats, tokenizer, tmp_path):
    """2 x 4 rows = 1 x 8, for an MoE without balance loss, which each process averages over its own tokens."""
    moe = {**KINDS["moe"], "balance_loss_coef": 0.0, "dropout": 0.0}
    parent = write_parent(tmp_path, tokenizer, **moe)
    flags = ["--max_steps", "5", "--init_from", parent, "--learning_rate", "0.01"]
    lora(*flags, "--batch_size", "8", "--checkpoint_activations")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = ["--data_path", chats, "--out_dir", tmp_path / "two"]
    result = run_process(*torchrun, ROOT / "4-lora_sft.py", *FLAGS, *flags, *paths)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("holds the adapter alone") == 1, "only the first process speaks"
    one, two = load_weights(out / "lora_sft_32_moe.pth"), load_weights(tmp_path / "two" / "lora_sft_32_moe.pth")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_the_parent_may_be_a_transformers_folder(monkeypatch, lora, tokenizer, tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    parent = write_parent(tmp_path, tokenizer)
    monkeypatch.setattr(hf_import, "open_folder", lambda path, device: load_model(parent, device))
    path = lora("--init_from", folder, "--max_steps", "1")
    assert read_checkpoint(path)["adapter"]["parent_fingerprint"] == model_fingerprint(parent)
    hf_import.open_model(path)
    shutil.copy(write_parent(tmp_path / "other", tokenizer, seed=7), parent)
    with pytest.raises(UserError, match=r"llama with fingerprint \w+, but .*llama is \w+"):
        hf_import.open_model(path)


def test_lora_flags_do_not_change(monkeypatch, capsys):
    text = run_here(monkeypatch, capsys, "4-lora_sft.py", "--help_all").stdout
    names = "rank alpha lora_dropout targets init_adapter peft_dir init_from data_path resume compile learning_rate"
    assert all(f"--{name} " in text for name in names.split())
    assert "(default: adamw)" in text and load_script("4-lora_sft.py").LoRASFTConfig().weight_decay == 0
    for spelling in ("--local_rank=0", "--local-rank=0"):
        assert run_here(monkeypatch, capsys, "4-lora_sft.py", spelling, "--help").returncode == 0


@pytest.mark.slow
def test_compiled_lora_equals_eager(lora, tokenizer, tmp_path):
    flags = ["--max_steps", "3", "--init_from", write_parent(tmp_path, tokenizer, dropout=0.0)]
    compiled = lora(*flags, "--compile", out_dir=tmp_path / "compiled")
    ours, theirs = load_weights(lora(*flags)), load_weights(compiled)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-4) for n in ours)


def test_adapter_summary():
    model = attach_copy(make_random_model())
    count = sum(tensor.numel() for tensor in adapter_state(model).values())
    rest = sum(p.numel() for p in make_random_model().parameters())
    assert adapter_summary(model) == (
        f"LoRA rank 4, alpha 8, on all (14 matrices): {count:,} parameters train, {count / rest:.2%} of the parent's "
        f"{rest:,}"
    )


def test_an_adapter_is_never_saved_without_its_parent(tokenizer, tmp_path):
    model = attach_copy(Transformer(ModelConfig(tokenizer.vocab_size, **CONFIG)))
    with pytest.raises(AssertionError, match="record_parent"):
        save_model(tmp_path / "a.pth", model, "lora_sft", tokenizer, [])
    parent = write_parent(tmp_path, tokenizer)
    record_parent(model, parent, tmp_path / "a.pth")
    assert model.adapter["parent_fingerprint"] == model_fingerprint(parent)
