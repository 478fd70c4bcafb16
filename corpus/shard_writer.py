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

`ShardWriter` only appends. It writes to the staging folder `<folder>.partial`, which `replace_dataset` renames when it
is complete. `ShardWriter.state` records the valid size of each file, from which a killed run resumes.

Read next: prepare_text.py and prepare_chats.py (use ShardWriter), dataset_meta.py (meta.json), shard_reader.py.
"""

import array
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.checksums import checksum, file_checksum
from common.errors import UserError
from common.files import replace_folder, write_error
from corpus.block_checksums import ChecksummedFile
from corpus.dataset_meta import TOKEN_DTYPES, PathLike, resolve_link

SHARD_TOKENS = 100_000_000
KNOWN_FILES = (
    "meta.json",
    "progress.json",
    "*.json.tmp",  # left by a killed run of an earlier version
    ".*.tmp",
    ".*.gone",
    ".tokens-*",  # locks of token folders
    "*.bin",
    "*.mask",
    "*.crc",
    "*.idx",
    "*.idx.npy",
    "train.jsonl",
    "val.jsonl",
    "tokens-*",
)


def token_dtype(vocab_size: int) -> str:
    """The dtype of token ids: "uint16" for up to 65,535 entries, else "uint32"."""
    return TOKEN_DTYPES[vocab_size > 65_535]


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


def open_shard_writer(folder: PathLike, split: str, dtype: str, state: dict[str, Any] | None = None) -> ShardWriter:
    """The writer of a split: train splits in numbered shards, validation splits in one."""
    return ShardWriter(folder, split, dtype, SHARD_TOKENS if split.startswith("train") else 0, state)


def require_train_split(splits: dict[str, Any], problem: str) -> None:
    """Raises UserError with the message `problem` if there is no train split."""
    if "train" not in splits:
        raise UserError(problem)


@contextlib.contextmanager
def report_write_errors(folder: PathLike) -> Iterator[None]:
    """Context manager that turns an OSError (disk full, no permission) into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise write_error(folder, error) from error


def dataset_staging_folder(out_dir: PathLike) -> Path:
    """`<out_dir>.partial`, where a dataset is written; beside the target if `out_dir` is a symbolic link."""
    target = resolve_link(out_dir)
    return target.with_name(target.name + ".partial")


def check_replaceable(out_dir: PathLike, known_files: tuple[str, ...] = KNOWN_FILES) -> bool:
    """Whether `out_dir` holds an older dataset, which `replace_dataset` will replace.

    Raises UserError if it holds files with names outside `known_files`, because they would be deleted.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: choose another --out_dir")
    if not out_dir.is_dir():
        return False
    names = [path for path in out_dir.iterdir() if not any(path.match(pattern) for pattern in known_files)]
    if names:
        raise UserError(
            f"{out_dir} holds files that data_process.py did not write ({names[0].name}): move them or choose another "
            "--out_dir"
        )
    return (out_dir / "meta.json").is_file()


def replace_dataset(staging: PathLike, out_dir: PathLike) -> None:
    """Rename the staging folder to `out_dir`; an older dataset is renamed first and deleted afterwards."""
    replace_folder(staging, resolve_link(out_dir))
