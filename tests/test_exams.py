"""Exams are read whole or refused in one line: both layouts, folders and archives, and files that somebody broke."""

import csv
import io
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.errors import UserError
from corpus.exams import LETTERS, read_exam, read_items

HEAD = "id,question,A,B,C,D,answer\n"
GOOD = HEAD + '0,一加一等于____。,1,2,3,4,B\n1,"逗号，和 comma, here",a,"b, b","c\nc",d,d\n'


def ceval(folder, text=GOOD, subject="logic", split="val"):
    (folder / "exam" / split).mkdir(parents=True, exist_ok=True)
    file = folder / "exam" / split / f"{subject}_{split}.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "exam"


def archives(folder, exam):
    for name, mode in (("e.tar", "w"), ("e.tar.gz", "w:gz"), ("e.tar.xz", "w:xz"), ("e.tar.bz2", "w:bz2")):
        with tarfile.open(folder / name, mode) as archive:
            archive.add(exam, "any/name")
        yield folder / name
    with zipfile.ZipFile(folder / "e.zip", "w") as archive:
        for file in exam.rglob("*.csv"):
            archive.write(file, f"any/name/{file.relative_to(exam)}")
            archive.writestr(f"__MACOSX/{file.relative_to(exam).parent}/._{file.name}", b"\0\5\26\7")
    yield folder / "e.zip"


def test_both_layouts_from_folders_and_archives(tmp_path):
    exam = ceval(tmp_path)
    ceval(tmp_path, GOOD, "law", "dev")
    ceval(tmp_path, GOOD, "logic", "dev")
    for path in (exam, exam / "val", *archives(tmp_path, exam)):
        read = read_exam(path)
        first, second = read.items
        assert (read.split, read.subjects, read.categories) == ("val", ["logic"], {"logic": "Humanities"})
        assert (first.number, first.question, first.options, first.answer) == (
            "0",
            "一加一等于____。",
            tuple("1234"),
            "B",
        )
        assert second.question == "逗号，和 comma, here" and second.options == ("a", "b, b", "c\nc", "d")
        assert second.answer == "D" and second.where.endswith("logic_val.csv:3")
    assert len(read_exam(exam).examples["logic"]) == 2 and not read_exam(exam / "val").examples

    cmmlu = tmp_path / "cmmlu" / "test"
    cmmlu.mkdir(parents=True)
    (cmmlu / "agronomy.csv").write_text("\ufeff,Question,A,B,C,D,Answer\r\n7,谁？,甲,乙,丙,丁,C\r\n", encoding="utf-8")
    read = read_exam(tmp_path / "cmmlu")
    assert (read.split, read.subjects, read.items[0].number, read.items[0].answer) == ("test", ["agronomy"], "7", "C")


def test_an_exam_may_bring_its_own_categories_and_keep_its_answers_secret(tmp_path):
    exam = ceval(tmp_path, "id,question,A,B,C,D\n0,q,1,2,3,4\n", "logic", "test")
    (exam / "subject_mapping.json").write_text('{"logic": ["Logic", "逻辑学", "Thinking"]}', encoding="utf-8")
    read = read_exam(exam)
    assert read.split == "test" and read.items[0].answer == "" and read.categories == {"logic": "Thinking"}
    (exam / "subject_mapping.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"subject_mapping.json: expected"):
        read_exam(exam)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,question,A,B,C,answer\n0,q,1,2,3,A\n", "no column d"),
        (HEAD + "0,q,1,2,3,4,E\n", ":2: the answer must be A, B, C or D, not 'E'"),
        (HEAD + "0,q,1,2,3,4,AB\n", ":2: the answer must be"),
        (HEAD + "0,q,1,2,3,4,A\n1,q,1,2,3,4,\n", ":3: the answer is empty"),
        (HEAD + "0,q,1,2,3,4,A\n1,a, comma,1,2,3,4,A\n", ":3: 8 cells, 7 in the first line"),
        (HEAD + "0,q,1,2,3,4\n", ":2: 6 cells"),
        (HEAD + '0,"q,1,2,3,4,A\n', "not valid csv"),
        (HEAD + '0,"q"x,1,2,3,4,A\n', ":2: not valid csv"),
        (HEAD + "0, ,1,2,3,4,A\n", ":2: question is empty"),
        (HEAD + "0,q,1,2,,4,A\n", ":2: C is empty"),
        (HEAD + "0,q,1,2,3,4,A\n0,r,1,2,3,4,A\n", ":3: the number 0 occurs twice"),
        (HEAD, "no questions"),
        ("", "no column question, a, b, c, d"),
        (HEAD + "0,q\0,1,2,3,4,A\n", ":2: a NUL character"),
        ((HEAD + "0,问,1,2,3,4,A\n").encode("gbk"), ":2: not UTF-8"),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, text, said):
    exam = ceval(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_exam(exam)
    assert said in str(error.value) and "logic_val.csv" in str(error.value) and "\n" not in str(error.value)


def test_dev_needs_its_answers(tmp_path):
    ceval(tmp_path, "id,question,A,B,C,D\n0,q,1,2,3,4\n", "logic", "dev")
    with pytest.raises(UserError, match="no column answer"):
        read_exam(ceval(tmp_path))


def test_a_wrong_place_says_what_was_expected(tmp_path):
    exam = ceval(tmp_path)
    for path, said in (
        (tmp_path / "nowhere", "no such file or folder"),
        (exam / "val" / "logic_val.csv", "no archive"),
        (tmp_path / "empty", "holds no exam"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=said) as error:
            read_exam(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no split 'test'.* val"):
        read_exam(exam, "test")
    with pytest.raises(UserError, match=r"no subject 'lore'.*logic"):
        read_exam(exam, subjects=["lore"])
    (tmp_path / "exam" / "old" / "val").mkdir(parents=True)
    (tmp_path / "exam" / "old" / "val" / "logic_val.csv").write_text(GOOD, encoding="utf-8")
    with pytest.raises(UserError, match="holds logic twice"):
        read_exam(exam)


def test_a_damaged_archive_is_said(tmp_path):
    for path in list(archives(tmp_path, ceval(tmp_path, HEAD + "0,q,1,2,3,4,A\n" * 1))):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 3])
        with pytest.raises(UserError, match="e\\.") as error:
            read_exam(path)
        assert "\n" not in str(error.value)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(lambda t: t.strip() == t)
ROW = st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT, st.sampled_from(LETTERS))


@given(st.lists(ROW, min_size=1, max_size=5))
def test_what_csv_writes_is_read_back(rows):
    text = io.StringIO()
    csv.writer(text).writerows([("question", *LETTERS, "answer"), *rows])
    items = read_items("s", "f", text.getvalue())
    assert [(item.question, *item.options, item.answer) for item in items] == rows


@given(st.text(alphabet='ABCDquestion,answer"\n\r 01甲', max_size=120))
def test_any_text_is_read_or_refused(noise):
    for text in (noise, HEAD + noise):
        try:
            assert read_items("s", "f", text)
        except UserError as error:
            assert str(error).startswith("f")
