"""--recipe belle and --data_share.

The recipe sets BELLE's hyper-parameters, flags override it, the batch is 64 rows for any number of processes; the
schedule equals transformers'. A data-scaling study trains on nested subsets, validates all models on the same rows,
resumes, and writes a table and a plot.
"""

import csv
import json
import shutil

import pytest
import torch

from common.errors import UserError
from tests.helpers import IGNORE_TOKEN_FOLDERS, read_jsonl, run_script
from trainer.legacy_config import make_training_parser
from trainer.optim import lr_multiplier
from trainer.recipes import add_recipe_flag, describe_recipe


@pytest.fixture
def parse(monkeypatch):
    def parse(*flags, world=1):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        parser = make_training_parser(
            "", {"muon": 5e-4, "adamw": 2e-4}, data_path="dataset/sft", batch_size=32, epochs=2
        )
        add_recipe_flag(parser)
        return parser.parse_args([str(flag) for flag in flags])

    return parse


def test_belle_recipe_sets_its_hyperparameters(parse):
    args = parse("--recipe", "belle")
    assert (args.batch_size, args.accumulation_steps, args.learning_rate, args.epochs) == (64, 1, 3e-6, 3)
    assert (args.weight_decay, args.warmup_share, args.schedule, args.optimizer) == (0.001, 0.1, "linear", "adamw")
    assert describe_recipe(args) == (
        "recipe belle: batch_size 64, accumulation_steps 1, learning_rate 3e-06, epochs 3, weight_decay 0.001, "
        "warmup_share 0.1, schedule linear, optimizer adamw"
    )
    plain = parse()
    assert (plain.batch_size, plain.learning_rate, plain.epochs, plain.warmup_share) == (32, 5e-4, 2, 0.0)


def test_flags_override_the_recipe(parse):
    args = parse("--epochs", 1, "--recipe", "belle", "--learning_rate", 1e-4, "--warmup_iters", 5, "--batch_size", 8)
    assert (args.epochs, args.learning_rate, args.warmup_iters, args.warmup_share) == (1, 1e-4, 5, 0.0)
    assert args.batch_size == 8 and args.weight_decay == 0.001
    assert parse("--recipe", "belle", "--optimizer", "muon").learning_rate == 3e-6


def test_recipe_batch_is_split_over_processes_and_accumulation(parse):
    for world, accumulation, rows in ((1, 8, 8), (2, 1, 32), (4, 2, 8)):
        args = parse("--recipe", "belle", "--accumulation_steps", accumulation, world=world)
        assert args.batch_size == rows
    with pytest.raises(UserError, match="3 processes"):
        parse("--recipe", "belle", world=3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_warmup_share_equals_transformers_schedule(kind):
    from transformers import get_scheduler

    total, share = 40, 0.1
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=int(share * total), num_training_steps=total)
    for step in range(total):
        ours = lr_multiplier(step, step / total, 10, kind, 0.0, share)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


# ---- data scaling ----------------------------------------------------------------------------------------------------
SHORT = ["--device", "cpu", "--dtype", "float32", "--batch_size", 8, "--epochs", 2, "--log_interval", 1]


