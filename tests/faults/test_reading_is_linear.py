"""Promise: the time to read a file is linear in its size, for every format and layout."""

import json
import time
from pathlib import Path

import pytest

from common.errors import UserError
from corpus.examples import read_chat_examples, read_pair_examples
from corpus.readers import read_chats, read_texts
from corpus.render_chats import render_chat_examples
from corpus.render_pairs import render_pair_examples
from corpus.stats import DataStats

GROWTH = 4  # ratio of the sizes of the two files
MAX_SECONDS = 2.5 * GROWTH  # largest ratio of the times, with caches and noise; a quadratic reader has 16
HANG = 5.0  # seconds
NOISE_SECONDS = 0.02  # shorter times are noise

USER, ASSISTANT = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}


def jsonl(**row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def zstd_bomb(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(content, 19)


def numbered_keys(n: int) -> str:
    return ",".join(f'"k{i}":{i}' for i in range(n))


GOOD = jsonl(text="a good row")
ROWS = [{"id": i, "messages": [USER, ASSISTANT]} for i in range(100)]
# name -> (file name, content of size n); n is 1 and GROWTH
TEXTS = {
    "zst bomb of zeros": lambda n: ("a.jsonl.zst", zstd_bomb(b"\0" * (n * 4_000_000))),
    "zst bomb of text": lambda n: ("a.txt.zst", zstd_bomb(b"x" * (n * 4_000_000))),
    "zst bomb of one JSON string": lambda n: ("a.jsonl.zst", zstd_bomb(b'{"text":"' + b"x" * (n * 4_000_000) + b'"}')),
    "one JSON element": lambda n: ("a.json", b'[{"text":"' + b"ab c" * (n * 500_000) + b'"}]'),
    "one JSON line": lambda n: ("a.jsonl", jsonl(text="ab c" * (n * 500_000)) + GOOD),
    "a million keys in an array": lambda n: ("a.json", f"[{{{numbered_keys(n * 3_000)}}}]".encode()),
    "a million keys on a line": lambda n: ("a.jsonl", f"{{{numbered_keys(n * 3_000)}}}\n".encode() + GOOD),
    "nested lists": lambda n: ("a.json", b"[" * (n * 250_000)),
    "nested objects": lambda n: ("a.json", b'{"a":' * (n * 20_000)),
    "nested objects in an array": lambda n: ("a.json", b'[{"a":1},' + b'{"a":' * (n * 20_000)),
    "broken elements": lambda n: ("a.json", b"[" + b'{"text": "a", "n": x},' * (n * 2_000) + b'{"text": "a"}]'),
    "broken openings": lambda n: ("a.json", b'[{"text":"a"},' + b'{"text":' * (n * 20_000) + b"]"),
    "an array without its end, inside": lambda n: ("a.json", b'[{"a":[' + b'{"a":1},' * (n * 2_000)),
    "open quotes in an array": lambda n: ("a.json", b"[" + b'{"text": "a},' * (n * 2_000) + b"]"),
    "an open csv quote": lambda n: ("a.csv", b'text,a\n"x,y\n' + b"1,2\n" * (n * 11_000)),
    "an open csv quote on each line": lambda n: ("a.csv", b"text,a\n1,2\n" + b'"x,y\n' * (n * 5_000)),
    "a csv cell that never ends": lambda n: ("a.csv", b'text,a\n1,2\n"' + b"x\n" * (n * 11_000)),
    "doubled csv quotes": lambda n: ("a.csv", b'text,a\n1,2\n"' + b'""' * (n * 200_000)),
    "a csv row of many cells": lambda n: ("a.csv", b"text,a\n1,2\n" + b"x," * (n * 500_000)),
    "a csv header of many columns": lambda n: ("a.csv", b"x," * (n * 3_000) + b"\n1,2\n"),
    "one line of text": lambda n: ("a.txt", b"ab c" * (n * 1_000_000)),
    "white space": lambda n: ("a.txt", b" " * (n * 2_000_000) + b"a"),
    "empty lines": lambda n: ("a.txt", b"\n" * (n * 50_000) + b"a"),
    "document markers": lambda n: ("a.txt", b"a\n" + b"<|endoftext|>" * (n * 50_000)),
    "halves of markers": lambda n: ("a.txt", b"a\n<|endoftext|>\nb" + b"<|" * (n * 500_000)),
    "spaces before a marker": lambda n: ("a.jsonl", jsonl(text="a" + " " * (n * 20_000) + "b<|endoftext|>c")),
    "UTF-16": lambda n: ("a.jsonl", (jsonl(text="ab c") * (n * 5_000)).decode().encode("utf-16")),
    "GB18030": lambda n: (
        "a.jsonl",
        (jsonl(text="今天天气很好，我们去公园。") * (n * 5_000)).decode().encode("gb18030"),
    ),
    "old Mac lines": lambda n: ("a.txt", b"a line\r" * (n * 20_000)),
}
CHATS = {
    "turns": lambda n: jsonl(messages=[USER, ASSISTANT] * (n * 3_000)),
    "turns of one role": lambda n: jsonl(messages=[USER] * (n * 3_000) + [ASSISTANT]),
    "tool calls": lambda n: jsonl(messages=[USER, {**ASSISTANT, "tool_calls": [{"name": "f"}] * (n * 20_000)}]) + jsonl(
        q="a", a="b"),
    "a long thought": lambda n: jsonl(messages=[USER, {**ASSISTANT, "content": "<think>" * (n * 50_000) + "x"}]),
    "a thought of white space": lambda n: jsonl(
        messages=[USER, {**ASSISTANT, "content": "<think>" + " \n" * (n * 50_000) + "</think>x"}]),
    "Human and Assistant": lambda n: jsonl(text="Human: hi\nAssistant: yes\n" * (n * 3_000)),
    "white space after a marker": lambda n: jsonl(text="Human: hi\n" + " " * (n * 3_000) + "\nAssistant: x"),
    "white space in an answer": lambda n: jsonl(text="Human: hi\nAssistant: a" + ("\n" + " " * 100) * (n * 100) + "x"),
    "ends of turns": lambda n: jsonl(text="Human: hi\nAssistant: a" + "<|im_end|>" * (n * 3_000) + "x"),
    "Llama's system marks": lambda n: jsonl(text="[INST] <<SYS>>" * (n * 5_000) + " x [/INST] y"),
    "ChatML": lambda n: jsonl(text="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo" * (n * 5_000)),
    "a list that is text": lambda n: jsonl(messages=json.dumps([USER, ASSISTANT] * (n * 2_000))),
    "a list in Python notation": lambda n: jsonl(messages=repr([USER, ASSISTANT] * (n * 1_000))),
    "brackets that are text": lambda n: jsonl(messages="[{" * (n * 20_000)) + jsonl(q="a", a="b"),
    "MOSS": lambda n: jsonl(messages=[USER, {**ASSISTANT, "content": "<|MOSS|>: " + " " * (n * 3_000) + "x"}]),
    "history": lambda n: jsonl(q="a", a="b", history=[["x", "y"]] * (n * 5_000)),
    "columns of turns": lambda n: jsonl(messages={"role": ["user", "assistant"] * (n * 5_000), "content": ["x", "y"] * (
        n * 5_000)}),
    "keys of turns": lambda n: jsonl(q="x", a="y", **{f"turn_{i}": {"user": "a"} for i in range(n * 3_000)}),
}  # fmt: skip


def cpu_seconds(work) -> float:
    """The minimum CPU seconds of up to three calls; one call if it is below NOISE_SECONDS."""
    best = HANG
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
        if best < NOISE_SECONDS:
            break
    return best


def check_growth(work_of) -> None:
    """Compare the times of work_of(1) and work_of(GROWTH). Up to three tries: a busy machine may slow one of them."""
    for _ in range(3):
        small, large = cpu_seconds(work_of(1)), cpu_seconds(work_of(GROWTH))
        if large <= MAX_SECONDS * max(small, NOISE_SECONDS):
            break
    assert large <= MAX_SECONDS * max(small, NOISE_SECONDS), (small, large)
    assert large < HANG


def read_file(folder: Path, n: int, file_of, reader):
    name, content = file_of(n)
    path = folder / f"{n} {name}"
    path.write_bytes(content)

    def work() -> None:
        try:
            for _ in reader([path], DataStats(1.0)):
                pass
        except UserError:
            pass

    return work


@pytest.mark.parametrize("name", TEXTS)
def test_reading_texts_is_linear(tmp_path, record_attacks, name):
    check_growth(lambda n: read_file(tmp_path, n, TEXTS[name], read_texts))
    record_attacks("files for which reading could be slow", 1, linear=1)


@pytest.mark.parametrize("name", CHATS)
def test_reading_chats_is_linear(tmp_path, record_attacks, name):
    check_growth(lambda n: read_file(tmp_path, n, lambda n: ("a.jsonl", CHATS[name](n)), read_chats))
    record_attacks("chats for which reading could be slow", 1, linear=1)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_unpacking_is_linear(tmp_path, record_attacks, suffix):
    import bz2
    import gzip
    import lzma

    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    check_growth(
        lambda n: read_file(tmp_path, n, lambda n: (f"a.jsonl{suffix}", pack(b"\0" * (n * 4_000_000))), read_texts)
    )
    record_attacks("files for which reading could be slow", 1, linear=1)


def test_chats_and_pairs_of_thousands_of_turns_are_rendered_in_linear_time(tmp_path, tokenizer, record_attacks):
    """Regression: a pair of 2,001 turns took over a minute, because its prompt was shortened turn by turn."""
    path = tmp_path / "a.jsonl"

    def chats(n: int):
        path.write_bytes(jsonl(messages=[USER, ASSISTANT] * (500 * n)))
        items = list(read_chat_examples([path], DataStats()))
        return lambda: render_chat_examples(items, tokenizer, 256, DataStats())

    def pairs(n: int):
        path.write_bytes(jsonl(prompt=[USER, ASSISTANT] * (500 * n) + [USER], chosen="a", rejected="b"))
        items = list(read_pair_examples([path], DataStats()))
        return lambda: render_pair_examples(items, tokenizer, 256, DataStats())

    check_growth(chats)
    check_growth(pairs)
    record_attacks("chats for which reading could be slow", 2, linear=2)


def test_a_message_of_33_megabytes_is_dropped_before_it_is_tokenised(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    long = "ab c" * 8_250_000
    rows = jsonl(messages=[{**USER, "content": long}, ASSISTANT]), jsonl(prompt="a", chosen=long, rejected="b")
    for row, items_of, render in zip(
        rows, (read_chat_examples, read_pair_examples), (render_chat_examples, render_pair_examples), strict=True
    ):
        path.write_bytes(row)
        report = DataStats()
        items = list(items_of([path], report))
        assert cpu_seconds(lambda items=items, render=render: render(items, tokenizer, 512, DataStats())) < 1
        assert render(items, tokenizer, 512, report) == [[]] and report.dropped_rows == 1
