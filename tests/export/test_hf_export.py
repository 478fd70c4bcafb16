"""export_model.py: writes a folder that stock transformers opens, and whose import and export give the same bytes.

Promises: for every architecture, tied or not, in one file or several, transformers' logits, greedy answer and ids of
texts and chats equal ours; export -> import -> export gives the same bytes; the lineage is kept, and later training
extends it; an adapter is merged, or exported for peft; a folder that differs from the model is an error and is removed;
no incomplete folder is left, and only an earlier export is replaced.
"""

import filecmp
import json
import sys

import pytest
import torch

from common.errors import UserError
from export import hf_export
from export.hf_import import open_model
from export.verify_hf import SAMPLE_TEXTS
from model.checkpoint import save_model
from model.config import ModelConfig
from model.transformer import Transformer
from tests.export.test_hf_import import edit_json, make_folder
from tests.helpers import run_here, run_script

CASES = {
    "llama": {},
    "llama-untied": {"tie_embeddings": False, "n_kv_heads": 4, "rope_theta": 5000.0, "norm_eps": 1e-4},
    "qwen3": {"qk_norm": True, "tie_embeddings": False},
    "moe": {"use_moe": True, "n_shared_experts": 2},
    "moe-unshared": {"use_moe": True, "n_shared_experts": 0, "n_active_experts": 1, "tie_embeddings": False},
}
LINEAGE = [
    {"stage": "pretrain", "data": "dataset/pretrain", "steps": 3, "tokens": 96, "seconds": 1.5, "loss": 6.0},
    {"stage": "full_sft", "data": "/home/someone/secret/sft", "steps": 2, "tokens": 64, "seconds": 2.0, "loss": 5.0},
]


def random_model(config):
    """A model whose random weights are large enough that every module affects the logits."""
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = weight.dim() == 1 and not name.endswith(".bias")
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if norm else torch.randn_like(weight) * 0.15)
    return model.eval()


@pytest.fixture
def make_checkpoint(tokenizer, tmp_path):
    """make_checkpoint(qk_norm=True) -> path of a checkpoint of a tiny model."""

    def make_model_file(stage="full_sft", chats=tokenizer, **changes):
        size = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 96}
        config = ModelConfig(chats.vocab_size, **{**size, **changes})
        path = tmp_path / "out" / f"{stage}_{config.name}.pth"
        save_model(path, random_model(config), stage, chats, LINEAGE)
        return path

    return make_model_file


def run_export(monkeypatch, *arguments):
    run_script(monkeypatch, "export_model.py", *arguments)


def assert_same_folders(one, two):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    others = [name for name in names if name != "README.md"]
    assert filecmp.cmpfiles(one, two, others, shallow=False)[1:] == ([], [])
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (one, two) if "README.md" in names]
    assert len({card.replace(f"./{one.name}", "./").replace(f"./{two.name}", "./") for card in cards}) <= 1


