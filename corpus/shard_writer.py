"""Writes token shards, the training data format of data_process.py and the training scripts.

    folder/  meta.json                        splits and shards, with the checksums of their files and of itself;
                                              written last (dataset_meta.py)
             train_000.bin  train_001.bin     concatenated token ids: little-endian uint16, or uint32 if the
                                              vocabulary has more than 65,535 entries
             train_zh_000.bin  …              pretraining data: each shard holds one language (and one source),
                                              named in its entry of meta.json
             train_000.idx.npy                int64 offset of each document; one more entry than documents
             train_000.mask                   chats only: uint8, one byte per token, 1 = trained
             train_000.crc                    checksums of the blocks of .bin and .mask (block_checksums.py)
             val_zh.bin  val_en.bin  ...      the same for the validation splits

    document i of a shard = bin[idx[i] : idx[i + 1]]

`ShardWriter` only appends. `ShardWriter.state` records the valid size of each file, from which a killed run resumes.

Read next: dataset_writer.py (the staging folder of a dataset), dataset_meta.py (meta.json), shard_reader.py.
"""

import array
import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from common.checksums import checksum, file_checksum
from common.errors import UserError
from corpus.block_checksums import ChecksummedFile
from corpus.dataset_meta import TOKEN_DTYPES, PathLike

SHARD_TOKENS = 100_000_000


class ShardWriter:
    """Appends the documents of one split to shards of about `shard_tokens` tokens (0: one shard without a number).

    With the `state` of an earlier writer, it truncates the files to that state and appends to them.
    """

    def __init__(
        self,
        out_dir: PathLike,
        split: str,
        dtype: str,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = Path(out_dir), split, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = [dict(shard) for shard in state["shards"]] if state else []
        self.bytes = state["bytes"] if state else 0
        self.files: dict[str, ChecksummedFile] = {}
        self.offsets = array.array("q")
        if self.shards:
            self._open(self.shards[-1])

    def add(self, ids: Any, mask: Any = None, utf8_bytes: int = 0) -> None:
        """Append one document: ids, for chats the mask of the same length, and the UTF-8 bytes of its text."""
        ids = np.asarray(ids, dtype=np.dtype(self.dtype).newbyteorder("<"))
        assert mask is None or len(mask) == len(ids), "the mask needs one entry per token"
        if not self.shards or (self.shard_tokens and self.shards[-1]["tokens"] >= self.shard_tokens):
            self._new_shard(mask is not None)
        self.files[".bin"].write(ids.tobytes())
        if mask is not None:
            self.files[".mask"].write(np.asarray(mask, dtype=np.uint8).tobytes())
        shard = self.shards[-1]
        self.offsets.append(shard["tokens"])
        shard["tokens"] += len(ids)
        shard["documents"] += 1
        self.bytes += utf8_bytes

    def state(self) -> dict[str, Any]:
        """Sync the files to disk; return their sizes and checksums as plain values for a progress file."""
        self._write_offsets()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.shards:
            self.shards[-1]["checksums"] = {suffix: file.checksum for suffix, file in self.files.items()}
        return {"shards": [dict(shard) for shard in self.shards], "bytes": self.bytes}

    def close(self) -> dict[str, Any]:
        """Finish the files; return the split's entry of meta.json. Raises UserError if a file has changed meanwhile."""
        self._close_shard()
        for shard in self.shards:
            (self.folder / (shard["file"] + ".idx")).unlink()
        shards = [{name: shard[name] for name in ("file", "tokens", "documents", "checksums")} for shard in self.shards]
        totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
        return {"shards": shards, **totals, "bytes": self.bytes}

    def abort(self) -> None:
        """Close the files without finishing them; the last `state` stays valid."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        self.files = {}

    def _new_shard(self, masked: bool) -> None:
        self._close_shard()
        name = f"{self.split}_{len(self.shards):03d}" if self.shard_tokens else self.split
        for path in self.folder.glob(name + ".*"):  # left by a run that was killed after its last state
            path.unlink()
        self.shards.append({"file": name, "tokens": 0, "documents": 0, "masked": masked, "checksums": {}})
        self._open(self.shards[-1])

    def _open(self, shard: dict[str, Any]) -> None:
        sizes = {".bin": shard["tokens"] * np.dtype(self.dtype).itemsize, ".idx": shard["documents"] * 8}
        if shard["masked"]:
            sizes[".mask"] = shard["tokens"]
        for suffix, size in sizes.items():
            path = self.folder / (shard["file"] + suffix)
            self.files[suffix] = ChecksummedFile(path, size, shard["checksums"].get(suffix))

    def _write_offsets(self) -> None:
        if self.files:
            self.files[".idx"].write(np.asarray(self.offsets, dtype="<i8").tobytes())
            self.offsets = array.array("q")

    def _close_shard(self) -> None:
        if not self.files:
            return
        self._write_offsets()
        for file in self.files.values():
            file.close()
        shard, path = self.shards[-1], str(self.folder / self.shards[-1]["file"])
        # The raw index stays until `close`: a resumed run may start from an earlier state of this shard.
        raw = Path(path + ".idx").read_bytes()
        if checksum(raw) != self.files[".idx"].checksum:
            raise UserError(f"{path}.idx has changed since it was written: check the disk, then run the command again")
        np.save(path + ".idx.npy", np.append(np.frombuffer(raw, "<i8"), shard["tokens"]).astype("<i8"))
        masks = [self.files[".mask"].block_checksums()] if shard["masked"] else []
        Path(path + ".crc").write_bytes(np.concatenate([self.files[".bin"].block_checksums(), *masks]).tobytes())
        sums = {suffix: self.files[suffix].checksum for suffix in (".bin", *([".mask"] if masks else []))}
        shard["checksums"] = sums | {suffix: file_checksum(path + suffix) for suffix in (".idx.npy", ".crc")}
        self.files = {}


class ShardSet:
    """The shards of a dataset: a ShardWriter for every split, opened for its first document.

    With the `states` of an earlier ShardSet (split -> ShardWriter.state), its writers resume.
    """

    def __init__(self, folder: Path, vocab_size: int, states: dict[str, Any] | None = None) -> None:
        self.folder, self.dtype = folder, TOKEN_DTYPES[vocab_size > 65_535]
        self.writers: dict[str, ShardWriter] = {}
        folder.mkdir(exist_ok=True)
        for split, state in (states or {}).items():
            self._open(split, state)

    def append(self, split: str, ids: Any, mask: Any = None, utf8_bytes: int = 0) -> None:
        """Append a document to a split, as ShardWriter.add."""
        (self.writers.get(split) or self._open(split)).add(ids, mask, utf8_bytes)

    def _open(self, split: str, state: dict[str, Any] | None = None) -> ShardWriter:
        """Train splits have numbered shards, validation splits one."""
        shard_tokens = SHARD_TOKENS if split.startswith("train") else 0
        self.writers[split] = ShardWriter(self.folder, split, self.dtype, shard_tokens, state)
        return self.writers[split]

    def states(self) -> dict[str, Any]:
        return {split: writer.state() for split, writer in self.writers.items()}

    def close(self) -> dict[str, Any]:
        """Finish the files; returns {split: its entry of meta.json}, sorted."""
        return {split: self.writers[split].close() for split in sorted(self.writers)}

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()
