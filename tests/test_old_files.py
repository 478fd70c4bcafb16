"""Files of the version before the renames still open: tests/data/before_renames, described in its README.md.

Training starts from an old .pth or adapter and computes the old losses. Old data folders train without being tokenized
again. An interrupted run resumes from its .resume folder and continues its log. Caches are used, not rewritten. Export
and evaluation work. The tests use only the public scripts, so that they survive further renames.
"""

import json
import shutil
from pathlib import Path

import pytest

from demo_world.report import summarize_log
from tests.helpers import load_weights, read_jsonl, run_script

OLD = Path(__file__).resolve().parent / "data" / "before_renames"
RUN = ["--device", "cpu", "--dtype", "float32", "--batch_size", "2", "--log_interval", "1", "--eval_tokens", "256"]
STAGES = ("pretrain", "full_sft", "lora_sft", "dpo")


@pytest.fixture
def old(tmp_path):
    """A copy of the old files: scripts create locks and write next to their inputs."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def data_files(folder: Path) -> dict[str, bytes]:
    """Return {relative name: content} of all files, without lock files (their names begin with a dot)."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def last_validation(log: Path) -> dict[str, float]:
    return [row["val_loss"] for row in read_jsonl(log) if "val_loss" in row][-1]


@pytest.mark.parametrize(
    ("script", "stage", "data"),
    [("1-pretrain.py", "pretrain", "pretrain"), ("4-lora_sft.py", "lora_sft", "sft")],
)
def test_a_stage_starts_from_an_old_checkpoint_with_its_loss(monkeypatch, old, tmp_path, script, stage, data):
    """One step with a learning rate near 0: the validation loss equals the last one that the old run logged."""
    before = data_files(old / data)
    flags = ["--data_path", old / data, "--init_from", old / f"out/{stage}_16.pth", "--out_dir", tmp_path / "new"]
    flags += ["--tokenizer", old / "tokenizer"] if stage == "pretrain" else ["--rank", "2"]
    run_script(monkeypatch, script, *flags, *RUN, "--max_steps", "1", "--learning_rate", "1e-9")
    assert last_validation(tmp_path / f"new/{stage}_16.jsonl") == pytest.approx(
        last_validation(OLD / f"out/{stage}_16.jsonl"), rel=1e-4
    )
    assert data_files(old / data) == before, "old token shards are read, not written again"


def test_full_sft_starts_from_an_old_pretrained_model(monkeypatch, old, tmp_path):
    before = data_files(old / "sft")
    flags = ["--data_path", old / "sft", "--init_from", old / "out/pretrain_16.pth", "--out_dir", tmp_path / "new"]
    run_script(monkeypatch, "3-full_sft.py", *flags, *RUN, "--max_steps", "1")
    parent, child = load_weights(OLD / "out/pretrain_16.pth"), load_weights(tmp_path / "new/full_sft_16.pth")
    assert {name: tensor.shape for name, tensor in child.items()} == {
        name: tensor.shape for name, tensor in parent.items()
    }
    assert data_files(old / "sft") == before, "old token shards are read, not written again"


def test_an_interrupted_run_resumes_and_continues_its_log(curves, monkeypatch, old, capsys):
    """The reference cache is used, the log keeps the old rows, the plot has rows of both versions."""
    folder = old / "interrupted"
    rows_before = read_jsonl(folder / "dpo_16.jsonl")
    cache = (folder / "dpo_16.reference").stat()
    last = rows_before[-1]["step"]
    flags = ["--data_path", old / "dpo", "--init_from", old / "out/lora_sft_16.pth", "--out_dir", folder]
    run_script(monkeypatch, "5-dpo_train.py", *flags, *RUN, "--max_steps", last + 2)
    said = capsys.readouterr()
    rows = read_jsonl(folder / "dpo_16.jsonl")

    def logged(rows: list[dict], key: str) -> list[tuple[int, object]]:
        return [(row["step"], row[key]) for row in rows if key in row]

    losses, validations = logged(rows, "loss"), logged(rows, "val_loss")
    kept = len(logged(rows_before, "loss"))
    assert losses[:kept] == logged(rows_before, "loss"), "old rows stay; a run that starts anew would drop them"
    assert [step for step, _ in losses[kept:]] == [last + 1, last + 2]
    assert validations[:-1] == logged(rows_before, "val_loss") and validations[-1][0] == last + 2
    assert (folder / "dpo_16.png").stat().st_size > 10_000 and not said.err, said.err
    now = (folder / "dpo_16.reference").stat()
    assert (now.st_mtime_ns, now.st_ino) == (cache.st_mtime_ns, cache.st_ino), "the reference was computed again"
    assert not (folder / "dpo_16.resume").exists()


