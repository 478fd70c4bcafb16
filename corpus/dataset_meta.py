"""The meta.json of a folder of training data: written, read, checked, and the data set's fingerprint.

    {"format": 2,  "kind": "pretrain", "chats" or "pairs",  "dtype": "uint16" or "uint32",
     "splits": {"train": {"shards": [{"file": "train_000", "tokens": n, "documents": n, "checksums": {".bin": n, ...}}],
                          "tokens": n, "documents": n, "bytes": n}, "val_zh": ..., ...},
     "tokenizer": fingerprint,  "vocab_size": n,  "checksum": of all of these, ...}

Format 1, which earlier versions wrote, has no checksums and is read without.
Read next: shard_writer.py (the files that it describes), shard_reader.py (who reads them).
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from common.checksums import has_valid_checksum, with_checksum
from common.errors import UserError
from common.files import set_aside, write_json

FORMAT, WITHOUT_CHECKSUMS = 2, 1  # what is written, and an earlier version of it that is read
COMMANDS = {  # by the kind of data
    "pretrain": "python data_process.py pretrain FILES…",
    "chats": "python data_process.py sft FILES…",
    "pairs": "python data_process.py dpo FILES…",
}
DTYPES = ("uint16", "uint32")
SUMMED = {".bin", ".idx.npy", ".crc"}  # the files of every shard; chats have a .mask as well

Folder = str | os.PathLike[str]


# ---- writing and reading ---------------------------------------------------------------------------------------------
def write_meta(folder: Folder, content: dict[str, Any]) -> dict[str, Any]:
    """Write the folder's meta.json with this format's number and a checksum; returns it. Raises UserError."""
    content = with_checksum({**content, "format": FORMAT})
    write_json(Path(folder) / "meta.json", content)
    return content


def read_meta(folder: Folder) -> dict[str, Any]:
    """The meta.json of a folder of token shards.

    Raises UserError naming the command to run when there is none, a damaged one, or one of another kind.
    """
    meta, path = read_checked_meta(folder), Path(folder) / "meta.json"
    if meta is None:
        command, old = command_for(Path(folder)), set_aside(resolve_link(folder))
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


def resolve_link(folder: Folder) -> Path:
    """The folder itself, or the one that a link points to."""
    path = Path(folder)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


# ---- types of the fields ---------------------------------------------------------------------------------------------
def is_meta(meta: dict[str, Any], with_checksums: bool) -> bool:
    """Whether the fields that readers use have their types: a folder of an earlier version has no checksum."""
    shapes = {"kind": str, "dtype": str, "splits": dict}
    if any(not isinstance(meta.get(name), kind) for name, kind in shapes.items()) or meta["dtype"] not in DTYPES:
        return False
    if not isinstance(meta.get("tokenizer", ""), str) or not _is_count(meta.get("vocab_size", 0)):
        return False
    return all(
        isinstance(split, dict)
        and isinstance(split.get("shards"), list)
        and all(_is_count(split.get(name)) for name in ("tokens", "documents", "bytes"))
        and all(_is_shard(shard, with_checksums) for shard in split["shards"])
        for split in meta["splits"].values()
    )


def _is_shard(shard: Any, with_checksums: bool) -> bool:
    if not isinstance(shard, dict) or not all(_is_count(shard.get(name)) for name in ("tokens", "documents")):
        return False
    sums = shard.get("checksums") if with_checksums else dict.fromkeys(SUMMED)
    name = shard.get("file")
    named = isinstance(name, str) and Path(name).name == name  # a file of this folder, not of another one
    return named and isinstance(sums, dict) and sums.keys() >= SUMMED


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# ---- what is said about a folder -------------------------------------------------------------------------------------
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
