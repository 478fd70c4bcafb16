"""Decompresses .gz, .xz, .zst and .bz2 streams in bounded memory; damage is recorded with its offset, not raised.

    Decompressor(raw, file, ".gz").next_chunk()    bytes, at most about 1 MB (zstd: 32 MB); None at the end

A compressed file is a sequence of members: gzip members (RFC 1952), xz streams, zstd frames (RFC 8878) or bzip2
streams. pigz, bgzip, pbzip2 and `cat a.gz b.gz` write several. With `skip_damage` reading continues at the next member
after a damaged one, and GAP_LINE, a line that is malformed in UTF-8, marks the missing bytes.

Read next: damage.py, input_files.py (the caller).
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any

from common.errors import UserError
from corpus.damage import Damage, DataFile

PACKED_CHUNK_BYTES = 16 << 10  # compressed bytes per read
MAX_UNPACKED_BYTES = 1 << 20  # decompressed bytes of one chunk; gzip, bzip2 and xz respect this limit
ZSTD_CHUNK_BYTES = 1 << 10  # zstd may expand 4 bytes to 128 KB, so one call returns at most 32 MB
XZ_MEMORY_LIMIT = 1 << 30  # bytes
GAP_LINE = b"\xff\n"
MAGIC_BYTES = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}
COMPRESSION_NAMES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
_MEMBERS = {  # start of a member; longer than the magic number, to avoid matches inside compressed data
    ".gz": re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00-\x04][\x00-\x0d\xff]", re.DOTALL),
    ".xz": re.compile(rb"\xfd7zXZ\x00\x00[\x00\x01\x04\x0a]"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # or a skippable frame (pzstd)
    ".bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
MAX_MEMBER_HEADER_BYTES = 10  # longest match of these patterns


def compression_suffix(start: bytes) -> str:
    """Returns the suffix of the compression format that the first bytes show, or "" for an uncompressed file."""
    found = next((suffix for suffix, magic in MAGIC_BYTES.items() if start.startswith(magic)), "")
    return found or (".zst" if _MEMBERS[".zst"].match(start) else "")


class _GzipDecompressor:
    """zlib's decompressor with the interface of bz2 and lzma."""

    def __init__(self) -> None:
        self.inner, self.needs_input = zlib.decompressobj(zlib.MAX_WBITS | 16), True  # 16: a gzip header

    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        unpacked = self.inner.decompress(self.inner.unconsumed_tail + data, max_bytes)
        self.needs_input = not self.inner.unconsumed_tail and len(unpacked) < max_bytes
        return unpacked

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


class _ZstdDecompressor:
    """zstandard's decompressor with the interface of bz2 and lzma."""

    def __init__(self, make_decompressor: Callable[[], Any]) -> None:
        self.inner, self.pending = make_decompressor(), b""

    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        packed = self.pending + data
        start, chunks, size = 0, [], 0
        while start < len(packed) and size < max_bytes and not self.inner.eof:
            chunks.append(self.inner.decompress(packed[start : start + ZSTD_CHUNK_BYTES]))
            size += len(chunks[-1])
            start += ZSTD_CHUNK_BYTES
        self.pending = packed[start:]
        return b"".join(chunks)

    @property
    def needs_input(self) -> bool:
        return not self.pending

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data + self.pending


def _decompressor_factory(kind: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """Returns (factory of a decompressor for one member, exceptions it raises for damaged data)."""
    if kind == ".gz":
        return _GzipDecompressor, (zlib.error,)
    if kind == ".xz":
        return (lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_LIMIT)), (lzma.LZMAError, EOFError)
    if kind == ".bz2":
        return bz2.BZ2Decompressor, (OSError, EOFError, ValueError)
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst files needs one more package: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor()
    return (lambda: _ZstdDecompressor(decompressor.decompressobj)), (zstandard.ZstdError,)


class Decompressor:
    """Decompresses an open file of format `kind`, a key of MAGIC_BYTES. Damage is added to `file.damages`."""

    def __init__(self, raw: io.BufferedReader, file: DataFile, kind: str, skip_damage: bool = False) -> None:
        self.raw, self.file, self.kind, self.skip_damage = raw, file, kind, skip_damage
        self.make_decompressor, self.errors = _decompressor_factory(kind)
        self.member: Any = None  # the decompressor of the current member
        self.has_members = False
        self.data = b""  # compressed bytes that are read but not consumed
        self.last, self.offset = b"", 0  # the compressed bytes that were decompressed last
        self.at_end = False

    def next_chunk(self) -> bytes | None:
        """Returns the next bytes; None at the end of the file, or at the first damage unless `skip_damage`."""
        if self.member is None:
            if not self._member_follows():
                return None
            self.member, self.last, self.offset, self.has_members = self.make_decompressor(), b"", 0, True
        if self.member.needs_input and not self.data and not self._read_packed():
            if not self.file.has_failed:
                self._add_damage(f"truncated {COMPRESSION_NAMES[self.kind]} stream", self.raw.tell(), 0)
            return None
        packed, self.data = self.data, b""
        if packed:
            self.last, self.offset = packed, self.raw.tell() - len(packed)
        try:
            chunk: bytes = self.member.decompress(packed, MAX_UNPACKED_BYTES)
            if self.member.eof:
                self.data, self.member = self.member.unused_data, None
            return chunk
        except self.errors:
            return self._skip_to_next_member()

    def _read_packed(self) -> bool:
        """Reads more compressed bytes; False at the end of the file."""
        chunk = b"" if self.at_end else self.raw.read(PACKED_CHUNK_BYTES)
        self.data += chunk
        self.at_end = not chunk
        return not self.at_end

    def _member_follows(self) -> bool:
        """True if another member begins here. Zero bytes between members are padding (gzip on tape, xz)."""
        while True:
            if self.has_members:
                self.data = self.data.lstrip(b"\0")
            if len(self.data) >= MAX_MEMBER_HEADER_BYTES or not self._read_packed():
                break
        if self.data and self.has_members and compression_suffix(self.data) != self.kind:
            self._add_damage(
                f"bytes after the end of the {COMPRESSION_NAMES[self.kind]} stream", self.raw.tell() - len(self.data)
            )
            return False
        return bool(self.data)

    def _skip_to_next_member(self) -> bytes | None:
        """Records damage in the compressed bytes `last` and skips to the next member. Returns GAP_LINE, or None."""
        self.data, self.member, found = self.last[1:], None, None
        while self.skip_damage and not (found := _MEMBERS[self.kind].search(self.data)):
            self.data = self.data[-MAX_MEMBER_HEADER_BYTES:]
            if not self._read_packed():
                break
        end = self.file.size
        if found:
            self.data = self.data[found.start() :]
            end = self.raw.tell() - len(self.data)
        self._add_damage(f"a broken {COMPRESSION_NAMES[self.kind]} stream", self.offset, end - self.offset)
        return GAP_LINE if found else None

    def _add_damage(self, reason: str, offset: int, lost_bytes: int | None = None) -> None:
        """Records damage at a byte; by default, the rest of the file is lost."""
        lost_bytes = self.file.size - offset if lost_bytes is None else lost_bytes
        self.file.damages.append(Damage(reason, offset, max(0, lost_bytes)))
