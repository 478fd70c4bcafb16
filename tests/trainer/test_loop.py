"""Training loop: dtypes, non-finite losses, learning rates, parameter groups, saves, wandb, compile."""

import json
import math
import re
import sys
import types

import pytest
import torch

from common.errors import UserError
from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import TINY_MODEL_FLAGS, load_weights, read_jsonl, run_script, visible_names
from trainer import loop, run
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.engine import DDPEngine
from trainer.optim import lr_multiplier, make_optimizers, set_learning_rate, split_parameters
from trainer.run import StopReason
from trainer.train_state import TrainState

SHORT = [*TINY_MODEL_FLAGS, "--device", "cpu", "--batch_size", "4", "--log_interval", "1", "--max_steps", "3"]


@pytest.fixture
def pretrain(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path):
    def run(*flags, out="out"):
        folder = tmp_path / out
        paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", folder]
        run_script(monkeypatch, "1-pretrain.py", *SHORT, *paths, *flags)
        return folder

    return run


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_matrix_products_use_the_requested_dtype(monkeypatch, pretrain, name, capsys):
    dtypes = set()
    original_forward = torch.nn.Linear.forward

    def record_dtype(self, x):
        out = original_forward(self, x)
        dtypes.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", record_dtype)
    folder = pretrain("--dtype", name)
    assert dtypes == {getattr(torch, name)}
    assert f", {name}, " in capsys.readouterr().out, "the run must print the dtype"
    assert {tensor.dtype for tensor in load_weights(folder / "pretrain_32.pth").values()} == {torch.float32}


def test_unknown_dtype_or_device_is_rejected(pretrain):
    with pytest.raises(UserError, match="argument --dtype: invalid choice: 'float61'"):
        pretrain("--dtype", "float61")
    with pytest.raises(UserError, match="--device: nonsense: not a device"):
        pretrain("--device", "nonsense")


def test_short_run_saves_its_last_weights(curves, pretrain):
    """A run of 3 steps, shorter than --save_interval, writes a complete checkpoint."""
    folder = pretrain()
    assert visible_names(folder) == ["pretrain_32.jsonl", "pretrain_32.png", "pretrain_32.pth", "report.html"]
    checkpoint = torch.load(folder / "pretrain_32.pth", weights_only=True)
    assert checkpoint.keys() == {"format", "stage", "config", "tokenizer", "model", "lineage"}
    assert checkpoint["lineage"][-1]["steps"] == 3 and checkpoint["stage"] == "pretrain"
    assert "lm_head.weight" not in checkpoint["model"], "tied weights must be saved once"


def test_first_loss_is_compared_with_ln_vocabulary(pretrain, capsys):
    pretrain()
    match = re.search(r"first loss ([\d.]+), ln\(vocabulary\) ([\d.]+)", capsys.readouterr().out)
    assert abs(float(match[1]) - float(match[2])) <= 0.15 and float(match[2]) == pytest.approx(math.log(272), abs=1e-3)


def make_losses_nan(monkeypatch, steps):
    """Make the training loss NaN at these steps, counted from 1."""
    from trainer import loss

    original, calls = loss.cross_entropy_sum, 0

    def cross_entropy_with_nan(hidden, weight, labels):
        nonlocal calls
        value = original(hidden, weight, labels)
        if torch.is_grad_enabled():
            calls += 1
            value = value * (math.nan if calls in steps else 1.0)
        return value

    monkeypatch.setattr(loss, "cross_entropy_sum", cross_entropy_with_nan)


def test_non_finite_step_is_skipped_and_printed(monkeypatch, pretrain, capsys):
    clean = pretrain("--max_steps", "4", out="clean")
    make_losses_nan(monkeypatch, {2})
    folder = pretrain("--max_steps", "4")
    assert re.search(r"step 2 skipped: the loss is not finite \(data rows \[\d+", capsys.readouterr().out)
    values = load_weights(folder / "pretrain_32.pth")
    assert all(torch.isfinite(tensor).all() for tensor in values.values())
    assert any(
        not torch.equal(values[name], tensor) for name, tensor in load_weights(clean / "pretrain_32.pth").items()
    )


def test_five_non_finite_steps_end_the_run(monkeypatch, pretrain):
    make_losses_nan(monkeypatch, set(range(3, 99)))
    with pytest.raises(UserError, match=r"5 steps in a row; the last batch held data rows \[\d+, \d+, \d+, \d+\]"):
        pretrain("--max_steps", "20")


