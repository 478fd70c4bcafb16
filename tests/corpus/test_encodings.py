"""Promise: other encodings are detected, or the error contains the conversion command; separators end documents."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.input_files import READ_CHUNK_BYTES
from corpus.readers import read_rows, read_texts
from corpus.stats import DataStats
from corpus.text_encoding import _is_chinese, detect_encoding
from corpus.txt_reader import split_documents
from tests.helpers import jsonl_bytes

ZH = [
    "人工智能是计算机科学的一个分支，它企图了解智能的实质。",
    "今天天气很好，我们一起去公园散步吧！",
    "这本书的作者是谁？他在什么时候写了它？",
    "请把下面的句子翻译成英文，并说明理由。",
]
TW = [
    "人工智慧是電腦科學的一個分支，它企圖了解智能的實質。",
    "今天天氣很好，我們一起去公園散步吧！",
    "這本書的作者是誰？",
]
FR = ["Le café est très bon à l’été.", "Où êtes-vous né ? C’est là que j’ai vécu.", "Une leçon de français."]
EN = ["“Hello”, she said – it’s a café.", "There’s a naïve idea — isn’t it?", "He said: “No.”"]
NAMES = {"gbk": "GB18030", "gb18030": "GB18030", "big5": "Big5", "cp1252": "Windows-1252", "utf-16": "UTF-16",
         "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32"}  # fmt: skip
CASES = [
    *((ZH, encoding) for encoding in ("gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32")),
    (TW, "big5"), (FR, "cp1252"), (EN, "cp1252"), (EN, "utf-16"), (EN, "utf-16-le"),
]  # fmt: skip


def rows_of(folder: Path, name: str, content: bytes, max_bad_share=0.0, accept=None) -> tuple[list, DataStats]:
    path = Path(folder) / name
    path.write_bytes(content)
    report = DataStats(max_bad_share, accept)
    found = [row for _, row in read_rows(path, report)]
    assert report.read == len(found) + report.bad_rows + report.dropped_rows
    return found, report


def as_csv(texts: list[str], delimiter: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
    return file.getvalue()


def written(texts: list[str], form: str) -> str:
    if form == "csv":
        return as_csv(texts)
    if form == "txt":
        return "\n\n".join(texts)
    if form == "jsonl":
        return jsonl_bytes({"text": text} for text in texts).decode()
    return json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=1)


# ---- encodings -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["csv", "txt", "jsonl", "json"])
@pytest.mark.parametrize(("texts", "encoding"), CASES, ids=[f"{c[1]}-{c[0][0][:2]}" for c in CASES])
def test_every_encoding_is_detected_in_every_format(tmp_path, texts, encoding, form):
    texts = [f"{text} {i}" for i, text in enumerate(texts * 50)]
    found, report = rows_of(tmp_path, f"a.{form}", written(texts, form).encode(encoding))
    assert [row if form == "txt" else row["text"] for row in found] == texts
    assert report.notes == [f"{tmp_path}/a.{form}: read as {NAMES[encoding]}"]
    assert report.to_dict()["notes"] == report.notes


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
def test_compressed_files_of_other_encodings_are_read(tmp_path, pack, suffix):
    for encoding in ("gbk", "utf-16"):
        found, _ = rows_of(tmp_path, f"a.csv.{suffix}", pack(as_csv(ZH * 2000).encode(encoding)))
        assert [row["text"] for row in found] == ZH * 2000


def test_encoding_is_detected_from_later_lines(tmp_path):
    texts = ["plain words " * 10] * 2000 + ZH * 500
    found, _ = rows_of(tmp_path, "a.jsonl", written(texts, "jsonl").encode("gbk"))
    assert [row["text"] for row in found] == texts


def test_utf8_stays_utf8_with_malformed_rows(tmp_path):
    for texts, bad in ((ZH * 100, "中文".encode("gbk")), (["plain words"] * 400, "café".encode("latin-1"))):
        lines = written(texts, "jsonl").encode().split(b"\n")
        lines[7] = lines[300] = b'{"text": "' + bad + b'"}'
        found, report = rows_of(tmp_path, "a.jsonl", b"\n".join(lines), 1)
        assert len(found) == 398 and not report.notes
        assert report.bad["malformed UTF-8"].count == 2 and report.bad["malformed UTF-8"].first[0][1] == 8
    damaged = bytearray(written(ZH * 100, "txt").encode())
    damaged[::400] = b"\xff" * len(damaged[::400])
    assert detect_encoding(bytes(damaged)).codec == "utf-8"
    assert detect_encoding("naïve café".encode() * 9).codec == "utf-8"


def test_malformed_bytes_in_another_encoding_make_their_row_bad(tmp_path):
    for form in ("csv", "jsonl"):
        lines = written(ZH * 20, form).encode("gbk").split(b"\n")
        lines[40] = lines[40][:10] + b"\xff\xff" + lines[40][10:]
        found, report = rows_of(tmp_path, f"a.{form}", b"\n".join(lines), 1)
        assert len(found) == 79 and report.bad["malformed GB18030"].first[0][1] == 41


OTHERS = {
    "shift_jis": "人工知能とは、計算機科学の一分野です。これはテストです。",
    "euc_kr": "인공지능은 컴퓨터 과학의 한 분야입니다. 이것은 시험입니다.",
    "cp1251": "Искусственный интеллект это раздел информатики.",
    "koi8_r": "Искусственный интеллект это раздел информатики.",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy. Umělá inteligence řeší úlohy.",
    "cp1254": "Yapay zekâ, bilgisayarın şu işleri yapmasıdır: öğrenme, çıkarım, güzel ağaç.",
}


@pytest.mark.parametrize("encoding", OTHERS)
def test_the_error_for_an_uncertain_encoding_contains_the_iconv_command(tmp_path, encoding):
    (tmp_path / "my file.csv").write_bytes(as_csv([OTHERS[encoding]] * 20).encode(encoding))
    with pytest.raises(UserError, match=r"perhaps .*: iconv -f .* -t UTF-8 '.*my file.csv' > NEW_FILE") as error:
        list(read_texts([tmp_path / "my file.csv"], DataStats()))
    assert "\n" not in str(error.value)
    content = OTHERS[encoding].encode(encoding)
    assert not _is_chinese(content, "gb18030") and not _is_chinese(content, "cp950")


def test_carriage_return_line_ends_are_read(tmp_path):
    for form in ("csv", "jsonl", "txt"):
        content = written(ZH, form).replace("\r\n", "\r").replace("\n", "\r")
        found, _ = rows_of(tmp_path, f"a.{form}", content.encode())
        assert [row if form == "txt" else row["text"] for row in found] == ZH


@settings(max_examples=60, deadline=None)
@given(
    more=st.lists(  # few, because the encoding is a guess from statistics of Chinese text
        st.text(st.characters(codec="gb2312", exclude_characters="\0<\r\n", exclude_categories=["Cc"])), max_size=4
    ),
    form=st.sampled_from(["csv", "jsonl", "json"]),
    encoding=st.sampled_from(["gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be"]),
    pack=st.sampled_from([bytes, gzip.compress, bz2.compress]),
)
def test_rows_are_equal_after_reading_in_every_encoding(more, form, encoding, pack):
    texts = ZH * 10 + [f"“{text}”" for text in more]
    with tempfile.TemporaryDirectory() as folder:
        found, _ = rows_of(Path(folder), f"a.{form}", pack(written(texts, form).encode(encoding)))
    assert [row["text"] for row in found] == texts


# ---- document separators ---------------------------------------------------------------------------------------------
STORIES = [f"Once there was cat {i}.\n\nIt met a dog, and they played." for i in range(30)]


@pytest.mark.parametrize(
    "joined",
    [
        "\n<|endoftext|>\n".join(STORIES),
        "\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n",
        "<|endoftext|>\n" + "\r\n<|endoftext|>\r\n".join(STORIES),
        "\n\n <|endoftext|> \n\n".join(STORIES),
        "<|endoftext|>\n".join(STORIES),
        "<|endoftext|>".join(STORIES),
        " <|endoftext|> ".join(STORIES),
        "\n</s>\n".join(STORIES),
        "\n<|end_of_text|>\n<|begin_of_text|>".join(STORIES),
        "".join(f"<s>\n{story}\n</s>\n" for story in STORIES),
    ],
)
def test_documents_of_plain_text_end_at_markers(tmp_path, joined):
    found, report = rows_of(tmp_path, "a.txt", joined.encode())
    assert [text.replace("\r", "").strip() for text in found] == STORIES and not report.dropped_rows
    found, _ = rows_of(tmp_path, "b.jsonl", json.dumps({"text": joined, "id": 1}).encode() * 1)
    if "<s>" not in joined and "</s>" not in joined:
        assert [row["text"].replace("\r", "").strip() for row in found] == STORIES and found[0]["id"] == 1


def test_a_line_in_s_tags_is_a_document(tmp_path):
    found, _ = rows_of(tmp_path, "a.txt", b"<s> one </s>\n<s> two </s>\n")
    assert [text.strip() for text in found] == ["one", "two"]


def test_markers_around_a_text_are_stripped_and_html_stays():
    for text in ("one", "<|endoftext|>one", "one<|endoftext|>", "<s>one</s>", "one</s>", "<s> one", "<bos>one<eos>"):
        assert split_documents(text) == ["one"], text
    for text in ("was <s>10</s>", "<s>10</s> now 5", "a < b", "2 <| 3", "no markers\n\nat all\n"):
        assert split_documents(text) == [text]
    assert split_documents("<|endoftext|>") == split_documents("</s>\n") == []


def test_a_marker_inside_a_sentence_stays_and_is_counted(tmp_path):
    text = "GPT-2 writes the <|endoftext|> token, “<|endoftext|>”, after each text."
    found, report = rows_of(tmp_path, "a.jsonl", json.dumps({"text": text}).encode())
    assert found == [{"text": text}] and report.changed["contains <|endoftext|> as text"].count == 1


def test_a_row_with_only_a_marker_is_dropped_with_its_reason(tmp_path):
    content = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "<|endoftext|>", "two", "<|endoftext|>"))
    found, report = rows_of(tmp_path, "a.jsonl", content.encode())
    assert [row["text"] for row in found] == ["one", "two"] and report.bad_rows == 0
    assert report.dropped["only a document separator"].count == 2


def test_a_marker_is_found_at_any_position_where_a_long_line_is_split(tmp_path):
    for length in range(READ_CHUNK_BYTES - 16, READ_CHUNK_BYTES + 2):
        found, _ = rows_of(tmp_path, "a.txt", b"one<|endoftext|>" + b"x" * (length - 16) + b"<|endoftext|>two")
        assert "".join(found) == "one" + "x" * (length - 16) + "two" and found[-1] == "two"


def test_markers_are_found_under_the_filled_key(tmp_path):
    row = {"text": None, "content": "one<|endoftext|>two"}
    found, _ = rows_of(tmp_path, "a.jsonl", json.dumps(row).encode())
    assert [row["content"] for row in found] == ["one", "two"]


def test_markers_after_the_first_bytes_end_documents_too(tmp_path):
    content = "a line\n\n" * 20_000 + "one<|endoftext|>two\n"
    found, _ = rows_of(tmp_path, "a.txt", content.encode())
    assert found[-2:] == ["one", "two"]
