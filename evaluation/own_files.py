"""Looks at a folder of the user's files and at the base model, for ../train_on.py.

    sort_files("mine/")     {"chat": ["mine/a.csv"], "text": ["mine/b.txt"], "pair": […]}
    find_base("out")        out/full_sft_512.pth, or out/demo/full_sft_256.pth

Read next: ../train_on.py (the decisions), ../corpus/row_text.py (the kind of a row).
"""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from corpus.dataset_meta import read_checked_meta
from corpus.input_files import expand_inputs
from corpus.layouts import parse_keys
from corpus.readers import read_contents
from corpus.row_text import RowReader
from corpus.stats import DataStats
from model.checkpoint import find_checkpoint, list_checkpoints, load_carried_tokenizer, read_checkpoint
from model.checkpoint_schema import Checkpoint
from model.tokenizer import load_tokenizer

ROWS_TO_LOOK_AT = 200  # of each file, to find out its kind


def sort_files(path: str, keys: str = "") -> dict[str, list[str]]:
    """The data files in a folder by kind: text, chat, pair. The kind of a file is that of most of its first rows.

    keys: as --keys of data_process.py. Raises UserError for a file, or a folder, without a usable row.
    """
    reader, found = RowReader(parse_keys(keys)), dict[str, list[str]]()
    for file in expand_inputs([path]):
        contents = read_contents([file], DataStats(max_bad_fraction=1.0), "any", reader.read_content)
        kinds = Counter(content.kind for *_, content in islice(contents, ROWS_TO_LOOK_AT))
        if kinds:
            found.setdefault(kinds.most_common(1)[0][0], []).append(file)
    if not found:
        raise UserError(f"{path} has no usable row: put text, chats or pairs there (dataset/README.md)")
    return found


def find_base(out_dir: str, given: str = "") -> Path:
    """The model to start from: the given one, else the SFT or pretrained model in `out_dir`, else that of the demo."""
    if given:
        if Path(given).is_dir():
            raise UserError(f"--base {given} is a folder: name a .pth file")
        return Path(given)
    for folder in (Path(out_dir), Path(out_dir, "demo")):
        for stage in ("full_sft", "pretrain"):
            if list_checkpoints(folder, stage):
                return find_checkpoint(folder, stage)
    raise UserError(
        f"no base model in {out_dir}: run `make demo` (six minutes), train one as README.md describes, or name one "
        "with --base"
    )


def open_facts(path: Path) -> Checkpoint:
    """The checkpoint; its weights are not to be used."""
    return read_checkpoint(path, weights=False)


def stage_of(path: Path) -> str:
    return str(open_facts(path)["stage"])


def context_of(path: Path) -> int:
    """Tokens of the context of a model."""
    return int(open_facts(path)["config"]["max_seq_len"])


def tokenizer_folder(base: Path, out: Path) -> Path:
    """A folder with the tokenizer of the base: beside it, model/tokenizer, or written to `out`."""
    tokenizer = load_carried_tokenizer(open_facts(base), base)
    for folder in (base.parent / "tokenizer", Path("model/tokenizer")):
        if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).fingerprint == tokenizer.fingerprint:
            return folder
    tokenizer.save(out / "tokenizer")
    return out / "tokenizer"


def meta_of(folder: Path) -> dict[str, Any]:
    """The meta.json of a prepared folder. Raises UserError if it is missing or damaged."""
    meta = read_checked_meta(folder)
    if meta is None:
        raise UserError(f"{folder} has no meta.json: delete it and run the same command again")
    return meta


def long_fraction(folder: Path, context: int) -> float:
    """The fraction of the prepared chats with more tokens than `context`, by the bins of the length histogram."""
    lengths = meta_of(folder)["report"]["lengths"]
    limits = [int(label.removeprefix("<= ")) if label != "more" else context + 1 for label in lengths]
    longer = sum(count for limit, count in zip(limits, lengths.values(), strict=True) if limit > context)
    return longer / max(1, sum(lengths.values()))


def validation_lines(folder: Path) -> list[str]:
    """The rows of the validation chats. A text may contain other line separators than "\\n"."""
    return [line for line in (folder / "val.jsonl").read_text(encoding="utf-8").split("\n") if line]


def held_out_questions(folder: Path, base: Path, count: int) -> list[str]:
    """The first questions of the validation chats that are one line and fill at most half of the base's context."""
    tokenizer, limit = load_carried_tokenizer(open_facts(base), base), context_of(base) // 2
    rows = map(json.loads, validation_lines(folder))
    texts = (message["content"] for row in rows for message in row["messages"][:2] if message["role"] == "user")
    fitting = (text for text in texts if text and "\n" not in text and len(tokenizer.encode(text)) <= limit)
    return list(islice(fitting, count))


def comparable_chats(folder: Path, base: Path, path: Path) -> Path:
    """Write the validation chats that fit into the base's context to `path`; return it, or all if none or all fit.

    A model with a longer context is compared on the chats that the base reads whole too.
    """
    tokenizer, limit = load_carried_tokenizer(open_facts(base), base), context_of(base)
    lines = validation_lines(folder)
    fitting = [line for line in lines if len(tokenizer.render(json.loads(line)["messages"])[0]) <= limit]
    if len(fitting) in (0, len(lines)):
        return folder / "val.jsonl"
    write_text(path, "".join(f"{line}\n" for line in fitting))
    print(f"{len(lines) - len(fitting)} of {len(lines)} held-out chats are longer than the {limit} tokens of the base: "
          "the losses are those of the others")  # fmt: skip
    return path
