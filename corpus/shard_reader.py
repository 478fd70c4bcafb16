"""Random access to token shards of any size.

    split = open_split("dataset/pretrain", "train")     a TokenSplit
    split.read(start, stop)                             token ids, shape (stop - start,)
    split.read_document(i)                              ids and mask of one document
    split.tokens, split.documents                       totals

Opening a split checks file sizes; reading calls pread at an offset. So start-up time and memory do not grow with the
data, and each process reads only its own rows. (Pages of a memory map would count as memory of the process: after one
epoch, the whole dataset.)

Every block of 64 KiB is verified against its checksum once per process, and every index as a whole. In all folders,
also in those without checksums, ids outside the vocabulary, mask values other than 0 and 1 and document offsets out of
order raise a UserError.

The meta.json entry of a shard may have labels: language and source. `open_split` can select shards by them.
Read next: shard_writer.py (file format), mixing.py (labels and weights), ../trainer/datasets.py (rows of a batch).
"""

import contextlib
import itertools
import os
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.checksums import file_checksum
from common.errors import UserError
from corpus.block_checksums import BLOCK_BYTES, VerifiedBlocks
from corpus.dataset_meta import DATA_FORMAT, PathLike, read_meta, repair_hint, warn_no_checksums

MAX_OPEN_FILES = 128  # a terabyte has more shards than a process may have open files
MASK_DTYPE = np.dtype(np.uint8)


def open_split(
    folder: PathLike, split: str, keep_shard: Callable[[dict[str, Any]], bool] = lambda shard: True
) -> "TokenSplit":
    """Open a split of a dataset folder, or those of its shards for whose meta.json entry `keep_shard` returns True.

    Raises UserError if the split is missing or its files are incomplete.
    """
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise UserError(f"{folder} has no split {split!r} (it has {', '.join(meta['splits']) or 'none'})")
    if meta["format"] != DATA_FORMAT:
        warn_no_checksums(folder)
    return TokenSplit(folder, [shard for shard in meta["splits"][split]["shards"] if keep_shard(shard)], meta)


