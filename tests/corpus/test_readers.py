"""Promise: every file is read as rows; bad rows are counted with their line and do not raise."""

import bz2
import errno
import gzip
import io
import json
import lzma
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus import input_files
from corpus.damage import DamagedFile, DataFile
from corpus.input_files import READ_CHUNK_BYTES
from corpus.language import detect_language
from corpus.readers import read_chats, read_rows, read_texts
from corpus.stats import DataStats
from tests.helpers import jsonl_bytes

GOOD = [{"text": f"good row {i}"} for i in range(400)]


def read(folder: Path, name: str, content: bytes, max_bad_share: float = 0.01, reader=read_texts, accept=None):
    path = Path(folder) / name
    path.write_bytes(content)
    report = DataStats(max_bad_share, accept)
    found = list(reader([path], report))
    assert report.read == len(found) + report.bad_rows + report.dropped_rows
    return found, report


def texts(folder: Path, name: str, content: bytes, **kwargs) -> list[str]:
    return [document.text for document in read(folder, name, content, **kwargs)[0]]


# ---- formats ---------------------------------------------------------------------------------------------------------
SAME = [{"text": 'a "quoted", line\r\nwith \\ and 中文'}, {"text": "second"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl_bytes(SAME)),
        ("a.ndjson", jsonl_bytes(SAME).rstrip(b"\n")),
        ("crlf.jsonl", jsonl_bytes(SAME).replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + jsonl_bytes(SAME)),
        ("blank lines.jsonl", b"\n\n" + jsonl_bytes(SAME).replace(b"\n", b"\n\n")),
        ("no name", jsonl_bytes(SAME)),
        ("wrong name.txt", jsonl_bytes(SAME)),
        ("list.json", json.dumps(SAME).encode()),
        ("indented.json", json.dumps(SAME, indent=2, ensure_ascii=False).encode()),
        ("objects.json", "\n".join(json.dumps(row, indent=1) for row in SAME).encode()),
        ("lines.json", jsonl_bytes(SAME)),
        ("a.csv", 'id,text\n1,"a ""quoted"", line\r\nwith \\ and 中文"\n2,second\n'.encode()),
        ("a.tsv", 'text\tid\r\n"a ""quoted"", line\r\nwith \\ and 中文"\t1\r\nsecond\t2\r\n'.encode()),
        ("bom.csv", b"\xef\xbb\xbf" + 'Text,id\n"a ""quoted"", line\r\nwith \\ and 中文",1\nsecond,2'.encode()),
        ("list.json.gz", gzip.compress(json.dumps(SAME).encode())),
        ("a.jsonl.gz", gzip.compress(jsonl_bytes(SAME))),
        ("a.jsonl.xz", lzma.compress(jsonl_bytes(SAME))),
        ("a.jsonl.bz2", bz2.compress(jsonl_bytes(SAME))),
        ("two members.jsonl.gz", gzip.compress(jsonl_bytes(SAME[:1])) + gzip.compress(jsonl_bytes(SAME[1:]))),
        ("archive without a suffix", gzip.compress(jsonl_bytes(SAME))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # no ids from bytes: gzip output contains the time
)
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    assert texts(tmp_path, name, content) == [row["text"] for row in SAME]


def test_zst_and_parquet_files_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    packed = b"".join(zstandard.compress(jsonl_bytes(rows)) for rows in (GOOD[:200], GOOD[200:]))
    assert len(texts(tmp_path, "a.jsonl.zst", packed)) == 400
    found, report = read(tmp_path, "cut.jsonl.zst", packed[:-3], accept=True)
    assert len(found) >= 200 and report.bad_rows == 1 and "zstd stream" in next(iter(report.bad))
    parquet.write_table(pyarrow.table({"text": ["one", "two", None]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    assert texts(tmp_path, "renamed.bin", content, max_bad_share=0.5) == ["one", "two"]
    with pytest.raises(UserError, match="damaged parquet"):
        read(tmp_path, "half.parquet", content[:-9])


def test_plain_text_is_split_at_blank_lines(tmp_path):
    content = "第一段\n还是第一段\n\n \nsecond\r\n\r\n\r\nthird without end".encode()
    found, _ = read(tmp_path, "a.txt", content)
    assert [d.text for d in found] == ["第一段\n还是第一段", "second", "third without end"]
    assert [d.line for d in found] == [1, 5, 8]


@pytest.mark.parametrize("unit", ["长", "A sentence. ", "一句话。", "no-space", "line\n"])
def test_long_paragraphs_are_split_into_bounded_chunks_without_loss(tmp_path, unit):
    text = unit * (3 * READ_CHUNK_BYTES // len(unit.encode()))
    found = texts(tmp_path, "a.txt", text.encode())
    assert len(found) > 2 and max(len(piece.encode()) for piece in found) <= READ_CHUNK_BYTES
    assert "".join(found).replace("\n", "") == text.replace("\n", "")


def test_line_numbers_are_those_of_the_file(tmp_path):
    content = jsonl_bytes(GOOD[:3]) + b"\nbroken\n" + jsonl_bytes(GOOD[3:])
    found, report = read(tmp_path, "a.jsonl", content)
    assert [d.line for d in found] == [1, 2, 3, *range(6, 403)]
    assert report.bad["broken JSON"].first == [(str(tmp_path / "a.jsonl"), 5)]
    found, report = read(tmp_path, "a.csv", b'text,x\n"two\nlines",1\nthird,2\na,long,row\n', max_bad_share=0.5)
    assert [d.line for d in found] == [2, 4] and next(iter(report.bad.values())).first[0][1] == 5


def test_read_texts_reads_chats_as_text(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    assert texts(tmp_path, "a.jsonl", jsonl_bytes([row, {"q": "1+1?", "a": "2"}])) == ["hi\nhello", "1+1?\n2"]


def test_csv_of_minimind_v1_never_runs_code(tmp_path):
    proof = tmp_path / "ran"
    payload = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    rows = ["history,q,a", "[],你好,您好", "\"[['早', '早上好']]\",吃了吗,吃了"]
    rows += [f'"{payload}",q,a', f'"[[{payload}, 1]]",q,a']
    found, report = read(tmp_path, "a.csv", "\n".join(rows).encode(), max_bad_share=0.5, reader=read_chats)
    assert not proof.exists()
    contents = [[message["content"] for message in chat.messages] for chat in found]
    assert contents == [["你好", "您好"], ["早", "早上好", "吃了吗", "吃了"]]
    assert [place[1] for place in report.bad["history is neither JSON nor a Python list"].first] == [4, 5]


# ---- broken rows -----------------------------------------------------------------------------------------------------
BROKEN = {
    "cut off": b'{"text": "half',
    "no braces": b"plain words",
    "single quotes": b"{'text': 'python'}",
    "malformed UTF-8": b'{"text": "\xff\xfe\xfa"}',
    "latin-1": '{"text": "café"}'.encode("latin-1"),
    "gbk": '{"text": "中文"}'.encode("gbk"),
    "half a character": '{"text": "中文"}'.encode()[:-3] + b'"}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "raw NUL": b'{"text": "a\x00b"}',
    "escaped NUL": b'{"text": "a\\u0000b"}',
    "only NULs": b"\x00" * 5000,
    "control character": b'{"text": "a\x01b"}',
    "number": b'{"text": 12}',
    "null": b'{"text": null}',
    "NaN": b'{"text": NaN}',
    "list": b'{"text": ["a", "b"]}',
    "object": b'{"text": {"a": 1}}',
    "true": b'{"text": true}',
    "empty": b'{"text": ""}',
    "white space": b'{"text": " \\n\\t\\u3000"}',
    "missing key": b'{"txt": "a"}',
    "empty object": b"{}",
    "array row": b"[1, 2]",
    "string row": b'"just text"',
    "number row": b"3.5",
    "null row": b"null",
    "two objects": b'{"text": "a"} {"text": "b"}',
    "endless number": b'{"text": ' + b"9" * 6000 + b"}",
    "deep nesting": b"[" * 100_000,
    "chat with a number": b'{"messages": 3}',
    "chat without role": b'{"messages": [{"content": "a"}]}',
    "trailing comma": b'{"text": "a",}',
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_three_broken_lines_are_three_bad_rows(tmp_path, broken):
    good = jsonl_bytes(GOOD)
    content = broken + b"\n" + good + broken + b"\n" + good.replace(b"good", b"more") + broken
    found, report = read(tmp_path, "a.jsonl", content)
    assert len(found) == 800 and report.bad_rows == 3
    assert [line for reason in report.bad.values() for _, line in reason.first] == [1, 402, 803]


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "gz"), (lzma.compress, "xz"), (bz2.compress, "bz2")])
def test_truncated_and_damaged_archives_are_an_error_unless_accepted(tmp_path, pack, suffix):
    rows = [{"text": f"{i} {i * 7919 % 10007} {i**3}"} for i in range(60_000)]
    packed = pack(jsonl_bytes(rows))
    damaged = bytearray(packed)
    damaged[-2000:-1990] = b"0123456789"
    name = f"a.jsonl.{suffix}"
    for content in (packed[:-1000], bytes(damaged)):
        expected = r"damaged at byte [\d,]+ of .* rows were read, .*--accept_damaged"
        with pytest.raises(DamagedFile, match=expected) as error:
            read(tmp_path, name, content, accept=False)
        assert "\n" not in str(error.value)
        found, report = read(tmp_path, name, content, accept=True)
        assert 0 < len(found) <= 60_000 and 0 < report.bad_rows < 12_000
        assert len(found) + report.bad_rows > 30_000 and report.accepted_rows
        assert any("stream" in reason for reason in report.bad) and "damaged at byte" in report.notes[0]
    with pytest.raises(UserError, match="despite its suffix"):
        read(tmp_path, f"fake.jsonl.{suffix}", b"<html>404</html>")


def test_a_disk_read_error_counts_as_damage(tmp_path, monkeypatch):
    class BrokenDisk(io.FileIO):
        def readinto(self, target):
            if self.tell() >= 2 * READ_CHUNK_BYTES:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(target)

    class BrokenFile(DataFile, BrokenDisk): ...

    monkeypatch.setattr(input_files, "DataFile", BrokenFile)
    content = jsonl_bytes({"text": f"{i} {i * 7919 % 10007}"} for i in range(40_000))
    for name, packed in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content, 1))):
        with pytest.raises(DamagedFile, match=r"\(cannot be read: Input/output error\): [\d,]+ rows were read, about"):
            read(tmp_path, name, packed, accept=False)
        found, report = read(tmp_path, name, packed, accept=True)
        assert 4_000 < len(found) < 30_000 and {*report.bad} == {"cannot be read: Input/output error", "broken JSON"}


def test_reading_continues_at_the_next_stream_after_a_damaged_one(tmp_path):
    for pack, suffix in ((gzip.compress, "gz"), (lzma.compress, "xz"), (bz2.compress, "bz2")):
        parts = [pack(jsonl_bytes([{"text": f"{i} {j * 7919 % 10007}"} for j in range(2000)])) for i in range(4)]
        middle = bytearray(parts[1])
        middle[len(middle) // 2 : len(middle) // 2 + 8] = b"01234567"
        content = b"".join((parts[0], middle, *parts[2:]))
        found, report = read(tmp_path, f"a.jsonl.{suffix}", content, accept=True)
        assert {document.text[0] for document in found} >= {"0", "2", "3"} and 6000 <= len(found) <= 8000
        assert report.accepted_rows and 7900 <= len(found) + report.bad_rows <= 12_000


def test_empty_files_are_reported(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.jsonl").write_bytes(jsonl_bytes(GOOD))
    report = DataStats()
    assert len(list(read_texts([tmp_path / "empty.txt", tmp_path / "good.jsonl"], report))) == 400
    assert report.bad["empty file"].count == 1
    with pytest.raises(UserError, match="empty file"):
        read(tmp_path, "blank.jsonl", b"\n \n")


# ---- limits ----------------------------------------------------------------------------------------------------------
def test_the_error_for_a_file_without_a_good_row_lists_its_keys(tmp_path):
    expected = r"none of its 2 rows.*needs a text.*found the keys prompt_zh, id; nearest.*--list_layouts"
    with pytest.raises(UserError, match=expected):
        read(tmp_path, "a.jsonl", jsonl_bytes([{"prompt_zh": "x", "id": 1}] * 2), max_bad_share=1)
    with pytest.raises(UserError, match=r"plain text, not a chat.*a chat row needs a list of turns"):
        read(tmp_path, "a.txt", b"some text", reader=read_chats)
    with pytest.raises(UserError, match="unpack it first"):
        read(tmp_path, "c.txt", b"PK\x03\x04rest of a zip file")


def test_too_many_bad_rows_end_reading_early_with_a_one_line_error(tmp_path):
    rows = (jsonl_bytes(GOOD[:200]) + b"broken\n" * 20) * 200
    (tmp_path / "a.jsonl").write_bytes(rows)
    report = DataStats()
    with pytest.raises(UserError) as error:
        list(read_texts([tmp_path / "a.jsonl"], report))
    assert report.read < 10_000 and "\n" not in str(error.value)
    assert "x broken JSON" in str(error.value) and "a.jsonl:201" in str(error.value)
    report = DataStats(max_bad_fraction=0.1)
    assert len(list(read_texts([tmp_path / "a.jsonl"], report))) == 40_000


def test_one_block_of_bad_rows_in_a_large_file_is_tolerated(tmp_path):
    content = jsonl_bytes(GOOD) * 3 + b"broken\n" * 200 + jsonl_bytes(GOOD) * 50
    assert len(texts(tmp_path, "a.jsonl", content)) == 53 * 400


def test_missing_files_are_errors(tmp_path):
    for path, words in ((tmp_path / "none.txt", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=words):
            list(read_rows(path, DataStats()))


# ---- properties ------------------------------------------------------------------------------------------------------
KEYS = st.sampled_from(["text", "messages", "role", "content", "history", "q", "a"]) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".txt", "", ".parquet", ".gz", ".jsonl.xz", ".zst", ".bz2"])
STARTS = st.sampled_from([b"", b'{"text": ', b"[", b"[{", b"{\n", b"text,q\n", b"history,q,a\n", b"\x1f\x8b",
                          b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh9"])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=300), start=STARTS, suffix=SUFFIXES, reader=st.sampled_from([read_texts, read_chats]))
def test_random_bytes_never_raise_anything_but_a_user_error(content, start, suffix, reader):
    with tempfile.TemporaryDirectory() as folder:
        try:
            read(Path(folder), "a" + suffix, start + content, max_bad_share=1, reader=reader)
        except UserError as error:
            assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(st.lists(JSON, max_size=8), st.sampled_from(["a.jsonl", "a.json"]), st.booleans(), st.booleans())
def test_random_json_never_raises(rows, name, chats, array):
    good = {"q": "?", "a": "!"}
    together = array and name == "a.json"
    content = json.dumps([good, *rows]).encode() if together else jsonl_bytes([good, *rows])
    with tempfile.TemporaryDirectory() as folder:
        found, report = read(Path(folder), name, content, 1, read_chats if chats else read_texts)
    lists = [row for row in rows if isinstance(row, list) and row and all(isinstance(item, dict) for item in row)]
    most = len(rows) + 1 + sum(len(row) - 1 for row in lists)  # a list of objects is one chat, or one row per object
    assert len(rows) + 1 <= report.read <= most and found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
def test_csv_round_trips_every_text(cells):
    cells = [cell for cell in cells if cell.strip()] or ["x"]
    content = "id,text\r\n" + "".join(f'{i},"{cell.replace(chr(34), chr(34) * 2)}"\r\n' for i, cell in enumerate(cells))
    with tempfile.TemporaryDirectory() as folder:
        assert texts(Path(folder), "a.csv", content.encode()) == cells


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("中国人abc é7，\n"))
def test_every_text_has_a_language(text):
    chinese = len(re.findall("[\u4000-\u9fff]", text))
    letters = len(re.findall("[A-Za-z\u00c0-\u07ff]", text))
    assert detect_language(text) == ("zh" if chinese and chinese >= 0.3 * (chinese + letters) else "en")


def test_chinese_and_english_are_detected():
    assert detect_language("今天天气很好。") == "zh" and detect_language("Nice weather today.") == "en"
    assert detect_language("用 Python 的 transformers 库加载模型权重") == "zh"
    assert detect_language("The word 你好 means hello.") == "en"
    assert detect_language("12 + 30 = 42 🙂") == "en"
