"""2-eval.py --report NAME=http://host/v1: served models in a report.

Promises: the server gets each prompt once, in order, with the settings; its answers, repetition, lengths and speed are
in the report, and missing figures are a dash with a reason; an unreachable server is an error before any model runs; a
server that stops answering is left out and named, and the report of the other models is written; the key is sent in
one header only.
"""

import io
import json
import sys

import pytest

from common.errors import UserError
from evaluation.prompts import PROMPTS
from tests.evaluation.test_judge import completion_body, error_body, sleep_calls, stub_server  # noqa: F401 - the fixture
from tests.helpers import one_line_error, run_here, run_script


@pytest.fixture
def served_models(stub_server, monkeypatch):  # noqa: F811
    """A server with two models, whose answer is the prompt repeated twice."""
    monkeypatch.delenv("REPORT_API_KEY", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    stub_server.models, stub_server.tokens, stub_server.reply = ["first", "second"], 7, lambda text: text + text
    return stub_server


@pytest.fixture
def run_report(scripted_models, monkeypatch, tmp_path):
    (tmp_path / "en.txt").write_text("The sun is up.\n", encoding="utf-8")

    def run(*models, flags=(), texts=True):
        json_path = tmp_path / "page" / "r.json"
        flags = [*(["--texts", f"en={tmp_path / 'en.txt'}"] if texts else []), *flags]
        short = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", 8, "--json", json_path]
        run_script(monkeypatch, "2-eval.py", "--report", *models, *short, *flags)
        report = json.loads(json_path.read_text(encoding="utf-8"))
        return report, json_path.with_suffix(".md").read_text(encoding="utf-8")

    return run


def test_report_compares_served_and_local_model(served_models, run_report, scripted_models, capsys):
    found, page = run_report(scripted_models / "full_sft_64.pth", f"other={served_models.url}")
    ours, other = found["models"]
    assert (other["label"], other["stage"], other["path"]) == ("other", "served", f"{served_models.url}#first")
    assert [row["answer"] for row in other["answers"]] == [prompt + prompt for *_, prompt in PROMPTS]
    assert [body["messages"] for body in served_models.seen] == [[{"role": "user", "content": p}] for *_, p in PROMPTS]
    settings = {"model": "first", "temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "frequency_penalty": 0.2}
    settings["penalty_window"] = 64
    assert [{**body, "messages": 0} for body in served_models.seen] == [
        {**settings, "messages": 0, "seed": number} for number in range(32)
    ]
    assert other["tokens_per_second"] > 0 and other["answer_figures"]["zh"]["answers"] == 16
    assert other["answer_figures"]["all"]["mean_length"] > ours["answer_figures"]["all"]["mean_length"]
    assert other["bits_per_byte"] == {} and other["parameters"] is None and other["safety"] is None
    assert "|  | full\\_sft\\_64 | other |" in page and "| stage | full\\_sft | served |" in page
    row = next(line for line in page.splitlines() if line.startswith("| bits per byte, en"))
    assert row.endswith("| – |") and not row.startswith("| bits per byte, en | –")
    assert "- other: bits per byte and SFT loss need the log-probabilities of given text" in page
    assert "- other: safety prompts need an answer prefix" in page
    assert "tokens/s, all answers in one batch" in page and "**other** (7 tokens)" in page
    assert f"other: first at {served_models.url}" in capsys.readouterr().out


def test_model_is_selected_and_extra_settings_are_sent(served_models, run_report):
    flags = ["--top_k", 5, "--repetition_penalty", 1.1, "--system", "Be brief.", "--prompt", "Hi"]
    found, page = run_report(f"b={served_models.url}/#second", flags=flags, texts=False)
    (body,) = served_models.seen
    assert body["model"] == "second" and body["top_k"] == 5 and body["repetition_penalty"] == 1.1
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and "min_p" not in body
    assert found["settings"]["top_k"] == 5 and "top_k 5" in page
    assert found["models"][0]["path"] == f"{served_models.url}#second"


def test_rejected_settings_are_omitted_and_named(served_models, run_report):
    served_models.errors = [(200, {}, ""), (422, {}, error_body("body.top_k: extra inputs are not permitted"))]
    found, page = run_report(f"b={served_models.url}#m", flags=["--top_k", 5, "--prompt", "Hi"], texts=False)
    assert ["top_k" in body for body in served_models.seen] == [True, False]
    assert "- b: the server rejected top\\_k: its answers are sampled without." in page
    assert found["models"][0]["answers"][0]["answer"] == "HiHi"


def test_server_without_token_counts(served_models, run_report):
    served_models.tokens = None
    found, page = run_report(f"b={served_models.url}", flags=["--prompt", "Hi"], texts=False)
    assert found["models"][0]["tokens_per_second"] is None
    assert "| tokens/s, one answer at a time | – |" in page and "(tokens not counted)" in page
    assert "- b: the server does not count tokens, so the speed is unknown." in page


@pytest.mark.parametrize("named", ["flag", "variable"])
def test_key_is_sent_in_one_header_only(served_models, run_report, monkeypatch, tmp_path, capsys, named):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-judge")
    flags = ["--prompt", "Hi"]
    if named == "flag":
        flags += ["--report_api_key", "sk-secret"]
    else:
        monkeypatch.setenv("REPORT_API_KEY", " sk-secret\n")
    run_report(f"b={served_models.url}", flags=flags, texts=False)
    assert {headers.get("Authorization") for headers in served_models.headers} == {"Bearer sk-secret"}
    written = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "page").iterdir())
    assert "sk-" not in written + capsys.readouterr().out + json.dumps(served_models.seen)