class TokenSplit:
    """All documents of a split as one stream of tokens. `tokens` and `documents` are totals over its shards.

    Each process opens the files at the first read; pickling the object copies no data. Reading raises UserError if a
    file differs from its checksum or holds invalid ids, masks or offsets.
    """

    def __init__(self, folder: PathLike, shards: list[dict[str, Any]], meta: dict[str, Any]) -> None:
        self.folder, self.dtype = Path(folder), np.dtype(meta["dtype"]).newbyteorder("<")
        self.vocab_size = meta.get("vocab_size") or 2 ** (8 * self.dtype.itemsize)
        self.shards = {shard["file"]: shard for shard in shards}
        self.names = list(self.shards)
        self._token_ends = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self._document_ends = np.cumsum([0, *(shard["documents"] for shard in shards)])
        self.tokens, self.documents = int(self._token_ends[-1]), int(self._document_ends[-1])
        self.has_masks = meta["kind"] in ("chats", "pairs") or any(self._has_mask(shard) for shard in shards[:1])
        for shard in shards:
            self._check_sizes(shard)
        self._files: dict[str, Any] = {}
        self._indices: dict[str, np.ndarray] = {}
        self._blocks: dict[str, VerifiedBlocks] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids start … stop - 1 of the stream, shape (stop - start,), in the dtype on disk, across shards."""
        return self._read_stream(start, stop, ".bin", self.dtype)

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """The loss mask of these tokens, uint8, shape (stop - start,); ones if the split has no masks."""
        if self.has_masks:
            return self._read_stream(start, stop, ".mask", MASK_DTYPE)
        return np.ones(len(self._read_stream(start, stop, ".bin", self.dtype)), np.uint8)

    def read_document(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids, mask) of document i, each of shape (tokens,); mask is None for plain text."""
        which = int(np.searchsorted(self._document_ends, i, side="right")) - 1
        name, at = self.names[which], i - self._document_ends[which]
        start, stop = (int(edge) for edge in self._shard_offsets(name)[at : at + 2])
        ids = self._read_shard(name, ".bin", self.dtype, start, stop)
        return ids, self._read_shard(name, ".mask", MASK_DTYPE, start, stop) if self.has_masks else None

    def lengths(self) -> np.ndarray:
        """Tokens of each document, shape (documents,), int64. Unlike all else here, its size grows with the data."""
        return np.concatenate([np.diff(self._shard_offsets(name)) for name in self.names] or [np.zeros(0, np.int64)])

    def offsets(self) -> np.ndarray:
        """Start of each document in the stream, and the end of the last one: shape (documents + 1,), int64."""
        return np.concatenate([[0], np.cumsum(self.lengths())]).astype(np.int64)

    def _read_stream(self, start: int, stop: int, suffix: str, dtype: np.dtype) -> np.ndarray:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.tokens}")
        pieces = []
        first = int(np.searchsorted(self._token_ends, start, side="right")) - 1
        for name, (begin, end) in zip(self.names[first:], itertools.pairwise(self._token_ends[first:]), strict=True):
            if begin >= stop:
                break
            pieces.append(self._read_shard(name, suffix, dtype, max(start, begin) - begin, min(stop, end) - begin))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype)

    def _read_shard(self, name: str, suffix: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Tokens or mask values start … stop - 1 of a shard. Verifies the blocks that this process reads first."""
        file = name + suffix
        begin, end = int(start) * dtype.itemsize, int(stop) * dtype.itemsize
        blocks = self._blocks.get(file) or self._open_blocks(name, suffix)
        if blocks.is_verified(begin, end):
            return np.frombuffer(self._read_at(file, begin, end - begin), dtype)
        first, last = blocks.block_range(begin, end)
        data = self._read_at(file, first, last - first)
        if (damaged_at := blocks.find_mismatch(data, first)) >= 0:
            raise self._damage_error(file, f"its bytes from {damaged_at:,} on differ from their checksum")
        found = np.frombuffer(data, dtype)
        self._check_values(file, found)
        return found[(begin - first) // dtype.itemsize :][: stop - start]

    def _open_blocks(self, name: str, suffix: str) -> VerifiedBlocks:
        """The VerifiedBlocks of a .bin or .mask file, with checksums if the folder has them."""
        shard = self.shards[name]
        size, checksums = shard["tokens"] * (self.dtype.itemsize if suffix == ".bin" else 1), None
        if "checksums" in shard:
            path = self.folder / f"{name}.crc"
            if not path.is_file() or file_checksum(path) != shard["checksums"][".crc"]:
                raise self._damage_error(path.name, "it is missing or differs from its checksum")
            ends = -(-shard["tokens"] * self.dtype.itemsize // BLOCK_BYTES)
            checksums = np.fromfile(path, "<u4")
            checksums = checksums[:ends] if suffix == ".bin" else checksums[ends:]
            if len(checksums) != -(-size // BLOCK_BYTES):
                raise self._damage_error(path.name, f"it has {len(checksums):,} checksums for {name}{suffix}")
        self._blocks[name + suffix] = VerifiedBlocks(size, checksums)
        return self._blocks[name + suffix]

    def _check_values(self, file: str, found: np.ndarray) -> None:
        largest, limit = int(found.max(initial=0)), 2 if file.endswith(".mask") else self.vocab_size
        if largest >= limit:
            if limit == 2:
                raise self._damage_error(file, f"it holds {largest}, a mask is 0 or 1")
            raise self._damage_error(file, f"it holds the id {largest:,}, the vocabulary has {limit:,} entries")

    def _read_at(self, file: str, offset: int, size: int) -> bytes:
        if file not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self._close()
            try:
                self._files[file] = (self.folder / file).open("rb", buffering=0)
            except OSError as error:
                raise self._damage_error(file, f"it cannot be read ({error.strerror})") from None
        data = _read_at(self._files[file], offset, size)
        if len(data) < size:
            raise self._damage_error(file, "it was truncated while it was read")
        return data

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files = {}

    def _shard_offsets(self, name: str) -> np.ndarray:
        if name not in self._indices:
            self._indices[name] = self._open_index(name)
        return self._indices[name]

    def _open_index(self, name: str) -> np.ndarray:
        """Start of each document of a shard, and the end of the last one, shape (documents + 1,), int64."""
        path, shard = self.folder / f"{name}.idx.npy", self.shards[name]
        try:
            if "checksums" in shard and file_checksum(path) != shard["checksums"][".idx.npy"]:
                raise self._damage_error(path.name, "it differs from its checksum")
            offsets = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, TypeError, EOFError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError):
            raise self._damage_error(path.name, "it is not a numpy array") from None
        if (
            not isinstance(offsets, np.ndarray)
            or offsets.dtype != np.int64
            or offsets.shape != (shard["documents"] + 1,)
        ):
            raise self._damage_error(path.name, f"it is not an int64 array of {shard['documents'] + 1:,} offsets")
        if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) < 0).any():
            raise self._damage_error(path.name, f"its offsets do not rise from 0 to {shard['tokens']:,}")
        return offsets

    def _has_mask(self, shard: dict[str, Any]) -> bool:
        if "checksums" in shard:
            return ".mask" in shard["checksums"]
        return (self.folder / f"{shard['file']}.mask").is_file()

    def _check_sizes(self, shard: dict[str, Any]) -> None:
        """Compare file sizes with meta.json, so that an incomplete copy is an error before training starts."""
        sizes = {".bin": shard["tokens"] * self.dtype.itemsize} | ({".mask": shard["tokens"]} if self.has_masks else {})
        for suffix, expected in sizes.items():
            path = self.folder / (shard["file"] + suffix)
            found = path.stat().st_size if path.is_file() else -1
            if found != expected:
                size = "missing" if found < 0 else f"damaged or incomplete ({found:,} of {expected:,} bytes)"
                raise UserError(f"{path} is {size}: {repair_hint(self.folder, self.has_masks)}")
        index = self.folder / f"{shard['file']}.idx.npy"
        if not index.is_file() or index.stat().st_size < 8 * (shard["documents"] + 1):
            raise self._damage_error(index.name, "it is missing or incomplete")

    def _damage_error(self, file: str, problem: str) -> UserError:
        return UserError(f"{self.folder / file} is damaged: {problem}: {repair_hint(self.folder, self.has_masks)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_indices": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._close()


def _read_at(file: Any, offset: int, size: int) -> bytes:
    """Read `size` bytes at `offset`, fewer at the end of the file.

    Uses pread, because forked processes share the file position.
    """
    if not hasattr(os, "pread"):  # Windows, where processes are not forked
        file.seek(offset)
        return file.read(size)
    data = os.pread(file.fileno(), size, offset)
    while len(data) < size:
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
