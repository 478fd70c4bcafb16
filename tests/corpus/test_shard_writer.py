"""Promise: token shards round-trip exactly, are complete or absent, and damage to them is an error with its cause."""

import itertools
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.dataset_meta import DATA_FORMAT, read_meta, write_meta
from corpus.dataset_writer import check_replaceable, dataset_staging_folder, replace_dataset, report_write_errors
from corpus.shard_reader import open_split
from corpus.shard_writer import ShardSet, ShardWriter


def write(folder: Path, documents, masks=None, dtype="uint16", shard_tokens=100, split="train") -> dict:
    writer = ShardWriter(folder, split, dtype, shard_tokens)
    for ids, mask in zip(documents, masks or itertools.repeat(None), strict=False):
        writer.add(ids, mask, utf8_bytes=len(ids))
    meta = {"format": DATA_FORMAT, "kind": "pretrain", "dtype": dtype, "splits": {split: writer.close()}}
    write_meta(folder, meta)
    return meta["splits"][split]


IDS = st.lists(st.lists(st.integers(0, 65_535), max_size=30), max_size=30)


@settings(max_examples=60, deadline=None)
@given(documents=IDS, masked=st.booleans(), wide=st.booleans(), shard_tokens=st.sampled_from([0, 1, 7, 1000]))
def test_any_documents_round_trip(documents, masked, wide, shard_tokens):
    dtype = "uint32" if wide else "uint16"
    documents = [[i * 65_537 for i in ids] for ids in documents] if wide else documents
    masks = [[i % 2 for i in ids] for ids in documents] if masked else None
    with tempfile.TemporaryDirectory() as name:
        entry = write(Path(name), documents, masks, dtype, shard_tokens)
        split = pickle.loads(pickle.dumps(open_split(name, "train")))
        assert split.documents == entry["documents"] == len(documents)
        stream = [i for ids in documents for i in ids]
        assert split.tokens == entry["tokens"] == entry["bytes"] == len(stream)
        assert split.lengths().tolist() == [len(ids) for ids in documents]
        assert split.offsets().tolist() == [0, *itertools.accumulate(len(ids) for ids in documents)]
        assert split.read(0, split.tokens).tolist() == stream
        assert split.read(len(stream) // 3, len(stream) // 2).tolist() == stream[len(stream) // 3 : len(stream) // 2]
        for i, ids in enumerate(documents):
            found, mask = split.read_document(i)
            assert found.tolist() == ids and (mask is None if not masked else mask.tolist() == masks[i])
        flat = [m for mask in masks for m in mask] if masked else [1] * len(stream)
        assert split.read_mask(0, split.tokens).tolist() == flat


def test_files_match_the_documented_format(tmp_path):
    write(tmp_path, [[1, 2, 3], [258]], shard_tokens=0, split="val_zh")
    assert (tmp_path / "val_zh.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 2, 1])
    assert np.load(tmp_path / "val_zh.idx.npy").tolist() == [0, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta.json",
        "val_zh.bin",
        "val_zh.crc",
        "val_zh.idx.npy",
    ]
    write(tmp_path, [[1] * 60, [2] * 60, [3] * 60], shard_tokens=100)
    assert {"train_000.bin", "train_001.bin"} <= {path.name for path in tmp_path.iterdir()}
    dtypes = [ShardSet(tmp_path, vocab_size).dtype for vocab_size in (6400, 65_535, 65_536)]
    assert dtypes == ["uint16", "uint16", "uint32"]


@settings(max_examples=40, deadline=None)
@given(documents=IDS, kept=st.integers(0, 30), lost=st.integers(0, 30), shard_tokens=st.sampled_from([0, 5, 40]))
def test_a_writer_resumes_from_its_state(documents, kept, lost, shard_tokens):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        write(Path(one), documents, shard_tokens=shard_tokens)
        killed = ShardWriter(other, "train", "uint16", shard_tokens)
        for ids in documents[:kept]:
            killed.add(ids, utf8_bytes=len(ids))
        state = json.loads(json.dumps(killed.state()))
        for ids in documents[kept : kept + lost]:
            killed.add(ids)
        killed.abort()
        again = ShardWriter(other, "train", "uint16", shard_tokens, state)
        for ids in documents[kept:]:
            again.add(ids, utf8_bytes=len(ids))
        meta = {"format": DATA_FORMAT, "kind": "pretrain", "dtype": "uint16", "splits": {"train": again.close()}}
        write_meta(other, meta)
        names = sorted(path.name for path in Path(one).iterdir())
        assert names == sorted(path.name for path in Path(other).iterdir())
        assert all((Path(one) / name).read_bytes() == (Path(other) / name).read_bytes() for name in names)


def test_errors_about_missing_other_and_damaged_folders_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no training data.*data_process.py pretrain"):
        read_meta(tmp_path / "pretrain")
    with pytest.raises(UserError, match=r"no training data.*data_process.py sft"):
        read_meta(tmp_path / "sft")
    for content in ("not json", "[]", '{"format": 1}', '{"format": 99, "splits": {}}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError, match=r"run `python data_process\.py"):
            read_meta(tmp_path)
    write(tmp_path, [[1, 2, 3]] * 9)
    with pytest.raises(UserError, match=r"no split 'val_en' \(it has train\)"):
        open_split(tmp_path, "val_en")
    with (tmp_path / "train_000.bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"damaged or incomplete \(10 of 54 bytes\)"):
        open_split(tmp_path, "train")
    with pytest.raises(IndexError):
        write(tmp_path, [[1, 2, 3]])
        open_split(tmp_path, "train").read(0, 4)


def test_replace_dataset_replaces_the_whole_folder(tmp_path):
    out, partial = tmp_path / "pretrain", dataset_staging_folder(tmp_path / "pretrain")
    assert partial == tmp_path / "pretrain.partial"
    for ids in ([1, 2], [3]):
        assert check_replaceable(out) == out.exists()
        partial.mkdir()
        write(partial, [ids])
        replace_dataset(partial, out)
        assert open_split(out, "train").read(0, len(ids)).tolist() == ids
        assert [path.name for path in tmp_path.iterdir()] == ["pretrain"]


def test_folders_with_other_files_are_never_replaced(tmp_path):
    (tmp_path / "novel.txt").write_text("mine")
    with pytest.raises(UserError, match=r"did not write \(novel.txt\)"):
        check_replaceable(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        check_replaceable(tmp_path / "novel.txt")
    assert dataset_staging_folder("some/folder/").name == "folder.partial"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert dataset_staging_folder(link) == tmp_path / "elsewhere.partial"


def test_a_write_error_is_one_line():
    with pytest.raises(UserError, match="cannot write out: No space left on device"), report_write_errors("out"):
        raise OSError(28, "No space left on device")
