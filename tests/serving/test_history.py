"""Files of saved conversations.

Promises: a conversation is read as it was written, and continued with the same prompts; its messages are rows that can
be trained on; no damage of a file is an exception other than one line, or is overwritten; two writers lose nothing; a
deleted conversation is not written again; a failed write leaves the older file.
"""

import json
import random

import pytest

from common.errors import UserError
from corpus.chats import RowNotes, parse_messages
from evaluation.chat_model import open_chat_model
from evaluation.tool_loop import ReplyPart, ToolOptions
from evaluation.tools import find_tools
from model.sampling import SamplingParams
from serving.conversation import Conversation
from serving.history import ChatHistory
from tests.helpers import save_scripted_model, script_answers

GREEDY = SamplingParams(max_new_tokens=20)
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>'


@pytest.fixture(scope="module")
def chat_model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "full_sft_64.pth"
    return open_chat_model(save_scripted_model(path, tokenizer, ["鸟", "叫", "!"], max_seq_len=2048), "cpu")


@pytest.fixture
def history(tmp_path):
    return ChatHistory(tmp_path / "user" / "chats")


def ask(conversation, chat_model, question, **options):
    conversation.start_turn(question, [chat_model], GREEDY, **options)
    while conversation.advance():
        pass
    return conversation


def fields(conversation) -> list:
    return [
        (turn.question, turn.attempt, [(vars(reply) | {"reply": reply.reply.messages}) for reply in turn.replies])
        for turn in conversation.turns
    ]


def without_iterator(values: list) -> list:
    for _, _, replies in values:
        for reply in replies:
            reply.pop("next_parts")
    return values


def test_a_conversation_is_read_as_it_was_written_and_continued(history, chat_model, monkeypatch):
    answers = (f"<think>\nadd\n</think>\n\n{CALL}", "It is 5.", "yes", "no", "again", "again")
    prompts = script_answers(monkeypatch, *answers)
    options = ToolOptions(tuple(find_tools("calculator")))
    chat = ask(Conversation(), chat_model, "2+3? \u2028 <b>", options=options)
    chat = ask(chat, chat_model, "sure?")
    history.save(chat)
    read = history.load(chat.saved_id)
    assert without_iterator(fields(read)) == without_iterator(fields(chat))
    assert len(read.turns[0].replies[0].parts) == 4 and read.turns[0].replies[0].tokens > 20
    ask(chat, chat_model, "next")
    ask(read, chat_model, "next")
    assert prompts[-1] == prompts[-2] and "<tool_response>\n5\n</tool_response>" in prompts[-1]
    row = json.loads(history.path(chat.saved_id).read_text(encoding="utf-8"))["turns"][0]["replies"][0]["messages"]
    assert parse_messages(row, RowNotes()) == row and [message["role"] for message in row] == [
        "assistant",
        "tool",
        "assistant",
    ]


def test_a_reply_that_was_streaming_when_the_server_ended_is_a_stopped_one(history, chat_model):
    chat = Conversation()
    chat.start_turn("x", [chat_model], GREEDY)
    for _ in range(2):
        chat.advance()
    history.save(chat)
    read = history.load(chat.saved_id)
    reply = read.turns[0].replies[0]
    assert (reply.text, reply.stop_reason, read.streaming) == ("鸟叫", "stopped", [])
    assert reply.reply.messages == [{"role": "assistant", "content": "鸟叫"}], "read by the model in the next turn"


def test_the_list_has_the_last_written_first_and_ignores_other_files(history, chat_model):
    chats = [ask(Conversation(), chat_model, question) for question in ("  a\n\nb ", "c" * 300)]
    assert history.ids() == []
    for chat in [*chats, Conversation()]:
        history.save(chat)
    history.save(ask(chats[0], chat_model, "more"))
    for name in ("notes.json", ".20260101-000000-01234567.json.1.tmp", "20260101-000000-01234567.txt"):
        (history.folder / name).write_text("{}")
    assert [entry.title for entry in history.entries(history.ids())] == ["a b", "c" * 80]
    assert history.ids() == [chat.saved_id for chat in chats] and history.entries(["20260101-000000-01234567"]) == []


