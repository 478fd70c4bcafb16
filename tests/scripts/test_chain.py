"""The chain of training scripts: default paths lead from stage to stage, under every launcher; --help is fast."""

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from tests.helpers import (
    IGNORE_TOKEN_FOLDERS,
    ROOT,
    TINY_MODEL_FLAGS,
    child_cpu_seconds,
    free_port,
    load_weights,
    read_jsonl,
    run_here,
    run_process,
    run_script,
)

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
SHORT_RUN = ["--device", "cpu", "--batch_size", "4", "--max_steps", "3", "--log_interval", "1"]


@pytest.fixture
def pretrained(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path):
    paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out"]
    run_script(monkeypatch, "1-pretrain.py", *TINY_MODEL_FLAGS, *SHORT_RUN, *paths)
    return tmp_path / "out"


@pytest.fixture
def chats(sft_dir, tmp_path):
    return shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)


def test_sft_starts_from_the_one_parent(monkeypatch, pretrained, chats):
    run_script(monkeypatch, "3-full_sft.py", *SHORT_RUN, "--data_path", chats, "--out_dir", pretrained)
    parent, child = (torch.load(pretrained / f"{name}_32.pth", weights_only=True) for name in ("pretrain", "full_sft"))
    assert child["config"] == parent["config"] and child["tokenizer"] == parent["tokenizer"]
    assert [entry["stage"] for entry in child["lineage"]] == ["pretrain", "full_sft"]
    rows = read_jsonl(pretrained / "full_sft_32.jsonl")
    assert rows[-1]["val_loss"].keys() == {"zh", "en"}
    changed = [name for name in parent["model"] if not torch.equal(parent["model"][name], child["model"][name])]
    assert len(changed) == len(parent["model"]), "all weights are trained"


def test_no_parent_and_several_parents_are_errors(monkeypatch, pretrained, chats, tmp_path):
    with pytest.raises(UserError, match=r"run `python 1-pretrain.py`"):
        run_script(monkeypatch, "3-full_sft.py", *SHORT_RUN, "--data_path", chats, "--out_dir", tmp_path / "empty")
    shutil.copy(pretrained / "pretrain_32.pth", pretrained / "pretrain_64.pth")
    with pytest.raises(UserError, match=r"several pretrain models .*pretrain_32.pth.*pretrain_64.pth"):
        run_script(monkeypatch, "3-full_sft.py", *SHORT_RUN, "--data_path", chats, "--out_dir", pretrained)


def test_missing_inputs_name_the_command(monkeypatch, pretrained, pretrain_dir, tokenizer_dir, tmp_path):
    for name, flags, line in (
        ("1-pretrain.py", ["--tokenizer", tmp_path / "no"], "run `python train_tokenizer.py"),
        ("1-pretrain.py", ["--tokenizer", tokenizer_dir, "--data_path", tmp_path / "no"], "data_process.py pretrain"),
        ("3-full_sft.py", ["--data_path", tmp_path / "no", "--out_dir", pretrained], "data_process.py sft"),
        ("3-full_sft.py", ["--init_from", tmp_path / "no.pth"], "no checkpoint at"),
    ):
        with pytest.raises(UserError, match=line):
            run_script(monkeypatch, name, *flags)


def test_pretraining_continues_from_a_model(monkeypatch, pretrained, pretrain_dir, tokenizer_dir, tmp_path):
    flags = [*SHORT_RUN, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "more"]
    flags += ["--init_from", pretrained / "pretrain_32.pth"]
    with pytest.raises(UserError, match="brings its own config"):
        run_script(monkeypatch, "1-pretrain.py", *flags, "--dim", "64")
    run_script(monkeypatch, "1-pretrain.py", *flags)
    child = torch.load(tmp_path / "more" / "pretrain_32.pth", weights_only=True)
    assert [entry["stage"] for entry in child["lineage"]] == ["pretrain", "pretrain"]
    first, second = (read_jsonl(out / "pretrain_32.jsonl")[0]["loss"] for out in (pretrained, tmp_path / "more"))
    assert second < first, "training continues from the parent's weights"


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    result = run_process(sys.executable, "3-full_sft.py", "--out_dir", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]


@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launchers_run_the_same_script(monkeypatch, launcher, pretrained, chats):
    if launcher is DEEPSPEED:
        pytest.importorskip("deepspeed", reason="the launcher comes with deepspeed: pip install deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    result = run_process(*launcher, "3-full_sft.py", *SHORT_RUN, "--data_path", chats, "--out_dir", pretrained)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es)" in result.stdout and result.stdout.count("saved ") == 1, "only rank 0 prints"
    assert load_weights(pretrained / "full_sft_32.pth").keys() == load_weights(pretrained / "pretrain_32.pth").keys()


def test_ctrl_c_under_torchrun_saves_and_exits(pretrained, chats):
    import signal

    command = [
        *TORCHRUN,
        "3-full_sft.py",
        *SHORT_RUN,
        "--max_steps",
        "100000",
        "--data_path",
        chats,
        "--out_dir",
        pretrained,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    log, deadline = pretrained / "full_sft_32.jsonl", time.monotonic() + 60
    while not (log.exists() and '"step": 5,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends SIGINT to the whole process group
    out, _ = process.communicate(timeout=60)
    assert "run again to resume" in out
    assert (pretrained / "full_sft_32.resume").exists() and (pretrained / "full_sft_32.pth").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_imports_no_front_end(name):
    """torch is imported at the top of the lessons; it takes most of these seconds."""
    probe = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "front = {'wandb', 'deepspeed', 'streamlit', 'matplotlib'}\n"
        "heavy = ({'transformers', 'pandas'} | front) & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    before = child_cpu_seconds()
    result = run_process(sys.executable, "-c", probe, name)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and f"python {name}" in result.stdout, "the help shows the command"
    assert child_cpu_seconds() - before < 4


@pytest.mark.parametrize(
    "name", ["1-pretrain.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py", "6-grpo_train.py"]
)
def test_common_is_imported_before_torch(name):
    """common/__init__.py sets the log level of torch's C++ part: one line for a lost process, no stack trace."""
    imports = [node for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
    packages = [module.split(".")[0] for module in modules]
    assert next(package for package in packages if package not in sys.stdlib_module_names) == "common"
    run = "import os; os.environ['WORLD_SIZE'] = '2'; import common; print(os.environ['TORCH_CPP_LOG_LEVEL'])"
    assert run_process(sys.executable, "-c", run).stdout == "ERROR\n"


@pytest.mark.parametrize("name", ["1-pretrain.py", "3-full_sft.py", "5-dpo_train.py"])
def test_shared_flags_are_frozen(monkeypatch, capsys, name):
    """Flags that the documentation names, hidden spellings, and both spellings of the flag that deepspeed adds."""
    text = run_here(monkeypatch, capsys, name, "--help_all").stdout
    flags = {
        "duration": "epochs max_steps max_minutes resume init_from save_interval",
        "optimization": "batch_size global_batch_size learning_rate grad_clip warmup_iters seed",
        "machine": "dtype device num_workers compile",
        "logging": "log_interval eval_interval use_wandb wandb_project wandb_run_name",
    }
    for names in flags.values():
        assert all(f"--{flag}" in text for flag in names.split())
    for spelling in ("--local_rank=0", "--local-rank=0", "--accumulation_steps=2", "--final_lr_share=0.1"):
        assert run_here(monkeypatch, capsys, name, spelling, "--help").returncode == 0
