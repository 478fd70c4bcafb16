"""Promise: rows written as JSON or csv or by pandas, pyarrow or datasets in any layout are read back equal."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus import csv_reader, json_reader, json_stream
from corpus.damage import DamagedFile
from corpus.json_reader import list_rows
from corpus.readers import read_chats, read_rows, read_texts
from corpus.stats import DataStats
from tests.corpus.test_encodings import rows_of

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.ipc")
pytest.importorskip("pyarrow.parquet")

ROWS = [{"text": f"第{i}行, row {i}", "n": i} for i in range(30)]
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def dumps(value, **options) -> bytes:
    return json.dumps(value, ensure_ascii=False, **options).encode()


# ---- JSON ------------------------------------------------------------------------------------------------------------
FRAME = pandas.DataFrame(ROWS)
LAYOUTS = {
    "array on one line": dumps(ROWS),
    "array on one line, with a line feed": dumps(ROWS) + b"\n",
    "indented array": dumps(ROWS, indent=2),
    "array, an object on each line": b"[\n" + b",\n".join(map(dumps, ROWS)) + b"\n]\n",
    "array, an object on each line, without line feeds at its ends": b"[" + b",\n".join(map(dumps, ROWS)) + b"]",
    "comma after each line": b"".join(dumps(row) + b",\n" for row in ROWS),
    "comma after each line, CRLF": b"".join(dumps(row) + b", \r\n" for row in ROWS),
    "arrays of five": b"\n".join(dumps(ROWS[i : i + 5]) for i in range(0, 30, 5)),
    "indented objects": b"\n".join(dumps(row, indent=4) for row in ROWS),
    "concatenated objects": b"".join(dumps(row, indent=1) for row in ROWS),
    "object that wraps the rows": dumps({"version": "1.0", "n": [1, 2], "data": ROWS}),
    "object that wraps the rows, indented": dumps({"meta": {"a": [{"b": 1}]}, "train": ROWS}, indent=2),
    "pandas records": FRAME.to_json(orient="records", force_ascii=False).encode(),
    "pandas lines": FRAME.to_json(orient="records", lines=True).encode(),
    "pandas columns": FRAME.to_json().encode(),
    "pandas columns, indented": FRAME.to_json(indent=2).encode(),
    "pandas index": FRAME.to_json(orient="index").encode(),
    "pandas split": FRAME.to_json(orient="split").encode(),
    "lists of equal length": dumps(FRAME.to_dict("list")),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "no suffix"])
@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_json_layouts_give_the_same_rows_under_any_name(tmp_path, content, name):
    if name in ("a.txt", "no suffix") and content.startswith((b"[\n  {", b"{\n", b'{"text":{')):
        name = "a.json"  # plain text may begin like this as well
    assert rows_of(tmp_path, name, content)[0] == ROWS


def test_pandas_table_layout_gives_its_rows(tmp_path):
    found, _ = rows_of(tmp_path, "a.json", FRAME.to_json(orient="table").encode())
    assert [{key: row[key] for key in ("text", "n")} for row in found] == ROWS


def test_a_list_of_messages_is_one_chat_and_a_list_of_rows_is_rows(tmp_path):
    turns = [{"human": "hi", "assistant": "hello"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    for chat in ([USER, ASSISTANT], sharegpt, turns):
        assert list_rows(chat) == [{"messages": chat}]
    assert list_rows(ROWS) == ROWS and list_rows([{"q": "1", "a": "2"}]) == [{"q": "1", "a": "2"}]
    for nothing in ([], [1], ["a", "b"], [USER, 1]):
        assert list_rows(nothing) == [nothing]
    chat = {"messages": [USER, ASSISTANT]}
    line = dumps([USER, ASSISTANT])
    for name, content, many in (
        ("lines.jsonl", (line + b"\n") * 3, 3),
        ("one line.jsonl", line, 1),
        ("indented.json", dumps([USER, ASSISTANT], indent=2), 1),
        ("array of chats.json", dumps([[USER, ASSISTANT]] * 3), 3),
        ("indented array of chats.json", dumps([[USER, ASSISTANT]] * 3, indent=1), 3),
        ("wrapped.json", dumps({"data": [[USER, ASSISTANT]] * 3}), 3),
        ("row.json", dumps(chat, indent=1), 1),
    ):
        assert rows_of(tmp_path, name, content)[0] == [chat] * many, name
        assert len(list(read_chats([tmp_path / name], DataStats()))) == many


def test_a_single_row_object_is_one_row(tmp_path):
    for row in (
        {"text": "one"},
        {"messages": [USER, ASSISTANT], "id": 1},
        {"conversations": ["hi", "hello"]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"q": "1", "a": "2", "history": [["a", "b"]]},
    ):
        assert rows_of(tmp_path, "a.json", dumps(row))[0] == [row]
        assert rows_of(tmp_path, "a.json", dumps(row, indent=1))[0] == [row]


def test_all_lists_of_rows_in_an_object_are_read_and_reported(tmp_path):
    found, report = rows_of(tmp_path, "a.json", dumps({"train": ROWS[:20], "test": ROWS[20:]}))
    assert found == ROWS and "train, test" in report.notes[0]


def test_rows_inside_a_long_object_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "MAX_WHOLE_OBJECT", 100)
    monkeypatch.setattr(json_stream, "MAX_LINE", 70_000)
    rows = [{"text": "x" * 50, "n": i} for i in range(3000)]
    for wrapped in (
        {"version": 1, "tags": ["a"], "data": rows},
        {"schema": {"fields": [{"name": "n"}]}, "data": rows, "end": [1, 2]},
    ):
        assert rows_of(tmp_path, "a.json", dumps(wrapped))[0] == rows
        assert rows_of(tmp_path, "a.json", dumps(wrapped, indent=1))[0] == rows
    (tmp_path / "b.json").write_text(pandas.DataFrame(rows).to_json())
    with pytest.raises(UserError, match=r"one value above .*lines=True"):
        list(read_texts([tmp_path / "b.json"], DataStats()))


def test_nan_and_infinity_in_json_are_read(tmp_path):
    content = b'{"text": "a", "score": NaN}\n{"text": "b", "score": -Infinity}\n'
    assert [row["text"] for row in rows_of(tmp_path, "a.jsonl", content)[0]] == ["a", "b"]


def test_python_notation_is_reported_by_name(tmp_path):
    _, report = rows_of(tmp_path, "a.jsonl", b"{'text': 'a'}\n" + dumps(ROWS[0]), 1)
    assert "single quotes" in next(iter(report.bad))


# ---- csv -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "sep=", "\ufeffsep="])
def test_csv_delimiters_and_line_ends_of_spreadsheets_are_read(tmp_path, delimiter, end, mark):
    rows = [{"question": f"a, b; c\td|e {i}?", "answer": f'"{i}"', "note": ""} for i in range(5)]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    first = mark.replace("sep=", f"sep={delimiter}{end}") if mark else ""
    assert rows_of(tmp_path, "a.csv", (first + file.getvalue()).encode())[0] == rows


def test_csv_headers_are_cleaned(tmp_path):
    for header in ('" Question " , ANSWER', '\ufeff"question","answer"', "Question , Answer ", '"QUESTION", "Answer"'):
        assert rows_of(tmp_path, "a.csv", f"{header}\nq,a\n".encode())[0] == [{"question": "q", "answer": "a"}]
    for header in (b'"text"\r\0', b'te"xt\rb', b'"a" b,text', b'"text', b"\0\r"):
        assert [next(iter(row.values())) for row in rows_of(tmp_path, "a.csv", header + b"\none\n", 1)[0]] == ["one"]
    assert rows_of(tmp_path, "a.csv", b"text,text\na,b\n")[0] == [{"text": "a", "text.1": "b"}]
    assert rows_of(tmp_path, "a.csv", b"text\none\ntwo\n")[0] == [{"text": "one"}, {"text": "two"}]
    assert rows_of(tmp_path, "a.csv", b'"q", "a"\n"x, y", "z"\n')[0] == [{"q": "x, y", "a": "z"}]


def test_short_csv_rows_have_empty_cells_and_long_ones_are_bad(tmp_path):
    found, report = rows_of(tmp_path, "a.csv", b"q,a,note\n1,2,3\n1,2\n1\n\n1,2,3,,\n1,2,3,4\n1,2,3\n", 1)
    assert [tuple(row.values()) for row in found] == [
        ("1", "2", "3"),
        ("1", "2", ""),
        ("1", "", ""),
        ("1", "2", "3"),
        ("1", "2", "3"),
    ]
    assert [(name, reason.first[0][1]) for name, reason in report.bad.items()] == [("more csv cells than columns", 7)]


@pytest.mark.parametrize("most", [3, 10_000])
def test_an_unclosed_quote_loses_one_row(tmp_path, monkeypatch, most):
    monkeypatch.setattr(csv_reader, "MAX_CELL_LINES", most)
    lines = ["q,a", *(f"question {i},answer {i}" for i in range(100))]
    lines[50] = '"question 49,answer 49'
    lines[71] = '"two\nlines",answer 70'
    found, report = rows_of(tmp_path, "a.csv", "\n".join(lines).encode(), 1)
    assert [row["a"] for row in found] == [f"answer {i}" for i in range(100) if i != 49]
    assert [(name, reason.first[0][1]) for name, reason in report.bad.items()] == [(csv_reader.OPEN_QUOTE_REASON, 51)]


def test_an_unterminated_csv_cell_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_reader, "MAX_CELL", 1000)
    content = b'q,a\n"' + b"x" * 3000 + b"\n" + b"1,2\n" * 50
    found, report = rows_of(tmp_path, "a.csv", content, 1)
    assert len(found) == 50 and report.bad_rows == 1


def test_a_csv_line_above_the_limit_counts_as_an_estimated_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_reader, "MAX_LINE", 2000)
    found, report = rows_of(tmp_path, "a.csv", b"q,a\n1,2\n3," + b"x," * 5000 + b"\n5,6\n", 1)
    assert found == [{"q": "1", "a": "2"}, {"q": "5", "a": "6"}]
    assert (
        report.bad["a line longer than 64 MB"].first == [(str(tmp_path / "a.csv"), 3)] and 1 <= report.bad_rows <= 2500
    )


# ---- arrow -----------------------------------------------------------------------------------------------------------
NESTED = [
    {
        "text": f"row {i}",
        "meta": {"ids": list(range(i)), "source": None},
        "messages": [{"role": "user", "content": "hi"}],
    }
    for i in range(2500)
]


def test_nested_columns_of_arrow_and_parquet_are_read(tmp_path):
    table = pyarrow.Table.from_pylist(NESTED)
    pyarrow.parquet.write_table(table, tmp_path / "parquet")
    with pyarrow.ipc.new_file(tmp_path / "file", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream", table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    for name in ("parquet", "file", "stream"):
        content = (tmp_path / name).read_bytes()
        assert rows_of(tmp_path, name, content)[0] == NESTED
        half = content[: len(content) * 2 // 3]
        with pytest.raises(
            DamagedFile, match=f"truncated or damaged {'parquet' if name == 'parquet' else 'arrow'} file"
        ):
            rows_of(tmp_path, name, half)
        found, report = rows_of(tmp_path, name, half, 0, accept=True)
        assert found == NESTED[: len(found)] and "damaged" in next(iter(report.bad))
        assert found or name != "stream"  # parquet and arrow files have one batch here and their metadata at the end
        (tmp_path / "packed.gz").write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match="unpack it first"):
            list(read_texts([tmp_path / "packed.gz"], DataStats()))


# ---- workbooks -------------------------------------------------------------------------------------------------------
def test_the_error_for_a_workbook_says_to_save_it_as_csv(tmp_path):
    for name, content in (("a.xlsx", b"PK\x03\x04[Content_Types].xml"), ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")):
        with pytest.raises(UserError, match="Excel workbook: save its sheet as CSV UTF-8"):
            rows_of(tmp_path, name, content)


# ---- properties ------------------------------------------------------------------------------------------------------
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<\r"), min_size=1, max_size=40)
TABLES = st.lists(st.fixed_dictionaries({"text": TEXTS, "note": TEXTS}), min_size=1, max_size=8)
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def in_layout(rows: list[dict], layout: str) -> tuple[str, bytes]:
    frame = pandas.DataFrame(rows)
    if layout.startswith("csv"):
        return ".csv", frame.to_csv(index=False, sep=layout[3], quoting=csv.QUOTE_ALL).encode()
    if layout == "lines":
        return ".jsonl", b"\n".join(map(dumps, rows))
    if layout == "commas":
        return ".jsonl", b",\n".join(map(dumps, rows))
    if layout == "array":
        return ".jsonl", dumps(rows)
    if layout == "wrapped":
        return ".json", dumps({"rows": rows}, indent=1)
    return ".json", frame.to_json(orient=layout, force_ascii=False).encode("utf-8")


LAYOUT_NAMES = [
    "csv,",
    "csv;",
    "csv\t",
    "csv|",
    "lines",
    "commas",
    "array",
    "wrapped",
    "columns",
    "index",
    "split",
    "records",
]


@settings(max_examples=150, deadline=None)
@given(rows=TABLES, layout=st.sampled_from(LAYOUT_NAMES), suffix=st.sampled_from(sorted(PACKED)))
def test_rows_are_equal_after_reading_every_layout_and_compression(rows, layout, suffix):
    name, content = in_layout(rows, layout)
    with tempfile.TemporaryDirectory() as folder:
        assert rows_of(Path(folder), "a" + name + suffix, PACKED[suffix](content))[0] == rows


FRAGMENTS = st.text(
    st.sampled_from(' ab,;"\n\t|今天的是{}[]:\\'), max_size=20
)  # characters with a meaning in some format
DAMAGE = st.lists(st.sampled_from([*b'\0\n\r",<[]{}', 255, 128, 65]), max_size=4).map(bytes)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": FRAGMENTS, "note": FRAGMENTS}), min_size=1, max_size=6),
    layout=st.sampled_from(LAYOUT_NAMES),
    encoding=st.sampled_from(["utf-8", "gb18030", "utf-16", "utf-16-le"]),
    suffix=st.sampled_from(["", ".txt", ".csv", ".json", ".jsonl"]),
    damage=st.lists(st.tuples(st.integers(0, 10_000), DAMAGE, st.integers(0, 4)), min_size=1, max_size=5),
)
def test_damage_at_any_position_is_counted_or_a_one_line_error(rows, layout, encoding, suffix, damage):
    content = in_layout(rows, layout)[1].decode().encode(encoding)
    for place, added, removed in damage:
        place %= len(content) + 1
        content = content[:place] + added + content[place + removed :]
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows_of(Path(folder), "a" + suffix, content, 1)
        except UserError as error:
            assert "\n" not in str(error)


def test_an_extra_line_feed_in_an_object_that_wraps_the_rows_loses_one_row(tmp_path):
    rows = [{"text": f"row {i} of a long text", "note": "n"} for i in range(30)]
    content = json.dumps({"version": 1, "data": rows})
    at = content.index("row 7") + 5
    (tmp_path / "a.json").write_text(content[:at] + "\n" + content[at:], encoding="utf-8")
    report = DataStats(1.0)
    found = [row for _, row in read_rows(tmp_path / "a.json", report)]
    assert sum(row in rows for row in found) >= 29 and len(found) + report.bad_rows >= 30
