"""2-eval.py: selection of the model, prompts, accuracy on questions, and errors.

Promises: the default is the latest stage, not the newest file; a chat model gets the rendered question, a pretrained
model the bare text; only the model's own answer is scored, by the rule in --help; bad input is a one-line error with
exit code 2; tools are called up to the limit, also for questions. Conversations: ../evaluation/test_terminal_chat.py;
reports: ../evaluation/test_report.py.
"""

import io
import json
import os
import subprocess
import sys

import pytest

from common.errors import UserError
from evaluation.chat_model import find_model
from evaluation.prompts import PROMPTS, SCRIPT_PROMPTS
from evaluation.qa_data import is_correct
from tests.helpers import (
    ROOT,
    child_cpu_seconds,
    one_line_error,
    run_here,
    run_process,
    run_script,
    save_scripted_model,
    script_answers,
)


@pytest.fixture
def out(scripted_models):
    return scripted_models


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


QUESTION = {"question": "首都?", "keys": ["巴"], "lang": "zh", "kind": "capital"}


def test_a_chat_model_answers(out, monkeypatch, capsys, tmp_path):
    run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompt", "你好", "--json", tmp_path / "new" / "a.json",
               "--temperature", 0)  # fmt: skip
    shown = capsys.readouterr().out
    assert "full_sft_64.pth: full_sft, 0." in shown and "> 你好\nA巴\n" in shown and "tokens/s" in shown
    saved = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))
    assert saved["answers"] == [{"prompt": "你好", "answer": "A巴", "finish_reason": "stop"}]
    assert saved["stage"] == "full_sft" and saved["checkpoint"].endswith("full_sft_64.pth")


def test_pretrained_model_continues_prompt(out, monkeypatch, capsys):
    options = ["--out_dir", out, "--temperature", 0, "--max_new_tokens", 4]
    run_script(monkeypatch, "2-eval.py", *options, "--stage", "pretrain", "--prompt", "xP")
    assert "> xP\naris\n" in capsys.readouterr().out


def test_each_line_of_prompts_file_is_answered(out, monkeypatch, capsys, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeff一\r\n\r\ntwo\u2028three\n".encode())
    run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompts", tmp_path / "p.txt", "--seed", 1)
    shown = capsys.readouterr().out
    assert "> 一\nA巴\n" in shown and "> two\u2028three\nA巴\n" in shown and shown.count("\n> ") == 2


def test_prompts_are_read_from_a_pipe(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("一\n\ntwo\n".encode())))
    run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompts", "-")
    shown = capsys.readouterr().out
    assert "> 一\nA巴\n" in shown and "> two\nA巴\n" in shown and shown.count("\n> ") == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(UserError, match="stdin is empty"):
        run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompts", "-")


