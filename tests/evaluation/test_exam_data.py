"""Exams are read completely or raise a one-line error: both layouts, folders, archives and damaged files."""

import csv
import io
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from evaluation.exam_data import CEVAL_LETTERS, parse_exam_items, read_exam_split
from tests.helpers import one_line_error

HEAD = "id,question,A,B,C,D,answer\n"
GOOD = HEAD + '0,一加一等于____。,1,2,3,4,B\n1,"逗号，和 comma, here",a,"b, b","c\nc",d,d\n'


def write_ceval_file(folder, text=GOOD, subject="logic", split="val"):
    (folder / "exam" / split).mkdir(parents=True, exist_ok=True)
    file = folder / "exam" / split / f"{subject}_{split}.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "exam"


def write_archives(folder, exam):
    for name, mode in (("e.tar", "w"), ("e.tar.gz", "w:gz"), ("e.tar.xz", "w:xz"), ("e.tar.bz2", "w:bz2")):
        with tarfile.open(folder / name, mode) as archive:
            archive.add(exam, "any/name")
        yield folder / name
    with zipfile.ZipFile(folder / "e.zip", "w") as archive:
        for file in exam.rglob("*.csv"):
            archive.write(file, f"any/name/{file.relative_to(exam)}")
            archive.writestr(f"__MACOSX/{file.relative_to(exam).parent}/._{file.name}", b"\0\5\26\7")
    yield folder / "e.zip"


def test_ceval_and_cmmlu_layouts_are_read_from_folders_and_archives(tmp_path):
    exam = write_ceval_file(tmp_path)
    write_ceval_file(tmp_path, GOOD, "law", "dev")
    write_ceval_file(tmp_path, GOOD, "logic", "dev")
    for path in (exam, exam / "val", *write_archives(tmp_path, exam)):
        read = read_exam_split(path)
        first, second = read.items
        assert (read.split, read.subjects, read.categories) == ("val", ["logic"], {"logic": "Humanities"})
        assert (first.number, first.question) == ("0", "一加一等于____。")
        assert (first.options, first.answer) == (tuple("1234"), "B")
        assert second.question == "逗号，和 comma, here" and second.options == ("a", "b, b", "c\nc", "d")
        assert second.answer == "D" and second.location.endswith("logic_val.csv:3")
    assert len(read_exam_split(exam).examples["logic"]) == 2 and not read_exam_split(exam / "val").examples

    cmmlu = tmp_path / "cmmlu" / "test"
    cmmlu.mkdir(parents=True)
    (cmmlu / "agronomy.csv").write_text("\ufeff,Question,A,B,C,D,Answer\r\n7,谁？,甲,乙,丙,丁,C\r\n", encoding="utf-8")
    read = read_exam_split(tmp_path / "cmmlu")
    assert (read.split, read.subjects, read.items[0].number, read.items[0].answer) == ("test", ["agronomy"], "7", "C")


def test_subject_mapping_sets_categories_and_answers_may_be_absent(tmp_path):
    exam = write_ceval_file(tmp_path, "id,question,A,B,C,D\n0,q,1,2,3,4\n", "logic", "test")
    (exam / "subject_mapping.json").write_text('{"logic": ["Logic", "逻辑学", "Thinking"]}', encoding="utf-8")
    read = read_exam_split(exam)
    assert read.split == "test" and read.items[0].answer == "" and read.categories == {"logic": "Thinking"}
    (exam / "subject_mapping.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"subject_mapping.json: expected"):
        read_exam_split(exam)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,question,A,B,D,answer\n0,q,1,2,3,A\n", "no column C"),
        ("id,question,A,answer\n0,q,1,A\n", "no column B"),
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
        ("", "no column question, A, B"),
        (HEAD + "0,q\0,1,2,3,4,A\n", ":2: a NUL character"),
        (HEAD.encode() + b"0,q\x8f\xff\x81,1,2,3,4,A\n", "neither UTF-8 nor UTF-16 nor GB18030"),
    ],
)
def test_broken_file_error_names_file_and_line(tmp_path, text, message):
    exam = write_ceval_file(tmp_path, text)
    with one_line_error(message, "logic_val.csv"):
        read_exam_split(exam)


def test_dev_requires_answers(tmp_path):
    write_ceval_file(tmp_path, "id,question,A,B,C,D\n0,q,1,2,3,4\n", "logic", "dev")
    with pytest.raises(UserError, match="no column answer"):
        read_exam_split(write_ceval_file(tmp_path))


