"""Chats -> SFT data on disk: rendered and tokenised once, with the mask of trained tokens. Pairs go the same way.

    chats -> train.jsonl, val.jsonl                           cleaned, whole, whatever the tokenizer
          -> tokens-<tokenizer>/  train, val_zh, val_en       what tokenizer.render makes of them, cut at whole turns

What pairs of answers do in their own way is a `Form`, see pairs.py.

The jsonl files are the source of truth: `tokenise_chats` builds the token folder again for another tokenizer or length.
Everything appears under its name only when it is complete.

Writes through shards.py. Read next: items.py (what is left out and set aside), shards.py (the files),
pack_texts.py (the same for plain text), ../data_process.py (the command).
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.chats import Message, chat_text
from corpus.errors import UserError
from corpus.history import history_of
from corpus.items import Item, chat_items, split_validation
from corpus.read import Path_
from corpus.report import DataReport
from corpus.shards import (
    FORMAT,
    ShardWriter,
    check_replaceable,
    open_writer,
    partial_folder,
    publish,
    read_meta,
    require_train,
    token_dtype,
    write_json,
    writing,
)

ROWS_A_STEP = 1000  # rows between two movements of the progress bar

Document = tuple[list[int], list[int], int]  # ids, mask, UTF-8 bytes of the answers


@dataclass(frozen=True)
class Form:
    """What chats and pairs of answers do each in their own way between a file and the token folder."""

    kind: str  # of the token folder
    command: str  # of data_process.py
    fields: tuple[str, ...]  # of a stored row: what of an item stands in `messages`, then its answers
    items: Callable[[Iterable[Path_], DataReport], Iterator[Item]]
    render: Callable[[Item, Any, int, DataReport], list[Document]]  # no document: the item does not fit


def pack_chats(
    paths: list[Path_],
    tokenizer: Any,
    out_dir: Path_,
    max_seq_len: int,
    val_share: float,
    report: DataReport,
    on_batch: Callable[[], None],
    form: Form,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and the token folder of the chats in `paths` to `out_dir`, complete or not at all.

    `about`: what else meta.json should remember.
    Returns the token folder's meta.json; raises as `pack_texts`.
    """
    check_replaceable(out_dir)
    check_replaceable(partial_folder(out_dir))
    partial = partial_folder(out_dir)
    with writing(out_dir):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            rows = {True: 0, False: 0}
            with (
                (partial / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train,
                (partial / "val.jsonl").open("w", encoding="utf-8", newline="\n") as val,
            ):
                for is_validation, item in split_validation(form.items(paths, report), val_share):
                    row = dict(zip(form.fields, (item.messages, *item.answers), strict=True)) | {"lang": item.language}
                    (val if is_validation else train).write(json.dumps(row, ensure_ascii=False) + "\n")
                    rows[is_validation] += 1
                    if sum(rows.values()) % ROWS_A_STEP == 0:
                        on_batch()
            tokens = tokenise_chats(partial, tokenizer, max_seq_len, report, on_batch, form)
            meta = {"format": FORMAT, "kind": "messages", "rows": {"train": rows[False], "val": rows[True]}}
            meta |= {"tokens": tokens.name, "val_share": val_share, "report": report.to_dict()}
            meta |= {"history": history_of(paths), **(about or {})}
            write_json(partial / "meta.json", meta)
            publish(partial, out_dir)
        finally:  # a moment's work for chats, so a run that ended early starts anew
            shutil.rmtree(partial, ignore_errors=True)
    return read_meta(Path(out_dir) / tokens.name)


def tokenise_chats(
    folder: Path_,
    tokenizer: Any,
    max_seq_len: int,
    report: DataReport | None = None,
    on_batch: Callable[[], None] | None = None,
    form: Form | None = None,
) -> Path:
    """The token folder of `folder`'s train.jsonl and val.jsonl for this tokenizer and length; built unless it is there.

    `tokenizer` needs .render, .chat_fingerprint and .vocab_size. Returns `folder/tokens-<chat_fingerprint>`, in the
    format of shards.py with masks. Raises UserError when the jsonl files are missing or no chat fits into `max_seq_len`
    tokens.
    """
    folder, form = Path(folder), form or CHATS
    target = folder / f"tokens-{tokenizer.chat_fingerprint}"
    job = {"max_seq_len": max_seq_len, "source": _fingerprint_source(folder, form)}
    if _is_current(target, job):
        return target
    report = report or DataReport()
    partial = folder / f"{target.name}.partial-{os.getpid()}"  # processes that start together must not share it
    dtype = token_dtype(tokenizer.vocab_size)
    writers: dict[str, ShardWriter] = {}
    with writing(partial):
        try:
            partial.mkdir()
            for number, (split, item) in enumerate(_stored_items(folder, form), start=1):
                for ids, mask, answer_bytes in form.render(item, tokenizer, max_seq_len, report):
                    if split not in writers:
                        writers[split] = open_writer(partial, split, dtype)
                    writers[split].add(ids, mask, answer_bytes)
                if on_batch and number % ROWS_A_STEP == 0:
                    on_batch()
            what = form.kind.removesuffix("s")
            require_train(
                writers, f"no {what} fits into {max_seq_len} tokens: give a larger --max_seq_len, or more data"
            )
            splits = {split: writers[split].close() for split in sorted(writers)}
            meta = {"format": FORMAT, "kind": form.kind, "tokenizer": tokenizer.chat_fingerprint, **job}
            meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "splits": splits, "report": report.to_dict()}
            write_json(partial / "meta.json", meta)
            try:
                publish(partial, target)
            except OSError:  # another process was faster
                if not _is_current(target, job):
                    raise
        finally:
            for writer in writers.values():
                writer.abort()
            shutil.rmtree(partial, ignore_errors=True)
    return target


