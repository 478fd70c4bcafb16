"""Token shards on disk: what data_process.py writes and the training scripts read, without ever loading it whole.

    folder/  meta.json                        which splits and shards there are, with the checksums of their files and
                                              one of its own; written last
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
can be continued. Folders of format 1, which earlier versions wrote, have no checksums and are read without.

Read next: prepare_text.py and prepare_chats.py (who writes), shard_reader.py (reading).
"""

import array
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.checksums import checksum, file_checksum, has_valid_checksum, with_checksum
from common.errors import UserError
from common.files import cannot_write, replace_folder, set_aside, write_json
from corpus.block_checksums import SummedFile
from corpus.meta_schema import DTYPES, is_meta

FORMAT, WITHOUT_CHECKSUMS = 2, 1  # what is written, and an earlier version of it that is read
SHARD_TOKENS = 100_000_000
COMMANDS = {  # by the kind of data
    "pretrain": "python data_process.py pretrain FILES…",
    "chats": "python data_process.py sft FILES…",
    "pairs": "python data_process.py dpo FILES…",
}
OUR_FILES = (
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

Folder = str | os.PathLike[str]


def token_dtype(vocab_size: int) -> str:
    """ "uint16" while every id fits with room for none besides, else "uint32"."""
    return DTYPES[vocab_size > 65_535]


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
        self.files: dict[str, SummedFile] = {}
        self.starts = array.array("q")
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
        self.starts.append(shard["tokens"])
        shard["tokens"] += len(ids)
        shard["documents"] += 1
        self.bytes += utf8_bytes

    def state(self) -> dict[str, Any]:
        """Everything so far is on disk, and this is how much it is: plain values for a progress file."""
        self._write_starts()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.shards:
            self.shards[-1]["checksums"] = {suffix: file.whole for suffix, file in self.files.items()}
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
            self.files[suffix] = SummedFile(path, size, shard["checksums"].get(suffix))

    def _write_starts(self) -> None:
        if self.files:
            self.files[".idx"].write(np.asarray(self.starts, dtype="<i8").tobytes())
            self.starts = array.array("q")

    def _close_shard(self) -> None:
        if not self.files:
            return
        self._write_starts()
        for file in self.files.values():
            file.close()
        shard, path = self.shards[-1], str(self.folder / self.shards[-1]["file"])
        # The raw index stays until `close`: an earlier state of this shard may still be the one to continue from.
        raw = Path(path + ".idx").read_bytes()
        if checksum(raw) != self.files[".idx"].whole:
            raise UserError(f"{path}.idx has changed since it was written: check the disk, then run the command again")
        np.save(path + ".idx.npy", np.append(np.frombuffer(raw, "<i8"), shard["tokens"]).astype("<i8"))
        masks = [self.files[".mask"].blocks()] if shard["masked"] else []
        Path(path + ".crc").write_bytes(np.concatenate([self.files[".bin"].blocks(), *masks]).tobytes())
        sums = {suffix: self.files[suffix].whole for suffix in (".bin", *([".mask"] if masks else []))}
        shard["checksums"] = sums | {suffix: file_checksum(path + suffix) for suffix in (".idx.npy", ".crc")}
        self.files = {}


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
        raise cannot_write(folder, error) from error


def write_meta(folder: Folder, content: dict[str, Any]) -> dict[str, Any]:
    """Write the folder's meta.json with this format's number and a checksum; returns it. Raises UserError."""
    content = with_checksum({**content, "format": FORMAT})
    write_json(Path(folder) / "meta.json", content)
    return content


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
    replace_folder(partial, _place(out_dir))


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_meta(folder: Folder) -> dict[str, Any]:
    """The meta.json of a folder of token shards.

    Raises UserError naming the command to run when there is none, a damaged one, or one of another kind.
    """
    meta, path = read_checked_meta(folder), Path(folder) / "meta.json"
    if meta is None:
        command, old = command_for(Path(folder)), set_aside(_place(folder))
        if old:
            raise UserError(
                f"no training data in {folder}: the command that replaces it was ended between two steps; run "
                f"`{command}` again (the older data is in {old})"
            )
        raise UserError(f"no training data in {folder}: run `{command}` first")
    if not is_meta(meta, with_checksums=meta["format"] == FORMAT):
        raise UserError(f"{path} is not the meta.json of a data folder: {way_back(folder)}")
    return meta


def read_checked_meta(folder: Folder) -> dict[str, Any] | None:
    """The meta.json that `write_meta` wrote, of token shards or of the rows beside them; None when there is none.

    Raises UserError when it is damaged.
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not the meta.json of a data folder: {way_back(folder)}") from None
    if version == FORMAT and not has_valid_checksum(meta):
        raise UserError(f"{path} is damaged (it differs from its checksum): {way_back(folder)}")
    if version not in (FORMAT, WITHOUT_CHECKSUMS):
        raise UserError(f"{path}: format {version}, this version reads {FORMAT}: {way_back(folder)}")
    return meta


_said: set[str] = set()


def say_without_checksums(folder: Folder) -> None:
    """Say once that a folder was made by an earlier version; of several processes of a run the first one says it."""
    if str(folder) not in _said and os.environ.get("RANK", "0") == "0":
        print(
            f"note: {folder} was made by an earlier version and has no checksums: damage to its files cannot be "
            f"noticed until `{command_for(Path(folder))}` makes it again",
            file=sys.stderr,
        )
    _said.add(str(folder))


def way_back(folder: Folder, masked: bool = False) -> str:
    """What to do about a damaged folder."""
    folder = Path(folder)
    if folder.name.startswith("tokens-"):
        return f"delete {folder}, the next training run makes it again from the rows beside it"
    return f"run `{command_for(folder, masked)}` again"


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
