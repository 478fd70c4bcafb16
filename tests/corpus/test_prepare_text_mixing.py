"""Promise: every training shard holds one language and one source, named in meta.json, also after a resume."""

import json

import pytest

from common.errors import UserError
from corpus.data_config import PretrainDataConfig
from corpus.dataset_meta import read_meta
from corpus.prepare_text import MAX_SOURCES, OTHER_SOURCE, prepare_text
from corpus.shard_reader import open_split
from corpus.stats import DataStats


def rows(folder, name, texts, source=None):
    lines = [json.dumps({"text": text} | ({"source": source} if source else {}), ensure_ascii=False) for text in texts]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


@pytest.fixture
def files(tmp_path):
    """Three files: source law in both languages, source tale, and rows without a source."""
    law = [f"第{i}条法律" for i in range(60)] + [f"law number {i}" for i in range(40)]
    one = rows(tmp_path, "one.jsonl", law, "law, old=yes")
    two = rows(tmp_path, "two.jsonl", [f"a tale of {i} dragons" for i in range(90)], "tale")
    return [one, two, rows(tmp_path, "three.txt.jsonl", [f"nobody knows {i}" for i in range(30)])]


def pack(files, tokenizer, out_dir, source_key="", on_batch=lambda: None):
    config = PretrainDataConfig(tuple(files), out_dir=out_dir, val_fraction=0.0, source_key=source_key)
    return prepare_text(config, tokenizer, DataStats(), on_batch)


def texts(tokenizer, out_dir, language, source):
    part = open_split(out_dir, "train", lambda shard: (shard["language"], shard["source"]) == (language, source))
    return [tokenizer.decode(part.read_document(i)[0][:-1].tolist()) for i in range(part.documents)]


def test_shards_are_labelled_by_language_and_source(tokenizer, files, tmp_path):
    meta = pack(files, tokenizer, tmp_path / "out", source_key="source")
    labels = {(shard["language"], shard["source"]) for shard in meta["splits"]["train"]["shards"]}
    assert labels == {("zh", "law_old_yes"), ("en", "law_old_yes"), ("en", "tale"), ("en", OTHER_SOURCE)}
    assert texts(tokenizer, tmp_path / "out", "zh", "law_old_yes") == [f"第{i}条法律" for i in range(60)]
    assert len(texts(tokenizer, tmp_path / "out", "en", "tale")) == 90
    whole = open_split(tmp_path / "out", "train")
    assert whole.documents == 220 == meta["splits"]["train"]["documents"]
    assert whole.tokens == sum(shard["tokens"] for shard in meta["splits"]["train"]["shards"])


def test_without_a_source_key_shards_have_languages_only_and_file_uses_the_file_name(tokenizer, files, tmp_path):
    plain = pack(files, tokenizer, tmp_path / "plain")["splits"]["train"]["shards"]
    assert {(shard["language"], shard["source"], shard["file"]) for shard in plain} == {
        ("zh", "", "train_zh_000"),
        ("en", "", "train_en_000"),
    }
    by_file = pack(files, tokenizer, tmp_path / "by_file", source_key="file")["splits"]["train"]["shards"]
    assert {shard["source"] for shard in by_file} == {"one", "two", "three"}


def test_sources_beyond_the_limit_are_merged(tokenizer, tmp_path):
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"text": f"text {i}", "source": f"https://example.org/{i}"}) for i in range(MAX_SOURCES + 50)]
    path.write_text("\n".join(lines) + "\n")
    shards = pack([path], tokenizer, tmp_path / "out", source_key="source")["splits"]["train"]["shards"]
    assert len({shard["source"] for shard in shards}) == MAX_SOURCES + 1
    assert sum(shard["documents"] for shard in shards if shard["source"] == OTHER_SOURCE) == 50


def test_a_killed_run_resumes_with_the_same_labels(tokenizer, files, tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.examples.BATCH_EXAMPLES", 10)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0.0)
    pack(files, tokenizer, tmp_path / "whole", source_key="source")
    calls = iter(range(100))

    def killed():
        if next(calls) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(files, tokenizer, tmp_path / "out", "source", killed)
    pack(files, tokenizer, tmp_path / "out", source_key="source")
    one, other = (sorted((tmp_path / name).glob("*.bin")) for name in ("whole", "out"))
    assert [path.name for path in one] == [path.name for path in other]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))
    assert read_meta(tmp_path / "whole")["splits"] == read_meta(tmp_path / "out")["splits"]


def test_a_damaged_shard_is_an_error(tokenizer, files, tmp_path):
    pack(files, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "train_zh_000.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="damaged or incomplete"):
        open_split(tmp_path / "out", "train")
