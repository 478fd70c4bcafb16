"""Rows -> examples without exact duplicates.

    read_documents(paths, stats)        -> TextExample    for `data_process.py pretrain`
    read_chat_examples(paths, stats)    -> ChatExample    for `sft`
    read_pair_examples(paths, stats)    -> PairExample    for `dpo`
    read_prompt_examples(paths, stats)  -> PromptExample  for `rl`

Duplicates are recognised by 64-bit hashes, which take about 80 bytes per example.
Read next: readers.py (files -> rows), row_text.py (row -> text, chat or pair), validation_split.py.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpus.chats import Message, chat_text, is_trained
from corpus.examples import (
    ChatExample,
    PairExample,
    PromptExample,
    TextExample,
    messages_hash,
    question_hash,
    text_hash,
)
from corpus.language import detect_language
from corpus.readers import PathLike, read_contents
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats
from corpus.turn_rules import trim_unanswered

FILE_AS_SOURCE = "file"  # a source_key: the file name is the source


def read_documents(
    paths: Iterable[PathLike], stats: DataStats, source_key: str = "", reader: RowReader = DEFAULT_READER
) -> Iterator[TextExample]:
    """Yield the documents of the files. A chat is one document: its text without role markers.

    `source_key`: the row key that holds the source, "file" for the file name, or "" for no sources.
    Raises UserError if a file has rows but no usable one, or if too many rows are bad.
    """
    seen: set[int] = set()
    for file, line, row, content in read_contents(paths, stats, "text", reader.read_text):
        unused = [key for key in content.unused if key != source_key]
        if content.changes or unused:
            stats.row_changed(content.changes, unused, file, line)
        split_hash = text_hash(content.text)
        if split_hash in seen:
            stats.row_dropped("exact duplicate", file, line)
            continue
        seen.add(split_hash)
        source = row.get(source_key) if source_key and isinstance(row, dict) else ""
        if source_key == FILE_AS_SOURCE:
            source = Path(file).name.split(".")[0]
        source = source if isinstance(source, str) else ""
        yield TextExample(content.text, detect_language(content.text), split_hash, file, line, source)


def read_chat_examples(
    paths: Iterable[PathLike], stats: DataStats, reader: RowReader = DEFAULT_READER, only: str = ""
) -> Iterator[ChatExample]:
    """Yield the chats of the files, each cut after its last answer. Chats without an answer are dropped.

    `only`: "single" keeps chats of one turn, "multi" chats of several turns.
    """
    seen: set[int] = set()
    for file, line, _, content in read_contents(paths, stats, "chat", reader.read_chat):
        messages = trim_unanswered(content.messages)
        content_hash = messages_hash(messages)
        reason = _chat_drop_reason(messages, only) or ("exact duplicate" if content_hash in seen else "")
        if reason:
            stats.row_dropped(reason, file, line)
            continue
        seen.add(content_hash)
        stats.row_changed(content.changes, content.unused, file, line)
        if len(messages) < len(content.messages):
            stats.row_truncated("without its last question, which has no answer", file, line)
        text = content.text if messages is content.messages else chat_text(messages)
        yield ChatExample(messages, text, detect_language(text), question_hash(messages), content_hash, file, line)


def _chat_drop_reason(messages: list[Message], only: str) -> str:
    """Why a chat is left out; "" if it is kept."""
    if not any(map(is_trained, messages)):
        return "no answer, so nothing to train on"
    turns = sum(message["role"] == "user" for message in messages)
    if only == "multi" and turns == 1:
        return "of one turn (--only multi)"
    return "of several turns (--only single)" if only == "single" and turns != 1 else ""


def read_pair_examples(
    paths: Iterable[PathLike], stats: DataStats, reader: RowReader = DEFAULT_READER
) -> Iterator[PairExample]:
    """Yield the pairs of the files; pairs with equal answers are dropped and counted.

    As for chats, the first question determines the split: a question held out by SFT is held out here as well.
    """
    seen: set[int] = set()
    for file, line, _, content in read_contents(paths, stats, "pair", reader.read_pair):
        prompt, (chosen, rejected) = content.messages, content.answers
        content_hash = text_hash(json.dumps([prompt, chosen, rejected], ensure_ascii=False))
        if content_hash in seen:
            stats.row_dropped("exact duplicate", file, line)
            continue
        seen.add(content_hash)
        stats.row_changed(content.changes, content.unused, file, line)
        hashes = question_hash(prompt), content_hash
        yield PairExample(prompt, chosen, rejected, content.text, detect_language(content.text), *hashes, file, line)


def read_prompt_examples(
    paths: Iterable[PathLike], stats: DataStats, reader: RowReader = DEFAULT_READER
) -> Iterator[PromptExample]:
    """Yield the prompts of the files: a chat up to its last answer, which is the reference.

    They count as kept: they have no tokens. A prompt is used once, with its first reference. As for chats, the first
    question determines the split.
    """
    references: dict[int, int] = {}  # hash of a prompt -> hash of its reference
    for file, line, _, content in read_contents(paths, stats, "chat", reader.read_chat):
        *prompt, answer = trim_unanswered(content.messages) or [{"role": "", "content": ""}]
        content_hash, reference_hash = messages_hash(prompt), text_hash(answer["content"])
        reason = ""
        if not is_trained(answer) or not answer["content"].strip():
            reason = "no answer with a text, so no reference"
        elif content_hash in references:
            same = references[content_hash] == reference_hash
            reason = "exact duplicate" if same else "an earlier prompt with another reference"
        if reason:
            stats.row_dropped(reason, file, line)
            continue
        references[content_hash] = reference_hash
        stats.row_changed(content.changes, content.unused, file, line)
        text = chat_text([*prompt, answer])
        language, hashes = detect_language(text), (question_hash(prompt), content_hash)
        stats.row_kept(language, len(text), 0, len(text.encode()))
        yield PromptExample(prompt, answer["content"], text, language, *hashes, file, line)
