"""CRC-32 checksums of token shards: one per file and one per 64 KiB block.

    NAME.crc     little-endian uint32: the CRC-32 of every 64 KiB of NAME.bin, then of NAME.mask if there is one
    meta.json    for each shard: {"checksums": {".bin": 8 hex digits, ".idx.npy": …, ".crc": …, ".mask": …}}

A row of a batch is about 1 KiB in a file of gigabytes. A process verifies a block the first time it reads from it, so
opening a dataset costs nothing, and each block costs about 25 microseconds once.

Read next: shard_writer.py (computes the checksums), shard_reader.py (verifies them), ../common/checksums.py (CRC-32).
"""

import os
import zlib
from array import array
from pathlib import Path

import numpy as np

from common.checksums import CHECKSUM_CHUNK_BYTES
from common.errors import UserError

BLOCK_BYTES = 1 << 16  # bytes


class ChecksummedFile:
    """An append-only file with its CRC-32s: `checksum` of the file, `block_checksums()` of every BLOCK_BYTES bytes."""

    def __init__(self, path: Path, size: int | None = None, checksum: str | None = None) -> None:
        """Open `path` for appending and truncate it to `size` bytes (default: its current size).

        Raises UserError if these bytes differ from `checksum`, OSError if the file is shorter than `size`.
        """
        self._file = path.open("ab")
        self.name = str(path)
        current_size = self._file.tell()
        size = current_size if size is None else size
        if current_size < size:
            raise OSError(f"{path} is shorter than its progress file says")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        self.size = 0
        self._pending = bytearray()  # buffered: documents are short, and every checksum and write call has a cost
        self._block_crcs, self._last_block_crc, self._last_block_bytes, self._crc = array("I"), 0, 0, 0
        with path.open("rb") as written:
            while piece := written.read(CHECKSUM_CHUNK_BYTES):
                self._update_checksums(piece)
                self.size += len(piece)
        if checksum is not None and checksum != self.checksum:
            self.close()
            raise UserError(
                f"{path} has changed since an earlier run wrote it: run the same command again, from the start"
            )

    @property
    def checksum(self) -> str:
        """CRC-32 of the file so far, 8 hex digits."""
        self._write_pending()
        return f"{self._crc:08x}"

    def block_checksums(self) -> np.ndarray:
        """CRC-32 of each block, shape (blocks,), little-endian uint32; the last block may be shorter."""
        self._write_pending()
        checksums = np.array(self._block_crcs, dtype="<u4")
        return np.append(checksums, np.array([self._last_block_crc], "<u4")) if self._last_block_bytes else checksums

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self._pending += data
        if len(self._pending) >= BLOCK_BYTES:
            self._write_pending()

    def _write_pending(self) -> None:
        if self._pending:
            data, self._pending = bytes(self._pending), bytearray()
            self._file.write(data)
            self._update_checksums(data)

    def _update_checksums(self, data: bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)
        if self._last_block_bytes + len(data) < BLOCK_BYTES:
            self._last_block_crc = zlib.crc32(data, self._last_block_crc)
            self._last_block_bytes += len(data)
            return
        start = BLOCK_BYTES - self._last_block_bytes
        self._block_crcs.append(zlib.crc32(data[:start], self._last_block_crc))
        view = memoryview(data)
        while start + BLOCK_BYTES <= len(data):
            self._block_crcs.append(zlib.crc32(view[start : start + BLOCK_BYTES]))
            start += BLOCK_BYTES
        self._last_block_crc, self._last_block_bytes = zlib.crc32(view[start:]), len(data) - start

    # The file methods that job_state.py calls.
    def flush(self) -> None:
        self._write_pending()
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        try:
            self._write_pending()
        finally:
            self._file.close()


class VerifiedBlocks:
    """Records which blocks of a file this process has verified. It is pickled into worker processes."""

    def __init__(self, size: int, checksums: np.ndarray | None) -> None:
        self.size, self.checksums = size, checksums
        self.verified = bytearray(-(-size // BLOCK_BYTES))

    def is_verified(self, begin: int, end: int) -> bool:
        """Whether all blocks that hold bytes begin … end - 1 are verified."""
        return self.verified.find(0, begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)) < 0

    def block_range(self, begin: int, end: int) -> tuple[int, int]:
        """First and end byte of the blocks that hold bytes begin … end - 1."""
        return begin // BLOCK_BYTES * BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, self.size)

    def find_mismatch(self, data: bytes, begin: int) -> int:
        """Verify whole blocks that start at byte `begin` of the file.

        Returns the first byte of the first block that differs from its checksum. Returns -1 if all blocks match, and
        marks them as verified.
        """
        first, view = begin // BLOCK_BYTES, memoryview(data)
        for number in range(-(-len(data) // BLOCK_BYTES)):
            block = view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            if (
                self.checksums is not None
                and not self.verified[first + number]
                and zlib.crc32(block) != self.checksums[first + number]
            ):
                return begin + number * BLOCK_BYTES
        self.verified[first : first + -(-len(data) // BLOCK_BYTES)] = b"\1" * -(-len(data) // BLOCK_BYTES)
        return -1
