"""Rows -> examples: reads documents and chats, removes exact duplicates, detects the language.

    read_text_examples(paths, report)     the documents that `pretrain` trains on
    read_chat_examples(paths, report)     the chats that `sft` trains on

Read next: readers.py (files -> rows), preferences.py (pairs of answers), examples.py (the split).
"""

from collections.abc import Iterable, Iterator

from corpus.chats import chat_text, is_trained, trim_unanswered
from corpus.examples import Example, messages_hash, question_hash, text_hash
from corpus.language import detect_language
from corpus.readers import PathLike, read_chats, read_texts
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats


def read_text_examples(
    paths: Iterable[PathLike], report: DataStats, source_key: str = "", reader: RowReader = DEFAULT_READER
) -> Iterator[Example]:
    """Yield the documents of the files without exact duplicates. The hashes take about 80 bytes per document."""
    seen: set[int] = set()
    for document in read_texts(paths, report, source_key, reader):
        key = text_hash(document.text)
        if key in seen:
            report.row_dropped("exact duplicate", document.source_file, document.line)
            continue
        seen.add(key)
        language = detect_language(document.text)
        yield Example(document.text, [], language, key, document.source_file, document.line, source=document.source)


def read_chat_examples(
    paths: Iterable[PathLike], report: DataStats, reader: RowReader = DEFAULT_READER, only: str = ""
) -> Iterator[Example]:
    """Yield the chats of the files without exact duplicates, each cut after its last answer.

    Chats without an answer are dropped. `only`: "single" keeps chats of one turn, "multi" chats of several turns.
    """
    seen: set[int] = set()
    for chat in read_chats(paths, report, reader):
        location = (chat.source_file, chat.line)
        messages = trim_unanswered(chat.messages)
        if not any(map(is_trained, messages)):
            report.row_dropped("no answer, so nothing to train on", *location)
            continue
        turns = sum(message["role"] == "user" for message in messages)
        if only and (only == "single") != (turns == 1):
            report.row_dropped(
                "of one turn (--only multi)" if turns == 1 else "of several turns (--only single)", *location
            )
            continue
        content_hash = messages_hash(messages)
        if content_hash in seen:
            report.row_dropped("exact duplicate", *location)
            continue
        seen.add(content_hash)
        report.row_changed(chat.content.changes, chat.content.unused, *location)
        if len(messages) < len(chat.messages):
            report.row_truncated("without its last question, which has no answer", *location)
        text = chat.content.text if messages is chat.messages else chat_text(messages)
        yield Example(
            text, messages, detect_language(text), question_hash(messages), *location, content_hash=content_hash
        )
