"""The texts inside a row, whatever its format, so that a step can read or mend them and leave the rest as it is.

    text_of(row)            -> all that a reader of the row would read, as one text
    edit_texts(row, mend)   -> the same row, every text replaced by mend(text)

A row may be plain text, an object with one of the text keys, a chat in any of the formats of chats.py, or a pair of
answers; other keys (source, url, id, ...) are never looked at, and stay.

Read next: rewrite.py (who passes rows on), chats.py (the chat formats).
"""

from collections.abc import Callable, Iterator
from typing import Any

from corpus.chats import CONTENT_KEYS, LIST_KEYS, PAIR_KEYS
from corpus.language import sound_text
from corpus.report import BadRow
from corpus.sources import TEXT_KEYS

_INNER = (*LIST_KEYS, *CONTENT_KEYS, *(key for pair in PAIR_KEYS for key in pair))
_KEYS = frozenset((*_INNER, "input", "system", "history", "chosen", "rejected"))


def is_text_row(row: Any) -> bool:
    """True for plain text and for objects with a text key: documents, not chats."""
    return isinstance(row, str) or (isinstance(row, dict) and any(key in row for key in TEXT_KEYS))


def text_of(row: Any) -> str:
    """The text of a row; of a chat or pair all its messages, a line each. Raises BadRow when there is none."""
    if isinstance(row, str):
        return sound_text(row, "text")
    key = next((key for key in TEXT_KEYS if key in row), None)
    if key is not None:
        return sound_text(row[key], key)
    found = [sound_text(text, "a message") for text in _texts(row) if text.strip()]
    if not found:
        raise BadRow("no text key, and no chat")
    return "\n".join(found)


def edit_texts(row: Any, mend: Callable[[str], str]) -> Any:
    """A copy of the row with every text mended; a plain text becomes {"text": ...}."""
    if isinstance(row, str):
        return {"text": mend(row)}
    key = next((key for key in TEXT_KEYS if key in row), None)
    if key is not None:
        return {**row, key: mend(row[key])}
    return {key: _edited(value, mend) if key in _KEYS else value for key, value in row.items()}


def _texts(row: dict[str, Any]) -> Iterator[str]:
    for key, value in row.items():
        if key in _KEYS:
            yield from _inner_texts(value)


def _inner_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _inner_texts(inner)
    elif isinstance(value, dict):
        yield from _texts(value)


def _edited(value: Any, mend: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mend(value)
    if isinstance(value, list):
        return [_edited(inner, mend) for inner in value]
    if isinstance(value, dict):
        return {key: _edited(inner, mend) if key in _KEYS else inner for key, inner in value.items()}
    return value
