"""jsonl rows -> token folder: renders and tokenizes train.jsonl and val.jsonl, which data_process.py wrote.

    dataset/sft/train.jsonl, val.jsonl  ->  dataset/sft/tokens-<fingerprint>/  train, val_zh, val_en with loss masks

A training script calls `tokenize_chats`, which does nothing if the folder has tokens for the same tokenizer, chat
template, length and rows. data_process.py writes its token folder with `append_chats` and `finish_tokens`.
Read next: render_chats.py and render_pairs.py (the masks), shard_writer.py (file format), prepare_chats.py (writes the
jsonl files).
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import CHAT_FORMAT_ADVICE, UserError
from common.files import PathLike, remove, replace_folder, report_write_errors, temporary_path
from common.locks import lock_output
from corpus.dataset_meta import DATA_FORMAT, read_checked_meta, resolve_link, warn_no_checksums, write_meta
from corpus.examples import ChatExample, PairExample, next_batch
from corpus.render_chats import MaskedTokens, render_chat_examples
from corpus.render_pairs import render_pair_examples
from corpus.shard_writer import ShardSet
from corpus.stats import DataStats
from corpus.token_folder import data_command, is_current, token_folder_name, token_inputs
from corpus.validation_split import Assigned
from model.tokenizer import ChatTokenizer

ExampleType = type[ChatExample] | type[PairExample]
REFUSAL_PREFIXES = ("the model's chat template ", "the chat format ")  # of the reasons why a chat cannot be rendered


def tokenize_chats(
    folder: PathLike, tokenizer: ChatTokenizer, max_seq_len: int, example_type: ExampleType = ChatExample
) -> Path:
    """Tokenize train.jsonl and val.jsonl of `folder`, unless the token folder for this tokenizer and length exists.

    Returns the path of the token folder `folder/tokens-<fingerprint>`, in the format of shard_writer.py with masks.
    Raises UserError if a jsonl file is missing or damaged, or if no chat fits into `max_seq_len` tokens.
    """
    folder = Path(folder)
    target = folder / token_folder_name(tokenizer)
    job = token_inputs(folder, max_seq_len, example_type.kind)
    if is_current(target, job):
        return target
    with lock_output(target, wait=True), report_write_errors(target):
        if is_current(target, job):  # another process has built it while this one waited for the lock
            return target
        staged = temporary_path(target, "tmp")
        remove(staged)
        shards, stats = ShardSet(staged, tokenizer.vocab_size), DataStats()
        try:
            stored = _read_stored_examples(folder, example_type)
            while batch := next_batch(stored, length=lambda assigned: len(assigned[1].text)):
                append_chats(batch, tokenizer, max_seq_len, shards, stats)
            finish_tokens(shards, tokenizer, job, stats, example_type.kind)
            replace_folder(staged, resolve_link(target))
        finally:
            shards.abort()
            remove(staged)
    return target


def append_chats(
    assigned: Assigned, tokenizer: ChatTokenizer, max_seq_len: int, shards: ShardSet, stats: DataStats
) -> None:
    """Render and tokenize chats or pairs, and append them to the shards of their splits; count them in `stats`."""
    rendered = render_examples([example for _, example in assigned], tokenizer, max_seq_len, stats)
    for (split, _), documents in zip(assigned, rendered, strict=True):
        for ids, mask, answer_bytes in documents:
            shards.append(split, ids, mask, answer_bytes)


def render_examples(
    examples: list[Any], tokenizer: ChatTokenizer, max_seq_len: int, stats: DataStats
) -> list[list[MaskedTokens]]:
    """The documents of each chat or pair, [] for one that is dropped, as in render_chats.py and render_pairs.py."""
    render = render_pair_examples if examples and isinstance(examples[0], PairExample) else render_chat_examples
    return render(examples, tokenizer, max_seq_len, stats)


def finish_tokens(shards: ShardSet, tokenizer: ChatTokenizer, job: dict[str, Any], stats: DataStats, kind: str) -> None:
    """Finish the shards and write the meta.json of a token folder. Raises UserError if the train split is empty.

    `job`: token_inputs(...). `stats`: the counts for meta.json. `kind`: "chats" or "pairs".
    """
    if "train" not in shards.writers:
        raise UserError(no_data_message(kind.removesuffix("s"), stats))
    meta = {"kind": kind, "tokenizer": tokenizer.rendering_fingerprint, **job, "vocab_size": tokenizer.vocab_size}
    write_meta(shards.folder, meta | {"dtype": shards.dtype, "splits": shards.close(), "report": stats.to_dict()})


def no_data_message(what: str, stats: DataStats) -> str:
    """The error message for an empty train split: the most frequent reasons for dropped rows, and what to do."""
    reasons = stats.dropped.by_count()[:3]
    why = ", ".join(f"{reason.count:,} x {name}" for name, reason in reasons)
    if stats.kept:
        held_out = f"all {stats.kept:,} are held out: give a smaller --val_fraction or more data"
        return f"no {what} is left to train on: {held_out}"
    if reasons and reasons[0][0].startswith(REFUSAL_PREFIXES):
        return f"no {what} can be rendered: {why}; {CHAT_FORMAT_ADVICE}"
    remedy = "a larger --max_seq_len, or " if reasons and reasons[0][0].endswith(" tokens") else ""
    return f"no {what} is left to train on: {why or 'the files have none'}: give {remedy}more data"


def _read_stored_examples(folder: Path, example_type: ExampleType) -> Iterator[tuple[str, ChatExample | PairExample]]:
    """Yield (split, example) of train.jsonl and val.jsonl, which may have grown. Raises UserError if one is damaged."""
    meta = read_checked_meta(folder)
    if meta and meta["format"] != DATA_FORMAT:
        warn_no_checksums(folder)
    for name in ("train", "val"):
        path, crc = folder / f"{name}.jsonl", 0
        size, expected = (meta or {}).get("checksums", {}).get(path.name, [-1, ""])
        has_grown = path.stat().st_size > size
        if has_grown and expected:
            print(f"note: {path} has grown since data_process.py wrote it: its checksum is not verified")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                crc = zlib.crc32(line, crc)
                try:
                    example = example_type.from_row(json.loads(line.decode()), path.name, number)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    command = data_command(example_type.kind)
                    raise UserError(
                        f"{path}:{number}: not a row that data_process.py wrote: run {command} again"
                    ) from None
                yield ("train" if name == "train" else f"val_{example.language}"), example
        if not has_grown and f"{crc:08x}" != expected:
            command = f"python {data_command(example_type.kind)} FILES…"
            raise UserError(
                f"{path} is damaged (it differs from its checksum in meta.json): run `{command}` again; if you edited "
                "rows by hand, pass the edited file as FILES"
            )
