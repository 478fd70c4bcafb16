"""The loop call -> result -> answer, its bound, and thoughts: with one chat and with a batch of them.

Promises: the next prompt holds the calls and their results; the number of calls is bounded; an answer that is cut off,
and a call without tools, end the reply; the streamed and the batched loop give the same messages; thinking off means
an empty thought; a model whose format has no tools is refused in one line; formats without thoughts give plain text.
"""

import dataclasses
import json
import random
import time

import pytest

from evaluation.chat_model import open_chat_model
from evaluation.tool_loop import Reply, ToolOptions, complete_replies, stream_reply
from evaluation.tools import find_tools
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from tests.helpers import one_line_error, save_scripted_model, script_answers

SETTINGS = SamplingParams(max_new_tokens=50)
QUESTION = [{"role": "user", "content": "2+3?"}]
CALCULATOR = ToolOptions(tuple(find_tools("calculator")))


def call(expression: str) -> str:
    return f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}\n</tool_call>'


@pytest.fixture(scope="module")
def chat_model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "full_sft_64.pth"
    return open_chat_model(save_scripted_model(path, tokenizer, [call("2+3")], max_seq_len=2048), "cpu")


def run_loop(chat_model, options, messages=QUESTION):
    """(parts of the streamed reply with neighbours of a kind joined, the reply)."""
    reply, parts = Reply(options, chat_model.has_answer_parts), []
    for part in stream_reply(chat_model, messages, SETTINGS, reply):
        if parts and parts[-1][0] == part.kind and not part.kind.startswith("tool_"):
            parts[-1][1] += part.text
        elif part.text:
            parts.append([*part])
    return parts, reply


def test_a_call_is_run_and_its_result_is_read_by_the_next_answer(chat_model, monkeypatch):
    prompts = script_answers(monkeypatch, f"<think>\nadd\n</think>\n\nOne moment.\n{call('2+3')}", "It is 5.")
    parts, reply = run_loop(chat_model, CALCULATOR)
    assert parts == [
        *(["reasoning", "add"], ["content", "One moment."], ["tool_call", 'calculator {"expression": "2+3"}']),
        *(["tool_result", "5"], ["content", "It is 5."]),
    ]
    function = {"name": "calculator", "arguments": {"expression": "2+3"}}
    calls = [{"type": "function", "function": function}]
    first = {"role": "assistant", "content": "One moment.", "reasoning_content": "add", "tool_calls": calls}
    assert reply.messages == [first, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "It is 5."}]
    assert (reply.text, reply.finish_reason, reply.num_calls) == ("It is 5.", "stop", 1)
    assert '"name": "calculator"' in prompts[0] and prompts[0].endswith("user\n2+3?<|im_end|>\n<|im_start|>assistant\n")
    rest = prompts[1].removeprefix(prompts[0])
    assert rest.startswith(f"<think>\nadd\n</think>\n\nOne moment.\n{call('2+3')}<|im_end|>\n<|im_start|>user\n")
    assert "<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n" in rest


def test_several_calls_of_one_answer_are_answered_in_order(chat_model, monkeypatch):
    script_answers(monkeypatch, f"{call('1+1')}\n{call('1/0')}", "done")
    reply = run_loop(chat_model, CALCULATOR)[1]
    assert [message["content"] for message in reply.messages] == ["", "2", "error: division by zero", "done"]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_model_that_calls_without_end_is_stopped_at_the_limit(chat_model, limit):
    """This model generates the call after every line end."""
    options = ToolOptions(CALCULATOR.tools, max_tool_calls=limit)
    parts, reply = run_loop(chat_model, options)
    results = [text for kind, text in parts if kind == "tool_result"]
    assert results == ["5"] * limit + [f"error: the limit of {limit} calls is reached"]
    assert (reply.num_calls, reply.finish_reason, len(reply.completions)) == (limit, "tool_calls", limit + 1)


