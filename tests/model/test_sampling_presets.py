"""Sampling settings of the front ends: defaults, the chat format's preset, the user's flags, in rising precedence.

Promises: a flag overrides one setting of the preset and keeps the others; a flag for num_beams or temperature resets
the other; the introduction shows the settings; --sampling_preset none and --report use no preset; --questions is
greedy; /num_beams and /temperature change the settings of a running chat; the default penalty ends loops.
"""

import json

import pytest
import torch

from common.errors import UserError
from evaluation.chat_model import ChatModel
from evaluation.report import answer_prompts
from evaluation.terminal_chat import run_terminal_chat
from model.chat_template import CHAT_FORMATS
from model.completion import Completion
from model.config import ModelConfig
from model.generate import generate
from model.repetition import has_loop
from model.sampling import SamplingParams
from model.sampling_presets import DEFAULT_SAMPLING, PRESET_CHOICES, find_preset, merge_settings
from model.transformer import Transformer
from tests.helpers import run_here, run_script, save_scripted_model, start_chat

BELLE = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2, "frequency_penalty": 0}


@pytest.fixture(scope="module")
def out(tokenizer, tmp_path_factory):
    """A chat model for each format; all generate "hi"."""
    folder = tmp_path_factory.mktemp("formats")
    for name, after in (("chatml", "\n"), ("mindllm", "\n"), ("belle", ":"), ("text", "?")):
        (folder / name).mkdir()
        save_scripted_model(folder / name / "full_sft_64.pth", tokenizer.with_chat_format(name), ["hi"], trigger=after)
    return folder


@pytest.fixture
def make_chat(out):
    return lambda name, *arguments: start_chat("--out_dir", out / name, *arguments)


def settings_of(chat):
    return {name: getattr(chat.settings, name) for name in PLAIN}


PLAIN = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1, "num_beams": 1}
PLAIN |= {"no_repeat_ngram_size": 0, "frequency_penalty": 0.2, "penalty_window": 64}
NO_REPEATS = {"no_repeat_ngram_size": 5, "frequency_penalty": 0}
SEARCH_SHOWN = "num_beams 4, no_repeat_ngram_size 5, frequency_penalty 0.0"
SEARCH = {"temperature": 0, "num_beams": 4, **NO_REPEATS}


@pytest.mark.parametrize(
    ("name", "flags", "changes", "shown"),
    [
        ("chatml", [], {}, None),
        ("text", [], {}, None),
        ("belle", [], BELLE, "top_k 30, top_p 0.85, temperature 0.35, repetition_penalty 1.2, frequency_penalty 0.0"),
        ("belle", ["--top_k", 5, "--temperature", 0], {**BELLE, "top_k": 5, "temperature": 0},
         "top_p 0.85, repetition_penalty 1.2, frequency_penalty 0.0"),
        ("belle", ["--sampling_preset", "none"], {}, None),
        ("belle", ["--num_beams", 2], {**BELLE, "temperature": 0, "num_beams": 2},
         "top_k 30, top_p 0.85, repetition_penalty 1.2, frequency_penalty 0.0"),
        ("mindllm", [], SEARCH, SEARCH_SHOWN),
        ("mindllm", ["--temperature", 0.5], {"temperature": 0.5, **NO_REPEATS}, SEARCH_SHOWN[13:]),
        ("mindllm", ["--temperature", 0], SEARCH, SEARCH_SHOWN),
        ("mindllm", ["--num_beams", 1], NO_REPEATS, SEARCH_SHOWN[13:]),
        ("mindllm", ["--sampling_preset", "none", "--num_beams", 3], {"temperature": 0, "num_beams": 3}, None),
        ("chatml", ["--sampling_preset", "mindllm"], SEARCH, SEARCH_SHOWN),
    ],
)  # fmt: skip
def test_flags_override_the_preset_and_the_preset_the_defaults(make_chat, capsys, name, flags, changes, shown):
    chat = make_chat(name, *flags)
    assert settings_of(chat) == {**PLAIN, **changes}
    lines = capsys.readouterr().out.splitlines()
    preset = flags[flags.index("--sampling_preset") + 1] if "--sampling_preset" in flags else name
    assert lines[1:] == ([f"sampling: {preset} preset: {shown} (--sampling_preset none turns it off)"] if shown else [])


