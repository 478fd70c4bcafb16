"""Token shards on disk: what data_process.py writes and the training scripts read, without ever loading it whole.

    folder/  meta.json                        which splits and shards there are, with the checksums of their files and
                                              one of its own; written last (dataset_meta.py)
             train_000.bin  train_001.bin     token ids one after the other: little-endian uint16, or uint32
                                              when the vocabulary has more than 65,535 entries
             train_zh_000.bin  …              the same where each shard holds one language (and one source):
                                              its entry in meta.json says which, so that they can be mixed
             train_000.idx.npy                int64, where each document starts; one more entry than documents
             train_000.mask                   chats only: uint8, one byte a token, 1 where it is trained
             train_000.crc                    checksums of the blocks of .bin and .mask (block_checksums.py)
             val_zh.bin  val_en.bin  ...      the same for the validation splits

    document i of a shard = bin[idx[i] : idx[i + 1]]

Writing is append-only and the folder appears under its name only when it is complete: `ShardWriter` works in a sibling
`<folder>.partial`, and `publish` renames. `ShardWriter.state` says how much of each file counts, so that a killed run
can be continued.

Read next: prepare_text.py and prepare_chats.py (who writes), dataset_meta.py (meta.json), shard_reader.py (reading).
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
    "*.json.tmp",  # of a kill in an earlier version
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
    """ "uint16" while every id fits with room for none besides, else "uint32"."""
    return TOKEN_DTYPES[vocab_size > 65_535]


class ShardWriter:
    """Appends the documents of one split to shards of about `shard_tokens` tokens (0: one shard, without a number).

    `state` of an earlier writer continues its files where that writer's state was taken; what came later is cut off.
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
        """One document: its ids, for chats the mask of the same length, and how many bytes of text it stands for."""
        ids = np.asarray(ids, dtype=np.dtype(self.dtype).newbyteorder("<"))
        assert mask is None or len(mask) == len(ids), "one mask entry a token"
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
        """Everything so far is on disk, and this is how much it is: plain values for a progress file."""
        self._write_offsets()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.shards:
            self.shards[-1]["checksums"] = {suffix: file.checksum for suffix, file in self.files.items()}
        return {"shards": [dict(shard) for shard in self.shards], "bytes": self.bytes}

    def close(self) -> dict[str, Any]:
        """Finish the files; returns the split's entry of meta.json. Raises UserError for files changed meanwhile."""
        self._close_shard()
        for shard in self.shards:
            (self.folder / (shard["file"] + ".idx")).unlink()
        shards = [{name: shard[name] for name in ("file", "tokens", "documents", "checksums")} for shard in self.shards]
        totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
        return {"shards": shards, **totals, "bytes": self.bytes}

    def abort(self) -> None:
        """Let go of the files without finishing them; what the last `state` vouched for stays valid."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        self.files = {}

    def _new_shard(self, masked: bool) -> None:
        self._close_shard()
        name = f"{self.split}_{len(self.shards):03d}" if self.shard_tokens else self.split
        for path in self.folder.glob(name + ".*"):  # of a run that was killed after its last state
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
        # The raw index stays until `close`: an earlier state of this shard may still be the one to continue from.
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
    """The writer of a split as our folders have it: training data in shards, a validation split in one file."""
    return ShardWriter(folder, split, dtype, SHARD_TOKENS if split.startswith("train") else 0, state)


def require_train_split(splits: dict[str, Any], problem: str) -> None:
    """Raises UserError with the problem, which says what to do, unless there is something to train on."""
    if "train" not in splits:
        raise UserError(problem)


@contextlib.contextmanager
def report_write_errors(folder: PathLike) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into one line for the user."""
    try:
        yield
    except OSError as error:
        raise write_error(folder, error) from error


def dataset_staging_folder(out_dir: PathLike) -> Path:
    """Where a data set grows until it is complete: beside its place, and on the disk that a link points to."""
    target = resolve_link(out_dir)
    return target.with_name(target.name + ".partial")


def check_replaceable(out_dir: PathLike, known_files: tuple[str, ...] = KNOWN_FILES) -> bool:
    """True when `out_dir` holds an older data set, which `publish` will replace.

    Raises UserError when it holds files that are not ours (by their names): they would be lost.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: choose another --out_dir")
    if not out_dir.is_dir():
        return False
    names = [path for path in out_dir.iterdir() if not any(path.match(pattern) for pattern in known_files)]
    if names:
        raise UserError(
            f"{out_dir} holds files that are not ours ({names[0].name}): move them or choose another --out_dir"
        )
    return (out_dir / "meta.json").is_file()


def replace_dataset(staging: PathLike, out_dir: PathLike) -> None:
    """Rename the complete folder to its name; an older one of that name is set aside first and deleted afterwards."""
    replace_folder(staging, resolve_link(out_dir))
