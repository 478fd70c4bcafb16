"""The types of the fields of a data folder's meta.json. Read next: shard_writer.py (what the fields mean)."""

from pathlib import Path
from typing import Any

DTYPES = ("uint16", "uint32")
SUMMED = {".bin", ".idx.npy", ".crc"}  # the files of every shard; chats have a .mask as well


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