def test_evaluations_do_not_use_a_preset(out, monkeypatch, capsys, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "?", "keys": ["hi"], "lang": "en"}\n')
    seen = []
    generate = lambda chat_model, prompts, settings: seen.append(settings) or [Completion() for _ in prompts]
    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "generate", generate)
        run_script(patch, "2-eval.py", "--out_dir", out / "belle", "--questions", questions)
    assert seen == [SamplingParams(max_new_tokens=48, stop=("Human: ",))]
    report = tmp_path / "report.json"
    flags = ["--prompt", "x", "--json", report, "--max_new_tokens", 4]
    run_script(monkeypatch, "2-eval.py", "--report", out / "belle" / "full_sft_64.pth", *flags)
    settings = json.loads(report.read_text(encoding="utf-8"))["settings"]
    assert settings["temperature"] == 0.7 and settings["top_k"] == 0 and settings["repetition_penalty"] == 1
    assert settings["frequency_penalty"] == 0.2, "the default of every answer that is no answer to a question with keys"
    assert "preset:" not in capsys.readouterr().out


def test_the_default_penalty_ends_loops_and_does_not_count_the_prompt(tokenizer):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 2, 2, 2, max_seq_len=128)).eval()
    prompts = [[token, token + 1, token] for token in range(40, 56)]

    def answers(**settings):
        params = SamplingParams(**{**settings, "temperature": 0, "max_new_tokens": 80})
        return [answer.ids for answer in generate(model, prompts, params, tokenizer)]

    plain, default = answers(), answers(**DEFAULT_SAMPLING)
    loops = [sum(has_loop(ids, at_end=True) for ids in found) for found in (plain, default)]
    assert loops[0] == len(prompts) and loops[1] <= len(prompts) / 4, "an untrained model repeats one token"
    assert [ids[0] for ids in plain] == [ids[0] for ids in default]


def test_conflicting_flags_are_one_line_errors(make_chat, monkeypatch, capsys):
    for flags, message in (
        (["--num_beams", 2, "--temperature", 0.7], "--temperature must be 0 with num_beams above 1, not 0.7"),
        (["--num_beams", 9], "--num_beams: 9 is not a whole number from 1 to 8"),
        (["--num_beams", 0], "--num_beams: 0 is not a whole number from 1 to 8"),
        (["--no_repeat_ngram_size", -1], "--no_repeat_ngram_size: -1 is not a whole number of at least 0"),
        (["--length_penalty", "nan"], "--length_penalty: nan is not a number of at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_chat("chatml", *flags)
    wrong = run_here(monkeypatch, capsys, "2-eval.py", "--sampling_preset", "zephyr")
    assert wrong.returncode == 2 and "invalid choice: 'zephyr'" in wrong.stderr


def test_a_beam_search_answers_on_the_command_line(make_chat, capsys):
    chat = make_chat("mindllm", "--max_new_tokens", 9)
    chat.send_message("x", is_interactive=False)
    assert capsys.readouterr().out.endswith("hi\n")
    answers, _ = answer_prompts(chat.chat_model, ["x", "a longer one"], chat.settings, "")
    assert answers[1] == {"answer": "hi", "finish_reason": "stop", "tokens": 1}


def test_set_command_changes_sampling_in_a_chat(make_chat, monkeypatch, capsys, tmp_path):
    chat = make_chat("chatml")
    lines = iter(["/num_beams 4", "/no_repeat_ngram_size 5", "/length_penalty 0.5", "x", "/num_beams 9",
                  "/no_repeat_ngram_size 1.5", "/exit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    run_terminal_chat(chat, tmp_path)
    shown = capsys.readouterr().out
    assert "[temperature 0.0, top_k 0" in shown and "num_beams 4" in shown and "\nhi\n" in shown
    assert "[/num_beams: must be from 1 to 8, not 9]" in shown
    assert "[/no_repeat_ngram_size: 1.5 is not a whole number]" in shown
    search = {**PLAIN, "temperature": 0, "num_beams": 4, "no_repeat_ngram_size": 5}
    assert settings_of(chat) == search and chat.settings.length_penalty == 0.5
    lines = iter(["/temperature 0.9", "/exit"])
    run_terminal_chat(chat, tmp_path)
    assert settings_of(chat) == {**PLAIN, "temperature": 0.9, "no_repeat_ngram_size": 5}


def test_every_choice_is_a_preset(tokenizer):
    assert ("auto", "none", *CHAT_FORMATS) == PRESET_CHOICES
    for choice in PRESET_CHOICES:
        for chat_format in (None, tokenizer.format, tokenizer.with_chat_format("belle").format):
            name, preset = find_preset(choice, chat_format)
            SamplingParams(**merge_settings(preset, DEFAULT_SAMPLING))  # valid without changes
            assert name or not preset
    assert find_preset("auto", tokenizer.with_chat_format("belle").format) == ("belle", BELLE)
    assert find_preset("belle", None) == ("belle", BELLE) and find_preset("none", tokenizer.format) == ("", {})
