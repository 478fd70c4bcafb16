"""Every --parallel mode with two processes: losses and weights equal DDP's, same checkpoint, resume across modes."""

import importlib.util
import json
import sys

import pytest
import torch

from common.errors import UserError
from tests.helpers import ROOT, TINY_MODEL_FLAGS, load_weights, read_jsonl, run_process, run_script

MODES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
SHARED = MODES[1:]
EXACT_FLAGS = ["--device", "cpu", "--log_interval", "1", "--eval_interval", "4", "--batch_size", "2"]
# --grad_clip is far below the norms. 59 rows = 7 steps of 8 and one of 3, in which one process has no rows.
COMMON = [*EXACT_FLAGS, "--accumulation_steps", "2", "--grad_clip", "0.3", "--max_steps", "9", "--optimizer", "adamw"]
COMMON += ["--warmup_iters", "3"]
MODELS = {
    "dense": [*TINY_MODEL_FLAGS],
    # 16 tokens per micro-batch, each routed to 1 of 8 experts: in most micro-batches an expert has no token.
    "moe": [*TINY_MODEL_FLAGS, "--max_seq_len", "8", "--use_moe", "--n_routed_experts", "8", "--n_active_experts", "1"],
}
UNTIED = ["--tie_embeddings", "false", "--qk_norm", "true"]
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def training_job(out, mode, *flags, **more):
    return {"out": str(out), "flags": [*flags, "--parallel", mode], **more}


@pytest.fixture(scope="module")
def job_outputs(tokenizer_dir, pretrain_dir, tmp_path_factory):
    """All jobs of this file, trained by one pair of processes."""
    root = tmp_path_factory.mktemp("parallel")
    pairs = [(name, mode) for name in MODELS for mode in MODES]
    jobs = [training_job(root / f"{name}-{mode}", mode, *COMMON, *MODELS[name], double=True) for name, mode in pairs]
    for mode in ("ddp", "fsdp", "zero3"):
        low = [*COMMON, *UNTIED, "--dtype", "bfloat16"]
        jobs.append(training_job(root / f"bf16-{mode}", mode, *low, *MODELS["dense"]))
        jobs.append(training_job(root / f"bf16-moe-{mode}", mode, *low, *MODELS["moe"]))
    for mode in ("ddp", "fsdp"):
        muon = [*COMMON, *MODELS["dense"], "--optimizer", "muon"]
        jobs.append(training_job(root / f"muon-{mode}", mode, *muon))
        jobs.append(training_job(root / f"late-{mode}", mode, *muon, late=True))
    long = [*COMMON, *MODELS["dense"], "--max_steps", "14", "--save_interval", "3"]
    jobs.append(training_job(root / "whole", "ddp", *long))
    stops = (("zero1", 1), ("fsdp", 3), ("zero3", 5), ("ddp", 7), ("zero2", 9))
    jobs += [training_job(root / "parts", mode, *long, stop=stop) for mode, stop in stops]
    plan = {"jobs": jobs, "data": str(pretrain_dir), "tokenizer": str(tokenizer_dir)}
    (root / "jobs.json").write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_process(*torchrun, "-m", "tests.trainer.parallel_jobs", root / "jobs.json")
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    return root, result.stdout


def log_rows(folder):
    (log,) = folder.glob("*.jsonl")
    return read_jsonl(log)


def checkpoint_file(folder):
    (path,) = folder.glob("*.pth")
    return path


def assert_same_losses(ours, theirs, rel):
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["tokens"] == their["tokens"]
        for name in ("loss", "grad_norm"):
            if name in mine:
                assert mine[name] == pytest.approx(their[name], rel=10 * rel), (name, mine["step"])
        for split, value in mine.get("val_loss", {}).items():
            assert value == pytest.approx(their["val_loss"][split], rel=rel)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("mode", SHARED)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_weights_equal_ddp(job_outputs, name, mode):
    """With accumulation, clipping, a shorter last step and validation; in the MoE experts without tokens.

    In float64: AdamW normalises gradients, which in float32 amplifies rounding differences of gradients near 0.
    """
    whole, shared = job_outputs[0] / f"{name}-ddp", job_outputs[0] / f"{name}-{mode}"
    assert_same_losses(log_rows(shared), log_rows(whole), rel=1e-7)
    norms = [row["grad_norm"] for row in log_rows(whole) if "grad_norm" in row]
    assert min(norms) > 0.3, "every step is clipped"
    ours, theirs = load_weights(checkpoint_file(shared)), load_weights(checkpoint_file(whole))
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("mode", ["fsdp", "zero3"])
@pytest.mark.parametrize("name", ["bf16", "bf16-moe"])
def test_sharded_bf16_equals_ddp(job_outputs, name, mode):
    """With an untied output layer, and an MoE whose router stays in fp32."""
    ours, theirs = job_outputs[0] / f"{name}-{mode}", job_outputs[0] / f"{name}-ddp"
    assert_same_losses(log_rows(ours), log_rows(theirs), rel=3e-3)
    assert {tensor.dtype for tensor in load_weights(checkpoint_file(ours)).values()} == {torch.float32}


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_steps_read_late_are_the_same_steps(job_outputs, mode):
    late, at_once = (load_weights(checkpoint_file(job_outputs[0] / f"{name}-{mode}")) for name in ("late", "muon"))
    assert all(torch.equal(late[name], at_once[name]) for name in at_once)


