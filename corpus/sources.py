"""Opening a data file, whatever it is packed in, and telling its format from its content.

    open_source(path) -> Source    .readline .read .head; damage in an archive ends the file instead of raising
    sniff(source) -> "jsonl" | "json" | "csv" | "parquet" | "txt"

The first bytes decide, the name only where they leave it open: people rename files.

Read next: read.py (what is done with an open file).
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from corpus.errors import UserError

PIECE = 64 << 10  # bytes looked at to tell the format; also the size of one piece of plain text, see read.py
MAGIC = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}
SUFFIX_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
TEXT_KEYS = ("text", "content", "contents", "raw_content", "document", "passage", "article", "body")
_CHAT_KEYS = {"q", "a", "question", "answer", "instruction", "output", "prompt", "response", "history"}
_HEADER_KEYS = {*TEXT_KEYS, *_CHAT_KEYS, "chosen", "rejected"}


def check_input(file: str | os.PathLike[str]) -> None:
    """Raises UserError unless `file` is a readable file."""
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file} is a folder: name the files in it, for example {file}/*.jsonl")
    if not path.exists():
        raise UserError(f"{file}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{file}: no permission to read it")


class Source:
    """A file opened for reading, unpacked on the fly. Damage in an archive ends it and is remembered, not raised."""

    def __init__(self, raw: BinaryIO, stream: io.BufferedReader, suffix: str, name: str, damage: str = "") -> None:
        self.raw, self.stream, self.suffix, self.name, self.damage = raw, stream, suffix, name, damage
        self.size = os.fstat(raw.fileno()).st_size
        self.packed = stream is not raw
        self.line = 1

    def position(self) -> int:
        """Bytes of the (packed) file read so far."""
        return self.raw.tell()

    def _guard(self, read: Any, size: int) -> bytes:
        if self.damage:
            return b""
        try:
            return read(size)
        except (EOFError, OSError, lzma.LZMAError, zlib.error, _Damaged):
            self.damage = "truncated or damaged archive: the rest of the file is lost" if self.packed else "read error"
            return b""

    def readline(self, size: int) -> bytes:
        return self._guard(self.stream.readline, size)

    def read(self, size: int) -> bytes:
        return self._guard(self.stream.read1, size)

    def head(self) -> bytes:
        """The first bytes, without moving on."""
        return self._guard(self.stream.peek, PIECE)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _Damaged(Exception):
    """A .zst stream that ends or breaks in the middle."""


class _Unpacked(io.RawIOBase):
    """Hands on what the archive yields piece by piece: when it breaks, all that came before is already delivered."""

    def __init__(self, archive: Any) -> None:
        self.archive = archive

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        piece = self.archive.read1(len(target))
        target[: len(piece)] = piece
        return len(piece)


class _ZstdStream(io.RawIOBase):
    """Unpacks .zst frame after frame; unlike the library's own reader it notices when the last one is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError("reading .zst files needs one more package: pip install zstandard") from None
        self.raw, self.error, self.new = raw, zstandard.ZstdError, zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self.ready:
            packed = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.raw.read(16 << 10)
            if not packed:
                if self.frame and not self.frame.eof:
                    raise _Damaged
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.new()
            try:
                self.ready = self.frame.decompress(packed)
            except self.error:
                raise _Damaged from None
        n = min(len(target), len(self.ready))
        target[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def open_source(path: Path) -> Source:
    check_input(path)
    try:
        raw: Any = path.open("rb", buffering=PIECE)
        magic = raw.peek(8)[:8]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix, start in MAGIC.items() if magic.startswith(start)), "")
    damage = ""
    if suffixes and suffixes[-1] in MAGIC:
        named = suffixes.pop()
        if magic and not kind:
            damage = f"not a {named} archive, whatever its name says"
    stream: Any = raw
    if kind == ".gz":
        stream = _Unpacked(gzip.GzipFile(fileobj=raw))
    elif kind == ".xz":
        stream = _Unpacked(lzma.LZMAFile(raw))  # noqa: SIM115 - closing `raw` is enough
    elif kind == ".bz2":
        stream = _Unpacked(bz2.BZ2File(raw))
    elif kind == ".zst":
        stream = _ZstdStream(raw)
    if kind:
        stream = io.BufferedReader(stream, 1 << 20)
    return Source(raw, stream, suffixes[-1] if suffixes else "", os.fspath(path), damage)


_OBJECT = re.compile(rb'\s*\{\s*("[^"\n]*"\s*:|\})')
_ARRAY = re.compile(rb'\s*\[\s*([\[{"\]]|$)')


def sniff(source: Source) -> str:
    """ "jsonl", "json", "csv", "parquet" or "txt", from the first bytes and, where they leave it open, the name."""
    head = source.head()
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        source.damage = "UTF-16 text: save it as UTF-8"
    elif head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        source.damage = "a zip or tar archive: unpack it first"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(codecs.BOM_UTF8):
        source.readline(3)
        head = head[3:]
    first, _, rest = head.lstrip().partition(b"\n")
    named = SUFFIX_FORMATS.get(source.suffix, "txt")
    if _ARRAY.match(head) and (named == "jsonl" or re.match(rb"\s*\[\s*\{", head)) and source.suffix != ".jsonl":
        return "json"
    if first.strip() == b"{" and named == "jsonl":  # one object over many lines
        return "json"
    if _OBJECT.match(first):
        return "jsonl"
    columns = [cell.strip(b'" \r').lower() for cell in re.split(rb"[,\t]", first)]
    if named == "csv" or (len(columns) > 1 and all(cell.decode("latin-1") in _HEADER_KEYS for cell in columns)):
        return "csv"
    if named == "txt" and source.suffix not in (".txt", ".md") and any(map(_OBJECT.match, rest.split(b"\n")[:20])):
        return "jsonl"
    return named
