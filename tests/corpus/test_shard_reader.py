"""Promise: start-up time and memory do not grow with the data, and each process reads only its own rows."""

import json
import os
import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from common.checksums import file_checksum
from common.errors import UserError
from corpus import shard_reader
from corpus.block_checksums import BLOCK_BYTES
from corpus.dataset_meta import write_meta
from corpus.shard_reader import open_split
from trainer.datasets import MicroBatches, PackedDataset, prefetch_batches
from trainer.sampler import BatchSampler

SHARD_TOKENS = 100_000_000


def sparse_set(folder: Path, gigabytes: float) -> Path:
    """A dataset of `gigabytes` GB in sparse files, which take no disk space; each shard starts with its number."""
    folder.mkdir()
    shards, size = [], 2 * SHARD_TOKENS
    sums = np.full(-(-size // BLOCK_BYTES), zlib.crc32(bytes(BLOCK_BYTES)), "<u4")
    sums[-1] = zlib.crc32(bytes(size % BLOCK_BYTES))
    for number in range(round(gigabytes * 1e9 / 2 / SHARD_TOKENS)):
        name = f"train_zh_{number:03d}"
        with (folder / f"{name}.bin").open("wb") as file:
            file.write(first := np.array([number + 1], "<u2").tobytes())
            file.truncate(size)
        sums[0] = zlib.crc32(first + bytes(BLOCK_BYTES - 2))
        (folder / f"{name}.crc").write_bytes(sums.tobytes())
        np.save(folder / f"{name}.idx.npy", np.array([0, SHARD_TOKENS]))
        label = {"language": "zh", "source": "", "checksums": {".bin": "not read"}}
        label["checksums"] |= {suffix: file_checksum(folder / f"{name}{suffix}") for suffix in (".idx.npy", ".crc")}
        shards.append({"file": name, "tokens": SHARD_TOKENS, "documents": 1, **label})
    splits = {"train": {"shards": shards, "tokens": SHARD_TOKENS * len(shards), "documents": len(shards), "bytes": 0}}
    write_meta(folder, {"kind": "pretrain", "dtype": "uint16", "splits": splits})
    return folder


def resident_mb() -> float:
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads its memory from /proc")
def test_memory_and_start_up_do_not_grow_with_the_data(tmp_path):
    figures = {}
    for gigabytes in (0.2, 4.0):
        folder = sparse_set(tmp_path / f"{gigabytes}", gigabytes)
        before, started = resident_mb(), time.process_time()
        data = PackedDataset(str(folder), "train", 512)
        batches = MicroBatches(data, BatchSampler(len(data), None, 64, 42), 8, rank=3, world_size=8)
        assert batches[0][0]["input_ids"].shape == (8, 512)
        seconds = time.process_time() - started
        for step in range(1, 300):
            batches[step]
        figures[gigabytes] = (seconds, resident_mb() - before)
    (short, little), (long, much) = figures.values()
    assert much < little + 16, f"{little:.0f} MB for 0.2 GB, {much:.0f} MB for 4 GB"
    assert long < short + 0.5, f"{short:.2f} s for 0.2 GB, {long:.2f} s for 4 GB"


def test_reads_across_shards_are_right_with_few_open_files(tmp_path, monkeypatch):
    folder = sparse_set(tmp_path / "data", 1.0)
    monkeypatch.setattr(shard_reader, "MAX_OPEN_FILES", 2)
    tokens = open_split(folder, "train")
    for number in (0, 4, 1, 3, 2):
        edge = number * SHARD_TOKENS
        assert tokens.read(edge, edge + 3).tolist() == [number + 1, 0, 0]
        if number:
            assert tokens.read(edge - 2, edge + 2).tolist() == [0, 0, number + 1, 0], "one read across two files"
        assert len(tokens._files) <= 2
    assert len(tokens.read(10, SHARD_TOKENS * 2)) == SHARD_TOKENS * 2 - 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_forked_workers_do_not_disturb_each_other(pretrain_dir):
    """Forked workers share the open files of their parent, so reads must not use the file position."""
    data = PackedDataset(str(pretrain_dir), "train", 32)
    sampler = BatchSampler(len(data), None, 8, 42)
    alone = [batch[0]["input_ids"].tolist() for batch in prefetch_batches(MicroBatches(data, sampler, 8, 0, 1), 0, 40)]
    data.batch(np.arange(4))  # the files are open now
    shared = [
        batch[0]["input_ids"].tolist() for batch in prefetch_batches(MicroBatches(data, sampler, 8, 0, 1), 0, 40, 2)
    ]
    assert shared == alone


def test_a_file_that_shrinks_while_read_is_an_error(tmp_path):
    folder = sparse_set(tmp_path / "data", 0.2)
    tokens = open_split(folder, "train")
    os.truncate(folder / "train_zh_000.bin", 100)
    with pytest.raises(UserError, match="truncated while it was read"):
        tokens.read(0, 512)
    assert json.loads((folder / "meta.json").read_text())["splits"]["train"]["tokens"] == SHARD_TOKENS