def test_more_calls_than_the_limit_in_one_answer_are_not_run(chat_model, monkeypatch):
    script_answers(monkeypatch, "\n".join(map(call, ("1", "2", "3"))), "done")
    reply = run_loop(chat_model, ToolOptions(CALCULATOR.tools, max_tool_calls=2))[1]
    assert [m["content"] for m in reply.messages] == ["", "1", "2", "error: the limit of 2 calls is reached", "done"]
    assert reply.num_calls == 2 and reply.finish_reason == "stop"


def test_without_tools_a_call_ends_the_reply(chat_model, monkeypatch):
    script_answers(monkeypatch, call("1"))
    parts, reply = run_loop(chat_model, ToolOptions())
    assert parts == [["tool_call", 'calculator {"expression": "1"}']] and reply.finish_reason == "stop"


def test_a_call_of_an_answer_that_is_cut_off_is_not_run(chat_model, monkeypatch):
    script_answers(monkeypatch, call("1") + "\n<tool_call>", finish_reason="length")
    parts, reply = run_loop(chat_model, CALCULATOR)
    assert [kind for kind, _ in parts] == ["tool_call", "content"] and reply.finish_reason == "length"


def test_a_broken_call_is_shown_as_text(chat_model, monkeypatch):
    broken = '<tool_call>\n{"name": "calculator", "arguments": {"expression": }\n</tool_call>'
    script_answers(monkeypatch, broken)
    parts, reply = run_loop(chat_model, CALCULATOR)
    assert parts == [["content", broken]] and reply.text == broken and reply.num_calls == 0


def test_results_that_do_not_fit_end_the_reply(tokenizer, tmp_path, monkeypatch):
    path = save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, ["x"], max_seq_len=700)
    small = open_chat_model(path, "cpu")
    for run in (
        lambda: run_loop(small, CALCULATOR)[1],
        lambda: complete_replies(small, [QUESTION], SETTINGS, CALCULATOR)[0],
    ):
        script_answers(monkeypatch, call("1+" * 600))
        reply = run()
        assert reply.finish_reason == "length" and [m["role"] for m in reply.messages] == ["assistant", "tool"]


def test_a_reply_can_be_stopped_anywhere_and_keeps_what_was_generated(chat_model, monkeypatch):
    texts = (f"<think>\nadd\n</think>\n\n{call('2+3')}", "It is 5.")
    whole = len(list_parts(chat_model, monkeypatch, texts)[0])
    for count in range(whole):
        parts, reply = list_parts(chat_model, monkeypatch, texts, count)
        reply.stop()
        roles = [message["role"] for message in reply.messages]
        assert roles in ([], ["assistant"], ["assistant", "tool"], ["assistant", "tool", "assistant"])
        shown = "".join(part.text for part in parts if part.kind == "content")
        assert reply.finish_reason == "stopped" and reply.text.startswith(shown)
        generated = [completion.text for completion in reply.completions]
        assert [text[: len(start)] for text, start in zip(texts, generated, strict=False)] == generated


def list_parts(chat_model, monkeypatch, texts, count=10**6):
    script_answers(monkeypatch, *texts)
    reply = Reply(CALCULATOR)
    parts = [part for _, part in zip(range(count), stream_reply(chat_model, QUESTION, SETTINGS, reply), strict=False)]
    return parts, reply


def test_a_batch_gives_the_messages_of_the_streamed_loop(chat_model, monkeypatch):
    texts = {
        "a": [call("1+1"), "two"],
        "b": ["plain"],
        "c": [f"<think>\nr\n</think>\n\n{call('x')}", call("3*3"), "nine"],
    }
    chats = [[{"role": "user", "content": name}] for name in texts]
    alone = []
    for name, chat in zip(texts, chats, strict=True):
        script_answers(monkeypatch, *texts[name])
        alone.append(run_loop(chat_model, CALCULATOR, chat)[1].messages)
    rounds = [texts[name][i] for i in range(3) for name in texts if i < len(texts[name])]
    script_answers(monkeypatch, *rounds)
    replies = complete_replies(chat_model, chats, SETTINGS, CALCULATOR)
    assert [reply.messages for reply in replies] == alone
    assert [reply.num_calls for reply in replies] == [1, 0, 2]


