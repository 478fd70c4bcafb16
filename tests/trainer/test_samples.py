"""Samples during training: three fixed prompts, the same weights with and without them, and after a kill and resume."""

import sys
import types

import pytest
import torch

from common.errors import UserError
from tests.helpers import (
    EXACT_FLAGS,
    ROOT,
    TINY_MODEL_FLAGS,
    load_weights,
    read_jsonl,
    run_process,
    run_script,
    tiny_model,
)
from trainer import samples
from trainer.metrics import MetricLogger, bar_text, shorten
from trainer.run import Run
from trainer.samples import Samples, expert_loads
from trainer.trackers import numbers

STEPS = 12


@pytest.fixture
def train(monkeypatch, pretrain_dir, sft_dir, tokenizer_dir, tiny_parent, tmp_path):
    """Train a stage for STEPS steps; returns its weights and the rows of its log."""

    def run(stage, *flags, out):
        name, model = {
            "pretrain": ("1-pretrain.py", ["--tokenizer", tokenizer_dir, *TINY_MODEL_FLAGS]),
            "moe": (
                "1-pretrain.py",
                ["--tokenizer", tokenizer_dir, *TINY_MODEL_FLAGS, "--use_moe", "--dropout", "0.1"],
            ),
            "full_sft": ("3-full_sft.py", ["--init_from", tiny_parent]),
            "lora_sft": ("4-lora_sft.py", ["--init_from", tiny_parent, "--lora_dropout", "0.1"]),
        }[stage]
        data = pretrain_dir if name[0] == "1" else sft_dir
        length = ["--batch_size", "4", "--max_steps", STEPS, "--save_interval", "1000"]
        folder = tmp_path / out
        run_script(monkeypatch, name, "--data_path", data, "--out_dir", folder, *model, *EXACT_FLAGS, *length, *flags)
        (path,) = folder.glob("*.pth")
        return load_weights(path), read_jsonl(path.with_suffix(".jsonl"))

    return run


def losses(rows):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("stage", ["pretrain", "moe", "full_sft", "lora_sft"])
def test_samples_do_not_change_the_training(train, stage):
    without, rows_without = train(stage, "--sample_interval", 0, out="without")
    weights, rows = train(stage, "--sample_interval", 4, out="with")
    assert all(torch.equal(weights[name], without[name]) for name in weights)
    assert losses(rows) == losses(rows_without) and len(losses(rows)) == STEPS
    taken = [row for row in rows if "samples" in row]
    assert [row["step"] for row in taken] == [0, 4, 8, STEPS]
    prompts = [[sample["prompt"] for sample in row["samples"]] for row in taken]
    assert all(each == prompts[0] for each in prompts) and len(set(prompts[0])) == 3 and all(prompts[0])
    assert [sample["language"] for sample in taken[0]["samples"]] == ["en", "zh", "en"]
    assert not any("samples" in row for row in rows_without)
    loads = [load for row in taken for load in row.get("expert_load", [])]
    assert bool(loads) == (stage == "moe") and all(sum(load) == pytest.approx(1) for load in loads)
    if stage in ("full_sft", "lora_sft"):  # the questions and answers of the held-out chats, without markers
        assert {sample["prompt"] for sample in taken[0]["samples"]} <= {
            *(f"{i}?" for i in range(8)),
            *map("数{}".format, range(8)),
        }
        assert all(set(sample["reference"]) <= set("好n1357902468") for sample in taken[0]["samples"])


def test_a_killed_and_resumed_run_ends_with_the_same_weights_and_samples(train, monkeypatch):
    weights, rows = train("moe", "--sample_interval", 3, out="whole")
    end_step, dist = Run.end_step, []

    def stop_after_step_5(self, *sums, **metrics):
        if self.state.step == 4:
            self.dist.stop_requested = "SIGTERM"
            sums[0]["stop_requests"] = 1
        end_step(self, *sums, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stop_after_step_5)
        train("moe", "--sample_interval", 3, out="parts")
    resumed, all_rows = train("moe", "--sample_interval", 3, out="parts")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights) and not dist
    taken, expected = ([row for row in each if "samples" in row] for each in (all_rows, rows))
    assert taken == expected and [row["step"] for row in taken] == [0, 3, 6, 9, 12]


