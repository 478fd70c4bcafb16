"""Writes, reads and validates the meta.json of a dataset folder; computes the dataset's fingerprint.

    {"format": 2,  "kind": "pretrain", "chats" or "pairs",  "dtype": "uint16" or "uint32",
     "splits": {"train": {"shards": [{"file": "train_000", "tokens": n, "documents": n, "checksums": {".bin": n, ...}}],
                          "tokens": n, "documents": n, "bytes": n}, "val_zh": ..., ...},
     "tokenizer": fingerprint,  "vocab_size": n,  "checksum": of all of these, ...}

Format 1, written by earlier versions, has no checksums; it can still be read.
Read next: shard_writer.py (the files that meta.json describes), shard_reader.py (reads them).
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from common.checksums import has_valid_checksum, with_checksum
from common.errors import UserError
from common.files import PathLike, find_replaced_folder, write_json

DATA_FORMAT, FORMAT_WITHOUT_CHECKSUMS = 2, 1  # the format that is written; the earlier one that can be read
PREPARE_COMMANDS = {  # by kind of data
    "pretrain": "python data_process.py pretrain FILES…",
    "chats": "python data_process.py sft FILES…",
    "pairs": "python data_process.py dpo FILES…",
    "prompts": "python data_process.py rl FILES…",
}
READERS = {  # kind of data -> what it is, and the scripts that read it
    "pretrain": "text for 1-pretrain.py",
    "chats": "chats for 3-full_sft.py and 4-lora_sft.py",
    "pairs": "pairs of answers for 5-dpo_train.py",
    "prompts": "prompts for 6-grpo_train.py",
}
TOKEN_DTYPES = ("uint16", "uint32")
CHECKSUMMED_SUFFIXES = {".bin", ".idx.npy", ".crc"}  # the files of every shard; chats also have a .mask


# ---- writing and reading ---------------------------------------------------------------------------------------------
def write_meta(folder: PathLike, content: dict[str, Any]) -> dict[str, Any]:
    """Write `content` to the folder's meta.json with the format number and a checksum; return what was written."""
    content = with_checksum({**content, "format": DATA_FORMAT})
    write_json(Path(folder) / "meta.json", content)
    return content


def read_meta(folder: PathLike) -> dict[str, Any]:
    """Read the meta.json of a folder of token shards.

    Raises UserError with the command to run if the file is missing, damaged or of another kind.
    """
    meta, path = read_checked_meta(folder), Path(folder) / "meta.json"
    if meta is None:
        command, old_folder = prepare_command(Path(folder)), find_replaced_folder(resolve_link(folder))
        if old_folder:
            raise UserError(
                f"no training data in {folder}: the command that replaces it was ended between two steps; run "
                f"`{command}` again (the older data is in {old_folder})"
            )
        raise UserError(f"no training data in {folder}: run `{command}` first")
    if not is_valid_meta(meta, with_checksums=meta["format"] == DATA_FORMAT):
        raise UserError(f"{path} is not the meta.json of a data folder: {repair_hint(folder)}")
    return meta


def check_kind(folder: PathLike, kind: str) -> None:
    """Raise UserError if a training script is given a file, or the data of another one. A missing folder passes."""
    path = Path(folder)
    advice = f"name another --data_path, or run `{PREPARE_COMMANDS[kind]}`"
    if path.is_file():
        raise UserError(f"{folder} is a file: --data_path is the folder that `{PREPARE_COMMANDS[kind]}` writes")
    if path.name.startswith("tokens-"):
        raise UserError(f"{folder} holds tokens only: --data_path is the folder above it, {path.parent}")
    meta = read_checked_meta(folder) or {}
    found = meta.get("kind", "messages")
    if found == "messages":  # chats or pairs
        found = _kind_of_rows(path / "train.jsonl")
    if found in READERS and found != kind:
        raise UserError(
            f"{folder} holds {READERS[found]}, this script reads {READERS[kind].split(' for ')[0]}: {advice}"
        )


