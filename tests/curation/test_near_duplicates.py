"""Promise: near-duplicates go and nothing else, the first one stays, and every engine keeps the same rows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from common.errors import UserError
from corpus.stats import DataReport
from curation import near_duplicates
from curation.near_duplicates import KEYS, band_keys, first_of_cluster, join, row_hash, shingles, signatures_of_shingles
from curation.ngrams import codes_of, ngram_hashes, skeleton
from curation.transform import numbered_rows
from tests.planted import rows as planted_rows

RECALL, PRECISION = 0.97, 0.995
GOLDEN = ["0xb9f392762d0a5a0d", "0x258fd582db1c7673"]  # worked out with Python's integers from the formula


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def kept(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("text_*.jsonl")) for line in path.open(encoding="utf-8")]


def run(*files, out_dir, **flags) -> list[dict]:
    arguments = ["dedup", *map(str, files), "--out_dir", str(out_dir)]
    for name, value in flags.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    data_process.main(arguments)
    return kept(out_dir)


# ---- hashes ----------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.text("ab中文", max_size=40), st.integers(1, 14))
def test_ngram_hashes_are_equal_where_ngrams_are(text, n):
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    hashes = ngram_hashes(codes_of(text), n).tolist()
    assert len(hashes) == len(grams) and len(set(hashes)) == len(set(grams))
    assert dict(zip(grams, hashes, strict=True)) == dict(zip(reversed(grams), reversed(hashes), strict=True))
    assert ngram_hashes(codes_of("前" + text), n).tolist()[1:] == hashes or not hashes


def test_hashes_stay_the_same_in_every_version():
    assert skeleton("Hello,  世界。１") == "hello世界１"
    assert [hex(value) for value in ngram_hashes(codes_of("abc世"), 3).tolist()] == GOLDEN


def test_signatures_estimate_the_similarity():
    random = np.random.default_rng(0)
    for share in (0.5, 0.8, 0.95):
        same, one, other = (random.integers(0, 2**63, n, dtype=np.uint64) for n in (int(4000 * share), 4000, 4000))
        rest = 4000 - len(same)
        pair = [np.concatenate([same, tail[:rest]]) for tail in (one, other)]
        signatures = signatures_of_shingles(pair)
        similarity = len(same) / (len(same) + 2 * rest)
        assert (
            abs((signatures[0] == signatures[1]).mean() - similarity) < 4 * (similarity * (1 - similarity) / 112) ** 0.5
        )


def test_a_key_is_equal_exactly_where_its_band_is():
    signatures = np.arange(3 * 112, dtype=np.uint32).reshape(3, 112)
    signatures[1] = signatures[0]
    signatures[1, 8 * 5 + 7] += 1
    keys = band_keys(signatures)
    assert keys.shape == (3, 14) and (keys[0] == keys[1]).tolist() == [band != 5 for band in range(14)]
    assert not (keys[0] == keys[2]).any() and len(set(keys[0].tolist())) == 14


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30), st.integers(1, 5))
def test_clusters_are_those_of_the_graph(pairs, parts):
    first = np.arange(20)
    for part in range(parts):  # a band at a time
        some = pairs[part::parts]
        join(first, np.array([one for one, _ in some], int), np.array([other for _, other in some], int))
    expected = list(range(20))
    for _ in range(20):
        for one, other in pairs:
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert first.tolist() == expected


# ---- planted copies --------------------------------------------------------------------------------------------------
def measure(rows: list[dict], found: list[dict]) -> tuple[float, float]:
    """(recall, precision) of what was left out."""
    stay = {row["id"] for row in found}
    gone = [row for row in rows if row["id"] not in stay]
    copies = sum(row["copy_of"] is not None for row in rows)
    right = sum(row["copy_of"] is not None for row in gone)
    return right / copies, right / len(gone)


def test_planted_near_duplicates_are_found(tmp_path):
    rows = list(planted_rows(10_000, 0.2))
    assert 1900 < sum(row["copy_of"] is not None for row in rows) < 2100
    found = run(write(tmp_path / "a.jsonl", rows), out_dir=tmp_path / "out")
    recall, precision = measure(rows, found)
    assert recall >= RECALL and precision >= PRECISION
    assert [row["id"] for row in found] == sorted(row["id"] for row in found)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rules"]["near-duplicate"]["dropped"] == 10_000 - len(found) and report["read"] == 10_000
    example = report["rules"]["near-duplicate"]["examples"][0][-1]
    assert example.startswith("kept: ") and "\nthis: " in example and len(example) > 200


def test_the_first_stays_and_the_others_are_listed(tmp_path):
    text = "".join(f"第{i}句话讲的是河流与村庄的故事，" for i in range(30))
    one, other = write(tmp_path / "1.jsonl", [{"text": text, "id": 1}]), tmp_path / "2.jsonl"
    write(
        other,
        [{"text": text.replace("，", " ， "), "id": 2}, {"text": text + "完。", "id": 3}, {"text": "短", "id": 4}],
    )
    assert [row["id"] for row in run(one, other, out_dir=tmp_path / "out")] == [1, 4]
    lines = [line.split("\t") for line in (tmp_path / "out" / "dropped.tsv").read_text().splitlines()]
    assert [line[:3] for line in lines] == [
        [f"{other}:1", "exact duplicate", f"of {one}:1"],  # but for white space
        [f"{other}:2", "near-duplicate", f"of {one}:1"],
    ]
    assert [row["id"] for row in run(other, one, out_dir=tmp_path / "out")] == [2, 4]


def test_texts_without_letters_and_short_texts(tmp_path):
    texts = ["！！！", "。。。", "好", "好。", "hi", "a b", "！！！"]
    found = run(write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), out_dir=tmp_path / "out")
    assert [row["text"] for row in found] == ["！！！", "。。。", "好", "hi", "a b"]
    assert all(len(shingles(text)) == 1 for text in texts)


def test_exact_only_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    path = write(tmp_path / "a.jsonl", [{"text": "一样 的文本"}, {"text": "一样的文本\n"}, {"text": "一样的文本。"}])
    assert len(run(path, out_dir=tmp_path / "out", exact_only=True)) == 2
    with pytest.raises(UserError, match=r'one more package: pip install "rensa>=0.5,<0.6", or --exact_only'):
        run(path, out_dir=tmp_path / "near")
    assert not (tmp_path / "near.partial").exists()


def test_chats_and_pairs_are_rows_too(tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "河流从哪里来？"}, {"role": "assistant", "content": "从山里来。" * 9}]
    }
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏"}
    found = run(write(tmp_path / "a.jsonl", [chat, pair, chat, pair]), out_dir=tmp_path / "out")
    assert found == [chat, pair]


# ---- killed, several processes, bytes a document ---------------------------------------------------------------------
def test_a_killed_run_signs_no_document_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    path = write(tmp_path / "a.jsonl", planted_rows(3000, 0.3))
    whole = run(path, out_dir=tmp_path / "whole")
    sign, calls = near_duplicates.Signer.__call__, []

    def fails(self, rows):
        calls.append(len(rows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sign(self, rows)

    monkeypatch.setattr(near_duplicates.Signer, "__call__", fails)
    with pytest.raises(KeyboardInterrupt):
        run(path, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(path, out_dir=tmp_path / "out") == whole
    assert sum(calls) == 3000 + calls[3] and not (tmp_path / "out.partial").exists()


def test_several_processes_keep_the_same_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", planted_rows(2500, 0.3))
    whole, many = run(path, out_dir=tmp_path / "one"), run(path, out_dir=tmp_path / "two", workers=2)
    assert whole == many
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()


def test_memory_and_disk_of_a_document(tmp_path):
    import tracemalloc

    count = 200_000
    keys = np.random.default_rng(0).integers(0, 2**63, (count, KEYS), dtype=np.uint64)
    keys[1::2, 3] = keys[::2, 3]
    keys.tofile(tmp_path / "keys")
    assert (tmp_path / "keys").stat().st_size == 120 * count
    del keys
    tracemalloc.start()
    first = first_of_cluster(tmp_path / "keys")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first == np.arange(count) // 2 * 2).all()
    assert peak < 60 * count + (80 << 20), f"{peak / count:.0f} bytes a document"


def test_flags_that_do_not_fit_are_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    for flags, words in (
        ({"executor": "local", "exact_only": True}, "--exact_only needs no --executor"),
        ({"executor": "slurm"}, "--executor slurm needs --partition NAME"),
        ({"executor": "slurm", "partition": "p"}, "there is no sbatch on this machine"),
    ):
        with pytest.raises(UserError, match=words):
            run(path, out_dir=tmp_path / "out", **flags)
    assert not list(tmp_path.glob("out*"))


def test_chats_are_equal_only_if_their_messages_are(tmp_path):
    """The same words in other turns, under other roles or as a text are another document."""
    rows = [
        {"messages": [{"role": "user", "content": "q\na"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\nb"}]},
        {"conversations": [{"from": "human", "value": "q  a"}, {"from": "gpt", "value": "b "}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"text": "q\na\nb"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(numbered_rows([path], DataReport()))
    hashes = [row_hash(row) for row in read]
    assert hashes[0] == hashes[2] and len(set(hashes)) == 4
