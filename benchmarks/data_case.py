"""This project's data commands as programs that print their speed as JSON: MB are those of the UTF-8 text.

    python -m benchmarks.data_case FOLDER pretrain|sft|clean|tokenizer|exam
    python -m benchmarks.data_case FOLDER prepare --text FILES --chats FILES --exam FILE     their inputs

FOLDER/text.jsonl, chats.jsonl   at most --megabytes of the rows of the files that are usable (default: the demo world)
FOLDER/prompts.json              the tokens of all exam prompts and of their options, for the loop of transformers
FOLDER/sizes.json                bytes of text and chats, number of questions

A program runs the command in this process; importing it is not timed.
Read next: data.py (the table), peer_cases/datasets_map.py, peer_cases/plain_tools.py.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from benchmarks.inputs import InputsConfig, make_inputs
from common import cli
from common.cli import Config, flag
from common.errors import fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import path_string, pathlib_path, positive_float
from corpus.input_files import expand_inputs
from corpus.read_examples import read_chat_examples, read_documents
from corpus.stats import DataStats
from demo_world.exam import DemoExamConfig, build_exam
from demo_world.generator import WorldConfig, build_world
from evaluation.exam_data import read_exam_split
from evaluation.exam_prompts import PromptConfig, build_prompts
from model.tokenizer import load_tokenizer

SHOTS = 5  # examples before each question of the exam


@dataclass(frozen=True)
class DataCaseConfig(Config):
    """The command line."""

    folder: Path = flag(MISSING, "the inputs; results go to FOLDER/out", type=pathlib_path, positional=True)
    what: str = flag(MISSING, "the program", positional=True, choices=("prepare", "pretrain", "sft", "clean",
                                                                      "tokenizer", "exam"))  # fmt: skip
    text: tuple[str, ...] = flag((), "prepare: files of text", nargs="+", type=path_string)
    chats: tuple[str, ...] = flag((), "prepare: files of chats", nargs="+", type=path_string)
    exam: str = flag("", "prepare: an exam that eval_ceval.py reads", type=path_string)
    preset: str = flag("small", "prepare: the model that answers the exam")
    megabytes: float = flag(10.0, "prepare: at most this much text, and as much of chats", type=positive_float)


def up_to(rows: Iterable[Any], limit: float) -> Iterator[Any]:
    """Yield examples until their texts have `limit` bytes."""
    total = 0
    for row in rows:
        total += len(row.text.encode())
        yield row
        if total >= limit:
            return


def prepare(config: DataCaseConfig) -> None:
    """Write all inputs."""
    folder, text, chats, exam = config.folder, config.text, config.chats, config.exam
    if not (text and chats):
        build_world(WorldConfig(str(folder / "world")))
        text = text or (str(folder / "world/pretrain.jsonl"),)
        chats = chats or (str(folder / "world/chats.jsonl"),)
    if not exam:
        exam = str(folder / "exam")
        build_exam(DemoExamConfig(exam))
    with contextlib.redirect_stdout(sys.stderr):
        make_inputs(InputsConfig(folder, config.preset))
    limit = 1e6 * config.megabytes
    documents = list(up_to(read_documents(expand_inputs(text), DataStats(1.0, True)), limit))
    conversations = list(up_to(read_chat_examples(expand_inputs(chats), DataStats(1.0, True)), limit))
    rows = {"text": [{"text": row.text} for row in documents],
            "chats": [{"messages": row.messages} for row in conversations]}  # fmt: skip
    for name, content in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        write_text(folder / f"{name}.jsonl", "".join(lines))
    tokenizer = load_tokenizer(folder / "tokenizer")
    split = read_exam_split((exam,), "", ())
    prompts = build_prompts(split, tokenizer, PromptConfig("letter", SHOTS), 512)
    write_json(folder / "prompts.json", [[prompt.prompt, prompt.options] for prompt in prompts], indent=None)
    write_json(folder / "sizes.json", {
        "text": sum(len(row.text.encode()) for row in documents), "exam": exam, "questions": len(split.items),
        "chats": sum(len(row.text.encode()) for row in conversations),
    })  # fmt: skip


def run_command(script: str, arguments: list[str]) -> None:
    """Run a script of this project with these arguments; its output goes to stderr."""
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(script.removesuffix(".py")).main()


def command_of(what: str, folder: Path, exam: str) -> tuple[str, list[str]]:
    """Return the script and its arguments."""
    out, tokenizer = str(folder / "out" / f"{what}_{os.getpid()}"), str(folder / "tokenizer")
    text, chats = str(folder / "text.jsonl"), str(folder / "chats.jsonl")
    data = ["--tokenizer", tokenizer, "--out_dir", out]
    return {
        "pretrain": ("data_process.py", ["pretrain", text, *data]),
        "sft": ("data_process.py", ["sft", chats, *data]),
        "clean": ("data_process.py", ["clean", text, "--out_dir", out]),
        "tokenizer": ("train_tokenizer.py", [text, "--out_dir", out, "--byte_budget", str(10**9)]),
        "exam": ("eval_ceval.py", ["--data", exam, "--checkpoint", str(folder / "model.pth"), "--shots", str(SHOTS),
                                   "--out_dir", out, "--json", f"{out}.json"]),
    }[what]  # fmt: skip


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return (seconds, CPU seconds) of a call."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - start, cpu_seconds() - cpu_start


def main() -> None:
    config = cli.parse(DataCaseConfig, __doc__)
    if config.what == "prepare":
        prepare(config)
        print(json.dumps({"done": 1}))
        return
    sizes = json.loads((config.folder / "sizes.json").read_text(encoding="utf-8"))
    script, arguments = command_of(config.what, config.folder, sizes["exam"])
    importlib.import_module(script.removesuffix(".py"))
    seconds, cpu = timed(lambda: run_command(script, arguments))
    if config.what == "exam":
        result = json.loads(Path(arguments[-1]).read_text(encoding="utf-8"))
        numbers = {"questions_per_second": sizes["questions"] / max(result["seconds"], 0.05)}
    else:
        megabytes = sizes["chats" if config.what == "sft" else "text"] / 1e6
        numbers = {"mb_per_second": megabytes / seconds, "mb_per_cpu_second": megabytes / cpu}
    print(json.dumps(numbers | {"seconds": seconds}))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
