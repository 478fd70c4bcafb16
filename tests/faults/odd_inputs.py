"""Runs scripts on unexpected input in this process, with limits of time and memory, and returns the outcome.

tiny_inputs = make_tiny_inputs(folder, tokenizer, tokenizer_dir, pretrain_dir, sft_dir)     a tiny file of every kind
script_outcome(monkeypatch, capsys, "2-eval.py", tiny_inputs.flags("2-eval.py") + ["--top_k", "-1"])  ->  "refused"
"""

import contextlib
import importlib
import json
import resource
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import data_process
from common.errors import fail_in_one_line
from model.checkpoint import save_model
from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import TINY_MODEL_FLAGS, load_script, make_chat_row

TIME_LIMIT = 30  # seconds
MEMORY_LIMIT = 6 << 30  # bytes of additional address space
CPU_FLAGS = ["--device", "cpu", "--dtype", "float32"]
SHORT_RUN_FLAGS = [*CPU_FLAGS, "--max_steps", "1", "--batch_size", "4", "--eval_tokens", "64"]
GRPO_FLAGS = ["--prompts_per_step", "2", "--group_size", "2", "--max_new_tokens", "2"]


class TimeLimitExceeded(BaseException):
    """A BaseException, so that no `except Exception` catches it."""


@dataclass
class TinyInputs:
    """Tiny inputs of every kind in one folder. Each call of `flags` uses a new output folder."""

    folder: Path
    calls: int = 0

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name.replace("__", "."))

    def flags(self, script: str) -> list[str]:
        """Flags with which a script succeeds within seconds."""
        self.calls += 1
        out = self.folder / f"out{self.calls}"
        sft, pairs, parent = self.sft, self.pairs, self.parent__pth
        return {
            "1-pretrain.py": [
                *SHORT_RUN_FLAGS,
                *TINY_MODEL_FLAGS,
                "--data_path",
                self.data,
                "--tokenizer",
                self.tokenizer,
            ],
            "2-eval.py": [*CPU_FLAGS, "--checkpoint", parent, "--prompt", "hi", "--max_new_tokens", "2"],
            "3-full_sft.py": [*SHORT_RUN_FLAGS, "--data_path", sft, "--init_from", parent],
            "4-lora_sft.py": [*SHORT_RUN_FLAGS, "--data_path", sft, "--init_from", parent],
            "5-dpo_train.py": [*SHORT_RUN_FLAGS, "--data_path", pairs, "--init_from", parent],
            "6-grpo_train.py": [*SHORT_RUN_FLAGS, *GRPO_FLAGS, "--data_path", self.rl, "--init_from", parent],
            "eval_ceval.py": [*CPU_FLAGS, "--data", self.exam__csv, "--checkpoint", parent],
            "export_model.py": [parent, str(out / "exported"), "--no-verify"],
            "serve_openai_api.py": [*CPU_FLAGS, "--checkpoint", parent, "--port", "0"],
            "web_demo.py": [*CPU_FLAGS, "--checkpoint", parent, "--port", "18501"],
            "chat_openai_api.py": ["--base_url", "http://127.0.0.1:9/v1", "--prompt", "hi", "--model", "x"],
            "demo.py": ["--max_steps", "1"],
            "train_on.py": [self.chats__jsonl, "--base", parent, "--yes"],
            "train_tokenizer.py": [self.text__txt, "--vocab_size", "300"],
            "demo_world.generator": ["--statement_rounds", "1", "--chat_rounds", "1", "--questions", "20"],
            "demo_world.exam": [],
            "data_process.py pretrain": ["pretrain", self.text__txt, "--tokenizer", self.tokenizer],
            "data_process.py sft": ["sft", self.chats__jsonl, "--tokenizer", self.tokenizer],
            "data_process.py dpo": ["dpo", self.pairs__jsonl, "--tokenizer", self.tokenizer],
            "data_process.py rl": ["rl", self.chats__jsonl],
            "data_process.py clean": ["clean", self.text__txt],
            "data_process.py dedup": ["dedup", self.text__txt],
            "data_process.py decontaminate": ["decontaminate", self.text__txt, "--against", self.exam__csv],
            "data_process.py download": ["download", "ceval", "--mirror", "http://127.0.0.1:9"],
        }[script] + ([] if script in NO_OUT_DIR else ["--out_dir", str(out / "out")])


NO_OUT_DIR = {"export_model.py", "chat_openai_api.py"}


