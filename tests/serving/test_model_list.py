"""The chat page's list of the models in out/: which files, in which order, with which facts.

Promises: checkpoints, adapters and transformers folders are found, in subfolders too; the last stage is listed first,
never the newest file; incomplete and foreign files break nothing; a file that a training run replaces is read again.
"""

import json
import os

import pytest

from serving.model_list import find_models, is_model, list_models, read_model_entry
from tests.helpers import save_scripted_model


@pytest.fixture
def out(tokenizer, tmp_path):
    folder = tmp_path / "out"
    for name, stage in (("pretrain_64", "pretrain"), ("full_sft_64", "full_sft"), ("demo/dpo_64", "dpo")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_scripted_model(folder / f"{name}.pth", tokenizer, ["hi"], stage)
    os.utime(folder / "full_sft_64.pth", (0, 0))  # the oldest file, of a later stage than pretrain
    return folder


def test_only_models_are_found_and_the_last_stage_comes_first(out):
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


def test_named_files_get_the_distinct_part_of_their_paths(out):
    sft, dpo, pretrain = out / "full_sft_64.pth", out / "demo" / "dpo_64.pth", out / "pretrain_64.pth"
    assert [model.name for model in list_models(out, (sft,))] == ["full_sft_64"]
    assert [model.name for model in list_models(out, (pretrain, dpo, pretrain))] == ["pretrain_64", "demo/dpo_64"]
    assert [model.name for model in list_models(out)] == ["full_sft_64", "pretrain_64", "demo/dpo_64"]


def test_an_entry_has_name_stage_length_and_facts(out):
    model = read_model_entry(out / "demo" / "dpo_64.pth", out)
    assert (model.name, model.stage, model.error, model.is_chat_model) == ("demo/dpo_64", "dpo", "", True)
    assert model.facts["parameters"] > 10_000 and model.max_seq_len == 128 and model.facts["tokens"] == 1_500_000
    assert not read_model_entry(out / "pretrain_64.pth", out).is_chat_model


def test_scores_are_those_of_this_file(out):
    path = out / "full_sft_64.pth"
    report = {"checkpoint": "elsewhere/full_sft_64.pth", "accuracy": {"zh": 0.5, "en": 0.25}}
    for name, num_questions in (("few", 10), ("many", 300)):
        counts = {lang: {"questions": num_questions, "correct": 1, "accuracy": 0.1} for lang in ("zh", "en")}
        (out / f"{name}.json").write_text(json.dumps({**report, "counts": counts}))
    assert read_model_entry(path, out).scores == [
        ("accuracy:many", report["accuracy"]),
        ("accuracy:few", report["accuracy"]),
    ]
    assert read_model_entry(out / "pretrain_64.pth", out).scores == []
    later = (out / "many.json").stat().st_mtime + 10
    os.utime(path, (later, later))
    assert read_model_entry(path, out).scores == [], "the reports are older than the model"


def test_validation_scores_are_the_fallback_without_reports(tokenizer, out):
    from model.checkpoint import load_model, save_model

    model, own, _ = load_model(out / "pretrain_64.pth")
    path, bits = out / "pretrain_65.pth", {"zh": 2.5, "en": 2.0}
    save_model(path, model, "pretrain", own, [{"stage": "pretrain", "validation": {"bits_per_byte": bits}}])
    assert read_model_entry(path, out).scores == [("bits_per_byte", bits)]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04}."])
def test_a_bad_file_is_an_entry_with_an_error(out, content):
    path = out / "bad_64.pth"
    path.write_bytes(content)
    assert "bad_64.pth" in read_model_entry(path, out).error
    assert "gone.pth" in read_model_entry(out / "gone.pth", out).error


def test_a_bad_folder_is_an_entry_with_an_error(out):
    (out / "exported").mkdir()
    (out / "exported" / "model.safetensors").write_bytes(b"")
    for config in ("not json", "{}", '{"model_type": "mamba"}'):
        (out / "exported" / "config.json").write_text(config)
        assert "exported" in read_model_entry(out / "exported", out).error


def test_a_replaced_file_is_read_again(tokenizer, out):
    path = out / "full_sft_64.pth"
    assert read_model_entry(path, out).max_seq_len == 128
    save_scripted_model(path, tokenizer, ["hi"], max_seq_len=256)
    assert read_model_entry(path, out).max_seq_len == 256