def test_fp16_training_reduces_the_loss(pretrain):
    rows = read_jsonl(pretrain("--dtype", "float16", "--max_steps", "40") / "pretrain_32.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5


def test_no_decay_on_norms_and_embeddings():
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, qk_norm=True, tie_embeddings=False))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others, no_decay = ([named[id(p)] for p in group] for group in split_parameters(model))
    assert len(matrices) == 2 * 7 and others == ["lm_head.weight"]
    assert all("norm" in name or "embed" in name for name in no_decay) and len(no_decay) == 1 + 2 * 4 + 1
    for kind in ("adamw", "muon"):
        groups = [group for optimizer in make_optimizers(model, kind, 1e-3, 0.1) for group in optimizer.param_groups]
        decay = {named[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert len(decay) == len(named), "every parameter must be in one group of one optimizer"
        assert all((decay[name] == 0.0) == (name in no_decay) for name in decay)


@pytest.mark.parametrize(
    ("step", "progress", "kind", "expected"),
    [(0, 0.0, "cosine", 1 / 5), (3, 0.0, "cosine", 4 / 5), (4, 0.0, "cosine", 1.0), (9, 0.5, "cosine", 0.55),
     (9, 1.0, "cosine", 0.1), (9, 0.5, "linear", 0.55), (9, 0.25, "linear", 0.775), (9, 2.0, "linear", 0.1)],
)  # fmt: skip
def test_lr_multiplier_follows_the_schedule(step, progress, kind, expected):
    config = TrainConfig(warmup_iters=4, schedule=kind, min_lr_ratio=0.1)
    assert lr_multiplier(config, step, progress) == pytest.approx(expected)


def test_schedule_sets_every_parameter_group():
    model = Transformer(ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2))
    muon, adamw = make_optimizers(model, "muon", 1.0, 0.1)
    config = TrainConfig(learning_rate=1.0, warmup_iters=0)
    for step, momentum in ((0, 0.7), (500, 0.825), (1000, 0.95), (9999, 0.95)):
        assert set_learning_rate(config, [muon, adamw], step, fraction_done=0.5) == 0.5
        assert [group["momentum"] for group in muon.param_groups] == [pytest.approx(momentum)]
        assert [group["lr"] for group in muon.param_groups] == [0.5]
        # Embeddings train with 4 x the learning rate.
        rates = {model.model.embed_tokens.weight: 2.0, model.model.norm.weight: 0.5}
        assert all(group["lr"] == rates.get(group["params"][0], 0.5) for group in adamw.param_groups)
    (plain,) = make_optimizers(model, "adamw", 1.0, 0.1)
    set_learning_rate(config, [plain], 0, fraction_done=0.5)
    assert {group["lr"] for group in plain.param_groups} == {0.5}


def test_activation_checkpointing_gives_the_same_weights(pretrain):
    plain, recomputed = (
        pretrain("--dtype", "float32"),
        pretrain("--dtype", "float32", "--checkpoint_activations", out="re"),
    )
    expected, weights = load_weights(plain / "pretrain_32.pth"), load_weights(recomputed / "pretrain_32.pth")
    assert all(torch.allclose(expected[name], weights[name], atol=1e-6) for name in expected)


def test_data_workers_give_the_same_weights(pretrain):
    without_workers, with_workers = (
        load_weights(pretrain("--dtype", "float32", "--num_workers", str(n), out=f"w{n}") / "pretrain_32.pth")
        for n in (0, 2)
    )
    assert all(torch.equal(without_workers[name], with_workers[name]) for name in without_workers)


def test_moe_trains_and_logs_aux_loss(pretrain):
    rows = read_jsonl(pretrain("--use_moe", "--n_routed_experts", "4") / "pretrain_32_moe.jsonl")
    assert all(0.009 < row["aux_loss"] < 0.04 for row in rows if "loss" in row), (
        "aux_loss must be 0.01 (balanced) to 0.04 (all tokens in one expert)"
    )


def test_wandb_failure_does_not_stop_training(monkeypatch, pretrain, capsys):
    sent = []

    class FakeRun:
        def log(self, row, step):
            sent.append((step, row))
            if step == 2:
                raise ConnectionError("no network")

    fake = types.SimpleNamespace(init=lambda **options: sent.append(options) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = pretrain("--use_wandb", "--wandb_project", "p", "--wandb_run_name", "r")
    assert (sent[0]["project"], sent[0]["name"], sent[0]["config"]["max_steps"]) == ("p", "r", 3)
    assert [step for step, _ in sent[1:]] == [1, 2] and "loss" in sent[1][1]
    assert "training continues without it" in "".join(capsys.readouterr())
    assert (folder / "pretrain_32.pth").exists()


def test_wandb_writes_an_offline_run(monkeypatch, pretrain, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pretrain("--use_wandb")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_missing_wandb_names_the_install_command(monkeypatch, pretrain):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        pretrain("--use_wandb")


def test_a_run_ends_with_its_speed(pretrain, capsys):
    pretrain()
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"pretrain 3/3 loss .* tok/s [\d.e-]+ TFLOP/s eta 0:00 mem ", line) for line in lines)
    assert re.fullmatch(
        r"359 tokens in 0\.\d minutes, [\d,]+ tok/s, [\d.e-]+ TFLOP/s, peak memory [\d.]+ GiB", lines[-2]
    )


@pytest.mark.slow
def test_compiled_model_trains_to_equal_losses(pretrain):
    plain, compiled = pretrain("--dtype", "float32"), pretrain("--dtype", "float32", "--compile", out="compiled")
    expected, weights = load_weights(plain / "pretrain_32.pth"), load_weights(compiled / "pretrain_32.pth")
    assert expected.keys() == weights.keys(), "saved names must not have the prefix of torch.compile"
    # Compiled kernels round differently and the optimizer amplifies the differences: compare losses, not weights.
    losses = [
        [row["loss"] for row in read_jsonl(out / "pretrain_32.jsonl") if "loss" in row] for out in (plain, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_compile_without_a_compiler_is_a_one_line_error(monkeypatch, pretrain):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        pretrain("--compile")


def test_invalid_model_config_is_a_one_line_error(pretrain):
    with pytest.raises(UserError, match="multiple of n_heads"):
        pretrain("--n_heads", "5")


def test_log_is_json_lines_without_nan(pretrain):
    text = (pretrain() / "pretrain_32.jsonl").read_text()
    assert all(isinstance(json.loads(line)["step"], int) for line in text.splitlines()) and "NaN" not in text


# ---- one step --------------------------------------------------------------------------------------------------------
def record_reads(monkeypatch):
    """Record the reads of tensors; returns {"step": reads in train_step of each step, "after": those of its sums}."""
    reads, steps = [], {"step": [], "after": []}

    def recorded(part, real):
        def run(*given):
            reads.clear()
            result = real(*given)
            steps[part].append(list(reads))
            return result

        return run

    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__"):
        real = getattr(torch.Tensor, name)
        record = lambda *given, real=real, name=name: reads.append(name) or real(*given)
        monkeypatch.setattr(torch.Tensor, name, record)
    monkeypatch.setattr(loop, "train_step", recorded("step", loop.train_step))
    monkeypatch.setattr(loop.LaunchedStep, "read", recorded("after", loop.LaunchedStep.read))
    return steps


def test_an_optimizer_step_reads_its_sums_once(monkeypatch, pretrain):
    """A CPU also looks before each of the two optimizers whether the step is finite."""
    steps = record_reads(monkeypatch)
    pretrain("--accumulation_steps", "3", "--dropout", "0.1")
    assert steps == {"step": [["__bool__", "__bool__"]] * 3, "after": [["tolist"]] * 3}


def test_a_gpu_reads_nothing_within_a_step(monkeypatch, pretrain):
    """Every read waits for the GPU, so the sums of all micro-batches and the gradient norm are read together, later."""
    monkeypatch.setattr(DistContext, "reads_late", True)
    steps = record_reads(monkeypatch)
    pretrain("--accumulation_steps", "3", "--dropout", "0.1")
    assert steps == {"step": [[]] * 3, "after": [["tolist"]] * 3}


def test_an_error_in_validation_leaves_eval_mode():
    model = Transformer(ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2))
    stage = types.SimpleNamespace(model=model, compute_loss=None)
    engine = DDPEngine(TrainConfig(), stage, DistContext(torch.device("cpu"), torch.float32))
    with pytest.raises(ZeroDivisionError), engine.eval_mode():
        assert not model.training
        raise ZeroDivisionError
    assert model.training


def test_dropout_seeds_differ_between_steps_and_ranks_and_never_change():
    """A run resumed with another version of Python or numpy continues with the same masks."""
    seeds = []
    for step, rank in ((0, 0), (1, 0), (0, 1)):
        run.seed_dropout(42, step, rank)
        seeds.append(torch.initial_seed())
    assert seeds == [11465652750463011511, 15658369528003122356, 16016570408942317940]


@pytest.mark.parametrize(
    ("step", "objection", "expired", "signals", "final", "stop"),
    [(4, "", False, 0, 0, StopReason.NONE), (9, "", True, 1, 1, StopReason.COMPLETED),
     (9, "x", 0, 0, 0, StopReason.EARLY_STOP), (4, "", True, 1, 1, StopReason.SIGNAL),
     (4, "", True, 0, 0, StopReason.TIME), (4, "", True, 0, 1, StopReason.DEADLINE)],
)  # fmt: skip
def test_stop_reasons(step, objection, expired, signals, final, stop):
    timer = types.SimpleNamespace(is_expired=expired, is_final=final)
    assert run.stop_reason(TrainState(step=step, objection=objection), 9, timer, signals) is stop
    assert bool(stop) == (stop is not StopReason.NONE)
    assert stop.is_final == (stop in (StopReason.COMPLETED, StopReason.EARLY_STOP, StopReason.DEADLINE))
