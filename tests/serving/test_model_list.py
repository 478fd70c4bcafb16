"""What the chat page finds in out/, and in which order; what it says of each.

Promises: checkpoints, adapters and transformers folders are found, one folder down too; the last stage stands first,
never the newest file; half-written and foreign files harm nothing; a file that a training run replaces is read anew.
"""

import json
import os

import pytest

from serving.model_list import explain, fill_shelf, find_models, is_model
from tests.helpers import save_parrot


@pytest.fixture
def out(tokenizer, tmp_path):
    folder = tmp_path / "out"
    for name, stage in (("pretrain_64", "pretrain"), ("full_sft_64", "full_sft"), ("demo/dpo_64", "dpo")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_parrot(folder / f"{name}.pth", tokenizer, ["hi"], stage)
    os.utime(folder / "full_sft_64.pth", (0, 0))  # the older file, and still the later stage
    return folder


def test_what_is_a_model(out):
    (out / "own.pth").write_bytes(b"")
    for name in (".full_sft_64.pth.1.tmp", ".dpo_64.pth", "full_sft_64.resume", "full_sft_64.jsonl", "a.png"):
        (out / name).write_bytes(b"x")
    (out / "pretrain").mkdir()
    (out / "pretrain" / "train_000.bin").write_bytes(b"x")
    (out / "exported").mkdir()
    (out / "exported" / "config.json").write_text("{}")
    assert not is_model(out / "exported"), "without weights"
    (out / "exported" / "model.safetensors").write_bytes(b"")
    found = [str(path.relative_to(out)) for path in find_models(out)]
    assert found == ["full_sft_64.pth", "pretrain_64.pth", "exported", "own.pth", "demo/dpo_64.pth"]
    assert find_models(out / "nowhere") == []


def test_named_files_are_called_by_what_tells_them_apart(out):
    sft, dpo, pretrain = out / "full_sft_64.pth", out / "demo" / "dpo_64.pth", out / "pretrain_64.pth"
    assert [model.name for model in fill_shelf(out, (sft,))] == ["full_sft_64"]
    assert [model.name for model in fill_shelf(out, (pretrain, dpo, pretrain))] == ["pretrain_64", "demo/dpo_64"]
    assert [model.name for model in fill_shelf(out)] == ["full_sft_64", "pretrain_64", "demo/dpo_64"]


def test_what_is_said(out):
    model = explain(out / "demo" / "dpo_64.pth", out)
    assert (model.name, model.stage, model.problem, model.chats) == ("demo/dpo_64", "dpo", "", True)
    assert model.about["parameters"] > 10_000 and model.max_seq_len == 128 and model.about["tokens"] == 1_500_000
    assert not explain(out / "pretrain_64.pth", out).chats


def test_scores_are_those_of_this_file(out):
    path = out / "full_sft_64.pth"
    report = {"checkpoint": "elsewhere/full_sft_64.pth", "accuracy": {"zh": 0.5, "en": 0.25}}
    for name, asked in (("few", 10), ("many", 300)):
        counts = {lang: {"questions": asked, "correct": 1, "accuracy": 0.1} for lang in ("zh", "en")}
        (out / f"{name}.json").write_text(json.dumps({**report, "counts": counts}))
    assert explain(path, out).scores == [("accuracy:many", report["accuracy"]), ("accuracy:few", report["accuracy"])]
    assert explain(out / "pretrain_64.pth", out).scores == []
    later = (out / "many.json").stat().st_mtime + 10
    os.utime(path, (later, later))
    assert explain(path, out).scores == [], "the reports tell of the model that stood here before"


def test_validation_is_shown_where_nobody_asked_questions(tokenizer, out):
    from model.checkpoint import load_model, save_model

    model, own, _ = load_model(out / "pretrain_64.pth")
    path, bits = out / "pretrain_65.pth", {"zh": 2.5, "en": 2.0}
    save_model(path, model, "pretrain", own, [{"stage": "pretrain", "validation": {"bits_per_byte": bits}}])
    assert explain(path, out).scores == [("bits_per_byte", bits)]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04}."])
def test_a_bad_file_says_why(out, content):
    path = out / "bad_64.pth"
    path.write_bytes(content)
    assert "bad_64.pth" in explain(path, out).problem
    assert "gone.pth" in explain(out / "gone.pth", out).problem


def test_a_bad_folder_says_why(out):
    (out / "exported").mkdir()
    (out / "exported" / "model.safetensors").write_bytes(b"")
    for config in ("not json", "{}", '{"model_type": "mamba"}'):
        (out / "exported" / "config.json").write_text(config)
        assert "exported" in explain(out / "exported", out).problem


def test_a_replaced_file_is_read_anew(tokenizer, out):
    path = out / "full_sft_64.pth"
    assert explain(path, out).max_seq_len == 128
    save_parrot(path, tokenizer, ["hi"], max_seq_len=256)
    assert explain(path, out).max_seq_len == 256
