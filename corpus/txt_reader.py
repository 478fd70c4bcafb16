"""Reads plain text, and splits text at document separators that are written as text: `<|endoftext|>`, `</s>`.

    read_txt(input_file, report)                    -> (first line, document); streaming
    split_documents("one.<|endoftext|>\\ntwo.")    -> ["one.", "two."]
    has_marker(text)                                True if the text contains a marker

`<|endoftext|>` and similar markers separate documents at the start or end of a line and after a sentence or word; after
a space, a quote or a bracket they are text. `<s>` and `</s>` may also be HTML: they count only at the start and end of
a document and, in plain text, on a separate line.

Read next: readers.py (the caller).
"""

import re

from corpus.input_files import READ_CHUNK_BYTES, InputFile, NumberedRows
from corpus.stats import DataStats

DOCUMENT_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|endofdocument|>")
_MARKER_BYTES = tuple(marker.encode() for marker in DOCUMENT_MARKERS)
_MARKER_PATTERN = "|".join(map(re.escape, DOCUMENT_MARKERS))
_BORDER = re.compile(
    rf"^[ \t]*(?:{_MARKER_PATTERN})[ \t]*|(?<![ \t])[ \t]*(?:{_MARKER_PATTERN})[ \t\r]*$"  # the start or end of a line
    rf"|(?<=[.!?\u3002\uff01\uff1f\u201d]) (?:{_MARKER_PATTERN})[ \t]*"  # after a sentence and a space
    rf"|(?<![ \t\"'`\u2018\u201c\u300c(\[\uff08])(?:{_MARKER_PATTERN})[ \t]*",
    re.MULTILINE,
)
_SENTENCE_TAG_LINE = re.compile(
    rb"[ \t]*(?:</?s>|<[be]os>|<s>(.*)</s>|<bos>(.*)<eos>)[ \t\r]*\n?"
)  # a line of plain text
_SENTENCE_ENDS = (b". ", *(mark.encode() for mark in "。！？"), *_MARKER_BYTES)  # where a very long line is split


# ---- plain text ------------------------------------------------------------------------------------------------------
def read_txt(input_file: InputFile, report: DataStats) -> NumberedRows:
    """Yields (first line, document).

    Blank lines separate documents, or markers such as <|endoftext|> if the first bytes of the file contain one.
    A document above READ_CHUNK_BYTES is split at line or sentence ends.
    """
    head, readline = input_file.head(), input_file.stream.readline
    has_markers = b"<" in head and any(len(_split_at_markers(line)) > 1 for line in head.split(b"\n"))
    split = _split_at_markers if has_markers else _split_at_blank
    number, start, block, rest = 1, 1, bytearray(), b""
    while line := rest + readline(READ_CHUNK_BYTES - len(rest)):
        input_file.line, rest = number, b""
        if len(line) == READ_CHUNK_BYTES and not line.endswith(b"\n"):
            end = _sentence_end(line)
            line, rest = line[:end], line[end:]
        for i, piece in enumerate(split(line)):
            if block and (
                i or len(block) + len(piece) > READ_CHUNK_BYTES
            ):  # every piece but the first begins a document
                if text := _block_text(block, input_file, start, report):
                    yield start, text
                block = bytearray()
            if not block:
                start = number
            if block or not piece.isspace():
                block += piece
        number += line.endswith(b"\n")
    if text := _block_text(block, input_file, start, report):
        yield start, text


def _split_at_blank(line: bytes) -> list[bytes]:
    return [b"", b""] if line.isspace() else [line]


def _split_at_markers(line: bytes) -> list[bytes]:
    if tagged := _SENTENCE_TAG_LINE.fullmatch(line):
        return [b"", (tagged[1] or tagged[2] or b"") + b"\n", b""]
    if not any(marker in line for marker in _MARKER_BYTES):
        return [line]
    pieces: list[str] = _BORDER.split(line.decode("utf-8", "surrogateescape"))
    return [piece.encode("utf-8", "surrogateescape") for piece in pieces]


def _sentence_end(line: bytes) -> int:
    """Where to split a line of READ_CHUNK_BYTES: after a sentence in its second half, else between characters."""
    end = max(line.rfind(mark) + len(mark) if mark in line else 0 for mark in _SENTENCE_ENDS)
    if end >= READ_CHUNK_BYTES // 2:
        return end
    last = range(READ_CHUNK_BYTES - 1, READ_CHUNK_BYTES - 5, -1)
    end = next((i for i in last if line[i] & 0xC0 != 0x80), READ_CHUNK_BYTES)
    marker = line.rfind(b"<|", end - 20)  # do not split a marker
    return marker if marker > 0 else end


def _block_text(block: bytearray, input_file: InputFile, line: int, report: DataStats) -> str:
    """The text of a document; "" if it is empty, or malformed (counted)."""
    try:
        return block.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        report.row_unreadable(input_file.malformed_reason, input_file.name, line)
        return ""


# ---- separators in any text ------------------------------------------------------------------------------------------
def has_marker(text: str) -> bool:
    return "<|" in text and any(marker in text for marker in DOCUMENT_MARKERS)


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