def test_without_a_flag_short_runs_have_no_samples_and_long_ones_about_ten(train, monkeypatch):
    _, rows = train("pretrain", out="short")
    assert not any("samples" in row for row in rows)
    monkeypatch.setattr(samples, "MAX_FRACTION", 10.0)
    _, rows = train("pretrain", "--max_steps", "40", out="long")
    assert [row["step"] for row in rows if "samples" in row] == [0, *range(4, 41, 4)]
    monkeypatch.setattr(samples, "MAX_FRACTION", 0.0)
    _, rows = train("pretrain", "--max_steps", "40", out="limited")
    assert [row["step"] for row in rows if "samples" in row] == [0, 40], "later ones exceed the limit of the time"


def test_an_error_ends_the_samples_and_not_the_run(train, monkeypatch, capsys):
    monkeypatch.setattr("model.generate.generate", lambda *_: 1 / 0)
    _, rows = train("pretrain", "--sample_interval", 4, out="failing")
    assert len(losses(rows)) == STEPS and not any("samples" in row for row in rows)
    assert "".join(capsys.readouterr()).count("no samples (ZeroDivisionError: division by zero)") == 1


def test_sharded_weights_have_no_samples_and_say_so(capsys):
    stage = types.SimpleNamespace(loss_unit="token", validation={"en": None})
    config = types.SimpleNamespace(sample_interval=2, parallel="fsdp")
    dist = types.SimpleNamespace(world_size=2, print0=print)
    assert not Samples(config, stage, dist, 10).is_due(2)
    assert capsys.readouterr().out.count("\n") == 1
    config.parallel = "ddp"
    assert Samples(config, stage, dist, 10).is_due(2)