@pytest.fixture
def run_scaling(monkeypatch, tiny_parent, sft_dir, tmp_path):
    chats = shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)
    rows = [{"question": f"{i}?", "keys": ["n"], "lang": "en"} for i in (1, 3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(shares, *flags):
        paths = ["--data_path", chats, "--init_from", tiny_parent, "--out_dir", tmp_path / "out"]
        run_script(monkeypatch, "3-full_sft.py", *SHORT, *paths, "--data_share", shares, *flags)
        return tmp_path / "out" / "data_study"

    run.questions = ["--questions", tmp_path / "q.jsonl"]
    return run


def test_data_scaling_writes_table_and_plot(run_scaling, capsys):
    folder = run_scaling("1.0,0.25", *run_scaling.questions)
    rows = json.loads((folder / "data_study.json").read_text(encoding="utf-8"))["rows"]
    assert [row["share"] for row in rows] == [0.25, 1.0] and [row["chats"] for row in rows] == [10, 40]
    assert all(row["val_loss"].keys() == {"zh", "en"} and 0 <= row["right"]["en"] <= 1 for row in rows)
    with (folder / "data_study.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["share"] for row in table] == ["0.25", "1.0"] and float(table[0]["val_loss_zh"]) > 0
    text = (folder / "data_study.md").read_text(encoding="utf-8")
    assert text.count("\n|") == 4 and "25 %" in text and "accuracy en" in text
    assert (folder / "data_study.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "25 %" in shown and str(folder) in shown
    logs = {share: read_jsonl(folder / f"share_{share}" / "full_sft_32.jsonl") for share in ("0.25", "1")}
    assert logs["0.25"][0]["step"] == logs["1"][0]["step"] == 1
    assert max(row["step"] for row in logs["0.25"]) == 4 and max(row["step"] for row in logs["1"]) == 10


def test_data_scaling_resumes_per_subset(run_scaling, monkeypatch, capsys):
    from evaluation import data_scaling

    folder = run_scaling("0.5")
    first = (folder / "share_0.5" / "full_sft_32.pth").stat().st_mtime_ns
    capsys.readouterr()
    run_scaling("0.5,1.0")
    assert (folder / "share_0.5" / "full_sft_32.pth").stat().st_mtime_ns == first, "not trained again"
    assert "50 %: already trained" in capsys.readouterr().out
    run_scaling("0.5", "--learning_rate", 1e-3)
    assert (folder / "share_0.5" / "full_sft_32.pth").stat().st_mtime_ns != first, "other settings: trained anew"
    train = data_scaling.train

    def train_and_stop(config, stage, dist):
        dist.stop_requested = "SIGINT"
        return train(config, stage, dist)

    monkeypatch.setattr(data_scaling, "train", train_and_stop)
    (folder / "share_0.5" / "study.json").unlink()
    run_scaling("0.5,1.0", "--learning_rate", 1e-3)
    assert "run again to resume" in capsys.readouterr().out
    assert (folder / "share_0.5" / "full_sft_32.resume").exists()
    assert "row" not in json.loads((folder / "share_0.5" / "study.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(data_scaling, "train", train)
    run_scaling("0.5,1.0", "--learning_rate", 1e-3)
    assert "resuming after step 1" in capsys.readouterr().out


def test_data_subsets_are_nested():
    from evaluation.data_scaling import DataSubset

    class NumberedRows:
        folder = None

        def __len__(self):
            return 100

        def lengths(self):
            return torch.arange(100).numpy()

        def batch(self, rows):
            return {"row_ids": torch.tensor(rows)}

    small, large, whole = (DataSubset(NumberedRows(), share, seed=3) for share in (0.1, 0.5, 1.0))
    sets = [set(part.batch(range(len(part)))["row_ids"].tolist()) for part in (small, large, whole)]
    assert [len(one) for one in sets] == [10, 50, 100] and sets[0] < sets[1] < sets[2]
    assert len(DataSubset(NumberedRows(), 0.0001, seed=3)) == 1
    assert set(small.lengths().tolist()) == sets[0]


@pytest.mark.parametrize(("shares", "said"), [("0", "0"), ("1.5", "1.5"), ("a", "a"), ("", "--data_share")])
def test_invalid_data_share_is_one_line(run_scaling, shares, said):
    with pytest.raises(UserError, match="argument --data_share: ") as error:
        run_scaling(shares)
    assert said in str(error.value)


def test_data_scaling_rejects_max_minutes(run_scaling):
    with pytest.raises(UserError, match="--max_minutes"):
        run_scaling("0.5", "--max_minutes", 1)


def test_questions_require_data_share(monkeypatch, tiny_parent, sft_dir, tmp_path):
    with pytest.raises(UserError, match="--data_fractions"):
        run_script(monkeypatch, "3-full_sft.py", "--questions", tmp_path / "q.jsonl", "--init_from", tiny_parent)
