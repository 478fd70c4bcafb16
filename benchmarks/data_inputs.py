"""The inputs of data.py: rows of text and chats, the prompts of an exam, a tokenizer and a model.

    python -m benchmarks.data_inputs FOLDER --text FILES --chats FILES --exam FILE      (default: the demo world)

    FOLDER/text.jsonl, chats.jsonl   at most --megabytes of the rows of the files that are usable
    FOLDER/prompts.json              the tokens of all exam prompts and of their options, for the loop of transformers
    FOLDER/sizes.json                bytes of text and chats, the exam's path, number of questions

Read next: data_case.py (our programs), inputs.py (tokenizer and model).
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from benchmarks.data_case import SHOTS
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


@dataclass(frozen=True)
class DataInputsConfig(Config):
    """The command line."""

    folder: Path = flag(MISSING, "folder to write", type=pathlib_path, positional=True)
    text: tuple[str, ...] = flag((), "files of text", nargs="+", type=path_string)
    chats: tuple[str, ...] = flag((), "files of chats", nargs="+", type=path_string)
    exam: str = flag("", "an exam that eval_ceval.py reads", type=path_string)
    preset: str = flag("small", "the model that answers the exam")
    megabytes: float = flag(10.0, "at most this much text, and as much of chats", type=positive_float)


def up_to(rows: Iterable[Any], limit: float) -> Iterator[Any]:
    """Yield examples until their texts have `limit` bytes."""
    total = 0
    for row in rows:
        total += len(row.text.encode())
        yield row
        if total >= limit:
            return


def prepare_data(config: DataInputsConfig) -> None:
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


if __name__ == "__main__":
    with fail_in_one_line():
        prepare_data(cli.parse(DataInputsConfig, __doc__))
        print(json.dumps({"done": 1}))  # a case of harness.py ends with JSON
