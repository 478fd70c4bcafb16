"""recipes/*.args, --recipe belle and --data_fractions.

Every recipe sets exactly its settings, flags override it, a batch is the same for any number of processes; the schedule
equals transformers'. A data-scaling study trains on nested subsets, validates all models on the same rows,
resumes, and writes a table and a plot.
"""

import csv
import dataclasses
import json
import shutil

import pytest
import torch

from common import cli
from common.errors import UserError
from corpus.mixing import MixSpec
from tests.helpers import IGNORE_TOKEN_FOLDERS, ROOT, load_script, read_jsonl, run_script
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.optim import lr_multiplier
from trainer.train_state import micro_batch_size, resolve_global_batch_size

SCRIPTS = {  # recipe -> its script and the settings that it changes
    "belle-sft": ("3-full_sft.py", {"global_batch_size": 64, "learning_rate": 3e-6, "epochs": 3, "weight_decay": 0.001,
        "warmup_ratio": 0.1, "optimizer": "adamw"}),
    "minimind-v1-pretrain": ("1-pretrain.py", {"global_batch_size": 64, "learning_rate": 1e-4, "min_lr_ratio": 0.1,
        "epochs": 5, "schedule": "cosine", "optimizer": "adamw", "weight_decay": 0.0, "warmup_iters": 0}),
    "minimind-v1-sft-single": ("3-full_sft.py", {"global_batch_size": 64, "learning_rate": 1e-5, "min_lr_ratio": 0.1,
        "epochs": 6, "schedule": "cosine", "optimizer": "adamw", "weight_decay": 0.0, "warmup_iters": 0,
        "data_path": "dataset/sft_single"}),
    "minimind-v1-sft-multi": ("3-full_sft.py", {"global_batch_size": 64, "learning_rate": 1e-5, "min_lr_ratio": 0.1,
        "epochs": 5, "schedule": "cosine", "optimizer": "adamw", "weight_decay": 0.0, "warmup_iters": 0,
        "data_path": "dataset/sft_multi"}),
    "minimind-v1-dpo": ("5-dpo_train.py", {"global_batch_size": 64, "learning_rate": 1e-5, "optimizer": "adamw"}),
    "mindllm-two-stage": ("1-pretrain.py", {"preset": "mindllm-1.3b", "mix": MixSpec({"en": 1.0}, False),
        "stage2_mix": MixSpec({"zh": 1.0}, False), "stage2_at": 0.746}),
    "xiangxin-20-per-param": ("1-pretrain.py", {"preset": "xiangxin-3b", "tokens_per_param": 20.0}),
    "demo-pretrain": ("1-pretrain.py", {"preset": "demo", "batch_size": 16,
        "model": {"hidden_dim": 384, "qk_norm": True, "tie_embeddings": False}}),
    "demo-sft": ("3-full_sft.py", {"epochs": 1}),
    "demo-lora": ("4-lora_sft.py", {"rank": 16, "alpha": 32.0, "epochs": 3, "batch_size": 16}),
    "demo-dpo": ("5-dpo_train.py", {"batch_size": 32, "learning_rate": 1e-4, "eval_interval": 15,
        "log_interval": 2}),
    "demo-tools": ("3-full_sft.py", {"max_seq_len": 512, "epochs": 1, "batch_size": 8}),
    "demo-grpo": ("6-grpo_train.py", {"max_steps": 50, "warmup_iters": 5,
        "prompts_per_step": 24, "sample_interval": 25}),
}  # fmt: skip


class Parsed(Exception):
    """Carries the configuration that a script has parsed."""


def parse(script, *flags):
    """The configuration that the script's main() parses from these flags."""
    module = load_script(script)

    def capture(config, *arguments, **options):
        raise Parsed(cli.parse(config, *arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", capture)
        patch.setattr("sys.argv", [script, *map(str, flags)])
        with pytest.raises(Parsed) as parsed:
            module.main()
    return parsed.value.args[0]


def changed(config):
    """The settings that differ from the defaults."""
    default = type(config)()
    names = (field.name for field in dataclasses.fields(config))
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}


def test_every_recipe_is_listed_and_names_its_source():
    files = sorted((ROOT / "recipes").glob("*.args"))
    assert [file.stem for file in files] == sorted(SCRIPTS)
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# ") and f"@recipes/{file.name}" in text and f"`{file.name}`" in table


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_recipe_sets_exactly_its_settings(recipe):
    script, expected = SCRIPTS[recipe]
    found = changed(parse(script, f"@{ROOT}/recipes/{recipe}.args"))
    assert {name: found.get(name) for name in expected} == expected
    if not recipe.startswith("demo-"):
        assert found == expected


def test_recipe_belle_is_an_alias():
    file = parse("3-full_sft.py", f"@{ROOT}/recipes/belle-sft.args")
    assert vars(parse("3-full_sft.py", "--recipe", "belle")) == vars(file)
    assert file.warmup == (0, 0.1)
    with pytest.raises(UserError, match="choose from belle"):
        parse("3-full_sft.py", "--recipe", "other")


def test_flags_override_the_recipe():
    flags = ("--epochs", 1, "--recipe", "belle", "--learning_rate", 1e-4, "--warmup_iters", 5, "--global_batch_size", 8)
    config = parse("3-full_sft.py", *flags)
    assert (config.epochs, config.learning_rate, config.warmup, config.global_batch_size) == (1, 1e-4, (5, 0.0), 8)
    assert config.weight_decay == 0.001
    assert parse("3-full_sft.py", "--recipe", "belle", "--optimizer", "muon").learning_rate == 3e-6


def test_recipe_batch_is_split_over_processes(tmp_path):
    config = parse("3-full_sft.py", "--recipe", "belle", "--out_dir", tmp_path)
    for world, rows in ((1, 32), (2, 32), (4, 16), (64, 1)):
        assert micro_batch_size(config, 64, world) == rows
    with pytest.raises(UserError, match="3 processes"):
        resolve_global_batch_size(
            config, tmp_path / "full_sft_32.pth", DistContext(torch.device("cpu"), torch.float32, world_size=3)
        )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_warmup_share_equals_transformers_schedule(kind):
    from transformers import get_scheduler

    total, share = 40, 0.1
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=int(share * total), num_training_steps=total)
    for step in range(total):
        ours = lr_multiplier(TrainConfig(schedule=kind, warmup_ratio=share), step, step / total)
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
    run_scaling("0.5", "--learning_rate", 2e-3)
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
