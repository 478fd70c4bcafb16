"""Unpacks .gz, .xz, .zst and .bz2 in bounded memory. Damage is noted with its place; it is never raised.

    pieces = Unpacked(raw, ".gz").pieces()       an iterator of bytes, each of about a megabyte at most
    pieces.damages                               what could not be read

A compressed file is one member after the other: gzip members (RFC 1952), xz streams, zstd frames (RFC 8878), bzip2
streams. pigz, bgzip, pbzip2 and `cat a.gz b.gz` write several. With `skip_damage` reading continues at the next member
after a damaged one; a line with a byte that no encoding has, GAP, stands where bytes are missing.

Read next: input_files.py (who opens files).
"""

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from common.errors import UserError
from corpus.damage import Damage

CHUNK = 16 << 10  # packed bytes that are read at once
MOST = 1 << 20  # unpacked bytes of one piece; deflate, bzip2 and xz keep to it
ZST_CHUNK = 1 << 10  # zstd may unpack 128 KB from 4 bytes, so 32 MB at most at once
MEMORY = 1 << 30  # bytes that an xz dictionary may take
GAP = b"\xff\n"
MAGIC = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}
NAMES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
_MEMBERS = {  # how a member begins; longer than the magic number, so that packed data is not taken for one
    ".gz": re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00-\x04][\x00-\x0d\xff]", re.DOTALL),
    ".xz": re.compile(rb"\xfd7zXZ\x00\x00[\x00\x01\x04\x0a]"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # or a skippable frame, as pzstd writes
    ".bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
LONGEST_HEADER = 10  # bytes that these patterns need


def kind_of(start: bytes) -> str:
    """The suffix that stands for the format of a file with these first bytes; "" for one that is not compressed."""
    found = next((suffix for suffix, magic in MAGIC.items() if start.startswith(magic)), "")
    return found or (".zst" if _MEMBERS[".zst"].match(start) else "")


class _Gzip:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self.inner, self.needs_input = zlib.decompressobj(zlib.MAX_WBITS | 16), True  # 16: a gzip header

    def decompress(self, data: bytes, most: int) -> bytes:
        unpacked = self.inner.decompress(self.inner.unconsumed_tail + data, most)
        self.needs_input = not self.inner.unconsumed_tail and len(unpacked) < most
        return unpacked

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


class _Zstd:
    """zstandard's decompressor with the interface of bz2's and lzma's."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self.inner, self.waiting = new(), b""

    def decompress(self, data: bytes, most: int) -> bytes:
        packed = self.waiting + data
        start, pieces, size = 0, [], 0
        while start < len(packed) and size < most and not self.inner.eof:
            pieces.append(self.inner.decompress(packed[start : start + ZST_CHUNK]))
            size += len(pieces[-1])
            start += ZST_CHUNK
        self.waiting = packed[start:]
        return b"".join(pieces)

    @property
    def needs_input(self) -> bool:
        return not self.waiting

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data + self.waiting


def _decompressor(kind: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """(makes a decompressor of one member, the errors that it raises for damaged data)."""
    if kind == ".gz":
        return _Gzip, (zlib.error,)
    if kind == ".xz":
        return (lambda: lzma.LZMADecompressor(memlimit=MEMORY)), (lzma.LZMAError, EOFError)
    if kind == ".bz2":
        return bz2.BZ2Decompressor, (OSError, EOFError, ValueError)
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst files needs one more package: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor()
    return (lambda: _Zstd(decompressor.decompressobj)), (zstandard.ZstdError,)


class Unpacked:
    """The unpacked bytes of an open file whose format is `kind`, a key of MAGIC."""

    def __init__(self, raw: BinaryIO, kind: str, size: int, damages: list[Damage], skip_damage: bool = False) -> None:
        self.raw, self.kind, self.size, self.damages, self.skip_damage = raw, kind, size, damages, skip_damage
        self.new, self.errors = _decompressor(kind)
        self.data = b""  # packed bytes that are read and not used yet
        self.ended = self.failed = False  # at the end of the file; because the disk cannot be read

    def pieces(self) -> Iterator[bytes]:
        """Unpacks member after member. The iterator ends at the end of the file or at the first damage."""
        members, name = 0, NAMES[self.kind]
        while self._member_follows(members):
            member, last, at = self.new(), b"", 0
            try:
                while not member.eof:
                    if member.needs_input and not self.data and not self._read():
                        if not self.failed:
                            self._note(f"a {name} stream that ends too early", 0)
                        return
                    packed, self.data = self.data, b""
                    if packed:
                        last, at = packed, self.raw.tell() - len(packed)
                    yield member.decompress(packed, MOST)
                self.data = member.unused_data
            except self.errors:
                yield from self._skip(last, at, f"a broken {name} stream")
            members += 1

    def _read(self) -> bool:
        """Reads more packed bytes; False at the end of the file."""
        if self.ended:
            return False
        try:
            piece = self.raw.read(CHUNK)
        except OSError as error:
            self._note(read_error(error), self.size - self.raw.tell())
            piece, self.failed = b"", True
        self.data += piece
        self.ended = not piece
        return not self.ended

    def _member_follows(self, members: int) -> bool:
        """Whether another member begins here. Zero bytes between members are padding (gzip on tape, xz)."""
        while True:
            if members:
                self.data = self.data.lstrip(b"\0")
            if len(self.data) >= LONGEST_HEADER or not self._read():
                break
        if not self.data:
            return False
        if members and kind_of(self.data) != self.kind:
            at = self.raw.tell() - len(self.data)
            self._note(f"bytes after the end of the {NAMES[self.kind]} stream", self.size - at, at)
            self.data, self.ended = b"", True
            return False
        return True

    def _skip(self, last: bytes, at: int, reason: str) -> Iterator[bytes]:
        """Notes damage in `last`, the packed bytes at `at`, and continues with the next member."""
        self.data = last[1:]
        found = None
        while self.skip_damage:
            found = _MEMBERS[self.kind].search(self.data)
            if found:
                self.data = self.data[found.start() :]
                break
            self.data = self.data[-LONGEST_HEADER:]
            if not self._read():
                break
        end = self.raw.tell() - len(self.data) if found else self.size
        self._note(reason, end - at, at)
        if found:
            yield GAP
        else:
            self.data, self.ended = b"", True

    def _note(self, reason: str, lost: int, at: int | None = None) -> None:
        self.damages.append(Damage(reason, self.raw.tell() if at is None else at, max(0, lost)))


def read_error(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"