def test_wrong_path_error_names_expected_input(tmp_path):
    exam = write_ceval_file(tmp_path)
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "notes.docx", "is no exam: expected a .csv, .tsv or .jsonl file of questions"),
        (tmp_path / "table.xlsx", "is no exam: expected"),
        (tmp_path / "torn.tar.gz", "as a tar or zip archive .*: damaged, or expected a .csv"),
        (tmp_path / "empty", "holds no exam"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "notes.docx").write_bytes(b"1. What is one and one?")
        (tmp_path / "torn.tar.gz").write_bytes(b"\x1f\x8b\x08\0torn")
        with zipfile.ZipFile(tmp_path / "table.xlsx", "w") as archive:
            archive.writestr("xl/workbook.xml", "<workbook/>")
        with pytest.raises(UserError, match=message) as error:
            read_exam_split(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no split 'test'.* val"):
        read_exam_split(exam, "test")
    with pytest.raises(UserError, match=r"no subject 'lore'.*logic"):
        read_exam_split(exam, subjects=["lore"])
    (tmp_path / "exam" / "old" / "val").mkdir(parents=True)
    (tmp_path / "exam" / "old" / "val" / "logic_val.csv").write_text(GOOD, encoding="utf-8")
    with pytest.raises(UserError, match="holds logic twice"):
        read_exam_split(exam)


def test_damaged_archive_is_an_error(tmp_path):
    for path in list(write_archives(tmp_path, write_ceval_file(tmp_path, HEAD + "0,q,1,2,3,4,A\n" * 1))):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 3])
        with pytest.raises(UserError, match="e\\.") as error:
            read_exam_split(path)
        assert "\n" not in str(error.value)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(lambda t: t.strip() == t)
ROW = st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT, st.sampled_from(CEVAL_LETTERS))


@given(st.lists(ROW, min_size=1, max_size=5))
def test_csv_round_trip(rows):
    text = io.StringIO()
    csv.writer(text).writerows([("question", *CEVAL_LETTERS, "answer"), *rows])
    items = parse_exam_items("s", "f", text.getvalue())
    assert [(item.question, *item.options, item.answer) for item in items] == rows


@given(st.text(alphabet='ABCDquestion,answer"\n\r 01甲', max_size=120))
def test_any_text_is_read_or_raises_user_error(noise):
    for text in (noise, HEAD + noise):
        try:
            assert parse_exam_items("s", "f", text)
        except UserError as error:
            assert str(error).startswith("f")


# ---- own files -------------------------------------------------------------------------------------------------------
OWN_ROWS = [("一加一?", "1", "2", "3", "4", "B"), ("1, 2; 3\tand?", "a", "b", "c", "d", "D")]