def test_server_that_stops_answering_is_left_out(served_models, run_report, scripted_models, tmp_path):
    def reply(text):
        if len(served_models.seen) == 3:
            served_models.errors = [(500, {}, "boom")] * 6
        return '{"score": 5}' if "=====" in text else text  # a verdict of the judge, else an answer

    served_models.reply = reply
    models, judge = (f"other={served_models.url}", scripted_models / "full_sft_64.pth"), ["--judge", served_models.url]
    given_up = f"--report other {served_models.url}: gave up after 6 tries (500 boom) (3 of 32 prompts were answered)"
    with one_line_error(f"{given_up}; the report of the other models is written"):
        run_report(*models, flags=[*judge, "--judge_model", "j"])
    assert len(sleep_calls) == 5
    found = json.loads((tmp_path / "page" / "r.json").read_text(encoding="utf-8"))
    assert [model["label"] for model in found["models"]] == ["full_sft_64"] and "other" in found["failed"]
    assert len(found["models"][0]["answers"]) == 32 and found["judge"] is not None
    page = (tmp_path / "page" / "r.md").read_text(encoding="utf-8")
    assert "- other: left out because its server stopped answering: " in page and "**other**" not in page


def test_no_report_when_the_only_model_fails(served_models, run_report, tmp_path):
    served_models.reply = lambda text: served_models.errors.extend([(400, {}, error_body("no"))] * 2) or text
    with pytest.raises(UserError, match=r"400: no \(1 of 32 prompts were answered\)$"):
        run_report(f"other={served_models.url}")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["{url}"], "give the served model a name, as NAME={url}"),
        (["=http://a/v1"], "give the served model a name"),
        (["a={url}", "a={url}#second"], "two models are named a"),
        (["full_sft_64={url}", "{file}"], "two models are named full_sft_64"),
        (["a=http://a:b/v1"], "--report a http://a:b/v1: not an address"),
        (["a=http://me:sk-secret@127.0.0.1/v1"], "a key, which belongs in REPORT_API_KEY"),
        (["a=http://127.0.0.1:1/v1", "{file}"], "--report a http://127.0.0.1:1/v1: no answer"),
        (["{file}", "a={url}"], "lists no models: name one, as a={url}#MODEL"),
        (["nowhere.pth", "a={url}"], "no checkpoint at nowhere.pth"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_names_and_addresses_are_errors_before_any_model_runs(
    served_models, run_report, scripted_models, tmp_path, capsys, models, message
):
    if "lists no models" in message:
        served_models.models = []
    fields = {"url": served_models.url, "file": scripted_models / "full_sft_64.pth"}
    with one_line_error(message.format(**fields)) as error:
        run_report(*(model.format(**fields) for model in models))
    assert "sk-" not in str(error.value)
    assert not served_models.seen and not (tmp_path / "page").exists() and "answers:" not in capsys.readouterr().out


def test_wrong_keys_and_settings_are_errors(served_models, run_report, monkeypatch, capsys):
    served_models.errors = [(401, {}, error_body("no key"))]
    with pytest.raises(UserError, match=r"401: the server rejects the key: give --report_api_key KEY or set REPORT"):
        run_report(f"a={served_models.url}")
    with pytest.raises(UserError, match="--temperature: -1 is not a number of at least 0"):
        run_report(f"a={served_models.url}", flags=["--temperature", "-1"])
    shown = run_here(monkeypatch, capsys, "2-eval.py", "--prompt", "a", "--report_api_key", "x")
    assert shown.returncode == 2 and "--report_api_key needs --report" in shown.stderr


def test_own_server_gives_the_answers_of_the_local_model(tokenizer, tmp_path, monkeypatch, run_report):
    """The same model, local and served: equal greedy answers, finish reasons and token counts."""
    pytest.importorskip("uvicorn")
    from tests.serving.server_helpers import run_server, save_random_model

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = save_random_model(tmp_path / "full_sft_32.pth", tokenizer)
    with run_server([path]) as server:
        found, _ = run_report(path, f"served={server.url}/v1", flags=["--temperature", 0, "--system", "S"], texts=False)
    ours, theirs = found["models"]
    assert ours["answers"] == theirs["answers"] and len(ours["answers"]) == 32
    assert ours["answer_figures"] == theirs["answer_figures"]
