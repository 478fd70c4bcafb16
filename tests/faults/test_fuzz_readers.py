"""Promise: files with any bytes are read as rows or refused in one line, and every unread row is counted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.damage import DamagedFile
from corpus.readers import read_chats, read_rows, read_texts
from corpus.stats import DataStats
from tests.helpers import apply_changes, json_bytes, jsonl_bytes

FULL = os.environ.get("FAULTS") == "full"
EXAMPLES = 2_000 if FULL else 100
HANG = 5.0  # limit of CPU seconds per file
FEW_EXAMPLES = settings(max_examples=EXAMPLES, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

CHATS = [
    {"id": i, "messages": [{"role": "user", "content": f'what is {i}, {{and}} "why"?'},
                           {"role": "assistant", "content": f"答案是 {i}。"}]} for i in range(12)
]  # fmt: skip
TEXTS = [{"text": f'row {i}: "quoted", {{braces}} 中文', "note": f"line\nbreak {i}"} for i in range(12)]


def csv_bytes(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "note"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TEXTS)
    return file.getvalue().encode()


def arrow_bytes(kind: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.ipc")
    pytest.importorskip("pyarrow.parquet")
    content, data = io.BytesIO(), pyarrow.Table.from_pylist(CHATS)
    if kind == "parquet":
        pyarrow.parquet.write_table(data, content, row_group_size=4)
        return content.getvalue()
    new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
    with new(content, data.schema) as writer:
        writer.write_table(data, max_chunksize=4)
    return content.getvalue()


def compress_zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(content)


FORMATS = {
    "txt": lambda: ("a.txt", "\n\n".join(row["text"] for row in TEXTS).encode()),
    "jsonl": lambda: ("a.jsonl", jsonl_bytes(CHATS)),
    "json array": lambda: ("a.json", json_bytes(CHATS)),
    "json array, indented": lambda: ("a.json", json_bytes(CHATS, indent=2)),
    "json object": lambda: ("a.json", json_bytes({"version": 1, "data": TEXTS})),
    "csv": lambda: ("a.csv", csv_bytes(",")),
    "tsv": lambda: ("a.tsv", csv_bytes("\t")),
    "parquet": lambda: ("a.parquet", arrow_bytes("parquet")),
    "arrow file": lambda: ("a.arrow", arrow_bytes("arrow")),
    "arrow stream": lambda: ("a.arrow", arrow_bytes("stream")),
    "gz": lambda: ("a.jsonl.gz", gzip.compress(jsonl_bytes(CHATS[:6])) + gzip.compress(jsonl_bytes(CHATS[6:]))),
    "xz": lambda: ("a.jsonl.xz", lzma.compress(jsonl_bytes(CHATS[:6])) + lzma.compress(jsonl_bytes(CHATS[6:]))),
    "bz2": lambda: ("a.jsonl.bz2", bz2.compress(jsonl_bytes(CHATS[:6])) + bz2.compress(jsonl_bytes(CHATS[6:]))),
    "zst": lambda: ("a.jsonl.zst", compress_zstd(jsonl_bytes(CHATS[:6])) + compress_zstd(jsonl_bytes(CHATS[6:]))),
    "GB18030": lambda: ("a.jsonl", (jsonl_bytes(CHATS) * 3).decode().encode("gb18030")),
    "UTF-16": lambda: ("a.jsonl", jsonl_bytes(CHATS).decode().encode("utf-16")),
    "Big5": lambda: ("a.txt", ("這是一個測試。我們在這裡說話，他們也會來。\n\n" * 20).encode("big5")),
}
ADDED = st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b"\n"])
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), ADDED, st.integers(0, 40)), min_size=1, max_size=4)


def read_outcome(path: Path, content: bytes, reader, accept: bool) -> str:
    """Read the file: "read", "refused" or "damaged". Checks that the report counts every row."""
    path.write_bytes(content)
    report, start, outcome = DataStats(1.0, accept), time.process_time(), "read"
    try:
        found = sum(1 for _ in reader([path], report))
        assert report.read == found + report.dropped_rows + report.bad_rows
    except UserError as error:
        assert "\n" not in str(error)
        outcome = "damaged" if isinstance(error, DamagedFile) else "refused"
        assert outcome == "refused" or not accept
    assert time.process_time() - start < HANG
    return outcome


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_counted_and_never_raise(tmp_path, record_attacks, name):
    file, content = FORMATS[name]()
    outcomes = dict.fromkeys(("read", "refused", "damaged"), 0)

    @FEW_EXAMPLES
    @given(changes=CHANGES, reader=st.sampled_from([read_texts, read_chats]), accept=st.booleans())
    def check_one_file(changes, reader, accept):
        outcomes[read_outcome(tmp_path / file, apply_changes(content, changes), reader, accept)] += 1

    check_one_file()
    record_attacks(f"damaged {name} files", sum(outcomes.values()), **outcomes)


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_after_a_valid_prefix_are_counted_and_never_raise(tmp_path, record_attacks, name):
    file, content = FORMATS[name]()
    outcomes = dict.fromkeys(("read", "refused", "damaged"), 0)

    @FEW_EXAMPLES
    @given(cut=st.integers(0, 300), noise=st.binary(max_size=300), accept=st.booleans())
    def check_one_file(cut, noise, accept):
        outcomes[read_outcome(tmp_path / file, content[:cut] + noise, read_texts, accept)] += 1

    check_one_file()
    record_attacks(f"random bytes as {name}", sum(outcomes.values()), **outcomes)


@pytest.mark.parametrize("layout", ["json array", "json array, indented", "json object"])
def test_one_wrong_byte_in_a_json_array_loses_at_most_three_rows(tmp_path, record_attacks, layout):
    """Regression: one replaced, inserted or removed byte lost up to 4,700 of 5,000 rows, counted as one."""
    file, content = FORMATS[layout]()
    rows = [json_bytes(row) for row in (TEXTS if layout == "json object" else CHATS)]

    @FEW_EXAMPLES
    @given(place=st.integers(0, len(content) - 1), byte=st.binary(max_size=1) | st.sampled_from(
        [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff"]), removed=st.integers(0, 1))  # fmt: skip
    def check_one_file(place, byte, removed):
        # Damage to the first bytes of an object around rows or of an indented array, or a newline in the only line of
        # an object, can hide the layout: then no row is read, which is an error in every command.
        assume(layout == "json array" or place > 8)
        assume(layout != "json object" or byte not in (b"\n", b"\r"))
        path = tmp_path / file
        path.write_bytes(content[:place] + byte + content[place + removed :])
        report = DataStats(1.0)
        found = [row for _, row in read_rows(path, report)]
        sound = sum(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") in rows for row in found)
        assert sound >= len(rows) - 3
        assert len(rows) <= len(found) + report.bad_rows + 1 <= len(rows) + 5
        assert all(line >= 1 for reason in report.bad.values() for _, line in reason.first)

    check_one_file()
    record_attacks(f"one wrong byte in a {layout}", EXAMPLES, within_three_rows=EXAMPLES)