@NEEDS_DEEPSPEED
def test_sharded_muon_equals_ddp(job_outputs):
    """Tolerance for Muon's bf16 rounding; orthogonalising each shard separately would differ far more."""
    assert_same_losses(log_rows(job_outputs[0] / "muon-fsdp"), log_rows(job_outputs[0] / "muon-ddp"), rel=3e-3)


@NEEDS_DEEPSPEED
def test_every_parallel_mode_writes_the_same_checkpoint(job_outputs):
    from model.checkpoint import load_model

    for mode in MODES:
        checkpoint = torch.load(checkpoint_file(job_outputs[0] / f"dense-{mode}"), weights_only=True)
        assert checkpoint.keys() == {"format", "stage", "config", "tokenizer", "model", "lineage"}
        assert {type(tensor) for tensor in checkpoint["model"].values()} == {torch.Tensor}
        assert checkpoint["lineage"][-1]["steps"] == 9
        load_model(checkpoint_file(job_outputs[0] / f"dense-{mode}"))


@NEEDS_DEEPSPEED
def test_run_resumes_under_another_parallel_mode_and_in_one_process(
    monkeypatch, job_outputs, pretrain_dir, tokenizer_dir, capsys
):
    """Two steps each with zero1, fsdp, zero3, ddp, zero2 in two processes, then one process: as one whole run."""
    root, out = job_outputs
    assert [f"resuming after step {step} " in out for step in (2, 4, 6, 8)] == [True] * 4
    (folder,) = (root / "parts" / "pretrain_32.resume").iterdir()
    assert folder.name == "step_000000010" and (folder / "rank_00001.json").exists(), "older step folders are removed"
    paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", root / "parts"]
    long = [*COMMON, *MODELS["dense"], "--max_steps", "14", "--save_interval", "3"]
    run_script(monkeypatch, "1-pretrain.py", *long, *paths)
    assert "resuming after step 10" in capsys.readouterr().out
    losses = [
        [(row["step"], row["tokens"], row["loss"]) for row in log_rows(root / name) if "loss" in row]
        for name in ("parts", "whole")
    ]
    assert [row[:2] for row in losses[0]] == [row[:2] for row in losses[1]]
    assert [row[2] for row in losses[0]] == pytest.approx([row[2] for row in losses[1]], rel=1e-4)
    assert not (root / "parts" / "pretrain_32.resume").exists()


def run_pretrain(monkeypatch, *flags):
    run_script(monkeypatch, "1-pretrain.py", "--data_path", "nowhere", *flags)


def test_unsupported_parallel_flags_are_one_line(monkeypatch):
    adamw = ["--optimizer", "adamw"]
    for flags, said in (
        (["--parallel", "zero2"], "add --optimizer adamw, or use --parallel fsdp"),
        (["--parallel", "zero1", *adamw, "--compile"], "does not support --compile"),
        (["--parallel", "zero3", *adamw, "--dtype", "float16"], "bfloat16 and float32"),
    ):
        with pytest.raises(UserError, match=said):
            run_pretrain(monkeypatch, *flags)


def test_missing_deepspeed_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else real(name, *a))
    with pytest.raises(UserError, match=r'pip install "deepspeed>='):
        run_pretrain(monkeypatch, "--parallel", "zero1", "--optimizer", "adamw")


def test_one_process_trains_with_any_parallel_flag(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path):
    paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path]
    flags = [*EXACT_FLAGS, *MODELS["dense"], "--max_steps", "2", "--parallel", "fsdp"]
    run_script(monkeypatch, "1-pretrain.py", *flags, *paths)
    assert (tmp_path / "pretrain_32.pth").exists()


@NEEDS_DEEPSPEED
@pytest.mark.slow
def test_script_trains_under_torchrun(pretrain_dir, tokenizer_dir, tmp_path):
    paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*EXACT_FLAGS, *MODELS["dense"], "--max_steps", "2", "--parallel", "zero2", "--optimizer", "adamw"]
    result = run_process(*torchrun, ROOT / "1-pretrain.py", *flags, *paths)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "pretrain_32.pth").exists() and not (tmp_path / "pretrain_32.resume").exists()