def test_dpo_starts_from_an_old_adapter(monkeypatch, old, tmp_path):
    """The adapter finds its parent in its folder and is merged: the first loss is ln 2."""
    flags = ["--data_path", old / "dpo", "--out_dir", old / "out", "--max_steps", "1"]
    run_script(monkeypatch, "5-dpo_train.py", *flags, *RUN)
    assert read_jsonl(old / "out/dpo_16.jsonl")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_the_demo_reads_old_logs(stage):
    log = summarize_log(OLD / f"out/{stage}_16.jsonl")
    assert log["steps"] == 4 and log["final_loss"] > 0
    assert set(log["validation_loss"]) == {"zh", "en"} and all(value > 0 for value in log["validation_loss"].values())


def test_old_logs_hold_every_metric_key():
    """The old logs cover all renamed keys of training and validation rows, so readers are tested with each of them."""
    keys = {key for path in (OLD / "out").glob("*.jsonl") for row in read_jsonl(path) for key in row}
    assert keys >= {"real_token_share", "balance_loss", "likelier", "margin", "accuracy", "chosen_change"}
    assert keys >= {"val_likelier", "val_likelier_before", "val_margin", "val_accuracy", "val_chosen_change"}


@pytest.mark.parametrize("checkpoint", ["out/pretrain_16.pth", "out/lora_sft_16.pth", "interrupted/dpo_16.pth"])
def test_old_models_answer(monkeypatch, old, tmp_path, checkpoint):
    flags = ["--prompt", "What is 2 plus 3?", "--temperature", "0", "--max_new_tokens", "8", "--device", "cpu"]
    run_script(monkeypatch, "2-eval.py", "--checkpoint", old / checkpoint, *flags, "--json", tmp_path / "answers.json")
    (answer,) = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))["answers"]
    assert answer["prompt"] == "What is 2 plus 3?" and answer["answer"]


@pytest.mark.parametrize("checkpoint", ["out/lora_sft_16.pth", "interrupted/dpo_16.pth"])
def test_old_models_are_exported(monkeypatch, old, tmp_path, checkpoint):
    """Export to a transformers folder; the export itself compares tokens, logits and a greedy answer."""
    run_script(monkeypatch, "export_model.py", old / checkpoint, tmp_path / "exported")
    config = json.loads((tmp_path / "exported/config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == 16 and (tmp_path / "exported/model.safetensors").is_file()
    card = (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    assert "pretrain" in card and "lora_sft" in card


def test_old_scores_of_chats_are_used(monkeypatch, old):
    """data_process.py sft --scorer does not score chats again that are in the old scores file."""
    (scores,) = old.glob("scored.scores-*.jsonl")
    before = scores.read_text(encoding="utf-8").split()
    flags = ["--tokenizer", old / "tokenizer", "--scorer", old / "out/pretrain_16.pth", "--keep_share", "0.8"]
    flags += ["--val_share", "0.3", "--max_seq_len", "128", "--out_dir", old / "scored"]
    run_script(monkeypatch, "data_process.py", "sft", old / "sft/train.jsonl", old / "sft/val.jsonl", *flags)
    assert scores.read_text(encoding="utf-8").split() == before
    assert len(list(old.glob("scored.scores-*.jsonl"))) == 1, "the scorer has another fingerprint than before"
    assert (old / "scored/meta.json").is_file()
