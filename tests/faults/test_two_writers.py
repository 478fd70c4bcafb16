"""Promise: if two commands write one output, the second exits with 2 and names the first; a kill releases the lock.

The test suspends the first command (SIGSTOP) when it holds its lock, so that the second always finds it locked.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import is_temporary
from tests.faults.conftest import FULL
from tests.helpers import ROOT, make_chat_row, write_shards
from tests.planted import planted_rows

KINDS = ["clean", "sft"] + (
    [
        "pretrain",
        "dpo",
        "rl",
        "dedup",
        "dedup many",
        "decontaminate",
        "scores",
        "tokenizer",
        "export",
        "world",
        "exam",
        "demo",
    ]
    * FULL
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_dir, tiny_parent):
    folder = tmp_path_factory.mktemp("inputs")
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3000)]
    chats = [make_chat_row(i) for i in range(3000)]
    rng = random.Random(0)
    questions = [{"question": " ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(15))} for _ in range(50)]
    files = {"texts": list(planted_rows(1500, 0.3)), "chats": chats, "pairs": pairs, "questions": questions}
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in files} | {"tokenizer": tokenizer_dir, "model": tiny_parent}


def command(kind: str, inputs: dict, out: Path) -> tuple[list, Path]:
    """The command line of a kind, and the path that it locks."""
    data, tokenizer = ["data_process.py"], ["--tokenizer", inputs["tokenizer"]]
    sft = [*data, "sft", inputs["chats"], *tokenizer]
    lines = {
        "clean": [*data, "clean", inputs["texts"], "--min_words", 1],
        "dedup": [*data, "dedup", inputs["texts"]],
        "dedup many": [*data, "dedup", inputs["texts"], "--executor", "local"],
        "decontaminate": [*data, "decontaminate", inputs["texts"], "--against", inputs["questions"]],
        "pretrain": [*data, "pretrain", inputs["texts"], *tokenizer],
        "sft": sft,
        "dpo": [*data, "dpo", inputs["pairs"], *tokenizer],
        "rl": [*data, "rl", inputs["chats"]],
        "scores": [*sft, "--scorer", inputs["model"]],
        "tokenizer": ["train_tokenizer.py", inputs["texts"], "--vocab_size", 400],
        "export": ["export_model.py", inputs["model"], out, "--no-verify"],
        "world": ["-m", "demo_world.generator", "--statement_rounds", 4, "--chat_rounds", 1, "--questions", 20],
        "exam": ["-m", "demo_world.exam"],
        "demo": ["demo.py", "--max_steps", 1],
    }
    out_flags = [] if kind == "export" else ["--out_dir", out]
    return [sys.executable, *lines[kind], *out_flags], out


def start_command(line: list) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*map(str, line)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def start_and_suspend(line: list, output: Path) -> subprocess.Popen:
    """Start a command and suspend it while it holds the lock of its output."""
    process, until = start_command(line), time.monotonic() + 120
    while not list(output.parent.glob(f".{output.name}*.lock.json")):
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGSTOP)
    assert list(output.parent.glob(f".{output.name}*.lock.json")), (
        "the command finished before it was suspended: use larger inputs"
    )
    return process


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def wait_for_exit(process: subprocess.Popen, code: int) -> str:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == code, error
    return error


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if is_temporary(path) or path.name.endswith((".partial", ".json"))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_of_two_commands_exits_with_2_and_the_first_succeeds(tmp_path, inputs, kind, record_attacks):
    comparable = kind not in ("demo", "dedup many")  # their results contain durations
    (line, output), (alone, expected) = (command(kind, inputs, tmp_path / name / "out") for name in ("two", "one"))
    output.parent.mkdir()
    first = start_and_suspend(line, output)
    error = wait_for_exit(start_command(line), 2)
    assert re.fullmatch(
        rf"error: \S*out\S* is being written by `\S+ .*` \(process {first.pid} on \S+, since 20[-: \d]+\): wait .*\n",
        error,
    )
    if kind == "demo":  # it would take minutes, so the test kills it
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        return
    os.killpg(first.pid, signal.SIGCONT)
    wait_for_exit(first, 0)
    wait_for_exit(start_command(alone), 0)
    assert folder_contents(output).keys() == folder_contents(expected).keys() != set()
    if comparable:
        assert folder_contents(output) == folder_contents(expected)
    shutil.rmtree(output)
    killed = start_and_suspend(line, output)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    wait_for_exit(start_command(line), 0)
    assert not comparable or folder_contents(output) == folder_contents(expected)
    assert not [name for name in leftovers(output.parent) if "scores" not in name]
    record_attacks("commands that write one output at the same time", 2, refused=1, freed_by_a_kill=1)


TOKENIZE_SCRIPT = """
import sys
from corpus.tokenize_chats import tokenize_chats
from model.tokenizer import load_tokenizer
print(tokenize_chats(sys.argv[1], load_tokenizer(sys.argv[2]), 64), flush=True)
"""


def test_two_training_runs_with_the_same_data_tokenize_it_once(tmp_path, inputs, tokenizer_dir):
    (tmp_path / "sft").mkdir()
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(inputs["chats"], tmp_path / "sft" / name)
    line = [sys.executable, "-c", TOKENIZE_SCRIPT, tmp_path / "sft", tokenizer_dir]
    output = tmp_path / "sft" / "tokens-"
    first = start_and_suspend(line, output)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    second = subprocess.Popen([*map(str, line)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    message = second.stdout.readline()
    assert re.search(rf"tokens-\w+ is being written by `.*` \(process {first.pid} on .*\): waiting for it\n", message)
    os.killpg(first.pid, signal.SIGCONT)
    wait_for_exit(first, 0)
    made = next((tmp_path / "sft").glob("tokens-*")).stat().st_mtime_ns
    assert second.communicate(timeout=120)[0].strip().endswith(next((tmp_path / "sft").glob("tokens-*")).name)
    assert second.returncode == 0
    assert next((tmp_path / "sft").glob("tokens-*")).stat().st_mtime_ns == made, "made twice"
    assert not [path for path in (tmp_path / "sft").iterdir() if is_temporary(path)]


def test_a_reader_between_two_renames_gets_an_error_with_the_remedy(tmp_path, tokenizer):
    from common.errors import UserError
    from corpus.dataset_meta import read_meta

    folder = write_shards(tmp_path / "pretrain", "pretrain", tokenizer, {"train": [[1, 2, 3]]})
    folder.rename(tmp_path / ".pretrain.17.old")  # the state after a kill between the renames
    with pytest.raises(
        UserError, match=r"the command that replaces it was ended between two steps; run `python data_p"
    ):
        read_meta(folder)
