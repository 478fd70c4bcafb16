"""Document separators that are written as text, as in TinyStories: `<|endoftext|>`, `</s>`.

    split_documents("one.<|endoftext|>\\ntwo.")   -> ["one.", "two."]
    has_marker(text)                               whether a marker is left, in the middle of a sentence

`<|endoftext|>` and similar markers separate documents at the start and the end of a line and after a sentence or word;
after a space, a quote or a bracket they are text. `<s>` and `</s>` are also HTML:
they count at the start and end of a document, and in plain text on a line of their own.

Read next: readers.py (rows), txt_reader.py (plain text).
"""

import re

STRONG = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|endofdocument|>")
_STRONG = "|".join(map(re.escape, STRONG))
_BORDER = re.compile(
    rf"^[ \t]*(?:{_STRONG})[ \t]*|(?<![ \t])[ \t]*(?:{_STRONG})[ \t\r]*$"  # the start or end of a line
    rf"|(?<=[.!?\u3002\uff01\uff1f\u201d]) (?:{_STRONG})[ \t]*"  # after a sentence and a space
    rf"|(?<![ \t\"'`\u2018\u201c\u300c(\[\uff08])(?:{_STRONG})[ \t]*",
    re.MULTILINE,
)
_ANY = re.compile(_STRONG)
_WEAK_LINE = re.compile(rb"[ \t]*(?:</?s>|<[be]os>|<s>(.*)</s>|<bos>(.*)<eos>)[ \t\r]*\n?")  # a line of plain text
STRONG_BYTES = tuple(marker.encode() for marker in STRONG)


def separates_documents(head: bytes) -> bool:
    """Whether a plain text with these first bytes uses markers between its documents, rather than blank lines."""
    return b"<" in head and any(len(line_pieces(line)) > 1 for line in head.split(b"\n"))


def line_pieces(line: bytes) -> list[bytes]:
    """A line of plain text, divided where documents end."""
    if weak := _WEAK_LINE.fullmatch(line):
        return [b"", (weak[1] or weak[2] or b"") + b"\n", b""]
    if not any(marker in line for marker in STRONG_BYTES):
        return [line]
    return [piece.encode("utf-8", "surrogateescape") for piece in
            _BORDER.split(line.decode("utf-8", "surrogateescape"))]  # fmt: skip


def has_marker(text: str) -> bool:
    return "<|" in text and _ANY.search(text) is not None


def split_documents(text: str) -> list[str]:
    """The documents of a text, without the markers between and around them; [] when there is nothing else in it."""
    pieces = _BORDER.split(text) if has_marker(text) else [text]
    pieces = [_without_weak(piece) for piece in pieces]
    return [piece.strip("\r\n") if len(pieces) > 1 else piece for piece in pieces if piece.strip()]


def _without_weak(text: str) -> str:
    """The text without <s> at its start and </s> at its end, unless they are HTML inside it."""
    inner = text.strip()
    for opening, closing in (("<s>", "</s>"), ("<bos>", "<eos>")):
        starts, ends = inner.startswith(opening), inner.endswith(closing)
        if not starts and not ends:
            continue
        middle = inner[len(opening) if starts else 0 : len(inner) - len(closing) if ends else None]
        if opening not in middle and closing not in middle:
            return middle.strip()
    return text
