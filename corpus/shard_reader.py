"""Reading token shards: the tokens that are asked for and no others, wherever they lie in however many gigabytes.

    open_split("dataset/pretrain", "train") -> TokenSplit    .read(start, stop)  .document(i)  .tokens  .documents

Opening looks at the sizes of the files; reading takes bytes from their place in a file. So neither start-up nor memory
grows with the data, and each of several processes reads its own rows only. (A memory map would do as well at first, but
its pages count as the process's own memory, and after an epoch that is the whole set.)

A shard may carry labels: the language and the source of its documents. `open_split` takes a choice of shards by them.

Reads   what shards.py describes.
Read next: shards.py (the files, who writes them), mix.py (who chooses by label), ../trainer/batches.py (rows).
"""

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from corpus.shards import Folder, command_for, read_meta

MOST_OPEN = 128  # files at a time: a terabyte has more shards than a process may have open files


def open_split(
    folder: Folder, split: str, chosen: Callable[[dict[str, Any]], bool] = lambda shard: True
) -> "TokenSplit":
    """One split of a data folder, or those of its shards that `chosen` takes by their entry in meta.json.

    Raises UserError when it is missing or its files are damaged.
    """
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise UserError(f"{folder} has no split {split!r} (it has {', '.join(meta['splits']) or 'none'})")
    return TokenSplit(folder, [shard for shard in meta["splits"][split]["shards"] if chosen(shard)], meta["dtype"])


class TokenSplit:
    """All documents of a split as one long stream. `tokens` and `documents` are totals over its shards.

    Files are opened at the first use, again in every worker process: copying the object copies no data.
    """

    def __init__(self, folder: Folder, shards: list[dict[str, Any]], dtype: str) -> None:
        self.folder, self.dtype = Path(folder), np.dtype(dtype).newbyteorder("<")
        self.names = [shard["file"] for shard in shards]
        self._token_ends = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self._document_ends = np.cumsum([0, *(shard["documents"] for shard in shards)])
        self.tokens, self.documents = int(self._token_ends[-1]), int(self._document_ends[-1])
        for shard in shards:
            self._check(shard)
        self.masked = any((self.folder / f"{name}.mask").is_file() for name in self.names[:1])
        self._files: dict[str, Any] = {}
        self._indices: dict[str, np.ndarray] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids start..stop of the stream, shape (stop - start,), in the dtype on disk, across shards."""
        return self._slice(start, stop, ".bin", self.dtype)

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """The mask of the same tokens, uint8; ones where the split has none (every token is trained)."""
        if self.masked:
            return self._slice(start, stop, ".mask", np.dtype(np.uint8))
        return np.ones(len(self._slice(start, stop, ".bin", self.dtype)), np.uint8)

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids, mask) of document i; mask is None for plain text."""
        which = int(np.searchsorted(self._document_ends, i, side="right")) - 1
        name, at = self.names[which], i - self._document_ends[which]
        start, stop = (int(edge) for edge in self._starts(name)[at : at + 2])
        ids = self._piece(name + ".bin", self.dtype, start, stop)
        return ids, self._piece(name + ".mask", np.dtype(np.uint8), start, stop) if self.masked else None

    def lengths(self) -> np.ndarray:
        """Tokens of every document, shape (documents,), int64. The one thing here that grows with the data."""
        return np.concatenate([np.diff(self._starts(name)) for name in self.names] or [np.zeros(0, np.int64)])

    def starts(self) -> np.ndarray:
        """Where every document starts in the stream, and where the last one ends: shape (documents + 1,), int64."""
        return np.concatenate([[0], np.cumsum(self.lengths())]).astype(np.int64)

    def _slice(self, start: int, stop: int, suffix: str, dtype: np.dtype) -> np.ndarray:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.tokens}")
        pieces = []
        first = int(np.searchsorted(self._token_ends, start, side="right")) - 1
        for name, (begin, end) in zip(self.names[first:], itertools.pairwise(self._token_ends[first:]), strict=True):
            if begin >= stop:
                break
            pieces.append(self._piece(name + suffix, dtype, max(start, begin) - begin, min(stop, end) - begin))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype)

    def _piece(self, file: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(_read_at(self._open(file), start * dtype.itemsize, (stop - start) * dtype.itemsize), dtype)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            if len(self._files) >= MOST_OPEN:
                self._close()
            self._files[file] = (self.folder / file).open("rb", buffering=0)
        return self._files[file]

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files = {}

    def _starts(self, name: str) -> np.ndarray:
        if name not in self._indices:
            self._indices[name] = np.load(self.folder / f"{name}.idx.npy", mmap_mode="r")
        return self._indices[name]

    def _check(self, shard: dict[str, Any]) -> None:
        """Sizes must be what meta.json says: a copy that was cut short is noticed before training, not amid it."""
        path = self.folder / (shard["file"] + ".bin")
        index = path.with_name(shard["file"] + ".idx.npy")
        want = shard["tokens"] * self.dtype.itemsize
        found = path.stat().st_size if path.is_file() else -1
        if found != want or not index.is_file() or index.stat().st_size < 8 * (shard["documents"] + 1):
            command = command_for(self.folder, path.with_suffix(".mask").exists())
            raise UserError(f"{path} is damaged or incomplete ({found:,} of {want:,} bytes): run `{command}` again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_indices": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._close()


def _read_at(file: Any, offset: int, size: int) -> bytes:
    """`size` bytes from their place. A forked process shares the file's position with its parent, so none is used."""
    if not hasattr(os, "pread"):  # Windows, where processes are not forked
        file.seek(offset)
        return file.read(size)
    data = os.pread(file.fileno(), size, offset)
    while len(data) < size:
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            raise OSError(f"{file.name} has become shorter while it was read")
        data += more
    return data
