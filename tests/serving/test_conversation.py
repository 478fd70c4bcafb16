"""A conversation as the chat page keeps it: what each model reads, and what stop, again and edit leave behind.

Promises: a reply may be put down between two pieces and go on later, in another thread too; stop keeps what was said;
each side reads its own answers, a model that joins later those of the first; a question that is too long is said with
its numbers, and the page lives on.
"""

import threading

import pytest

from common.errors import UserError
from model.checkpoint import load_model
from model.sampling import Sampling
from serving import conversation
from serving.conversation import Conversation, Speaker
from tests.helpers import save_parrot

GREEDY = Sampling(max_new_tokens=20)


def speaker(path) -> Speaker:
    model, tokenizer, checkpoint = load_model(path)
    return Speaker(path.stem, model, tokenizer, checkpoint["stage"] != "pretrain")


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    says = {"one": ["鸟", "叫", "!"], "two": ["second"], "endless": ["la", "li"]}
    return {name: speaker(save_parrot(folder / f"{name}.pth", tokenizer, pieces, ends=name != "endless"))
            for name, pieces in says.items()}  # fmt: skip


@pytest.fixture
def prompts(monkeypatch):
    """What the models read, as text."""
    seen, real = [], conversation.stream

    def spy(model, ids, settings, tokenizer, answer):
        seen.append(tokenizer.decode(ids))
        return real(model, ids, settings, tokenizer, answer)

    monkeypatch.setattr(conversation, "stream", spy)
    return seen


def finish(talk: Conversation) -> None:
    while talk.advance():
        pass


def test_a_reply_grows_and_ends(models):
    talk = Conversation()
    talk.ask("hm?", [models["one"]], GREEDY)
    reply, seen = talk.turns[0].replies[0], []
    while talk.advance():
        seen.append(reply.text)
    assert seen == ["鸟", "鸟叫", "鸟叫!"] and reply.end == "stop" and not talk.is_going
    assert reply.tokens == 3 and reply.speed > 0 and not reply.problem


def test_a_reply_goes_on_in_another_thread(models):
    talk = Conversation()
    talk.ask("hm?", [models["one"]], GREEDY)
    talk.advance()
    thread = threading.Thread(target=finish, args=(talk,))
    thread.start()
    thread.join()
    assert talk.turns[0].replies[0].text == "鸟叫!"


def test_two_threads_may_meet_for_a_moment(models):
    """The page that lost its browser is still drawn while the new one begins."""
    talk, errors = Conversation(), []
    talk.ask("hm?", [models["endless"]], Sampling(max_new_tokens=90))

    def draw():
        try:
            finish(talk)
        except ValueError as error:
            errors.append(error)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reply = talk.turns[0].replies[0]
    assert not errors and not reply.problem and reply.text == "lali" * 45


def test_stop_keeps_what_was_said_and_the_next_question_reads_it(models, prompts):
    talk = Conversation()
    talk.ask("first", [models["endless"]], GREEDY)
    for _ in range(3):
        talk.advance()
    talk.stop()
    reply = talk.turns[0].replies[0]
    assert (reply.text, reply.end, talk.is_going, talk.advance()) == ("lalila", "stopped", False, False)
    talk.ask("then", [models["endless"]], GREEDY)
    assert "first" in prompts[-1] and "lalila<|im_end|>" in prompts[-1] and prompts[-1].count("user\n") == 2


def test_an_answer_that_never_came_is_not_read_again(models, prompts):
    talk = Conversation()
    talk.ask("first", [models["endless"]], GREEDY)
    talk.ask("then", [models["endless"]], GREEDY)  # before a single piece
    assert "first" not in prompts[-1] and talk.turns[0].replies[0].end == "stopped"


def test_each_side_reads_its_own_answers(models, prompts):
    talk, both = Conversation(), [models["one"], models["two"]]
    talk.ask("a", both[:1], GREEDY)
    finish(talk)
    talk.ask("b", both, GREEDY)
    assert "鸟叫!" in prompts[-1], "the second model joins a conversation that it has not answered in"
    finish(talk)
    assert [reply.text for reply in talk.turns[1].replies] == ["鸟叫!", "second"]
    talk.ask("c", both, GREEDY)
    assert prompts[-1].count("second") == 1 and prompts[-2].count("second") == 0
    assert [reply.speaker for reply in talk.turns[2].replies] == ["one", "two"]


def test_again_and_edit_replace_the_last_turn(models, prompts):
    talk, sides = Conversation(), [models["one"]]
    for question in ("a", "b"):
        talk.ask(question, sides, GREEDY)
        finish(talk)
    talk.answer_again(sides, GREEDY)
    finish(talk)
    assert [turn.question for turn in talk.turns] == ["a", "b"] and prompts[-1] == prompts[-2]
    with pytest.raises(UserError, match="empty"):
        talk.edit_last("  ", sides, GREEDY)
    talk.edit_last("B?", sides, GREEDY)
    assert [turn.question for turn in talk.turns] == ["a", "B?"] and "b<|im_end|>" not in prompts[-1]
    talk.clear()
    assert not talk.turns and not talk.is_going
    talk.answer_again(sides, GREEDY)
    assert not talk.turns, "nothing to answer again"


def test_another_attempt_draws_anew_and_the_same_seed_the_same(tiny_parent):
    model = speaker(tiny_parent)
    drawn = Sampling(temperature=1.0, max_new_tokens=12, seed=5)

    def texts() -> list[str]:
        talk, found = Conversation(), []
        talk.ask("x", [model], drawn)
        for _ in range(3):
            finish(talk)
            found.append(talk.turns[0].replies[0].text)
            talk.answer_again([model], drawn)
        return found

    first = texts()
    assert len(set(first)) == 3 and first == texts()


def test_the_system_prompt_stands_first_and_stays(models, prompts):
    talk, long = Conversation(), "word " * 4
    for i in range(4):
        talk.ask(f"{i} {long}", [models["one"]], GREEDY, system="Be kind.")
        finish(talk)
    assert prompts[-1].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    last = talk.turns[-1].replies[0]
    assert last.shortened and "0 word" not in prompts[-1] and not talk.turns[0].replies[0].shortened


def test_a_pretrained_model_goes_on_with_the_bare_text(tiny_parent, prompts):
    talk = Conversation()
    talk.ask("sun moon", [speaker(tiny_parent)], GREEDY, system="Be kind.")
    talk.ask("tree", [speaker(tiny_parent)], GREEDY)
    assert prompts == ["sun moon", "tree"]


def test_too_long_a_question_is_said_with_its_numbers(models):
    talk = Conversation()
    talk.ask("x" * 500, [models["one"]], GREEDY)
    reply = talk.turns[0].replies[0]
    assert reply.end == "error" and not talk.is_going
    assert "tokens" in reply.problem and "128" in reply.problem


def test_running_out_of_memory_ends_the_reply_only(models, monkeypatch):
    def pieces(*_):
        yield "so far"
        raise RuntimeError("CUDA out of memory\nand a long story")

    monkeypatch.setattr(conversation, "stream", pieces)
    talk = Conversation()
    talk.ask("x", [models["one"]], GREEDY)
    finish(talk)
    reply = talk.turns[0].replies[0]
    assert (reply.text, reply.end, reply.problem) == ("so far", "error", "CUDA out of memory")