def render_chat(item: Item, tokenizer: Any, max_seq_len: int, report: DataReport) -> list[Document]:
    """The one document of as many whole first turns as fit; none when not even one does.

    A turn is never cut inside: half an answer would teach to stop in the middle of a sentence.
    """
    messages = item.messages
    ids, mask = tokenizer.render(messages)
    while len(ids) > max_seq_len:
        # Each run of trained tokens is one answer; no turn whose answer ends beyond the limit can stay.
        ends = [i + 1 for i, trained in enumerate(mask) if trained and not (i + 1 < len(mask) and mask[i + 1])]
        turns = min(sum(end <= max_seq_len for end in ends), len(ends) - 1)
        if turns == 0:
            report.drop(f"first turn longer than {max_seq_len} tokens", item.file, item.line)
            return []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: answers[turns - 1] + 1]
        ids, mask = tokenizer.render(messages)
    trained_tokens = sum(mask)
    if not trained_tokens:
        report.drop("no trained token", item.file, item.line)
        return []
    if len(messages) < len(item.messages):
        report.shorten(f"cut at a whole turn to {max_seq_len} tokens", item.file, item.line)
    text = item.text if messages is item.messages else chat_text(messages)
    report.keep(item.language, len(text), len(ids), len(text.encode()), trained_tokens)
    return [(ids, mask, answer_bytes(messages))]


def answer_bytes(messages: list[Message]) -> int:
    """UTF-8 bytes of what the assistant says."""
    return sum(len(message["content"].encode()) for message in messages if message["role"] == "assistant")


CHATS = Form("chats", "sft", ("messages",), chat_items, render_chat)


def _stored_items(folder: Path, form: Form) -> Iterator[tuple[str, Item]]:
    """(split, item) of our own train.jsonl and val.jsonl."""
    for name in ("train", "val"):
        path = folder / f"{name}.jsonl"
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    (messages, *answers), language = (row[field] for field in form.fields), row["lang"]
                    text = chat_text([*messages, *itertools.chain(*answers)])
                    item = Item(text, messages, language, 0, path.name, number, tuple(answers))
                except (ValueError, KeyError, TypeError):
                    command = f"data_process.py {form.command}"
                    raise UserError(f"{path}:{number}: not a row of ours: run {command} again") from None
                yield ("train" if name == "train" else f"val_{language}"), item


def _fingerprint_source(folder: Path, form: Form) -> dict[str, str]:
    """Names the content of the jsonl files by size, first and last megabyte: quick to check at every start."""
    result = {}
    for name in ("train.jsonl", "val.jsonl"):
        path = folder / name
        if not path.is_file():
            command = f"python data_process.py {form.command} FILES…"
            raise UserError(f"no {form.kind} in {folder} ({name} is missing): run `{command}` first")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
        result[name] = digest.hexdigest()
    return result


def _is_current(target: Path, job: dict[str, Any]) -> bool:
    try:
        meta = read_meta(target)
    except UserError:
        return False
    return all(meta.get(name) == value for name, value in job.items())