def test_hostile_answers_end_and_their_chats_can_be_rendered_and_saved(chat_model, monkeypatch, tmp_path):
    """Random sequences of markers, broken JSON and code: 400 chats of up to five answers."""
    blocks = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_end|>"]
    blocks += ["<|im_start|>user\n", "\n", call("__import__('os').system('id')"), call("9**9**9"), call("1+1"), "text"]
    blocks += [
        '{"name": "calculator", "arguments": ',
        "[" * 500,
        "\ud83d",
        "\0",
        "\x1b[2J",
        "\u2028",
        "答",
        call("\\ud800"),
    ]
    rng = random.Random(0)
    answers = ("".join(rng.choice(blocks) for _ in range(rng.randrange(9))).replace("\ud83d", "?") for _ in range(9999))
    prompts = script_answers(monkeypatch, *answers)
    began = time.process_time()
    replies = complete_replies(chat_model, [QUESTION] * 400, SETTINGS, CALCULATOR)
    assert time.process_time() - began < 60 and len(prompts) > 450
    assert {reply.finish_reason for reply in replies} >= {"stop"} and sum(reply.num_calls for reply in replies) > 50
    for reply in replies:
        chat_model.tokenizer.render([*QUESTION, *reply.messages])
        assert json.loads(json.dumps(reply.messages, ensure_ascii=False).encode()) == reply.messages


def test_thinking_off_is_an_empty_thought_in_the_prompt_and_in_the_message(chat_model, monkeypatch):
    prompts = script_answers(monkeypatch, call("1"), "one")
    reply = run_loop(chat_model, ToolOptions(CALCULATOR.tools, enable_thinking=False))[1]
    assert all(prompt.endswith("assistant\n<think>\n\n</think>\n\n") for prompt in prompts)
    assert prompts[1].startswith(prompts[0] + call("1")), "the second prompt continues the first"
    assert [message.get("reasoning_content") for message in reply.messages] == ["", None, ""]


def test_an_imported_template_may_begin_the_thought_in_the_prompt(tokenizer, tmp_path, monkeypatch):
    """As those of DeepSeek-R1's distilled models and of Qwen3's thinking-only ones."""
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    config = '{"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}'
    files = {**tokenizer.files, "chat_template.jinja": template, "tokenizer_config.json": config}
    own = open_chat_model(save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, ["x"]), "cpu")
    own = dataclasses.replace(own, tokenizer=ChatTokenizer(files))
    script_answers(monkeypatch, "hm\n</think>\n\n5", "no end")
    parts, reply = run_loop(own, ToolOptions())
    assert parts == [["reasoning", "hm"], ["content", "5"]]
    assert reply.messages == [{"role": "assistant", "content": "5", "reasoning_content": "hm"}]
    assert run_loop(own, ToolOptions())[1].messages[0]["reasoning_content"] == "no end"


@pytest.mark.parametrize("name", ["mindllm", "belle", "text"])
def test_formats_without_tools_are_refused_and_their_answers_are_plain_text(tokenizer, tmp_path, monkeypatch, name):
    path = save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer.with_chat_format(name), ["x"])
    other = open_chat_model(path, "cpu")
    with one_line_error(path, "cannot call tools", f"the chat format {name} has no tools"):
        CALCULATOR.check(other)
    ToolOptions().check(other)
    text = f"<think>a</think>{call('1')}"
    script_answers(monkeypatch, text)
    reply = run_loop(other, ToolOptions(enable_thinking=False))[1]
    assert reply.messages == [{"role": "assistant", "content": text}]


def test_a_pretrained_model_has_no_tools(tokenizer, tmp_path):
    path = save_scripted_model(tmp_path / "pretrain_64.pth", tokenizer, ["x"], "pretrain")
    with one_line_error(path, "cannot call tools: it continues a text"):
        CALCULATOR.check(open_chat_model(path, "cpu"))
