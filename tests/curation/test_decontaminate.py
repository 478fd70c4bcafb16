"""Promise: documents with an exam question are dropped and listed, other text is kept, and the training log names the
exams."""

import json
import shutil

import pytest

import data_process
from common.errors import UserError
from corpus.provenance import data_provenance, format_provenance, read_provenance
from curation.decontaminate import DecontaminationTransform, build_exam_index, find_exam_files, question_and_choices
from curation.transform import NumberedRow
from tests.helpers import EXACT_FLAGS, SHARED_DATA, TINY_MODEL_FLAGS, run_script, write_rows

ZH = "下列关于光合作用与呼吸作用关系的叙述中，符合绿色植物实际情况的一项是哪一个？"
EN = "Which of the following rivers flows through the largest number of capital cities in Europe today?"
SHORT = "鲸鱼属于____。"
CSV = (
    "id,question,A,B,C,D,answer\n"
    f"0,{ZH},白天只有光合作用,夜里只有光合作用,根只有呼吸作用,叶没有呼吸作用,C\n"
    f'1,"{EN}",The Rhine,The Danube,The Loire,The Elbe,B\n'
    f"2,{SHORT},海里的鱼类动物,海里的哺乳类动物,两栖类,爬行类,B\n"
    "3,2+2=？,1,2,3,4,D\n"
    + "".join(
        f"{i},一二三四五六七八九十甲乙丙丁下列说法中正确的是{word}类,a,b,c,d,A\n" for i, word in enumerate("鸟兽虫", 4)
    )
)
PROSE = "河流从山里来，穿过村庄和田野，最后流进了大海，两岸的人们靠它生活。"


@pytest.fixture(scope="module")
def exam_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam") / "myexam"
    (folder / "val").mkdir(parents=True)
    (folder / "val" / "all_val.csv").write_text(CSV, encoding="utf-8")
    (folder / "README.md").write_text("not a question, but fifteen characters long")
    return folder


def are_dropped(exam, *texts, overlap=0.5):
    transform = DecontaminationTransform(exam, overlap)
    return [
        decision.kept is None
        for decision in transform.apply([NumberedRow(i, "f", i, {"text": t}, t) for i, t in enumerate(texts)])
    ]


def test_leaks_are_found_in_any_context(exam_dir):
    exam = build_exam_index([str(exam_dir)])
    assert (len(exam.questions), exam.too_short, exam.names) == (6, 1, ["myexam"])
    leaks = [
        PROSE + ZH + PROSE,
        ZH.replace("，", " ,\n").replace("？", "()"),
        PROSE + ZH[4:-6],  # more than half of the question
        f"Quiz! {EN.upper()} Answer: the Danube.",
        "问：鲸鱼属于（ ）\nA.海里的鱼类动物 B.海里的哺乳类动物",
    ]
    assert are_dropped(exam, *leaks) == [True] * 5
    fine = [PROSE, ZH[:14] + PROSE, "鲸鱼属于海里的动物。", EN[:50], "甲乙丙丁下列说法中正确的是鱼类", "", "2+2=4"]
    assert are_dropped(exam, *fine) == [False] * 7
    assert are_dropped(exam, ZH[:14] + PROSE, overlap=0.0) == [True]


def test_common_ngrams_are_ignored_unless_a_question_has_no_others(exam_dir, tmp_path):
    phrase = "一二三四五六七八九十甲乙丙丁下列说法中正确"
    assert are_dropped(build_exam_index([str(exam_dir)]), phrase, overlap=0.0) == [False]
    rows = [{"question": phrase, "A": f"第{i}种很长的说法在这里", "B": "乙"} for i in range(4)]
    exam_file = write_rows(tmp_path / "same.jsonl", rows)
    leak = f"{phrase}：\nA. 第2种很长的说法在这里"
    assert are_dropped(build_exam_index([str(exam_file)]), PROSE + leak, PROSE + phrase) == [True, False]
    rows = [{"question": phrase, "A": f"开头都是一样的很长很长的说法{i}", "B": "乙"} for i in range(4)]
    write_rows(exam_file, rows)
    assert are_dropped(build_exam_index([str(exam_file)]), PROSE + phrase, PROSE) == [True, False]


def test_a_short_question_of_formulas_is_found_without_its_choices(tmp_path):
    question = "求极限：$\\lim_{n\\rightarrow\\infty}\\sum_{k=1}^n{\\frac{k}{(k+1)!}}=$____"
    (tmp_path / "math.csv").write_text(f"question,A,B,C,D\n{question},$0$,$1$,$2$,$e$\n", encoding="utf-8")
    exam = build_exam_index([str(tmp_path / "math.csv")])
    assert are_dropped(exam, PROSE + question + PROSE, PROSE + "$\\sum_{k=1}^n k$ 求极限") == [True, False]


@pytest.mark.parametrize("archive_format", ["zip", "xztar", "tar"])
def test_an_archive_gives_the_questions_of_its_folder(exam_dir, tmp_path, archive_format):
    archive = shutil.make_archive(str(tmp_path / "myexam"), archive_format, exam_dir.parent, "myexam")
    from_folder, from_archive = build_exam_index([str(exam_dir)]), build_exam_index([archive])
    assert [text for _, text in from_archive.questions] == [text for _, text in from_folder.questions]
    assert from_archive.questions[0][0] == f"{archive}/myexam/val/all_val.csv:2"
    assert are_dropped(from_archive, PROSE + ZH + PROSE) == [True]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Question": "甲？", "A": "一", "B": "二", "Answer": "A"}, ("甲？", "\nA. 一\nB. 二")),
        ({"question": "q", "choices": ["x", "y"]}, ("q", "\nA. x\nB. y")),
        ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ("问", "")),
        ({"instruction": "做", "output": "好"}, ("做", "")),
        ({"text": "一段"}, ("一段", "")),
        ("一块文字", ("一块文字", "")),
        ({"x": 1}, ("", "")),
        ({"question": None, "text": 5}, ("", "")),
    ],
)
def test_question_and_choices_are_read_from_many_formats(row, expected):
    assert question_and_choices(row) == expected