def _kind_of_rows(path: Path) -> str:
    """Return "chats" or "pairs", by the first row; "" for a missing or damaged file, which other checks report."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline(1 << 20))
        return "pairs" if "chosen" in row else "chats" if "messages" in row else ""
    except (OSError, ValueError, TypeError, RecursionError):
        return ""


def read_checked_meta(folder: PathLike) -> dict[str, Any] | None:
    """Read the meta.json of token shards, or of the jsonl folder that holds them; None if there is none.

    Raises UserError if it is damaged.
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not the meta.json of a data folder: {repair_hint(folder)}") from None
    if version == DATA_FORMAT and not has_valid_checksum(meta):
        raise UserError(f"{path} is damaged (it differs from its checksum): {repair_hint(folder)}")
    if version not in (DATA_FORMAT, FORMAT_WITHOUT_CHECKSUMS):
        raise UserError(f"{path}: format {version}, this version reads {DATA_FORMAT}: {repair_hint(folder)}")
    return meta


def resolve_link(folder: PathLike) -> Path:
    """The folder, with a symbolic link resolved to its target."""
    path = Path(folder)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


# ---- types of the fields ---------------------------------------------------------------------------------------------
def is_valid_meta(meta: dict[str, Any], with_checksums: bool) -> bool:
    """Whether the fields that readers use have the right types; format 1 has no checksums."""
    field_types = {"kind": str, "dtype": str, "splits": dict}
    if (
        any(not isinstance(meta.get(name), kind) for name, kind in field_types.items())
        or meta["dtype"] not in TOKEN_DTYPES
    ):
        return False
    if not isinstance(meta.get("tokenizer", ""), str) or not _is_count(meta.get("vocab_size", 0)):
        return False
    return all(
        isinstance(split, dict)
        and isinstance(split.get("shards"), list)
        and all(_is_count(split.get(name)) for name in ("tokens", "documents", "bytes"))
        and all(_is_valid_shard(shard, with_checksums) for shard in split["shards"])
        for split in meta["splits"].values()
    )


def _is_valid_shard(shard: Any, with_checksums: bool) -> bool:
    if not isinstance(shard, dict) or not all(_is_count(shard.get(name)) for name in ("tokens", "documents")):
        return False
    checksums = shard.get("checksums") if with_checksums else dict.fromkeys(CHECKSUMMED_SUFFIXES)
    name = shard.get("file")
    is_local_name = isinstance(name, str) and Path(name).name == name  # a file name without a path
    return is_local_name and isinstance(checksums, dict) and checksums.keys() >= CHECKSUMMED_SUFFIXES


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# ---- hints, commands and fingerprints --------------------------------------------------------------------------------
_warned_folders: set[str] = set()


def warn_no_checksums(folder: PathLike) -> None:
    """Print once per folder, on rank 0 only, that an earlier version wrote it without checksums."""
    if str(folder) not in _warned_folders and os.environ.get("RANK", "0") == "0":
        print(
            f"note: {folder} was made by an earlier version and has no checksums, so damage to its files is not "
            f"detected: run `{prepare_command(Path(folder))}` again to add them",
            file=sys.stderr,
        )
    _warned_folders.add(str(folder))


def repair_hint(folder: PathLike, has_masks: bool = False) -> str:
    """How to repair a damaged folder, as the end of an error message."""
    folder = Path(folder)
    if folder.name.startswith("tokens-"):
        return f"delete {folder}, the next training run makes it again from the jsonl files beside it"
    return f"run `{prepare_command(folder, has_masks)}` again"


def data_fingerprint(folder: PathLike, split: str = "train") -> str:
    """Fingerprint of a split's data, 16 hex digits, independent of the folder's location.

    Hashes the checksums in meta.json; without checksums, the sizes and the first and last MiB of the files.
    """
    meta = read_meta(folder)
    entry = meta["splits"][split]
    digest = hashlib.sha256(json.dumps([meta["dtype"], entry], sort_keys=True).encode())
    if not all(shard.get("checksums") for shard in entry["shards"]):
        names = [shard["file"] + suffix for shard in entry["shards"] for suffix in (".bin", ".mask", ".idx.npy")]
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + _first_and_last_bytes(path))
    return digest.hexdigest()[:16]


def _first_and_last_bytes(path: Path, size: int = 1 << 20) -> bytes:
    with path.open("rb") as file:
        first = file.read(size)
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return first + file.read(size)


def prepare_command(folder: Path, has_masks: bool = False) -> str:
    """The command that creates the folder, inferred from the folder's name."""
    names = (folder.name, folder.absolute().parent.name)
    if folder.name.startswith("rl"):
        return PREPARE_COMMANDS["prompts"]
    kind = "pairs" if any(name.startswith("dpo") for name in names) else "chats"
    return PREPARE_COMMANDS[kind if has_masks or folder.name.startswith(("sft", "dpo", "tokens-")) else "pretrain"]