def test_non_interactive_run_answers_fixed_prompts(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    run_script(monkeypatch, "2-eval.py", "--out_dir", out)
    shown = capsys.readouterr().out
    assert "--prompts - reads prompts from it" in shown
    assert all(f"> {prompt}\nA巴\n" in shown for prompt in SCRIPT_PROMPTS) and len(SCRIPT_PROMPTS) == 16


def test_history_makes_prompts_one_conversation(out, monkeypatch, tmp_path):
    from evaluation import chat_model

    model_inputs = []

    def stream(model, ids, settings, tokenizer, answer, decoder):
        model_inputs.append(tokenizer.decode(ids))
        answer.text = "ok"
        yield "ok"

    monkeypatch.setattr(chat_model, "stream", stream)
    prompts = write(tmp_path / "p.txt", "a", "b", "c")
    run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompts", prompts)
    run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompts", prompts, "--history", 1)

    assert [text.count("user") for text in model_inputs] == [1, 1, 1, 1, 2, 2]
    assert "user\na<" not in model_inputs[5] and "user\nb<" in model_inputs[5]


def test_fixed_prompts_cover_every_kind_in_both_languages():
    from corpus.language import detect_language

    kinds = {kind for _, kind, _ in PROMPTS}
    assert kinds == {"facts", "geography", "science", "writing", "code", "identity", "small_talk", "translation"}
    for lang in ("zh", "en"):
        assert sorted(kind for named, kind, _ in PROMPTS if named == lang) == sorted([*kinds, *kinds])
    assert len({text for *_, text in PROMPTS}) == len(PROMPTS) == 32
    odd = {text for lang, kind, text in PROMPTS if detect_language(text) != lang and kind != "translation"}
    assert not odd and {kind for _, kind, text in PROMPTS if text in SCRIPT_PROMPTS} == kinds


def test_accuracy_by_language_and_kind(out, monkeypatch, capsys, tmp_path):
    questions = write(
        tmp_path / "q.jsonl",
        QUESTION,
        {**QUESTION, "keys": ["伦敦", "A巴"]},
        {**QUESTION, "keys": ["伦敦"]},
        "",
        {"question": "Which letter?", "keys": ["a巴"]},
        *[{"question": "Capital" + "?" * (i % 5), "keys": ["Rome"], "kind": "capital"} for i in range(150)],
    )
    run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--questions", questions, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["accuracy"] == {"zh": pytest.approx(2 / 3), "en": pytest.approx(1 / 151)}
    assert report["counts"]["zh"] == {"questions": 3, "correct": 2, "accuracy": pytest.approx(2 / 3)}
    assert report["kinds"]["capital"]["en"] == {"questions": 150, "correct": 0, "accuracy": 0}
    assert [row["correct"] for row in report["answers"][:4]] == [True, True, False, True]  # in the file's order
    assert report["answers"][0] == {**QUESTION, "answer": "A巴", "correct": True}
    assert report["tokens_per_second"] > 0
    shown = capsys.readouterr().out
    assert "66.7% (2 of 3)" in shown and "0.7% (1 of 151)" in shown


def test_pretrained_model_gets_question_as_plain_text(out, monkeypatch, tmp_path):
    questions = write(tmp_path / "q.jsonl", {"question": "Capital?", "keys": ["Paris"]})
    options = ["--out_dir", out, "--stage", "pretrain", "--json", tmp_path / "r.json"]
    run_script(monkeypatch, "2-eval.py", *options, "--questions", questions)
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["answers"][0]["answer"] == "Paris!"  # after "Capital?\n", up to the end of the line
    assert report["accuracy"] == {"en": 1.0}


@pytest.mark.parametrize(
    ("answer", "keys", "right"),
    [
        ("It is PARIS.", ["Paris"], True),
        ("It is Parisian.", ["Paris"], False),
        ("unpaired", ["pair"], False),
        ("The answer is 12.", ["12"], True),
        ("The answer is 120.", ["12"], False),
        ("It is 1.12 or 12.5 or 1,012.", ["12"], False),
        ("等于12。", ["12"], True),
        ("符号是Fe元素", ["Fe"], True),
        ("法国的首都是巴黎。", ["巴黎"], True),
        ("法国的首都是巴黎。", ["伦敦", "巴黎"], True),
        ("等于十三", ["三"], False),
        ("等于三十", ["三"], False),
        ("等于三。", ["三"], True),
        ("在十一月", ["一月"], False),
        ("在一月", ["一月"], True),
        ("New York City", ["new york"], True),
        ("C++ and more", ["c++"], True),
        ("ab", [" ab "], True),
        ("", ["a"], False),
        ("a.c", ["abc"], False),
        ("abc", ["a.c"], False),
    ],
)
def test_is_correct_matches_whole_keys(answer, keys, right):
    assert is_correct(answer, keys) is right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--history", "-1"], "--history: -1 is not"),
        (["--prompt", "a", "--judge_model", "x"], "--judge_model needs --report"),
        (["--chats", "x"], "--chats needs --report"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompts", "absent.txt"], "cannot read absent.txt"),
        (["--prompt", "a", "--stage", "nonsense"], "choose from pretrain"),
        (["--prompt", "a", "--checkpoint", "absent.pth"], "no checkpoint at absent.pth"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: -1 is not a number of at least 0"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: 0 is not a whole number of at least 1"),
        (["--prompt", "a" * 200], "the model reads at most 96"),
        (["--prompt", "a", "--device", "toaster"], "--device: toaster: not a device"),
        (["--prompt", "a", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["--prompt", "a", "--system", ""], None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_one_line_errors(out, monkeypatch, arguments, message):
    if message is None:
        run_script(monkeypatch, "2-eval.py", "--out_dir", out, *arguments)
        return
    with one_line_error(message):
        run_script(monkeypatch, "2-eval.py", "--out_dir", out, *arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", ":2: not JSON"),
        ("[" * 100_000, ":2: not JSON"),
        ("[1]", ":2: expected"),
        ('{"question": 3, "keys": ["a"]}', ":2: expected"),
        ('{"question": " ", "keys": ["a"]}', ":2: question is empty"),
        ('{"question": "a"}', ":2: keys must be"),
        ('{"question": "a", "keys": []}', ":2: keys must be"),
        ('{"question": "a", "keys": [1]}', ":2: keys must be"),
        ('{"question": "a", "keys": [""]}', ":2: keys must be"),
        (json.dumps({"question": "a" * 99, "keys": ["a"]}), ":2: the question has"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_line_error_names_file_and_line(out, monkeypatch, tmp_path, line, message):
    path = write(tmp_path / "q.jsonl", QUESTION, line)
    with one_line_error(message):
        run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--questions", path, "--json", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
    for content in (b"", b"\xff\xfe\xfa"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"q\.jsonl"):
            run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--questions", path)


def test_latest_stage_is_selected(tmp_path):
    def find(stage=""):
        return find_model(tmp_path, stage=stage).name

    with pytest.raises(UserError, match=r"python 1-pretrain\.py"):
        find()
    (tmp_path / "pretrain_64.pth").touch()
    assert find() == "pretrain_64.pth"
    with pytest.raises(UserError, match=r"python 3-full_sft\.py"):
        find("full_sft")
    (tmp_path / "full_sft_64.pth").touch()
    os.utime(tmp_path / "full_sft_64.pth", (0, 0))
    assert find() == "full_sft_64.pth" and find("pretrain") == "pretrain_64.pth"
    (tmp_path / "full_sft_512_moe.pth").touch()
    with pytest.raises(UserError, match="several full_sft models"):
        find()


def test_stage_and_checkpoint_must_agree(out, monkeypatch):
    options = ["--stage", "pretrain", "--prompt", "a", "--checkpoint", out / "full_sft_64.pth"]
    with pytest.raises(UserError, match="is of stage full_sft, not pretrain"):
        run_script(monkeypatch, "2-eval.py", *options)


def test_help_is_fast_and_errors_are_one_line(monkeypatch, capsys, tmp_path):
    before = child_cpu_seconds()
    shown = run_process(sys.executable, "2-eval.py", "--help_all")
    assert child_cpu_seconds() - before < 4
    assert shown.returncode == 0 and "--questions" in shown.stdout and "中国的首都是哪座城市？" in shown.stdout
    failed = run_here(monkeypatch, capsys, "2-eval.py", "--out_dir", tmp_path, "--prompt", "a")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: no pretrain_*.pth") and failed.stderr.count("\n") == 1


def test_invalid_utf8_argument_and_ascii_console(out):
    """An incomplete UTF-8 character in --prompt and a console without Chinese: no traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "2-eval.py", "--out_dir", str(out), "--prompt", b"a\xe4\xbd"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"A?" in done.stdout, done.stderr


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "17 * 23"}}\n</tool_call>'


@pytest.fixture
def calling_model(tokenizer, tmp_path):
    """A model that always calls the calculator."""
    return save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, [CALL], max_seq_len=2048)


def test_tools_are_called_until_the_limit(calling_model, monkeypatch, capsys, tmp_path):
    run_script(monkeypatch, "2-eval.py", "--checkpoint", calling_model, "--prompt", "?", "--json", tmp_path / "a.json",
               "--tools", "calculator,clock", "--max_tool_calls", 2)  # fmt: skip
    call, limit = '[call] calculator {"expression": "17 * 23"}\n', "[result] error: the limit of 2 calls is reached\n"
    assert f"> ?\n{call}[result] 391\n{call}[result] 391\n{call}{limit}" in capsys.readouterr().out
    (answer,) = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["answers"]
    assert answer["finish_reason"] == "tool_calls" and answer["answer"] == ""
    assert [message["role"] for message in answer["messages"]] == ["assistant", "tool"] * 3


def test_questions_are_answered_with_tools(calling_model, monkeypatch, tmp_path):
    questions = write(tmp_path / "q.jsonl", *({"question": f"{n}?", "keys": ["391"]} for n in range(3)))
    options = ["--checkpoint", calling_model, "--questions", questions, "--json", tmp_path / "r.json"]
    script_answers(monkeypatch, CALL, CALL, "<think>391?</think>400", "It is 391.", "about 390")
    run_script(monkeypatch, "2-eval.py", *options, "--tools", "calculator")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [(row["answer"], row["correct"], row["calls"]) for row in report["answers"]] == [
        *(("It is 391.", True, 1), ("about 390", False, 1), ("400", False, 0)),
    ], "a thought is not the answer"
    assert report["accuracy"] == {"en": pytest.approx(1 / 3)}


def test_thinking_switch_adds_an_empty_thought(out, monkeypatch):
    prompts = script_answers(monkeypatch, *"abcd")
    for choice in ([], ["--enable_thinking", "true"], ["--enable_thinking", "false"]):
        run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--prompt", "?", *choice)
    assert prompts[0] == prompts[1] and prompts[2] == prompts[0] + "<think>\n\n</think>\n\n"


def test_tool_flags_are_checked_before_the_model_is_opened(out, monkeypatch, tmp_path):
    for flags, *parts in (
        (
            ["--tools", "abacus"],
            "--tools abacus: unknown tool; choose from calculator, convert_units, clock, date, lookup",
        ),
        (["--tools", "lookup"], "--tools lookup needs --lookup_file"),
        (["--lookup_file", "x"], "--lookup_file needs --tools lookup"),
        (["--tools", "clock", "--report"], "--tools cannot be combined with --report"),
        (["--enable_thinking", "maybe"], "--enable_thinking: maybe: give true or false"),
        (["--max_tool_calls", "-1"], "--max_tool_calls: -1 is not a whole number of at least 1"),
    ):
        with one_line_error(*parts):
            run_script(monkeypatch, "2-eval.py", "--out_dir", tmp_path / "no models", "--prompt", "?", *flags)
    with one_line_error("pretrain_64.pth cannot call tools"):
        run_script(
            monkeypatch, "2-eval.py", "--out_dir", out, "--stage", "pretrain", "--prompt", "?", "--tools", "clock"
        )
    questions = write(tmp_path / "q.jsonl", QUESTION)
    with one_line_error("pretrain_64.pth cannot call tools"):
        run_script(monkeypatch, "2-eval.py", "--out_dir", out, "--stage", "pretrain", "--questions", questions,
                   "--tools", "clock")  # fmt: skip