@pytest.mark.parametrize("chat_id", ["", ".", "../x", "/etc/passwd", "20260101-000000-0123456Z", "a\x00b", "２" * 8])
def test_an_id_names_a_file_of_the_folder(history, chat_id):
    for use in (history.path, history.load, lambda chat_id: history.delete([chat_id])):
        with pytest.raises(UserError, match="no saved conversation"):
            use(chat_id)


def test_two_writers_lose_nothing(history, chat_model):
    first = ask(Conversation(), chat_model, "x")
    history.save(first)
    second = history.load(first.saved_id)
    history.save(ask(second, chat_model, "second"))
    history.save(ask(first, chat_model, "first"))
    assert first.saved_id != second.saved_id
    questions = [[turn.question for turn in history.load(entry.id).turns] for entry in history.entries(history.ids())]
    assert sorted(questions) == [["x", "first"], ["x", "second"]]


def test_refresh_reads_what_another_tab_wrote_and_deleted(history, chat_model):
    first = ask(Conversation(), chat_model, "x")
    assert history.refresh(first) is first, "never saved"
    history.save(first)
    assert history.refresh(first) is first
    history.save(ask(history.load(first.saved_id), chat_model, "y"))
    first = history.refresh(first)
    assert [turn.question for turn in first.turns] == ["x", "y"]
    path = history.path(first.saved_id)
    path.write_text("damaged")
    assert history.refresh(first) is first, "the text on the page is the last copy"
    path.unlink()
    assert not history.refresh(first).turns
    history.save(first)
    assert not path.exists(), "a deleted conversation is not written again"


def test_no_damage_is_more_than_one_line_or_is_overwritten(history, chat_model):
    chat = ask(Conversation(), chat_model, "x")
    history.save(chat)
    path = history.path(chat.saved_id)
    good = path.read_text(encoding="utf-8")
    content = json.loads(good)
    reply = content["turns"][0]["replies"][0]
    rng = random.Random(0)
    texts = [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        good[: len(good) // 2],
        good.replace("鸟", "\\ud800"),
        '{"format": 2}',
    ]
    texts += [json.dumps({**content, "format": 99}), json.dumps({**content, "turns": []})]
    for name in reply:
        for value in (None, 3, -1.5, True, "x", [], {}, [[]], [["content"]], [["x", "y"]], [{"role": "user"}]):
            bad = {**reply, name: value}
            texts.append(json.dumps({"format": 1, "turns": [{"question": "x", "attempt": 0, "replies": [bad]}]}))
    raw = good.encode()
    damaged = [text.encode() for text in texts]
    for _ in range(300):
        at = rng.randrange(len(raw))
        damaged.append(raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            read = history.load(chat.saved_id)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
            (entry,) = history.entries(history.ids())
            assert entry.error and path.read_bytes() == data
            continue
        assert all(isinstance(part, ReplyPart) for turn in read.turns for r in turn.replies for part in r.parts)
        ask(read, chat_model, "and then?")
    assert refused > 100


def test_a_failed_write_is_one_line_and_leaves_the_older_file(history, chat_model, monkeypatch):
    chat = ask(Conversation(), chat_model, "x")
    history.save(chat)
    path, before = history.path(chat.saved_id), history.path(chat.saved_id).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left"):
            history.save(ask(chat, chat_model, "y"))
    assert path.read_bytes() == before and [entry.name for entry in history.folder.iterdir()] == [path.name]
    history.save(chat)
    assert len(history.load(chat.saved_id).turns) == 2 and len(history.ids()) == 1


def test_a_folder_that_cannot_be_created_is_one_line(chat_model, tmp_path):
    (tmp_path / "file").write_text("")
    chat, history = ask(Conversation(), chat_model, "x"), ChatHistory(tmp_path / "file" / "chats")
    assert history.ids() == []
    with pytest.raises(UserError, match="cannot write"):
        history.save(chat)
    history.folder = tmp_path / "there"
    history.save(chat)
    assert len(history.ids()) == 1
