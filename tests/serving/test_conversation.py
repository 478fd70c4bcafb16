"""Conversation of the chat page: the prompts of each model, stop, regenerate and edit.

Promises: a streaming reply can be advanced by different threads; stop keeps the text so far; the history of a side
contains its own replies, and those of the first side for turns before its model joined; a question that is too long
and a model that runs out of memory are errors of the reply only.
"""

import threading

import pytest

from common.errors import UserError
from evaluation import chat_model
from evaluation.chat_model import open_chat_model
from evaluation.tool_loop import ToolOptions
from evaluation.tools import find_tools
from model.sampling import SamplingParams
from serving.conversation import Conversation
from tests.helpers import save_scripted_model, script_answers

GREEDY = SamplingParams(max_new_tokens=20)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pieces_of = {"one": ["鸟", "叫", "!"], "two": ["second"], "endless": ["la", "li"]}
    return {
        name: open_chat_model(
            save_scripted_model(folder / f"{name}.pth", tokenizer, pieces, end_of_turn=name != "endless"), "cpu"
        )
        for name, pieces in pieces_of.items()
    }


@pytest.fixture
def prompts(monkeypatch):
    """The prompts of the models, as text."""
    recorded, real = [], chat_model.stream

    def spy(model, ids, settings, tokenizer, *more):
        recorded.append(tokenizer.decode(ids))
        return real(model, ids, settings, tokenizer, *more)

    monkeypatch.setattr(chat_model, "stream", spy)
    return recorded


def finish_replies(chat: Conversation) -> None:
    while chat.advance():
        pass


def test_a_reply_streams_its_pieces_and_ends_with_a_stop_reason(models):
    chat = Conversation()
    chat.start_turn("hm?", [models["one"]], GREEDY)
    reply, recorded = chat.turns[0].replies[0], []
    while chat.advance():
        recorded.append(reply.text)
    assert recorded == ["鸟", "鸟叫", "鸟叫!"] and reply.stop_reason == "stop" and not chat.streaming
    assert reply.tokens == 3 and reply.tokens_per_second > 0 and not reply.error


def test_a_reply_continues_in_another_thread(models):
    chat = Conversation()
    chat.start_turn("hm?", [models["one"]], GREEDY)
    chat.advance()
    thread = threading.Thread(target=finish_replies, args=(chat,))
    thread.start()
    thread.join()
    assert chat.turns[0].replies[0].text == "鸟叫!"


def test_two_threads_can_advance_one_conversation(models):
    """After a browser reconnects, the old and the new run of the page overlap."""
    chat, errors = Conversation(), []
    chat.start_turn("hm?", [models["endless"]], SamplingParams(max_new_tokens=90))

    def draw():
        try:
            finish_replies(chat)
        except ValueError as error:
            errors.append(error)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reply = chat.turns[0].replies[0]
    assert not errors and not reply.error and reply.text == "lali" * 45


def test_stop_keeps_the_text_and_the_next_prompt_contains_it(models, prompts):
    chat = Conversation()
    chat.start_turn("first", [models["endless"]], GREEDY)
    for _ in range(3):
        chat.advance()
    chat.stop()
    reply = chat.turns[0].replies[0]
    assert (reply.text, reply.stop_reason, chat.streaming, chat.advance()) == ("lalila", "stopped", [], False)
    chat.start_turn("then", [models["endless"]], GREEDY)
    assert "first" in prompts[-1] and "lalila<|im_end|>" in prompts[-1] and prompts[-1].count("user\n") == 2


def test_an_empty_reply_is_left_out_of_the_next_prompt(models, prompts):
    chat = Conversation()
    chat.start_turn("first", [models["endless"]], GREEDY)
    chat.start_turn("then", [models["endless"]], GREEDY)  # before the first piece
    assert "first" not in prompts[-1] and chat.turns[0].replies[0].stop_reason == "stopped"


def test_each_model_reads_its_own_answers(models, prompts):
    chat, both = Conversation(), [models["one"], models["two"]]
    chat.start_turn("a", both[:1], GREEDY)
    finish_replies(chat)
    chat.start_turn("b", both, GREEDY)
    assert "鸟叫!" in prompts[-1], "the second model reads the first side's replies"
    finish_replies(chat)
    assert [reply.text for reply in chat.turns[1].replies] == ["鸟叫!", "second"]
    chat.start_turn("c", both, GREEDY)
    assert prompts[-1].count("second") == 1 and prompts[-2].count("second") == 0
    assert [reply.model_name for reply in chat.turns[2].replies] == ["one", "two"]


def test_regenerate_and_edit_replace_the_last_turn(models, prompts):
    chat, sides = Conversation(), [models["one"]]
    for question in ("a", "b"):
        chat.start_turn(question, sides, GREEDY)
        finish_replies(chat)
    chat.answer_again(sides, GREEDY)
    finish_replies(chat)
    assert [turn.question for turn in chat.turns] == ["a", "b"] and prompts[-1] == prompts[-2]
    with pytest.raises(UserError, match="empty"):
        chat.answer_again(sides, GREEDY, question="  ")
    chat.answer_again(sides, GREEDY, question="B?")
    assert [turn.question for turn in chat.turns] == ["a", "B?"] and "b<|im_end|>" not in prompts[-1]
    chat = Conversation()
    chat.answer_again(sides, GREEDY)
    assert not chat.turns, "nothing to answer again"


