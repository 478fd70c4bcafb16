"""Token shards on disk: what data_process.py writes and the training scripts read, without ever loading it whole.

    folder/  meta.json                        which splits and shards there are, written last
             train_000.bin  train_001.bin     token ids one after the other: little-endian uint16, or uint32
                                              when the vocabulary has more than 65,535 entries
             train_zh_000.bin  …              the same where each shard holds one language (and one source):
                                              its entry in meta.json says which, so that they can be mixed
             train_000.idx.npy                int64, where each document starts; one more entry than documents
             train_000.mask                   chats only: uint8, one byte a token, 1 where it is trained
             val_zh.bin  val_en.bin  ...      the same for the validation splits

    document i of a shard = bin[idx[i] : idx[i + 1]]

Writing is append-only and the folder appears under its name only when it is complete: `ShardWriter` works in a sibling
`<folder>.partial`, and `publish` renames. `ShardWriter.state` says how much of each file counts, so that a killed run
can be continued.

Read next: pack_texts.py and pack.py (who writes), shard_reader.py (reading).
"""

import array
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError

FORMAT = 1
SHARD_TOKENS = 100_000_000
COMMANDS = {  # by the kind of data
    "pretrain": "python data_process.py pretrain FILES…",
    "chats": "python data_process.py sft FILES…",
    "pairs": "python data_process.py dpo FILES…",
}
OUR_FILES = (
    "meta.json",
    "progress.json",
    "*.json.tmp",  # of a kill in `write_json`
    "*.bin",
    "*.mask",
    "*.idx",
    "*.idx.npy",
    "train.jsonl",
    "val.jsonl",
    "tokens-*",
)

Folder = str | os.PathLike[str]


def token_dtype(vocab_size: int) -> str:
    """ "uint16" while every id fits with room for none besides, else "uint32"."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


# ---- writing ---------------------------------------------------------------------------------------------------------
class ShardWriter:
    """Appends the documents of one split to shards of about `shard_tokens` tokens (0: one shard, without a number).

    `state` of an earlier writer continues its files where that writer's state was taken; what came later is cut off.
    """

    def __init__(
        self,
        out_dir: Folder,
        split: str,
        dtype: str,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = Path(out_dir), split, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = [dict(shard) for shard in state["shards"]] if state else []
        self.bytes = state["bytes"] if state else 0
        self.files: list[Any] = []
        self.starts = array.array("q")
        if self.shards:
            self._open(self.shards[-1]["masked"])

    def add(self, ids: Any, mask: Any = None, utf8_bytes: int = 0) -> None:
        """One document: its ids, for chats the mask of the same length, and how many bytes of text it stands for."""
        ids = np.asarray(ids, dtype=np.dtype(self.dtype).newbyteorder("<"))
        assert mask is None or len(mask) == len(ids), "one mask entry a token"
        if not self.shards or (self.shard_tokens and self.shards[-1]["tokens"] >= self.shard_tokens):
            self._new_shard(mask is not None)
        self.files[0].write(ids.tobytes())
        if mask is not None:
            self.files[2].write(np.asarray(mask, dtype=np.uint8).tobytes())
        shard = self.shards[-1]
        self.starts.append(shard["tokens"])
        shard["tokens"] += len(ids)
        shard["documents"] += 1
        self.bytes += utf8_bytes

    def state(self) -> dict[str, Any]:
        """Everything so far is on disk, and this is how much it is: plain values for a progress file."""
        self._write_starts()
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return {"shards": [dict(shard) for shard in self.shards], "bytes": self.bytes}

    def close(self) -> dict[str, Any]:
        """Finish the files; returns the split's entry of meta.json."""
        self._close_shard()
        for shard in self.shards:
            (self.folder / (shard["file"] + ".idx")).unlink()
        shards = [{name: shard[name] for name in ("file", "tokens", "documents")} for shard in self.shards]
        totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
        return {"shards": shards, **totals, "bytes": self.bytes}

    def abort(self) -> None:
        """Let go of the files without finishing them; what the last `state` vouched for stays valid."""
        for file in self.files:
            with contextlib.suppress(OSError):
                file.close()
        self.files = []

    def _new_shard(self, masked: bool) -> None:
        self._close_shard()
        name = f"{self.split}_{len(self.shards):03d}" if self.shard_tokens else self.split
        for path in self.folder.glob(name + ".*"):  # of a run that was killed after its last state
            path.unlink()
        self.shards.append({"file": name, "tokens": 0, "documents": 0, "masked": masked})
        self._open(masked)

    def _open(self, masked: bool) -> None:
        shard = self.shards[-1]
        sizes = {".bin": shard["tokens"] * np.dtype(self.dtype).itemsize, ".idx": shard["documents"] * 8}
        if masked:
            sizes[".mask"] = shard["tokens"]
        for suffix, size in sizes.items():
            file = (self.folder / (shard["file"] + suffix)).open("ab")
            self.files.append(file)
            if file.tell() < size:
                raise OSError(f"{file.name} is shorter than its progress file says")
            file.truncate(size)

    def _write_starts(self) -> None:
        if self.files:
            self.files[1].write(np.asarray(self.starts, dtype="<i8").tobytes())
            self.starts = array.array("q")

    def _close_shard(self) -> None:
        if not self.files:
            return
        self._write_starts()
        for file in self.files:
            file.close()
        self.files = []
        shard = self.shards[-1]
        # The raw index stays until `close`: an earlier state of this shard may still be the one to continue from.
        starts = np.append(np.fromfile(self.folder / (shard["file"] + ".idx"), dtype="<i8"), shard["tokens"])
        np.save(self.folder / (shard["file"] + ".idx.npy"), starts.astype("<i8"))


