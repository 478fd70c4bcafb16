"""2-eval.py --report: comparison of several models.

Promises: all models get the same prompts in the same order; the Markdown page and the json file have the same figures;
equal arguments give equal answers; no answer can break the page; errors of the user are raised before the first model
runs; without --judge no data is sent anywhere.
"""

import io
import json
import re
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.markdown import code_block, escape_inline
from evaluation.chat_model import open_chat_model
from evaluation.prompts import PROMPTS, SAFETY_PROMPTS
from evaluation.report import continue_answers, unique_labels
from model.completion import Completion
from model.sampling import SamplingParams
from tests.helpers import one_line_error, run_here, run_script, save_scripted_model


@pytest.fixture
def run_report(scripted_models, sft_dir, monkeypatch, tmp_path):
    """Runs `2-eval.py --report …` with a text per language and chats; returns the json and the Markdown page."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "zh.txt").write_text("今天很好。\n\n太阳很大。\n", encoding="utf-8")
    (tmp_path / "en.txt").write_text("The sun is up.\n", encoding="utf-8")
    texts = ["--texts", tmp_path / "zh.txt", f"en={tmp_path / 'en.txt'}", "--chats", sft_dir / "val.jsonl"]
    models = [scripted_models / "pretrain_64.pth", scripted_models / "full_sft_64.pth"]

    def run(*arguments, models=models, texts=texts, out="page"):
        json_path = tmp_path / out / "r.json"
        short = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", 8]
        run_script(monkeypatch, "2-eval.py", "--report", *models, *texts, *short, "--json", json_path, *arguments)
        report = json.loads(json_path.read_text(encoding="utf-8"))
        return report, json_path.with_suffix(".md").read_text(encoding="utf-8")

    return run


def test_report_compares_two_models(run_report, capsys, scripted_models, tmp_path):
    found, page = run_report()
    first, second = found["models"]
    assert [model["label"] for model in found["models"]] == ["pretrain_64", "full_sft_64"]
    assert [model["stage"] for model in found["models"]] == ["pretrain", "full_sft"]
    assert [tuple(row.values()) for row in found["prompts"]] == list(PROMPTS)
    assert len(first["answers"]) == len(second["answers"]) == 32
    assert all(answer == {"answer": "A巴", "finish_reason": "stop", "tokens": 4} for answer in second["answers"])
    assert {answer["finish_reason"] for answer in first["answers"]} == {"length"}
    figures = second["answer_figures"]
    assert figures["zh"]["answers"] == figures["en"]["answers"] == 16 and figures["all"]["mean_length"] == 2
    assert figures["all"]["distinct_1"] == 2 / 64 and figures["all"]["cut_off"] == 0
    assert first["answer_figures"]["en"]["cut_off_rate"] == 1
    assert first["bits_per_byte"].keys() == {"zh", "en"} and first["bits_per_byte"]["en"]["bytes"] == 14
    assert second["sft_loss"]["zh"]["chats"] == second["sft_loss"]["en"]["chats"] == 4
    assert found["texts"]["zh"]["bytes"] > 20 and found["judge"] is None and found["settings"]["seed"] == 0
    assert first["tokens_per_second"] > 0 and first["batch_tokens_per_second"] > 0
    # the same figures on the Markdown page
    assert "|  | pretrain\\_64 | full\\_sft\\_64 |" in page
    assert f"| bits per byte, en | {first['bits_per_byte']['en']['bits_per_byte']:.3f} |" in page
    assert "| cut-off answers, zh / en | 16 of 16 / 16 of 16 | 0 of 16 / 0 of 16 |" in page
    assert "## Judge" not in page and "(8 tokens, cut off)" in page and page.count("### ") == 42
    answers, safety = page.split("## Safety: shown, not scored")
    assert all(prompt in answers for *_, prompt in PROMPTS) and answers.count("```text\nA巴\n```") == 32
    assert all(f"{prompt}\n→ {start}" in safety for _, prompt, start in SAFETY_PROMPTS)
    assert str(tmp_path / "page" / "r.md") in capsys.readouterr().out


def test_safety_prompts_are_shown_and_not_scored(tokenizer, monkeypatch, tmp_path):
    """The model continues "Yes, go" with "but no"; no figure counts the continuation."""
    path = save_scripted_model(tmp_path / "p.pth", tokenizer, ["but no"], trigger="o", max_seq_len=256)
    prompts = [("en", "May I?", "Yes, go"), ("zh", "可以吗？" * 90, "好")]
    monkeypatch.setattr("evaluation.report.SAFETY_PROMPTS", prompts)
    run_script(monkeypatch, "2-eval.py", "--report", path, "--json", tmp_path / "r.json", "--temperature", 0)
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    (model,) = found["models"]
    fits, long = model["safety"]
    assert (fits["answer"], fits["finish_reason"]) == ("but no", "stop") and long["finish_reason"] == "too_long"
    assert model["answer_figures"]["all"]["answers"] == len(model["answers"]) == 32
    page = (tmp_path / "r.md").read_text(encoding="utf-8").split("## Safety: shown, not scored")[1]
    assert "May I?\n→ Yes, go" in page and "but no" in page and "the prompt does not fit into the context" in page
    run_script(monkeypatch, "2-eval.py", "--report", path, "--json", tmp_path / "r.json", "--prompt", "own")
    assert "## Safety" not in (tmp_path / "r.md").read_text(encoding="utf-8"), "own prompts replace the fixed ones"


def test_answer_prefix_is_continued_in_the_assistant_turn(scripted_models, monkeypatch):
    """The prompt ids equal the rendered chat up to the end of the answer prefix."""
    chat_model, seen = open_chat_model(scripted_models / "full_sft_64.pth"), []
    monkeypatch.setattr(chat_model, "generate", lambda ids, _: seen.extend(ids) or [Completion() for _ in ids])
    prefixes = [("May I?", "Yes, <|im_end|> so"), ("可以吗", "可以，")]
    continue_answers(chat_model, prefixes, SamplingParams(), "S")
    for ids, (prompt, start) in zip(seen, prefixes, strict=True):
        chat = [("system", "S"), ("user", prompt), ("assistant", start)]
        whole, _ = chat_model.tokenizer.render([{"role": role, "content": content} for role, content in chat])
        assert ids == whole[: len(ids)] and chat_model.tokenizer.decode(whole[len(ids) :]) == "<|im_end|>\n"


def test_equal_arguments_give_equal_answers(run_report, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\n第二\n", encoding="utf-8")
    options = ["--prompts", prompts, "--temperature", 5]
    answers_per_run = [
        [[row["answer"] for row in model["answers"]] for model in run_report(*options, *more, texts=[])[0]["models"]]
        for more in ((), (), ("--seed", 1))
    ]
    assert answers_per_run[0] == answers_per_run[1] != answers_per_run[2]
    found, page = run_report(*options, texts=[])
    assert [(row["lang"], row["prompt"]) for row in found["prompts"]] == [("en", "one"), ("zh", "第二")]
    assert "`--texts zh=FILE en=FILE` names held-out texts" in page and "`--chats FILE` names held-out chats" in page
    assert run_report("--prompt", "only", texts=[])[0]["models"][0]["answers"][0]["tokens"] == 8


def test_report_without_models_compares_every_stage(scripted_models, monkeypatch, tmp_path):
    short = ["--prompt", "a", "--max_new_tokens", 2]
    run_script(monkeypatch, "2-eval.py", "--report", "--out_dir", scripted_models, *short)
    found = json.loads((scripted_models / "eval" / "report.json").read_text(encoding="utf-8"))
    assert [model["stage"] for model in found["models"]] == ["pretrain", "full_sft"]
    assert (scripted_models / "eval" / "report.md").is_file()


def test_report_opens_no_connection(run_report, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run_report("--prompt", "a")


def test_report_contains_judge_table(run_report, monkeypatch):
    from evaluation import judge_client

    def complete_text(server, text):
        assert server.url == "http://localhost:9/v1" and "64" not in text
        if "Answer B" not in text:
            return '{"score": 9}'
        return '{"better": "B"}' if text.index("A巴") > text.index("Answer B") else '{"better": "A"}'

    monkeypatch.setattr(judge_client.ChatClient, "list_model_names", lambda server: [])
    monkeypatch.setattr(judge_client.ChatClient, "complete_text", complete_text)
    found, page = run_report("--judge", "http://localhost:9/v1/", "--judge_model", "wise|one")
    assert list(found["judge"]["models"]) == ["full_sft_64", "pretrain_64"]
    assert found["judge"]["models"]["full_sft_64"] == {
        **{"score": 9, "score_error": 0, "scored": 32, "wins": 32, "ties": 0, "losses": 0, "points": 1},
    }
    assert "| full\\_sft\\_64 | 9.0 ± 0.0 | 32 | 0 | 0 | 100% |" in page and "Judge: wise\\|one at" in page
    assert "the first answer wins 50%" in page


def test_report_is_written_when_the_judge_fails(run_report, tmp_path, monkeypatch):
    from evaluation import judge_client

    def complete_text(server, text):
        raise UserError("--judge: gave up")

    monkeypatch.setattr(judge_client.ChatClient, "list_model_names", lambda server: [])
    monkeypatch.setattr(judge_client.ChatClient, "complete_text", complete_text)
    with pytest.raises(UserError, match="gave up"):
        run_report("--judge", "http://localhost:9/v1", "--judge_model", "m")
    assert json.loads((tmp_path / "page" / "r.json").read_text(encoding="utf-8"))["judge"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "absent.txt"], "absent.txt"),
        (["--chats", "absent.jsonl"], "absent.jsonl"),
        (["--max_bytes", "0"], "--max_bytes: 0 is not"),
        (["--stage", "pretrain"], "--stage cannot be combined with --report"),
        (["--questions", "q.jsonl"], "--questions cannot be combined with --report"),
        (["--judge", "http://a/v1"], "--judge BASE_URL and --judge_model NAME: give both or neither"),
        (["--judge", "nowhere", "--judge_model", "m"], "--judge nowhere: not an address"),
        (["--judge", "http://127.0.0.1:1/v1", "--judge_model", "m"], "is the server running?"),
        (["--prompt", "x" * 200], "the model reads at most 96"),
        (["--temperature", "-1"], "--temperature: -1 is not a number of at least 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_one_line_errors_and_write_nothing(run_report, arguments, message, tmp_path, capsys):
    with one_line_error(message):
        run_report(*arguments, texts=[])
    assert not (tmp_path / "page").exists() and "answers:" not in capsys.readouterr().out


def test_bad_models_are_errors_before_any_model_runs(run_report, scripted_models, tmp_path, capsys, monkeypatch):
    good = scripted_models / "full_sft_64.pth"
    (tmp_path / "broken.pth").write_bytes(b"no")
    (tmp_path / "folder").mkdir()
    for bad, message in (
        (tmp_path / "absent.pth", "no checkpoint at"),
        (tmp_path / "broken.pth", "damaged or foreign"),
        (tmp_path / "folder", "has no config.json"),
        (good.parent / ".." / good.parent.name / good.name, "is listed twice"),
    ):
        with pytest.raises(UserError, match=message):
            run_report(models=[good, bad])
    assert "answers:" not in capsys.readouterr().out
    failed = run_here(monkeypatch, capsys, "2-eval.py", "--report", tmp_path / "broken.pth")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and not failed.stdout


def test_non_finite_loss_is_null_in_json(run_report, scripted_models, tmp_path):
    import torch

    checkpoint = torch.load(scripted_models / "full_sft_64.pth", weights_only=True)
    for name in ("model.norm.weight", "lm_head.weight"):
        checkpoint["model"][name] *= 1e30  # finite weights, but non-finite logits
    torch.save(checkpoint, tmp_path / "diverged.pth")
    found, _ = run_report(models=[tmp_path / "diverged.pth"])
    assert found["models"][0]["bits_per_byte"]["zh"]["bits_per_byte"] is None
    assert "NaN" not in (tmp_path / "page" / "r.json").read_text(encoding="utf-8")


def test_labels_are_unique():
    def labels(*paths):
        return unique_labels([Path(path) for path in paths])

    assert labels("/a/out/x_512.pth", "/a/out/y_512.pth") == ["x_512", "y_512"]
    assert labels("/a/one/x.pth", "/a/two/x.pth") == ["one/x", "two/x"]
    assert labels("/m/Qwen2.5-0.5B") == ["Qwen2.5-0.5B"]


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("`\n a"))
def test_no_answer_can_break_the_page(text):
    block = code_block(text)
    fence = re.match("`+", block)[0]
    inside = block.removeprefix(fence + "text\n").removesuffix("\n" + fence)
    assert inside == text and not re.search(f"`{{{len(fence)},}}", inside)
    assert "\n" not in escape_inline(text) and not re.search(r"(?<!\\)(\\\\)*[|<]", escape_inline(text))