def test_expert_loads_count_the_assignments_of_the_router():
    """A router with constant scores sends every token to the same two experts; padding is not counted."""
    model = tiny_model(use_moe=True, n_routed_experts=4, n_active_experts=2, n_shared_experts=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    batch = {"input_ids": torch.arange(24).view(2, 12), "token_mask": torch.ones(2, 12, dtype=torch.bool)}
    assert [sorted(load.tolist()) for load in expert_loads(model, batch)] == [[0.0, 0.0, 0.5, 0.5]] * 2
    batch["token_mask"][:] = False
    assert [load.tolist() for load in expert_loads(model, batch)] == [[0.0] * 4] * 2


# ---- the screen ------------------------------------------------------------------------------------------------------
def test_model_text_on_the_screen_is_one_harmless_line():
    assert shorten("a\x1b[2J\n b", 20) == "a\\x1b[2J b" and shorten("好" * 30, 10) == "好" * 9 + "…"


@pytest.mark.parametrize("pair", [{}, {"reward_accuracy": 0.512, "reward_margin": 0.123}])
def test_the_bar_fits_80_columns_with_all_its_figures(pair, tmp_path, monkeypatch):
    """The live line has the step, the loss, the speed and the time left; logged rows stay above it, whole."""
    import io

    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("trainer.metrics.Console", lambda: console)
    row = {"step": 7, "loss": 12.3456, "lr": 1e-5, "tokens_per_second": 123456.0, "seconds_left": 3723.0,
           "peak_memory_mb": 1e5, "tflops": 123.4, "mfu": 0.321, **pair}  # fmt: skip
    with MetricLogger(tmp_path / "lora_sft_512.jsonl", "lora_sft", 123456, 0, True) as logger:
        logger.bar.live.auto_refresh = False
        logger.log(row, is_due=True)
        logger.bar.refresh()
        live = console.render_lines(logger.bar.get_renderable(), console.options)
    (line,) = ["".join(part.text for part in segments) for segments in live]
    assert len(line) <= 80 and "…" not in line
    for figure in ("lora_sft 7/123456", "loss 12.346", "123,456 tok/s", "eta 62:03", "0:00:"):
        assert figure in line, line
    printed = " ".join(screen.getvalue().split())
    for figure in ("12.346", "1.00e-05", "123 TFLOP/s", "32.1%", "97.7G", *(["51.2%", "0.123"] if pair else [])):
        assert figure in printed, figure


def test_rollouts_show_their_reward_in_the_bar():
    row = {"reward": 0.5, "loss": 0.001, "tokens_per_second": 10.0, "seconds_left": 61}
    assert bar_text(row) == "reward 0.500 10 tok/s eta 1:01"


# ---- trackers --------------------------------------------------------------------------------------------------------
class FakeTracker:
    """A module with init, log, finish and SummaryWriter; `broken` names the function that raises."""

    def __init__(self, broken=""):
        self.broken, self.sent = broken, []

    def check(self, name):
        if self.broken == name:
            raise ConnectionError("no network\nsecond line")

    def init(self, **options):
        self.check("init")
        return self

    def log(self, row, step):
        self.check("log")
        assert row, "SwanLab rejects an empty row"
        self.sent.append((step, row))

    def finish(self):
        self.check("finish")

    def SummaryWriter(self, folder, purge_step=None):
        self.check("init")
        return self

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def add_text(self, *_):
        self.check("log")

    def flush(self):
        pass

    close = finish


MODULES = {"wandb": "wandb", "swanlab": "swanlab", "tensorboard": "torch.utils.tensorboard"}


@pytest.mark.parametrize(
    ("name", "broken"),
    [*((name, "") for name in MODULES), ("wandb", "init"), ("tensorboard", "log"), ("swanlab", "init"),
     ("swanlab", "finish")],
)  # fmt: skip
def test_no_tracker_stops_a_run(train, monkeypatch, capsys, name, broken):
    fake = FakeTracker(broken)
    monkeypatch.setitem(sys.modules, MODULES[name], fake)
    _, rows = train("pretrain", "--tracker", name, "--max_steps", 3, "--sample_interval", 2, out=f"{name}{broken}")
    assert len(losses(rows)) == 3
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if f"{name} failed" in line]
    assert len(lines) == bool(broken) and all("no network" in line for line in lines)
    sent = {step for step, row in fake.sent for key, value in row.items() if key == "loss"}
    assert sent == (set() if broken in ("init", "log") else {1, 2, 3})


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_tracker_names_its_package(train, monkeypatch, name):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(UserError, match=f"pip install {name}$"):
        train("pretrain", "--tracker", name, out="out")


def test_nested_metrics_become_paths():
    row = {"step": 3, "val_loss": {"zh": 1.5, "en": 2}, "lr": 0.1, "samples": [{"prompt": "a"}]}
    assert numbers(row) == {"val_loss/zh": 1.5, "val_loss/en": 2, "lr": 0.1}


def test_two_processes_sample_on_the_first_one_and_train_the_same(pretrain_dir, tokenizer_dir, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, *TINY_MODEL_FLAGS, *EXACT_FLAGS]
    found = []
    for interval in (0, 2):
        folder = tmp_path / f"every{interval}"
        more = ["--batch_size", "2", "--max_steps", "5", "--sample_interval", interval, "--out_dir", folder]
        result = run_process(*torchrun, ROOT / "1-pretrain.py", *flags, *more)
        assert result.returncode == 0, result.stderr
        found.append((load_weights(folder / "pretrain_32.pth"), read_jsonl(folder / "pretrain_32.jsonl")))
    (without, _), (weights, rows) = found
    assert all(torch.equal(weights[name], without[name]) for name in weights)
    assert [row["step"] for row in rows if "samples" in row] == [0, 2, 4, 5]
