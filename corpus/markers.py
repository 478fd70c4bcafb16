"""Splits text at document separators that are written as text, as in TinyStories: `<|endoftext|>`, `</s>`.

    split_documents("one.<|endoftext|>\\ntwo.")    -> ["one.", "two."]
    has_marker(text)                                True if the text contains a marker

`<|endoftext|>` and similar markers separate documents at the start or end of a line and after a sentence or word; after
a space, a quote or a bracket they are text. `<s>` and `</s>` may also be HTML: they count only at the start and end of
a document and, in plain text, on a separate line.

Read next: readers.py (rows), txt_reader.py (plain text).
"""

import re

DOCUMENT_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|endofdocument|>")
_MARKER_PATTERN = "|".join(map(re.escape, DOCUMENT_MARKERS))
_BORDER = re.compile(
    rf"^[ \t]*(?:{_MARKER_PATTERN})[ \t]*|(?<![ \t])[ \t]*(?:{_MARKER_PATTERN})[ \t\r]*$"  # the start or end of a line
    rf"|(?<=[.!?\u3002\uff01\uff1f\u201d]) (?:{_MARKER_PATTERN})[ \t]*"  # after a sentence and a space
    rf"|(?<![ \t\"'`\u2018\u201c\u300c(\[\uff08])(?:{_MARKER_PATTERN})[ \t]*",
    re.MULTILINE,
)
_ANY_MARKER = re.compile(_MARKER_PATTERN)
_SENTENCE_TAG_LINE = re.compile(
    rb"[ \t]*(?:</?s>|<[be]os>|<s>(.*)</s>|<bos>(.*)<eos>)[ \t\r]*\n?"
)  # a line of plain text
DOCUMENT_MARKER_BYTES = tuple(marker.encode() for marker in DOCUMENT_MARKERS)


def uses_markers(head: bytes) -> bool:
    """True if plain text with these first bytes separates documents by markers instead of blank lines."""
    return b"<" in head and any(len(split_line(line)) > 1 for line in head.split(b"\n"))


def split_line(line: bytes) -> list[bytes]:
    """Splits a line of plain text at document separators."""
    if tagged := _SENTENCE_TAG_LINE.fullmatch(line):
        return [b"", (tagged[1] or tagged[2] or b"") + b"\n", b""]
    if not any(marker in line for marker in DOCUMENT_MARKER_BYTES):
        return [line]
    return [piece.encode("utf-8", "surrogateescape") for piece in
            _BORDER.split(line.decode("utf-8", "surrogateescape"))]  # fmt: skip


def has_marker(text: str) -> bool:
    return "<|" in text and _ANY_MARKER.search(text) is not None


def split_documents(text: str) -> list[str]:
    """Returns the documents of a text without their separators; [] if it contains nothing else."""
    pieces = _BORDER.split(text) if has_marker(text) else [text]
    pieces = [_strip_sentence_tags(piece) for piece in pieces]
    return [piece.strip("\r\n") if len(pieces) > 1 else piece for piece in pieces if piece.strip()]


def _strip_sentence_tags(text: str) -> str:
    """Removes <s> at the start and </s> at the end, unless the text also contains such tags inside (HTML)."""
    inner = text.strip()
    for opening, closing in (("<s>", "</s>"), ("<bos>", "<eos>")):
        starts, ends = inner.startswith(opening), inner.endswith(closing)
        if not starts and not ends:
            continue
        middle = inner[len(opening) if starts else 0 : len(inner) - len(closing) if ends else None]
        if opening not in middle and closing not in middle:
            return middle.strip()
    return text
