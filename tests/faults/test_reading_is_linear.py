"""Promise: the time of reading grows with the size of the file, not faster, in every format and layout."""

import json
import time
from pathlib import Path

import pytest

from common.errors import UserError
from corpus.examples import chat_items
from corpus.preferences import pair_items, render_pairs
from corpus.readers import read_chats, read_texts
from corpus.render_chats import render_chats
from corpus.stats import DataReport

GROWTH = 4  # the second file is so many times as large
MOST = 2.5 * GROWTH  # times as long: caches and noise; a quadratic reader takes 16 times as long
HANG = 5.0  # seconds
LEAST = 0.02  # seconds below which a time is noise

USER, ASSISTANT = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}


def line(**row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def bomb(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(content, 19)


def numbered(n: int) -> str:
    return ",".join(f'"k{i}":{i}' for i in range(n))


GOOD = line(text="a good row")
ROWS = [{"id": i, "messages": [USER, ASSISTANT]} for i in range(100)]
# name -> (file name, content of size n); n is 1 and GROWTH
TEXTS = {
    "zst bomb of zeros": lambda n: ("a.jsonl.zst", bomb(b"\0" * (n * 4_000_000))),
    "zst bomb of text": lambda n: ("a.txt.zst", bomb(b"x" * (n * 4_000_000))),
    "zst bomb of one JSON string": lambda n: ("a.jsonl.zst", bomb(b'{"text":"' + b"x" * (n * 4_000_000) + b'"}')),
    "one JSON element": lambda n: ("a.json", b'[{"text":"' + b"ab c" * (n * 500_000) + b'"}]'),
    "one JSON line": lambda n: ("a.jsonl", line(text="ab c" * (n * 500_000)) + GOOD),
    "a million keys in an array": lambda n: ("a.json", f"[{{{numbered(n * 3_000)}}}]".encode()),
    "a million keys on a line": lambda n: ("a.jsonl", f"{{{numbered(n * 3_000)}}}\n".encode() + GOOD),
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
    "spaces before a marker": lambda n: ("a.jsonl", line(text="a" + " " * (n * 20_000) + "b<|endoftext|>c")),
    "UTF-16": lambda n: ("a.jsonl", (line(text="ab c") * (n * 5_000)).decode().encode("utf-16")),
    "GB18030": lambda n: (
        "a.jsonl",
        (line(text="今天天气很好，我们去公园。") * (n * 5_000)).decode().encode("gb18030"),
    ),
    "old Mac lines": lambda n: ("a.txt", b"a line\r" * (n * 20_000)),
}
CHATS = {
    "turns": lambda n: line(messages=[USER, ASSISTANT] * (n * 3_000)),
    "turns of one role": lambda n: line(messages=[USER] * (n * 3_000) + [ASSISTANT]),
    "tool calls": lambda n: line(messages=[USER, {**ASSISTANT, "tool_calls": [{"name": "f"}] * (n * 20_000)}]) + line(
        q="a", a="b"),
    "a long thought": lambda n: line(messages=[USER, {**ASSISTANT, "content": "<think>" * (n * 50_000) + "x"}]),
    "a thought of white space": lambda n: line(
        messages=[USER, {**ASSISTANT, "content": "<think>" + " \n" * (n * 50_000) + "</think>x"}]),
    "Human and Assistant": lambda n: line(text="Human: hi\nAssistant: yes\n" * (n * 3_000)),
    "white space after a marker": lambda n: line(text="Human: hi\n" + " " * (n * 3_000) + "\nAssistant: x"),
    "white space in an answer": lambda n: line(text="Human: hi\nAssistant: a" + ("\n" + " " * 100) * (n * 100) + "x"),
    "ends of turns": lambda n: line(text="Human: hi\nAssistant: a" + "<|im_end|>" * (n * 3_000) + "x"),
    "Llama's system marks": lambda n: line(text="[INST] <<SYS>>" * (n * 5_000) + " x [/INST] y"),
    "ChatML": lambda n: line(text="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo" * (n * 5_000)),
    "a list that is text": lambda n: line(messages=json.dumps([USER, ASSISTANT] * (n * 2_000))),
    "a list in Python notation": lambda n: line(messages=repr([USER, ASSISTANT] * (n * 1_000))),
    "brackets that are text": lambda n: line(messages="[{" * (n * 20_000)) + line(q="a", a="b"),
    "MOSS": lambda n: line(messages=[USER, {**ASSISTANT, "content": "<|MOSS|>: " + " " * (n * 3_000) + "x"}]),
    "history": lambda n: line(q="a", a="b", history=[["x", "y"]] * (n * 5_000)),
    "columns of turns": lambda n: line(messages={"role": ["user", "assistant"] * (n * 5_000), "content": ["x", "y"] * (
        n * 5_000)}),
    "keys of turns": lambda n: line(q="x", a="y", **{f"turn_{i}": {"user": "a"} for i in range(n * 3_000)}),
}  # fmt: skip


def seconds(work) -> float:
    """CPU seconds, the least of up to three times; one where it is a blink."""
    best = HANG
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
        if best < LEAST:
            break
    return best


def check_growth(work_of) -> None:
    """work_of(n) -> work. Up to three tries: a busy machine may slow one of the two."""
    for _ in range(3):
        small, large = seconds(work_of(1)), seconds(work_of(GROWTH))
        if large <= MOST * max(small, LEAST):
            break
    assert large <= MOST * max(small, LEAST), (small, large)
    assert large < HANG


def reading(folder: Path, n: int, file_of, reader):
    name, content = file_of(n)
    path = folder / f"{n} {name}"
    path.write_bytes(content)

    def work() -> None:
        try:
            for _ in reader([path], DataReport(1.0)):
                pass
        except UserError:
            pass

    return work


@pytest.mark.parametrize("name", TEXTS)
def test_reading_texts_is_linear(tmp_path, attacks, name):
    check_growth(lambda n: reading(tmp_path, n, TEXTS[name], read_texts))
    attacks("files that a reader might take long for", 1, linear=1)


@pytest.mark.parametrize("name", CHATS)
def test_reading_chats_is_linear(tmp_path, attacks, name):
    check_growth(lambda n: reading(tmp_path, n, lambda n: ("a.jsonl", CHATS[name](n)), read_chats))
    attacks("chats that a reader might take long for", 1, linear=1)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_unpacking_is_linear(tmp_path, attacks, suffix):
    import bz2
    import gzip
    import lzma

    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    check_growth(
        lambda n: reading(tmp_path, n, lambda n: (f"a.jsonl{suffix}", pack(b"\0" * (n * 4_000_000))), read_texts)
    )
    attacks("files that a reader might take long for", 1, linear=1)


def test_chats_and_pairs_of_thousands_of_turns_are_rendered_in_linear_time(tmp_path, tokenizer, attacks):
    """A pair of 2,001 turns took over a minute: its prompt lost one turn after the other."""
    path = tmp_path / "a.jsonl"

    def chats(n: int):
        path.write_bytes(line(messages=[USER, ASSISTANT] * (500 * n)))
        items = list(chat_items([path], DataReport()))
        return lambda: render_chats(items, tokenizer, 256, DataReport())

    def pairs(n: int):
        path.write_bytes(line(prompt=[USER, ASSISTANT] * (500 * n) + [USER], chosen="a", rejected="b"))
        items = list(pair_items([path], DataReport()))
        return lambda: render_pairs(items, tokenizer, 256, DataReport())

    check_growth(chats)
    check_growth(pairs)
    attacks("chats that a reader might take long for", 2, linear=2)


def test_a_message_of_33_megabytes_is_dropped_before_it_is_tokenised(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    long = "ab c" * 8_250_000
    rows = line(messages=[{**USER, "content": long}, ASSISTANT]), line(prompt="a", chosen=long, rejected="b")
    for row, items_of, render in zip(rows, (chat_items, pair_items), (render_chats, render_pairs), strict=True):
        path.write_bytes(row)
        report = DataReport()
        items = list(items_of([path], report))
        assert seconds(lambda items=items, render=render: render(items, tokenizer, 512, DataReport())) < 1
        assert render(items, tokenizer, 512, report) == [[]] and report.dropped_rows == 1
