"""Checksums of the files of a data folder: of whole files, and of blocks, so that a reader compares what it reads.

    NAME.crc     little-endian uint32: the CRC-32 of every 64 KiB of NAME.bin, then of NAME.mask where there is one
    meta.json    of every shard: {"checksums": {".bin": 8 hex digits, ".idx.npy": …, ".crc": …, ".mask": …}}

A row of a batch is about 1 KiB somewhere in gigabytes. Its block is read whole and compared the first time that a
process reads from it, so opening costs nothing and every block costs once: about 25 microseconds.

Read next: shard_writer.py (who writes), shard_reader.py (who compares), ../common/checksums.py (CRC-32).
"""

import os
import zlib
from array import array
from pathlib import Path

import numpy as np

from common.checksums import PIECE
from common.errors import UserError

BLOCK = 1 << 16  # bytes


class SummedFile:
    """A file to append to, and the CRC-32s of what is in it: `whole` of all of it, `blocks()` of every BLOCK bytes."""

    def __init__(self, path: Path, size: int | None = None, whole: str | None = None) -> None:
        """Open `path` and cut it to `size` bytes, all of it by default; `whole`: their checksum when they were written.

        Raises UserError when those bytes have changed, OSError when there are fewer.
        """
        self._file = path.open("ab")
        self.name = str(path)
        found = self._file.tell()
        size = found if size is None else size
        if found < size:
            raise OSError(f"{path} is shorter than its progress file says")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        self.size = 0
        self._waiting = bytearray()  # not yet counted and written: a document is short, and a call costs
        self._blocks, self._block, self._filled, self._whole = array("I"), 0, 0, 0
        with path.open("rb") as written:
            while piece := written.read(PIECE):
                self._count(piece)
                self.size += len(piece)
        if whole is not None and whole != self.whole:
            self.close()
            raise UserError(
                f"{path} has changed since an earlier run wrote it: run the same command again, from the start"
            )

    @property
    def whole(self) -> str:
        self._drain()
        return f"{self._whole:08x}"

    def blocks(self) -> np.ndarray:
        """Shape (blocks,), little-endian uint32; the last block may be shorter."""
        self._drain()
        sums = np.array(self._blocks, dtype="<u4")
        return np.append(sums, np.array([self._block], "<u4")) if self._filled else sums

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self._waiting += data
        if len(self._waiting) >= BLOCK:
            self._drain()

    def _drain(self) -> None:
        if self._waiting:
            data, self._waiting = bytes(self._waiting), bytearray()
            self._file.write(data)
            self._count(data)

    def _count(self, data: bytes) -> None:
        self._whole = zlib.crc32(data, self._whole)
        if self._filled + len(data) < BLOCK:
            self._block = zlib.crc32(data, self._block)
            self._filled += len(data)
            return
        start = BLOCK - self._filled
        self._blocks.append(zlib.crc32(data[:start], self._block))
        view = memoryview(data)
        while start + BLOCK <= len(data):
            self._blocks.append(zlib.crc32(view[start : start + BLOCK]))
            start += BLOCK
        self._block, self._filled = zlib.crc32(view[start:]), len(data) - start

    # What job_state.py needs of a file.
    def flush(self) -> None:
        self._drain()
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        try:
            self._drain()
        finally:
            self._file.close()


class Blocks:
    """Which blocks of a file this process has compared with their checksums. Pickled into worker processes."""

    def __init__(self, size: int, sums: np.ndarray | None) -> None:
        self.size, self.sums = size, sums
        self.seen = bytearray(-(-size // BLOCK))

    def known(self, begin: int, end: int) -> bool:
        """Whether all blocks of bytes begin … end - 1 were compared."""
        return self.seen.find(0, begin // BLOCK, -(-end // BLOCK)) < 0

    def around(self, begin: int, end: int) -> tuple[int, int]:
        """The bytes of the blocks that hold bytes begin … end - 1."""
        return begin // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, self.size)

    def compare(self, data: bytes, begin: int) -> int:
        """Compare whole blocks, which begin at byte `begin` of the file.

        Returns the first byte of one that differs from its checksum, or -1 when none does, after which they are known.
        """
        first, view = begin // BLOCK, memoryview(data)
        for number in range(-(-len(data) // BLOCK)):
            block = view[number * BLOCK : (number + 1) * BLOCK]
            if (
                self.sums is not None
                and not self.seen[first + number]
                and zlib.crc32(block) != self.sums[first + number]
            ):
                return begin + number * BLOCK
        self.seen[first : first + -(-len(data) // BLOCK)] = b"\1" * -(-len(data) // BLOCK)
        return -1
