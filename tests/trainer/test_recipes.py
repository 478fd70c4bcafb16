"""BELLE by name: --recipe belle sets its numbers, and --data_share measures what more data brings.

Promises: the recipe's numbers are BELLE's, a given flag wins, the batch is 64 rows whatever the processes; the schedule
equals transformers'; a study trains on nested subsets, validates all on the same rows, goes on where it stopped, and
writes one table and one plot.
"""

import csv
import json
import shutil

import pytest
import torch

from common.errors import UserError
from tests.helpers import TOKENS, read_log, run_script
from trainer.config import make_parser
from trainer.optim import learning_rate_share
from trainer.recipes import add_recipe_flag, describe_recipe


@pytest.fixture
def parse(monkeypatch):
    def parse(*flags, world=1):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        parser = make_parser("", {"muon": 5e-4, "adamw": 2e-4}, data_path="dataset/sft", batch_size=32, epochs=2)
        add_recipe_flag(parser)
        return parser.parse_args([str(flag) for flag in flags])

    return parse


def test_the_numbers_are_belles(parse):
    args = parse("--recipe", "belle")
    assert (args.batch_size, args.accumulation_steps, args.learning_rate, args.epochs) == (64, 1, 3e-6, 3)
    assert (args.weight_decay, args.warmup_share, args.schedule, args.optimizer) == (0.001, 0.1, "linear", "adamw")
    assert describe_recipe(args) == (
        "recipe belle: batch_size 64, accumulation_steps 1, learning_rate 3e-06, epochs 3, weight_decay 0.001, "
        "warmup_share 0.1, schedule linear, optimizer adamw"
    )
    plain = parse()
    assert (plain.batch_size, plain.learning_rate, plain.epochs, plain.warmup_share) == (32, 5e-4, 2, 0.0)


def test_given_flags_win(parse):
    args = parse("--epochs", 1, "--recipe", "belle", "--learning_rate", 1e-4, "--warmup_iters", 5, "--batch_size", 8)
    assert (args.epochs, args.learning_rate, args.warmup_iters, args.warmup_share) == (1, 1e-4, 5, 0.0)
    assert args.batch_size == 8 and args.weight_decay == 0.001
    assert parse("--recipe", "belle", "--optimizer", "muon").learning_rate == 3e-6


def test_sixty_four_rows_whatever_shares_them(parse):
    for world, accumulation, rows in ((1, 8, 8), (2, 1, 32), (4, 2, 8)):
        args = parse("--recipe", "belle", "--accumulation_steps", accumulation, world=world)
        assert args.batch_size == rows
    with pytest.raises(UserError, match="3 processes"):
        parse("--recipe", "belle", world=3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_warmup_share_is_transformers(kind):
    from transformers import get_scheduler

    total, share = 40, 0.1
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=int(share * total), num_training_steps=total)
    for step in range(total):
        ours = learning_rate_share(step, step / total, 10, kind, 0.0, share)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


# ---- what more data brings -------------------------------------------------------------------------------------------
SHORT = ["--device", "cpu", "--dtype", "float32", "--batch_size", 8, "--epochs", 2, "--log_interval", 1]