def open_writer(folder: Folder, split: str, dtype: str, state: dict[str, Any] | None = None) -> ShardWriter:
    """The writer of a split as our folders have it: training data in shards, a validation split in one file."""
    return ShardWriter(folder, split, dtype, SHARD_TOKENS if split.startswith("train") else 0, state)


def require_train(splits: dict[str, Any], problem: str) -> None:
    """Raises UserError with the problem, which says what to do, unless there is something to train on."""
    if "train" not in splits:
        raise UserError(problem)


@contextlib.contextmanager
def writing(folder: Folder) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write under a temporary name and rename: the file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(path)


def partial_folder(out_dir: Folder) -> Path:
    """Where a data set grows until it is complete: beside its place, and on the disk that a link points to."""
    place = _place(out_dir)
    return place.with_name(place.name + ".partial")


def _place(out_dir: Folder) -> Path:
    path = Path(out_dir)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


def check_replaceable(out_dir: Folder, ours: tuple[str, ...] = OUR_FILES) -> bool:
    """True when `out_dir` holds an older data set, which `publish` will replace.

    Raises UserError when it holds files that are not ours (by their names): they would be lost.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: choose another --out_dir")
    if not out_dir.is_dir():
        return False
    names = [path for path in out_dir.iterdir() if not any(path.match(pattern) for pattern in ours)]
    if names:
        raise UserError(
            f"{out_dir} holds files that are not ours ({names[0].name}): move them or choose another --out_dir"
        )
    return (out_dir / "meta.json").is_file()


def publish(partial: Folder, out_dir: Folder) -> None:
    """Rename the complete folder to its name; an older one of that name is set aside first and deleted afterwards."""
    partial, out_dir = Path(partial), _place(out_dir)
    old = out_dir.with_name(out_dir.name + ".old")
    if out_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
        out_dir.rename(old)
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_meta(folder: Folder) -> dict[str, Any]:
    """The folder's meta.json. Raises UserError naming the command to run when there is none, or one of another kind."""
    path = Path(folder) / "meta.json"
    command = command_for(Path(folder))
    if not path.is_file():
        raise UserError(f"no training data in {folder}: run `{command}` first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and isinstance(meta["splits"], dict):
            return meta
        raise UserError(f"{path}: format {meta['format']}, this version reads {FORMAT}: run `{command}` again")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the meta.json of a data folder: run `{command}` again") from None


def fingerprint(folder: Folder, split: str = "train") -> str:
    """16 hex digits that name the data of a split, wherever the folder is.

    From the checksums in meta.json; of a folder without them from the sizes and the first and last MB of its files.
    """
    meta = read_meta(folder)
    entry = meta["splits"][split]
    digest = hashlib.sha256(json.dumps([meta["dtype"], entry], sort_keys=True).encode())
    if not all(shard.get("checksums") for shard in entry["shards"]):
        names = [shard["file"] + suffix for shard in entry["shards"] for suffix in (".bin", ".mask", ".idx.npy")]
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + _both_ends(path))
    return digest.hexdigest()[:16]


def _both_ends(path: Path, size: int = 1 << 20) -> bytes:
    with path.open("rb") as file:
        first = file.read(size)
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return first + file.read(size)


def command_for(folder: Path, masked: bool = False) -> str:
    """The command that makes such a folder, told from its name."""
    names = (folder.name, folder.absolute().parent.name)
    kind = "pairs" if any(name.startswith("dpo") for name in names) else "chats"
    return COMMANDS[kind if masked or folder.name.startswith(("sft", "dpo", "tokens-")) else "pretrain"]
