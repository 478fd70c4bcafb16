"""The terminal chat: prompts, commands and Ctrl-C.

Promises: the history grows, can be cleared and limited; a question longer than the context is an error and is not added
to the history; Ctrl-C stops only the answer, also in a real terminal; /save writes training data, also with thoughts,
calls and results, which are printed under headings.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from common.errors import UserError
from corpus.readers import read_chats, read_texts
from corpus.stats import DataStats
from evaluation import chat_model as chat_model_module
from evaluation.chat_model import ChatModel
from evaluation.terminal_chat import ReplyPrinter, run_terminal_chat
from evaluation.terminal_texts import CHINESE, ENGLISH, terminal_texts
from evaluation.tool_loop import ReplyPart
from evaluation.tools import TOOLS
from tests.helpers import ROOT, save_scripted_model, script_answers, start_chat


@pytest.fixture
def make_chat(scripted_models):
    return functools.partial(start_chat, "--out_dir", scripted_models, "--temperature", "0")


@pytest.fixture
def type_lines(monkeypatch):
    def prepare(*events) -> None:
        left = iter(events)

        def fake_input(_):
            event = next(left, EOFError)
            if isinstance(event, str):
                return event
            raise event

        monkeypatch.setattr("builtins.input", fake_input)

    return prepare


@pytest.fixture
def model_inputs(monkeypatch):
    """The contents of the messages of each prompt."""
    inputs = []

    def prompt_ids(chat_model, messages, max_new_tokens, enable_thinking=None, original=ChatModel.prompt_ids):
        inputs.append([message["content"] for message in messages])
        return original(chat_model, messages, max_new_tokens, enable_thinking)

    monkeypatch.setattr(ChatModel, "prompt_ids", prompt_ids)
    return inputs


def test_history_grows_and_is_cleared(make_chat, type_lines, model_inputs, capsys, tmp_path):
    type_lines("你好", "再说", "/help", "", "x" * 300, "/reset", "new")
    run_terminal_chat(make_chat(), tmp_path)
    assert model_inputs == [["你好"], ["你好", "A巴", "再说"], ["你好", "A巴", "再说", "A巴", "x" * 300], ["new"]]
    shown = capsys.readouterr().out
    assert shown.count("A巴\n") == 3 and "the model reads at most 96 (max_seq_len)]" in shown
    assert shown.count("tokens/s]") == 3 and "/save [FILE]" in shown


def test_the_chat_is_in_the_language_of_the_flag_or_of_the_environment(
    make_chat, type_lines, monkeypatch, capsys, tmp_path
):
    type_lines("/retry", "你好", "/history 2", "/history x", "/thinking maybe", "/nonsense", "/reset")
    run_terminal_chat(make_chat("--lang", "zh"), tmp_path)
    shown = capsys.readouterr().out
    for text in (
        "/help 列出命令",
        "[对话还是空的]",
        "token/秒]",
        "[历史：最近 2 轮]",
        "不小于 0 的整数",
        "on、off 或 auto",
        "退出",
        "[对话已清空]",
    ):
        assert text in shown
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    for value, expected in (("zh_CN.UTF-8", CHINESE), ("en_US.UTF-8", ENGLISH), ("C", ENGLISH), ("", ENGLISH)):
        monkeypatch.setenv("LANG", value)
        assert terminal_texts("auto") is expected
    assert terminal_texts("zh") is CHINESE and terminal_texts("en") is ENGLISH


def test_both_languages_have_the_same_texts_with_the_same_fields():
    assert CHINESE.keys() == ENGLISH.keys()
    for name, text in ENGLISH.items():
        assert sorted(re.findall(r"\{\w+", text)) == sorted(re.findall(r"\{\w+", CHINESE[name])), name
        assert re.findall(r"^/\w+", text, re.M) == re.findall(r"^/\w+", CHINESE[name], re.M), name


def test_history_command_limits_turns(make_chat, type_lines, model_inputs, tmp_path):
    type_lines("a", "b", "/history 0", "c", "/history 2", "d", "/history", "e", "/history x", "/exit", "never")
    run_terminal_chat(make_chat("--history", 1), tmp_path)
    everything = ["a", "A巴", "b", "A巴", "c", "A巴", "d", "A巴", "e"]
    assert model_inputs == [["a"], ["a", "A巴", "b"], ["c"], ["b", "A巴", "c", "A巴", "d"], everything]


def test_history_is_truncated_to_fit_the_answer(make_chat):
    chat_model = make_chat().chat_model
    turns = [{"role": role, "content": "说" * 3} for _ in range(4) for role in ("user", "assistant")]
    ids = chat_model.prompt_ids([{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "q"}], 24)
    assert len(ids) <= 96 - 24
    assert chat_model.tokenizer.decode(ids).startswith("<|im_start|>system\nS<|im_end|>")


def test_commands_change_sampling_settings(make_chat, type_lines, capsys, tmp_path):
    chat = make_chat()
    type_lines(
        *("/temperature 0.5", "/top_k 7", "/seed 3", "/max_new_tokens 1", "a", "/system 你是A", "/temperature -1"),
        *("/temperature hot", "/top_k 1.5", "/seed none", "/top_p", "/nonsense", "/system"),
    )
    run_terminal_chat(chat, tmp_path)
    settings = chat.settings
    assert (settings.temperature, settings.top_k, settings.seed, settings.max_new_tokens) == (0.5, 7, None, 1)
    assert chat.system == [] and chat.answers[0]["finish_reason"] == "length"
    shown = capsys.readouterr().out
    assert "[/temperature: must be at least 0, not -1.0]" in shown and "[/temperature: hot is not a number]" in shown
    assert "[/top_k: 1.5 is not a whole number]" in shown and "[temperature 0.5, top_k 7, top_p 0.9" in shown
    assert "[system message set]" in shown and "/reset  " in shown


def test_retry_samples_the_last_answer_again(make_chat, type_lines, model_inputs, capsys, tmp_path):
    type_lines("/retry", "a", "b", "/retry")
    run_terminal_chat(make_chat(), tmp_path)
    assert model_inputs == [["a"], ["a", "A巴", "b"], ["a", "A巴", "b"]]
    assert "[the conversation is empty]" in capsys.readouterr().out


def test_saved_chat_is_readable_training_data(make_chat, type_lines, capsys, tmp_path):
    file = tmp_path / "new" / "chat.jsonl"
    type_lines("/save", "你好", "/system S", "b", f"/save {file}", f"/save {file}", "/save")
    run_terminal_chat(make_chat(), tmp_path)
    shown = capsys.readouterr().out
    assert "[the conversation is empty]" in shown and f"[written: {file}]" in shown and "exists already" in shown
    (chat,) = read_chats([file], DataStats())
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        *(("system", "S"), ("user", "你好"), ("assistant", "A巴"), ("user", "b"), ("assistant", "A巴")),
    ]
    (named_by_time,) = (tmp_path / "talks").iterdir()
    assert json.loads(named_by_time.read_text(encoding="utf-8")) == {"messages": chat.messages}


def test_pretrained_model_continues_text_and_saves_it(make_chat, type_lines, tmp_path):
    type_lines("xP", f"/save {tmp_path / 't.jsonl'}")
    run_terminal_chat(make_chat("--stage", "pretrain", "--max_new_tokens", "4"), tmp_path)
    assert [document.text for document in read_texts([tmp_path / "t.jsonl"], DataStats())] == ["xParis"]


def test_ctrl_c_stops_only_the_answer(make_chat, type_lines, monkeypatch, capsys, tmp_path):
    def interrupted(*arguments):
        answer = arguments[4]  # the Completion
        answer.text = "half"
        yield "half"
        raise KeyboardInterrupt

    def at_once(*arguments):
        raise KeyboardInterrupt
        yield ""

    chat = make_chat()
    monkeypatch.setattr(chat_model_module, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.send_message("a", is_interactive=False)
    chat.send_message("a")
    assert "half [stopped]" in capsys.readouterr().out and chat.answers[0]["finish_reason"] == "stopped"
    assert [message["content"] for message in chat.messages] == ["a", "half"]
    monkeypatch.setattr(chat_model_module, "stream", at_once)
    chat.send_message("b")  # no text yet: the question is not added
    chat.retry()
    assert [message["content"] for message in chat.messages] == ["a", "half"]
    with pytest.raises(UserError, match="the question is empty"):
        chat.send_message("  ")
    type_lines(KeyboardInterrupt, "a")
    run_terminal_chat(chat, tmp_path)
    assert "\n/help lists the commands" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_ctrl_c_in_a_real_terminal(tokenizer, tmp_path):
    """With a model that never stops: Ctrl-C ends an answer, the next question is answered, /exit quits."""
    import torch

    from model.checkpoint import save_model
    from model.config import ModelConfig
    from model.transformer import Transformer

    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 1, 2, 2, max_seq_len=100_000, tie_embeddings=False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_() if "layers" in name else None
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.encode("z")[0]] = 1
    save_model(tmp_path / "full_sft_32.pth", model, "full_sft", tokenizer, [])
    outside, inside = os.openpty()
    command = [sys.executable, "2-eval.py", "--out_dir", tmp_path, "--temperature", "0", "--max_new_tokens", "90000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdin=inside, stdout=inside, stderr=inside
    )
    os.close(inside)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        ends = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < ends, seen
            seen += os.read(outside, 4096)
        seen = seen.split(text, 1)[1]

    try:
        for _ in range(2):
            wait_for(b"> ")
            os.write(outside, b"go\n")
            wait_for(b"zzzzzzzz")
            process.send_signal(signal.SIGINT)
            wait_for(b"[stopped]")
            wait_for(b"tokens/s]")
        wait_for(b"> ")
        os.write(outside, b"/exit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(outside)


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "17 * 23"}}\n</tool_call>'


@pytest.fixture
def make_tool_chat(tokenizer, tmp_path_factory):
    """A chat with a model whose context has space for tools."""
    out = tmp_path_factory.mktemp("out")
    save_scripted_model(out / "full_sft_64.pth", tokenizer, ["x"], max_seq_len=2048)
    return functools.partial(start_chat, "--out_dir", out)


def test_thoughts_calls_and_results_are_printed_and_saved(make_tool_chat, type_lines, monkeypatch, capsys, tmp_path):
    prompts = script_answers(
        monkeypatch, f"<think>\n17 by 23\n</think>\n\n{CALL}", "It is 391.\n", "plain", "x \x1b[2J"
    )
    type_lines("What is 17 times 23?", "and?", "/history 1", "once more", f"/save {tmp_path / 'chat.jsonl'}")
    chat = make_tool_chat("--tools", "calculator,clock", "--system", "S")
    run_terminal_chat(chat, tmp_path)
    shown = capsys.readouterr().out
    assert (
        '\n[thought]\n17 by 23\n[call] calculator {"expression": "17 * 23"}\n[result] 391\n[answer]\nIt is 391.\n\n['
        in shown
    )
    assert "\nplain\n[" in shown and r"x \x1b[2J" in shown, "a plain answer has no heading"
    assert "<tool_response>\n391\n</tool_response>" in prompts[1] and "17 by 23" not in prompts[2], "an earlier thought"
    assert "391" in prompts[2] and "391" not in prompts[3], "the history is cut at whole turns"
    assert [answer["answer"] for answer in chat.answers] == ["It is 391.\n", "plain", "x \x1b[2J"]
    assert [len(answer.get("messages", ())) for answer in chat.answers] == [3, 0, 0]

    stats = DataStats()
    (saved,) = read_chats([tmp_path / "chat.jsonl"], stats)
    assert saved.messages == [
        {"role": "system", "content": "S", "tools": [TOOLS[name].schema for name in ("calculator", "clock")]},
        *chat.messages,
    ]
    assert [m["role"] for m in chat.messages[:4]] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["reasoning_content"] == "17 by 23" and chat.messages[1]["tool_calls"]


def test_retry_replaces_a_whole_turn_with_its_calls(make_tool_chat, type_lines, monkeypatch, capsys, tmp_path):
    prompts = script_answers(monkeypatch, CALL, "wrong", "right")
    type_lines("a", "/retry")
    chat = make_tool_chat("--tools", "calculator")
    run_terminal_chat(chat, tmp_path)
    assert [message["content"] for message in chat.messages] == ["a", "right"] and prompts[2] == prompts[0]


def test_tools_and_thinking_are_switched_by_commands(make_tool_chat, type_lines, monkeypatch, capsys, tmp_path):
    prompts = script_answers(monkeypatch, "a", "b", "c", "d")
    type_lines("1", "/tools clock calculator", "2", "/thinking off", "3", "/tools", "/thinking on", "4", "/tools no",
               "/thinking maybe", "/tools lookup")  # fmt: skip
    run_terminal_chat(make_tool_chat("--enable_thinking", "true"), tmp_path)
    shown = capsys.readouterr().out
    assert ["# Tools" in prompt for prompt in prompts] == [False, True, True, False]
    assert [prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts] == [False, False, True, False]
    for line in (
        "[tools: clock, calculator]",
        "[tools: none]",
        "[thinking: off]",
        "[thinking: on]",
        "on, off or auto]",
    ):
        assert line in shown
    assert "[--tools no: unknown tool" in shown and "[--tools lookup needs --lookup_file" in shown


def test_ctrl_c_inside_a_thought_keeps_it(make_tool_chat, monkeypatch, capsys):
    def interrupted(*arguments):
        arguments[4].text = "<think>\nhm"
        yield "<think>\nhm"
        raise KeyboardInterrupt

    chat = make_tool_chat()
    monkeypatch.setattr(chat_model_module, "stream", interrupted)
    chat.send_message("a")
    assert "[thought]\nhm [stopped]\n" in capsys.readouterr().out
    assert chat.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "hm"}


def test_thoughts_and_calls_are_dimmed_on_a_terminal_only(monkeypatch, capsys):
    parts = [("reasoning", "a"), ("reasoning", "b"), ("tool_call", "f {}"), ("tool_result", "1"), ("content", "c")]
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        printer = ReplyPrinter(terminal_texts("en"))
        for part in parts:
            printer.show(ReplyPart(*part))
        shown, dim, normal = capsys.readouterr().out, *(("\x1b[2m", "\x1b[0m") if is_terminal else ("", ""))
        assert shown.replace(normal + dim, "") == f"{dim}[thought]\nab\n[call] f {{}}\n[result] 1{normal}\n[answer]\nc"


def test_tools_need_a_chat_format_with_tools(make_chat, scripted_models):
    with pytest.raises(UserError, match=r"pretrain_64\.pth cannot call tools: it continues a text"):
        make_chat("--stage", "pretrain", "--tools", "calculator")