@pytest.fixture
def study(monkeypatch, tiny_parent, sft_dir, tmp_path):
    chats = shutil.copytree(sft_dir, tmp_path / "sft", ignore=TOKENS)
    rows = [{"question": f"{i}?", "keys": ["n"], "lang": "en"} for i in (1, 3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(shares, *flags):
        paths = ["--data_path", chats, "--init_from", tiny_parent, "--out_dir", tmp_path / "out"]
        run_script(monkeypatch, "3-full_sft.py", *SHORT, *paths, "--data_share", shares, *flags)
        return tmp_path / "out" / "data_study"

    run.questions = ["--questions", tmp_path / "q.jsonl"]
    return run


def test_a_study_is_a_table_and_a_plot(study, capsys):
    folder = study("1.0,0.25", *study.questions)
    rows = json.loads((folder / "data_study.json").read_text(encoding="utf-8"))["rows"]
    assert [row["share"] for row in rows] == [0.25, 1.0] and [row["chats"] for row in rows] == [10, 40]
    assert all(row["val_loss"].keys() == {"zh", "en"} and 0 <= row["right"]["en"] <= 1 for row in rows)
    with (folder / "data_study.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["share"] for row in table] == ["0.25", "1.0"] and float(table[0]["val_loss_zh"]) > 0
    text = (folder / "data_study.md").read_text(encoding="utf-8")
    assert text.count("\n|") == 4 and "25 %" in text and "right en" in text
    assert (folder / "data_study.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "25 %" in shown and str(folder) in shown
    logs = {share: read_log(folder / f"share_{share}" / "full_sft_32.jsonl") for share in ("0.25", "1")}
    assert logs["0.25"][0]["step"] == logs["1"][0]["step"] == 1
    assert max(row["step"] for row in logs["0.25"]) == 4 and max(row["step"] for row in logs["1"]) == 10


def test_a_study_goes_on_share_by_share(study, monkeypatch, capsys):
    import evaluation.data_scaling as room

    folder = study("0.5")
    first = (folder / "share_0.5" / "full_sft_32.pth").stat().st_mtime_ns
    capsys.readouterr()
    study("0.5,1.0")
    assert (folder / "share_0.5" / "full_sft_32.pth").stat().st_mtime_ns == first, "done is done"
    assert "50 %: done before" in capsys.readouterr().out
    study("0.5", "--learning_rate", 1e-3)
    assert (folder / "share_0.5" / "full_sft_32.pth").stat().st_mtime_ns != first, "other numbers: trained anew"
    stopped = room.train

    def interrupted(run, args, stage):
        run.stop_asked = "SIGINT"
        return stopped(run, args, stage)

    monkeypatch.setattr(room, "train", interrupted)
    (folder / "share_0.5" / "study.json").unlink()
    study("0.5,1.0", "--learning_rate", 1e-3)
    assert "run again to go on" in capsys.readouterr().out
    assert (folder / "share_0.5" / "full_sft_32.resume").exists()
    assert "row" not in json.loads((folder / "share_0.5" / "study.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(room, "train", stopped)
    study("0.5,1.0", "--learning_rate", 1e-3)
    assert "going on after step 1" in capsys.readouterr().out


def test_subsets_are_nested():
    from evaluation.data_scaling import Share

    class Rows:
        def __len__(self):
            return 100

        def row_lengths(self):
            return torch.arange(100).numpy()

        def batch(self, rows):
            return {"rows": torch.tensor(rows)}

    small, large, whole = (Share(Rows(), share, seed=3) for share in (0.1, 0.5, 1.0))
    sets = [set(part.batch(range(len(part)))["rows"].tolist()) for part in (small, large, whole)]
    assert [len(one) for one in sets] == [10, 50, 100] and sets[0] < sets[1] < sets[2]
    assert len(Share(Rows(), 0.0001, seed=3)) == 1
    assert set(small.row_lengths().tolist()) == sets[0]


@pytest.mark.parametrize(("shares", "said"), [("0", "0"), ("1.5", "1.5"), ("a", "a"), ("", "--data_share")])
def test_bad_shares(study, shares, said):
    with pytest.raises(UserError, match="argument --data_share: ") as error:
        study(shares)
    assert said in str(error.value)


def test_a_study_has_no_time_box(study):
    with pytest.raises(UserError, match="--max_minutes"):
        study("0.5", "--max_minutes", 1)


def test_questions_need_a_study(monkeypatch, tiny_parent, sft_dir, tmp_path):
    with pytest.raises(UserError, match="--data_share"):
        run_script(monkeypatch, "3-full_sft.py", "--questions", tmp_path / "q.jsonl", "--init_from", tiny_parent)