@pytest.mark.parametrize("shard", [None, 0.00002], ids=["one file", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_gives_equal_results(case, shard, monkeypatch, capsys, make_checkpoint, tmp_path):
    import transformers

    source, folder, again = make_checkpoint(**CASES[case]), tmp_path / "a", tmp_path / "b"
    flags = ["--max_shard_gb", shard] if shard else []
    run_export(monkeypatch, source, folder, *flags)
    message = capsys.readouterr().out
    assert "greedy tokens equal" in message and "allowed 0.0001" in message
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(shard)

    ours, tokenizer, _ = open_model(source)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    ids = torch.randint(0, ours.config.vocab_size, (3, 96), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(hf_model(ids).logits, ours.logits(ids), rtol=0, atol=1e-4)
        assert ours.logits(ids).std() > 0.3
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert their_tokenizer.encode(SAMPLE_TEXTS[2], add_special_tokens=False) == tokenizer.encode(SAMPLE_TEXTS[2])
    assert their_tokenizer.pad_token_id == tokenizer.pad_id
    assert hf_model.generation_config.eos_token_id == tokenizer.stop_ids

    run_export(monkeypatch, folder, again, *flags)  # import the folder and export it again
    assert_same_folders(folder, again)
    back, _, checkpoint = open_model(folder)
    assert back.config == ours.config and checkpoint["stage"] == "full_sft"
    assert [entry["stage"] for entry in checkpoint["lineage"]] == ["pretrain", "full_sft"]
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


def test_training_starts_from_an_export(monkeypatch, make_checkpoint, sft_dir, tmp_path):
    run_export(monkeypatch, make_checkpoint("pretrain"), tmp_path / "a", "--no-verify", "--license", "mit")
    flags = ["--device", "cpu", "--batch_size", 8, "--max_steps", 1, "--init_from", tmp_path / "a"]
    run_script(monkeypatch, "3-full_sft.py", *flags, "--data_path", sft_dir, "--out_dir", tmp_path / "next")
    checkpoint = open_model(tmp_path / "next" / "full_sft_32.pth")[2]
    assert [entry["stage"] for entry in checkpoint["lineage"]] == ["pretrain", "full_sft", "full_sft"]
    assert "someone" not in json.dumps(checkpoint["lineage"]), "a local path was published"


def test_foreign_models_export_unchanged(monkeypatch, tmp_path):
    hf_model, _ = make_folder(tmp_path / "theirs", "Qwen3", tie_word_embeddings=True)
    run_export(monkeypatch, tmp_path / "theirs", tmp_path / "ours")
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, hf_model(ids).logits, rtol=0, atol=1e-5)
    card = (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
    assert 'AutoModelForCausalLM.from_pretrained("./ours")' in card
    assert "from scratch" not in card and "base_model: " in card and "chat format | template" in card


def test_half_precision_halves_the_file(monkeypatch, make_checkpoint, tmp_path):
    source = make_checkpoint()
    sizes = []
    for dtype in ("float32", "bfloat16"):
        run_export(monkeypatch, source, tmp_path / dtype, "--dtype", dtype)
        sizes.append((tmp_path / dtype / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    run_export(monkeypatch, tmp_path / "bfloat16", tmp_path / "again", "--dtype", "bfloat16")
    assert_same_folders(tmp_path / "bfloat16", tmp_path / "again")


@pytest.fixture
def adapter_file(monkeypatch, make_checkpoint, sft_dir, tmp_path):
    parent = make_checkpoint()
    flags = ["--device", "cpu", "--max_steps", 2, "--learning_rate", 0.5, "--init_from", parent]
    run_script(monkeypatch, "4-lora_sft.py", *flags, "--data_path", sft_dir, "--out_dir", parent.parent)
    return parent.parent / "lora_sft_32.pth"


def test_an_adapter_is_merged_or_exported_for_peft(monkeypatch, capsys, adapter_file, tmp_path):
    import peft
    import transformers

    run_export(monkeypatch, adapter_file, tmp_path / "merged")
    run_export(monkeypatch, adapter_file.parent / "full_sft_32.pth", tmp_path / "full_sft_32")
    run_export(monkeypatch, adapter_file, tmp_path / "kept", "--adapter", "--base", tmp_path / "full_sft_32")
    assert "PeftModel: logits" in capsys.readouterr().out
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full_sft_32")
    ids = torch.arange(90)[None]
    with torch.inference_mode():
        before = base(ids).logits
        kept = peft.PeftModel.from_pretrained(base, tmp_path / "kept").eval()(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        torch.testing.assert_close(kept, merged, rtol=0, atol=1e-4)
        torch.testing.assert_close(open_model(adapter_file)[0].logits(ids), merged, rtol=0, atol=1e-4)
    assert (before - merged).abs().max() > 0.01
    assert (tmp_path / "kept" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "kept" / "model.safetensors").exists()
    card = (tmp_path / "kept" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "LoRA adapter of rank 8" in card
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match='pip install "peft'):
        run_export(monkeypatch, adapter_file, tmp_path / "kept2", "--adapter")
    with pytest.raises(UserError, match="is not an adapter"):
        run_export(monkeypatch, adapter_file.parent / "full_sft_32.pth", tmp_path / "kept2", "--adapter")


# ---- rejected exports, and the files they leave ----------------------------------------------------------------------
QUERY, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
ROPE = {"rope_theta": 9e3, "rope_parameters": {"rope_type": "default", "rope_theta": 9e3}}
FAULTS = {  # function of hf_export -> its changed result, and the message
    "weights": ("hf_state_dict", lambda state: state | {QUERY: state[QUERY] + 0.01}, "logits differ"),
    "RoPE": ("make_hf_config", lambda settings: settings | ROPE, "logits differ"),
    "no tensor": ("hf_state_dict", lambda state: {n: t for n, t in state.items() if n != UP}, "not load every tensor"),
    "template": ("write_hf_folder", lambda _: None, "chat template"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_is_an_error_and_leaves_no_files(fault, monkeypatch, make_checkpoint, tmp_path):
    source, (function, change, message) = make_checkpoint(), FAULTS[fault]
    original = getattr(hf_export, function)

    def changed(*arguments):
        result = original(*arguments)
        if fault == "template":
            edit_json(arguments[0], "tokenizer_config.json", chat_template="{{ messages[0].content }}")
        return change(result)

    monkeypatch.setattr(hf_export, function, changed)
    with pytest.raises(UserError, match=message) as error:
        run_export(monkeypatch, source, tmp_path / "a")
    assert "\n" not in str(error.value) and "removed" in str(error.value)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_failed_export_leaves_no_files(failure, monkeypatch, make_checkpoint, tmp_path):
    source = make_checkpoint()

    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr("export.verify_hf.check_hf_folder", fail)
    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else UserError):
        run_export(monkeypatch, source, tmp_path / "a")
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["out"]


def test_only_an_export_is_replaced(monkeypatch, make_checkpoint, tmp_path):
    source, folder = make_checkpoint(), tmp_path / "a"
    folder.mkdir()  # an empty folder may exist
    run_export(monkeypatch, source, folder, "--no-verify")
    with pytest.raises(UserError, match="--overwrite"):
        run_export(monkeypatch, source, folder, "--no-verify")
    (folder / "note.txt").write_text("old")
    run_export(monkeypatch, source, folder, "--no-verify", "--overwrite")
    assert not (folder / "note.txt").exists() and (folder / "config.json").is_file()
    for taken in (source.parent, source):
        with pytest.raises(UserError, match=r"not an exported model|is a file"):
            run_export(monkeypatch, source, taken, "--no-verify", "--overwrite")
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["a", "out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "--gguf", "f16"], "--adapter takes neither"),
        (["--base", "x"], "add --adapter"),
        (["--private"], "--push_to_hub"),
        (["--max_shard_gb", "0"], "above 0"),
        (["--license", "mine\nx: y"], "identifier"),
    ],
)
def test_conflicting_flags_are_rejected(flags, message, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=message):
        run_export(monkeypatch, tmp_path / "none.pth", tmp_path / "a", *flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_moe": True, "qk_norm": True}, "qk_norm and shared experts"),
        ({"use_moe": True, "qkv_bias": True}, "experts with qkv_bias"),
        ({"use_moe": True, "head_dim": 16}, "head_dim that is not dim / n_heads"),
        ({"qkv_bias": True, "qk_norm": True}, "qkv_bias together with qk_norm"),
    ],
)
def test_a_model_without_stock_architecture_is_rejected(changes, message, monkeypatch, make_checkpoint, tmp_path):
    with pytest.raises(UserError, match=f"no stock architecture supports .*{message}"):
        run_export(monkeypatch, make_checkpoint(**changes), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    done = run_here(monkeypatch, capsys, "export_model.py", tmp_path / "none.pth", tmp_path / "a")
    assert done.returncode == 2 and done.stderr.startswith("error: no checkpoint at") and done.stderr.count("\n") == 1