def run_decontaminate(*files, against, out_dir, **flags):
    arguments = ["decontaminate", *map(str, files), "--against", str(against), "--out_dir", str(out_dir)]
    data_process.main(arguments + [str(x) for name, value in flags.items() for x in (f"--{name}", value)])


def test_a_planted_leak_is_dropped_and_listed(tmp_path, exam_dir, capsys):
    rows = [{"text": f"{PROSE}{i}", "source": "web"} for i in range(50)]
    rows[20] = {"text": PROSE + ZH, "source": "leak"}
    chat = {"messages": [{"role": "user", "content": EN}, {"role": "assistant", "content": "The Danube."}]}
    path = write_rows(tmp_path / "a.jsonl", [*rows, chat])
    run_decontaminate(path, against=exam_dir, out_dir=tmp_path / "out", workers=2)
    kept = [json.loads(line) for line in (tmp_path / "out" / "text_000.jsonl").open(encoding="utf-8")]
    assert kept == rows[:20] + rows[21:]
    lines = [line.split("\t") for line in (tmp_path / "out" / "dropped.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == [f"{path}:21", f"{path}:51"]
    assert lines[0][2].startswith("100% of ") and "all_val.csv:2: 下列关于光合作用与呼吸" in lines[0][2]
    assert "searching for 6 questions of myexam; 1 questions are too short" in capsys.readouterr().out
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert f"question: {ZH}" in markdown and "shared:" in markdown


def test_training_log_names_the_exams_the_data_was_checked_against(
    tmp_path, exam_dir, tokenizer_dir, monkeypatch, capsys
):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"{PROSE}第{i}次。"} for i in range(60)])
    run_decontaminate(path, against=exam_dir, out_dir=tmp_path / "checked")
    text = tmp_path / "checked" / "text_000.jsonl"
    data = tmp_path / "pretrain"
    data_process.main(["pretrain", str(text), "--tokenizer", str(tokenizer_dir), "--out_dir", str(data)])
    expected = "checked against myexam (6 questions, 13-grams of characters, 50 in English)"
    assert format_provenance(data_provenance(data)) == expected
    capsys.readouterr()
    flags = ["--data_path", data, "--out_dir", tmp_path / "out", "--tokenizer", tokenizer_dir, "--max_steps", "1"]
    run_script(monkeypatch, "1-pretrain.py", *flags, *TINY_MODEL_FLAGS, *EXACT_FLAGS)
    assert f"data: {expected}\n" in capsys.readouterr().out
    import torch

    lineage = torch.load(next((tmp_path / "out").glob("*.pth")), weights_only=True)["lineage"]
    assert lineage[-1]["data_history"] == expected


def test_provenance_lists_only_steps_applied_to_all_files(tmp_path, exam_dir):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"{PROSE}{i}"} for i in range(9)])
    run_decontaminate(path, against=exam_dir, out_dir=tmp_path / "one")
    data_process.main(
        ["dedup", str(tmp_path / "one" / "text_000.jsonl"), "--out_dir", str(tmp_path / "two"), "--exact_only"]
    )
    one, two = (tmp_path / name / "text_000.jsonl" for name in ("one", "two"))
    assert [entry["step"] for entry in read_provenance([two])] == ["decontaminate", "dedup"]
    assert [entry["step"] for entry in read_provenance([one, two])] == ["decontaminate"]
    assert read_provenance([one, path]) == [] and read_provenance([]) == [] and format_provenance([]) == ""
    (tmp_path / "two" / "report.json").write_text("[broken")
    assert read_provenance([two]) == []


def test_invalid_exams_are_reported_in_one_line(tmp_path, exam_dir):
    path = write_rows(tmp_path / "a.jsonl", [{"text": PROSE}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.csv").write_text("id,name\n1,x\n")
    (tmp_path / "broken.zip").write_text("no archive")
    for against, flags, words in (
        (tmp_path / "nowhere", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "no .csv, .tsv"),
        (tmp_path / "none.csv", {}, "no question found in 1 files: a row needs one of the keys question"),
        (tmp_path / "broken.zip", {}, "broken.zip is no exam: expected"),
        (exam_dir, {"overlap": 2}, "--overlap: 2 is not a number from 0 to 1"),
    ):
        with pytest.raises(UserError, match=words):
            run_decontaminate(path, against=against, out_dir=tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(not (SHARED_DATA / "ceval.tar.xz").is_file(), reason="needs the real data")
def test_every_question_of_ceval_is_found_where_it_is_planted(tmp_path):
    import random
    import tarfile

    with tarfile.open(SHARED_DATA / "ceval.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    exam = build_exam_index([str(tmp_path / "ceval")])
    assert len(find_exam_files([str(tmp_path / "ceval")])) >= 156 and exam.too_short < 0.01 * len(exam.questions)
    questions = random.Random(0).sample(exam.questions, 500)
    planted = [PROSE + question + PROSE for _, question in questions if len(question) > 20]
    found = are_dropped(exam, *planted)
    assert sum(found) / len(found) > 0.99