def make_tiny_inputs(folder, tokenizer, tokenizer_dir, pretrain_dir, sft_dir) -> TinyInputs:
    for name, source in (("tokenizer", tokenizer_dir), ("data", pretrain_dir), ("sft", sft_dir)):
        shutil.copytree(source, folder / name)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64))
    lineage = [{"stage": "pretrain", "data": "dataset/pretrain", "tokens": 5}, {"stage": "full_sft", "data": "x"}]
    save_model(folder / "parent.pth", model, "full_sft", tokenizer, lineage)
    words = ("the sun is warm", "the moon is cold", "a tree is tall", "月亮很亮", "太阳很热")
    lines = [f"{words[i % 5]} and {words[i * 3 % 5]} {i * 7919 % 1000}, {words[i // 5 % 5]}." for i in range(200)]
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    pairs = []
    for i in range(24):
        row = make_chat_row(i)
        prompt, answer = row["messages"]
        sides = {"chosen": [answer], "rejected": [{"role": "assistant", "content": "no!"}]}
        pairs.append({"prompt": [prompt], **sides, "lang": row["lang"]})
    (folder / "pairs").mkdir()
    for file, rows in {
        "chats.jsonl": [make_chat_row(i) for i in range(40)],
        "pairs.jsonl": pairs,
        "pairs/train.jsonl": pairs[:18],
        "pairs/val.jsonl": pairs[18:],
        "questions.jsonl": [{"question": "1+1?", "keys": ["2"]}],
    }.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / file).write_text(text, encoding="utf-8")
    data_process.main(["rl", str(folder / "chats.jsonl"), "--out_dir", str(folder / "rl"), "--val_fraction", "0.1"])
    rows = [f"{i},what is {i}?,one,two,three,four,{'ABCD'[i % 4]}" for i in range(6)]
    (folder / "exam.csv").write_text("\n".join(["id,question,A,B,C,D,answer", *rows]), encoding="utf-8")
    return TinyInputs(folder)


@contextlib.contextmanager
def resource_limits(seconds: float = TIME_LIMIT, memory: int = MEMORY_LIMIT):
    """Raise TimeLimitExceeded after `seconds` of CPU time or 10 * `seconds` of wall time; allow `memory` more bytes."""

    def stop(*_):
        raise TimeLimitExceeded

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds)}
    old_handlers, old_limits = (
        {name: signal.signal(name, stop) for name in timers},
        resource.getrlimit(resource.RLIMIT_AS),
    )
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, old_limits[1]))
    for timer, left in timers.values():
        signal.setitimer(timer, left)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, old_limits)
        for name, handler in old_handlers.items():
            signal.signal(name, handler)


def disable_servers(monkeypatch) -> None:
    """Make servers return instead of serving, and downloads fail without a retry."""
    import matplotlib.pyplot  # noqa: F401  # slow to import; an import that a limit interrupts leaves a broken module
    import streamlit.web.cli
    import uvicorn

    from curation import download

    monkeypatch.setattr(download, "MAX_FAILED_ATTEMPTS", 1)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    monkeypatch.setattr(streamlit.web.cli, "main", lambda *_, **__: None)


def script_outcome(monkeypatch, capsys, script: str, flags: list[str], seconds: float = TIME_LIMIT) -> str:
    """Run the script: "done", or "refused" (a one-line error, exit code 2). Raises AssertionError for any other end."""
    name = script.split(" ")[0]
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    module = load_script(name) if name.endswith(".py") else importlib.import_module(name)
    if name == "demo.py":
        monkeypatch.setattr(module, "run_steps", lambda *_: sys.exit(0))
    if name == "train_on.py":  # the scripts that it runs are attacked by themselves
        monkeypatch.setattr(module, "train_all", lambda run, files: run.base)
    command, code = f"{script}: {flags}", 0
    capsys.readouterr()
    try:
        with resource_limits(seconds), fail_in_one_line():
            module.main()
    except SystemExit as ended:
        code = ended.code or 0
    except TimeLimitExceeded:
        raise AssertionError(f"{command}: no end after {seconds} s\n{traceback.format_exc()[-1500:]}") from None
    except BaseException as error:
        raise AssertionError(f"{command}: {error!r}\n{traceback.format_exc()[-1500:]}") from None
    if not code:
        return "done"
    shown = capsys.readouterr().err
    last = shown.rstrip("\n").rpartition("\n")[2]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in shown, f"{command}: {code} {shown[-800:]}"
    return "refused"
