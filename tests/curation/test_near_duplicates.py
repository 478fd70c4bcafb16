"""Promise: near-duplicates are dropped with high recall and precision, the first document of a cluster is kept, and the
result does not depend on workers or interruptions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from common.errors import UserError
from corpus.stats import DataStats
from curation import near_duplicates
from curation.near_duplicates import (
    KEYS_PER_DOCUMENT,
    band_keys,
    cluster_representatives,
    merge_clusters,
    minhash_signatures,
    row_text_hash,
    shingle_hashes,
)
from curation.ngrams import alphanumeric, code_points, ngram_hashes
from curation.transform import read_numbered_rows
from tests.helpers import write_rows
from tests.planted import planted_rows

RECALL, PRECISION = 0.97, 0.995
GOLDEN = ["0xb9f392762d0a5a0d", "0x258fd582db1c7673"]  # computed from the formula with Python integers


def read_kept_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("text_*.jsonl")) for line in path.open(encoding="utf-8")]


def run_dedup(*files, out_dir, **flags) -> list[dict]:
    arguments = ["dedup", *map(str, files), "--out_dir", str(out_dir)]
    for name, value in flags.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    data_process.main(arguments)
    return read_kept_rows(out_dir)


# ---- hashes ----------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.text("ab中文", max_size=40), st.integers(1, 14))
def test_ngram_hashes_are_equal_where_ngrams_are(text, n):
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    hashes = ngram_hashes(code_points(text), n).tolist()
    assert len(hashes) == len(grams) and len(set(hashes)) == len(set(grams))
    assert dict(zip(grams, hashes, strict=True)) == dict(zip(reversed(grams), reversed(hashes), strict=True))
    assert ngram_hashes(code_points("前" + text), n).tolist()[1:] == hashes or not hashes


def test_hashes_match_golden_values():
    assert alphanumeric("Hello,  世界。１") == "hello世界１"
    assert [hex(value) for value in ngram_hashes(code_points("abc世"), 3).tolist()] == GOLDEN


def test_signatures_estimate_the_jaccard_similarity():
    random = np.random.default_rng(0)
    for fraction in (0.5, 0.8, 0.95):
        common, one, other = (random.integers(0, 2**63, n, dtype=np.uint64) for n in (int(4000 * fraction), 4000, 4000))
        rest = 4000 - len(common)
        pair = [np.concatenate([common, tail[:rest]]) for tail in (one, other)]
        signatures = minhash_signatures(pair)
        similarity = len(common) / (len(common) + 2 * rest)
        assert (
            abs((signatures[0] == signatures[1]).mean() - similarity) < 4 * (similarity * (1 - similarity) / 112) ** 0.5
        )


def test_band_keys_are_equal_exactly_where_the_bands_are():
    signatures = np.arange(3 * 112, dtype=np.uint32).reshape(3, 112)
    signatures[1] = signatures[0]
    signatures[1, 8 * 5 + 7] += 1
    keys = band_keys(signatures)
    assert keys.shape == (3, 14) and (keys[0] == keys[1]).tolist() == [band != 5 for band in range(14)]
    assert not (keys[0] == keys[2]).any() and len(set(keys[0].tolist())) == 14


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30), st.integers(1, 5))
def test_merge_clusters_finds_the_connected_components(pairs, parts):
    first = np.arange(20)
    for part in range(parts):  # one band at a time
        some = pairs[part::parts]
        merge_clusters(first, np.array([one for one, _ in some], int), np.array([other for _, other in some], int))
    expected = list(range(20))
    for _ in range(20):
        for one, other in pairs:
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert first.tolist() == expected


# ---- planted duplicates ----------------------------------------------------------------------------------------------
def recall_and_precision(rows: list[dict], kept_rows: list[dict]) -> tuple[float, float]:
    """(recall, precision) of the dropped rows."""
    kept_ids = {row["id"] for row in kept_rows}
    dropped_rows = [row for row in rows if row["id"] not in kept_ids]
    copies = sum(row["copy_of"] is not None for row in rows)
    true_positives = sum(row["copy_of"] is not None for row in dropped_rows)
    return true_positives / copies, true_positives / len(dropped_rows)


def test_planted_near_duplicates_are_found(tmp_path):
    rows = list(planted_rows(10_000, 0.2))
    assert 1900 < sum(row["copy_of"] is not None for row in rows) < 2100
    kept_rows = run_dedup(write_rows(tmp_path / "a.jsonl", rows), out_dir=tmp_path / "out")
    recall, precision = recall_and_precision(rows, kept_rows)
    assert recall >= RECALL and precision >= PRECISION
    assert [row["id"] for row in kept_rows] == sorted(row["id"] for row in kept_rows)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rules"]["near-duplicate"]["dropped"] == 10_000 - len(kept_rows) and report["read"] == 10_000
    example = report["rules"]["near-duplicate"]["examples"][0][-1]
    assert example.startswith("kept: ") and "\nthis: " in example and len(example) > 200


def test_the_first_copy_is_kept_and_the_others_are_listed(tmp_path):
    text = "".join(f"第{i}句话讲的是河流与村庄的故事，" for i in range(30))
    one, other = write_rows(tmp_path / "1.jsonl", [{"text": text, "id": 1}]), tmp_path / "2.jsonl"
    write_rows(
        other,
        [{"text": text.replace("，", " ， "), "id": 2}, {"text": text + "完。", "id": 3}, {"text": "短", "id": 4}],
    )
    assert [row["id"] for row in run_dedup(one, other, out_dir=tmp_path / "out")] == [1, 4]
    lines = [line.split("\t") for line in (tmp_path / "out" / "dropped.tsv").read_text().splitlines()]
    assert [line[:3] for line in lines] == [
        [f"{other}:1", "exact duplicate", f"of {one}:1"],  # differs in white space only
        [f"{other}:2", "near-duplicate", f"of {one}:1"],
    ]
    assert [row["id"] for row in run_dedup(other, one, out_dir=tmp_path / "out")] == [2, 4]


def test_texts_without_letters_and_short_texts_are_deduplicated(tmp_path):
    texts = ["！！！", "。。。", "好", "好。", "hi", "a b", "！！！"]
    kept_rows = run_dedup(
        write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts]), out_dir=tmp_path / "out"
    )
    assert [row["text"] for row in kept_rows] == ["！！！", "。。。", "好", "hi", "a b"]
    assert all(len(shingle_hashes(text)) == 1 for text in texts)


def test_exact_only_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    path = write_rows(
        tmp_path / "a.jsonl", [{"text": "一样 的文本"}, {"text": "一样的文本\n"}, {"text": "一样的文本。"}]
    )
    assert len(run_dedup(path, out_dir=tmp_path / "out", exact_only=True)) == 2
    with pytest.raises(UserError, match=r'dedup needs rensa: pip install "rensa>=0.5,<0.6", or --exact_only'):
        run_dedup(path, out_dir=tmp_path / "near")
    assert not (tmp_path / "near.partial").exists()


def test_chats_and_pairs_are_deduplicated(tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "河流从哪里来？"}, {"role": "assistant", "content": "从山里来。" * 9}]
    }
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏"}
    kept_rows = run_dedup(write_rows(tmp_path / "a.jsonl", [chat, pair, chat, pair]), out_dir=tmp_path / "out")
    assert kept_rows == [chat, pair]


# ---- resuming, several processes, memory per document ----------------------------------------------------------------
def test_a_resumed_run_hashes_no_document_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    path = write_rows(tmp_path / "a.jsonl", planted_rows(3000, 0.3))
    expected = run_dedup(path, out_dir=tmp_path / "whole")
    hash_rows, calls = near_duplicates.document_keys, []

    def fail_once(rows, exact_only):
        calls.append(len(rows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return hash_rows(rows, exact_only)

    monkeypatch.setattr(near_duplicates, "document_keys", fail_once)
    with pytest.raises(KeyboardInterrupt):
        run_dedup(path, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run_dedup(path, out_dir=tmp_path / "out") == expected
    assert sum(calls) == 3000 + calls[3] and not (tmp_path / "out.partial").exists()


def test_several_processes_keep_the_same_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", planted_rows(2500, 0.3))
    expected, parallel = run_dedup(path, out_dir=tmp_path / "one"), run_dedup(path, out_dir=tmp_path / "two", workers=2)
    assert expected == parallel
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()


def test_memory_and_disk_per_document_are_bounded(tmp_path):
    import tracemalloc

    count = 200_000
    keys = np.random.default_rng(0).integers(0, 2**63, (count, KEYS_PER_DOCUMENT), dtype=np.uint64)
    keys[1::2, 3] = keys[::2, 3]
    keys.tofile(tmp_path / "keys")
    assert (tmp_path / "keys").stat().st_size == 120 * count
    del keys
    tracemalloc.start()
    first = cluster_representatives(tmp_path / "keys")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first == np.arange(count) // 2 * 2).all()
    assert peak < 60 * count + (80 << 20), f"{peak / count:.0f} bytes per document"


def test_incompatible_flags_are_reported_in_one_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    for flags, words in (
        ({"executor": "local", "exact_only": True}, "--exact_only cannot be combined with --executor"),
        ({"executor": "slurm"}, "--executor slurm needs --partition NAME"),
        ({"executor": "slurm", "partition": "p"}, "no sbatch on this machine"),
    ):
        with pytest.raises(UserError, match=words):
            run_dedup(path, out_dir=tmp_path / "out", **flags)
    assert not list(tmp_path.glob("out*"))


def test_chats_are_equal_only_if_their_messages_are(tmp_path):
    """Equal words split into other messages, with other roles or as a plain text are not a duplicate."""
    rows = [
        {"messages": [{"role": "user", "content": "q\na"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\nb"}]},
        {"conversations": [{"from": "human", "value": "q  a"}, {"from": "gpt", "value": "b "}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"text": "q\na\nb"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    hashes = [row_text_hash(row) for row in read_numbered_rows([path], DataStats())]
    assert hashes[0] == hashes[2] and len(set(hashes)) == 4