def write_exam_file(folder, content, name="mine.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def csv_text(head, rows, order=None, delimiter=","):
    """csv text of the rows, with its columns in `order` if given."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    for row in [*([head] if head else []), *rows]:
        writer.writerow([row[i] for i in order] if order else row)
    return text.getvalue()


def read_own(path, **options):
    return [(item.question, item.options, item.answer) for item in read_exam_split(path, **options).items]


RIGHT = [(row[0], row[1:5], row[5]) for row in OWN_ROWS]
ENGLISH = ["question", "A", "B", "C", "D", "answer"]


@pytest.mark.parametrize(
    "head",
    [
        ENGLISH,
        ["Question", "a", "b", "c", "d", "ANSWER"],
        ["题目", "选项A", "选项B", "选项C", "选项D", "答案"],
        ["问题", "Ａ", "Ｂ", "Ｃ", "Ｄ", "正确答案"],
        ["question", "option_a", "Option B", "choiceC", "opD", "correct_answer"],
        None,  # no header, as in MMLU
    ],
    ids=str,
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=repr)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
def test_one_csv_is_an_exam_of_one_subject(tmp_path, head, delimiter, encoding):
    rows = OWN_ROWS * 3 if head is None else OWN_ROWS
    path = write_exam_file(tmp_path, csv_text(head, rows, delimiter=delimiter).encode(encoding))
    exam = read_exam_split(path)
    assert (exam.split, exam.subjects, exam.categories) == ("all", ["mine"], {"mine": "Other"})
    assert read_own(path) == RIGHT * (3 if head is None else 1)
    assert exam.items[1].location == f"{path}:{3 if head else 2}"


def test_rows_without_header_may_have_numbers(tmp_path):
    """C-Eval's columns without the header: the first column is the number, the second the question."""
    path = write_exam_file(tmp_path, csv_text(None, [(str(i), *row) for i, row in enumerate(OWN_ROWS, 7)]))
    assert read_own(path) == RIGHT and [item.number for item in read_exam_split(path).items] == ["7", "8"]
    short = write_exam_file(tmp_path, csv_text(None, [("12", "a dozen", "a score", "A")]))
    assert read_own(short) == [("12", ("a dozen", "a score"), "A")], "with two options only, a number is the question"


def test_encoding_of_short_files_is_detected(tmp_path):
    chinese = [("首都?", "gb18030"), ("首都?", "utf-16"), ("一?", "utf-16-le")]
    for text, encoding in (*chinese, ("Who is Müller?", "cp1252")):
        path = write_exam_file(tmp_path, csv_text(ENGLISH, [(text, *"1234", "A")]).encode(encoding))
        assert read_exam_split(path).items[0].question == text, encoding


def test_columns_may_be_in_any_order_among_other_columns(tmp_path):
    head = [*ENGLISH, "id", "explanation"]
    rows = [(*row, f"n{i}", "because") for i, row in enumerate(OWN_ROWS)]
    for order in ((7, 5, 0, 4, 3, 2, 1, 6), (6, 0, 1, 2, 3, 4, 5, 7), (1, 2, 3, 4, 5, 6, 7, 0)):
        path = write_exam_file(tmp_path, csv_text(head, rows, order))
        assert read_own(path) == RIGHT and [item.number for item in read_exam_split(path).items] == ["n0", "n1"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["a", "(D)", "Ｃ", "b."], "ADCB"),
        (["0", "1", "2", "3"], "ABCD"),
        (["1", "2", "3", "4"], "ABCD"),
        (["0", "0", "1", "0"], "AABA"),
        (["4", "２", "2", "2"], "DBBB"),
        (["1", "2", "3", "3"], ":2: the answers are numbers, but none is 0 or the number of options"),
        (["0", "1", "4", "1"], ":4: the answer is 4, that of line 2 is 0: it is unclear"),
        (["0", "1", "5", "1"], ":4: the answer must be A, B, C or D, not '5'"),
        (["0", "1", "b", "1"], ":4: the answer is 'b', others are numbers"),
        (["A", "1", "B", "C"], "answer"),
        (["A", "B", "E", "C"], ":4: the answer must be A, B, C or D, not 'E'"),
        (["A", "right", "B", "C"], ":3: the answer must be A, B, C or D, not 'right'"),
        (["A", "-1", "B", "C"], ":3: the answer must be A, B, C or D, not '-1'"),
    ],
    ids=str,
)
def test_answers_are_letters_or_numbers_from_0_or_1(tmp_path, answers, expected):
    rows = [(f"q{i}", "w", "x", "y", "z", answer) for i, answer in enumerate(answers)]
    path = write_exam_file(tmp_path, csv_text(ENGLISH, rows))
    if isinstance(expected, str) and len(expected) == 4:
        assert "".join(answer for *_, answer in read_own(path)) == expected
        return
    with one_line_error(expected, str(path)):
        read_exam_split(path)


def test_number_that_is_also_the_text_of_another_option_is_an_error(tmp_path):
    path = write_exam_file(tmp_path, "question,A,B,C,D,answer\n1+1?,1,2,3,4,2\n2+2?,2,3,4,5,0\n")
    with pytest.raises(UserError, match=r":2: the answer 2 is the number of one option and the text of another"):
        read_exam_split(path)
    assert read_own(write_exam_file(tmp_path, "question,A,B,C,D,answer\n1+1?,0,1,2,3,2\n0+0?,0,1,2,3,0\n"))[0][2] == "C"