def test_each_attempt_samples_anew_and_a_seed_reproduces_all_attempts(tiny_parent):
    model = open_chat_model(tiny_parent, "cpu")
    settings = SamplingParams(temperature=1.0, max_new_tokens=12, seed=5)

    def texts() -> list[str]:
        chat, found = Conversation(), []
        chat.start_turn("x", [model], settings)
        for _ in range(3):
            finish_replies(chat)
            found.append(chat.turns[0].replies[0].text)
            chat.answer_again([model], settings)
        return found

    first = texts()
    assert len(set(first)) == 3 and first == texts()


def test_the_system_prompt_comes_first_and_survives_truncation(models, prompts):
    chat, long = Conversation(), "word " * 4
    for i in range(4):
        chat.start_turn(f"{i} {long}", [models["one"]], GREEDY, system="Be kind.")
        finish_replies(chat)
    assert prompts[-1].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    last = chat.turns[-1].replies[0]
    assert last.is_truncated and "0 word" not in prompts[-1] and not chat.turns[0].replies[0].is_truncated


def test_a_pretrained_model_continues_the_bare_text(tiny_parent, prompts):
    chat = Conversation()
    chat.start_turn("sun moon", [open_chat_model(tiny_parent, "cpu")], GREEDY, system="Be kind.")
    chat.start_turn("tree", [open_chat_model(tiny_parent, "cpu")], GREEDY)
    assert prompts == ["sun moon", "tree"]


def test_a_question_that_is_too_long_is_an_error_with_its_length(models):
    chat = Conversation()
    chat.start_turn("x" * 500, [models["one"]], GREEDY)
    reply = chat.turns[0].replies[0]
    assert reply.stop_reason == "error" and not chat.streaming
    assert "tokens" in reply.error and "128" in reply.error


def test_running_out_of_memory_ends_only_the_reply(models, monkeypatch):
    def pieces(*_):
        yield "so far"
        raise RuntimeError("CUDA out of memory\nand further lines")

    monkeypatch.setattr(chat_model, "stream", pieces)
    chat = Conversation()
    chat.start_turn("x", [models["one"]], GREEDY)
    finish_replies(chat)
    reply = chat.turns[0].replies[0]
    assert (reply.text, reply.stop_reason, reply.error) == ("so far", "error", "CUDA out of memory")


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tool_model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "caller.pth"
    return open_chat_model(save_scripted_model(path, tokenizer, [CALL], max_seq_len=2048), "cpu")


def test_a_reply_with_tools_has_parts_and_its_calls_stay_in_the_history(tool_model, monkeypatch):
    recorded = script_answers(monkeypatch, f"<think>\nadd\n</think>\n\n{CALL}", "It is 5.", "yes")
    chat, options = Conversation(), ToolOptions(tuple(find_tools("calculator")))
    chat.start_turn("2+3?", [tool_model], GREEDY, options=options)
    finish_replies(chat)
    reply = chat.turns[0].replies[0]
    assert reply.parts == [
        *(("reasoning", "add"), ("tool_call", 'calculator {"expression": "2+3"}'), ("tool_result", "5")),
        ("content", "It is 5."),
    ]
    assert (reply.text, reply.stop_reason, reply.is_truncated) == ("It is 5.", "stop", False) and reply.tokens > 20
    chat.start_turn("sure?", [tool_model], GREEDY, options=options)
    assert "<tool_response>\n5\n</tool_response>" in recorded[2] and "add" not in recorded[2].split("<|im_end|>", 1)[1]


def test_a_reply_stopped_after_a_call_keeps_the_result(tool_model):
    chat = Conversation()
    chat.start_turn("2+3?", [tool_model], GREEDY, options=ToolOptions(tuple(find_tools("calculator"))))
    while not any(part.kind == "tool_result" for part in chat.turns[0].replies[0].parts):
        chat.advance()
    chat.stop()
    reply = chat.turns[0].replies[0]
    assert reply.stop_reason == "stopped" and [m["role"] for m in reply.reply.messages] == ["assistant", "tool"]


def test_the_limit_of_calls_ends_a_reply(tool_model):
    chat = Conversation()
    chat.start_turn("?", [tool_model], GREEDY, options=ToolOptions(tuple(find_tools("calculator")), 1))
    finish_replies(chat)
    assert chat.turns[0].replies[0].stop_reason == "tool_calls"


def test_a_model_whose_format_has_no_tools_reads_questions_and_answers_only(
    tool_model, tokenizer, tmp_path, monkeypatch
):
    path = save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer.with_chat_format("belle"), ["x"])
    plain, options = open_chat_model(path, "cpu"), ToolOptions(tuple(find_tools("calculator")))
    recorded = script_answers(monkeypatch, CALL, "five", CALL, *"ab")
    chat = Conversation()
    with pytest.raises(UserError, match="cannot call tools: the chat format belle has no tools"):
        chat.start_turn("2+3?", [tool_model, plain], GREEDY, options=options)
    assert not chat.turns and not recorded
    chat.start_turn("2+3?", [tool_model], GREEDY, options=options)
    finish_replies(chat)
    chat.start_turn("again", [tool_model], GREEDY)
    finish_replies(chat)
    chat.start_turn("then", [tool_model, plain], GREEDY)
    finish_replies(chat)
    assert recorded[-1] == "Human: 2+3? \n\nAssistant:fiveHuman: then \n\nAssistant:"