def test_questions_have_two_to_ten_options(tmp_path):
    five = write_exam_file(tmp_path, "question,A,B,C,D,E,answer\nq,1,2,3,4,5,E\ntrue?,yes,no,,,,B\n")
    assert read_own(five) == [("q", tuple("12345"), "E"), ("true?", ("yes", "no"), "B")]
    ten = write_exam_file(tmp_path, csv_text(["question", *"ABCDEFGHIJ", "answer"], [("q", *"0123456789", "J")]))
    assert read_own(ten)[0][2] == "J"
    bare = write_exam_file(tmp_path, "true?,yes,no,B\nfalse?,no,yes,a\n")
    assert read_own(bare) == [("true?", ("yes", "no"), "B"), ("false?", ("no", "yes"), "A")]
    for text, message in (
        ("question,A,B,C,D,E,answer\ntrue?,yes,no,,,,C\n", ":2: the answer must be A or B, not 'C'"),
        ("question,A,B,C,answer\nq,1,,3,C\n", ":2: B is empty"),
        ("question,A,B,answer\nq,1,,A\n", ":2: B is empty"),
        ("what?,yes,no,maybe\n", "no column question, A, B in the first line: 'what?,yes,no,maybe'"),
    ):
        with one_line_error(message, "mine.csv"):
            read_exam_split(write_exam_file(tmp_path, text))


def test_jsonl_questions_are_read(tmp_path):
    rows = [
        '{"question": "一?", "A": "1", "B": 2, "C": "3", "answer": "b"}',
        "",
        '{"题目": "二?", "选项": ["x", "y"], "答案": "A", "解析": "…"}',
        '{"question": "three?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"}',
    ]
    path = write_exam_file(tmp_path, "\n".join(rows), "mine.jsonl")
    first, *others = read_own(path)
    assert first == ("一?", ("1", "2", "3"), "B")
    assert others == [("二?", ("x", "y"), "A"), ("three?", ("x", "y", "z"), "C")]
    for text, message in (
        ('{"question": "q"}', ":1: no key A, B; keys: question"),
        ('{"A": 1, "B": 2}', ":1: no key question"),
        ("[1]", ":1: not a JSON object"),
        ("{oops", ":1: not JSON"),
        ('{"question": "q", "choices": ["x", ["y"]], "answer": "A"}', ":1: B is empty"),
    ):
        with one_line_error(message):
            read_exam_split(write_exam_file(tmp_path, text, "mine.jsonl"))


def test_lists_and_folders_of_files_are_read(tmp_path):
    text = csv_text(ENGLISH, OWN_ROWS)
    one = write_exam_file(tmp_path / "a", text, "law.csv")
    two = write_exam_file(tmp_path / "b", text, "driving_test.csv")
    exam = read_exam_split([one, two])
    assert (exam.split, exam.subjects) == ("all", ["driving_test", "law"]), "not every name has a split"
    assert read_exam_split(two).split == "test" and read_exam_split(two).subjects == ["driving"]
    write_exam_file(tmp_path / "a", text, "math.tsv")
    assert read_exam_split(tmp_path / "a").subjects == ["law", "math"]
    write_exam_file(tmp_path / "c", text, "law_val.csv"), write_exam_file(tmp_path / "c", text, "law_dev.csv")
    exam = read_exam_split(tmp_path / "c")
    assert (exam.split, exam.subjects, len(exam.examples["law"])) == ("val", ["law"], 2)
    write_exam_file(tmp_path / "d" / "val", text, "law.csv"), write_exam_file(tmp_path / "d" / "dev", text, "law.csv")
    write_exam_file(tmp_path / "d", text, "stray.csv")
    exam = read_exam_split(tmp_path / "d")
    assert (exam.split, exam.subjects, len(exam.examples["law"])) == ("val", ["law"], 2)
    with pytest.raises(UserError, match="holds law twice"):
        read_exam_split([tmp_path / "a", one])
    with pytest.raises(UserError, match=r"has the splits val, all, dev: choose one with --split"):
        read_exam_split([tmp_path / "d", two.rename(tmp_path / "b" / "driving.csv")])


@given(
    st.text(alphabet='ABCDquestion,answer"\n\r 01甲;\t题目选项答案{}[]', max_size=120),
    st.sampled_from(["f", "f.jsonl"]),
)
def test_any_text_without_header_is_read_or_raises_user_error(noise, name):
    for text in (noise, HEAD + noise, "q,1,2,A\n" + noise, '{"question": "q", "A": 1, "B": 2}\n' + noise):
        try:
            items = parse_exam_items("s", name, text)
        except UserError as error:
            assert str(error).startswith(name) and "\n" not in str(error)
        else:
            assert all(item.answer in "ABCDEFGHIJ"[: len(item.options)] and item.question for item in items)
