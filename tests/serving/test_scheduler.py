"""Decoding together: what one row gets does not depend on who else is there, nor when they come and go.

Promises: rows that join and leave between any two tokens are answered as if alone, greedy or drawn; a place is free at
once when its row leaves; the queue is bounded; a failing model fails its requests and not the server; penalties and
log-probabilities are what their definitions say.
"""

import contextlib
import math
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.completion import Answer, Row
from model.detokenizer import token_bytes
from model.generate import Batch, generate
from model.sampling import Sampling, choose, choose_each, penalise_counts
from serving.scheduler import Engine, Full, News, Ticket
from tests.serving.server_help import make_model

PROMPTS = [[50, 60, 70], [100] * 40, [80, 81], [90, 91, 92, 93, 94], [33] * 70, [40]]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def row(model, tokenizer, prompt, number=0, **options):
    return Row(model, tokenizer, prompt, Sampling(**options), Answer(), number)


# ------------------------------------------------------------------------------------------------ the batch


KINDS = [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}, {"frequency_penalty": 1.0, "top_k": 5}]
GUESTS = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(KINDS),
    st.integers(1, 40),  # tokens that it may have
    st.integers(0, 30),  # when it comes, in steps
    st.integers(1, 60),  # how long it stays at most
)


@given(st.lists(GUESTS, min_size=1, max_size=7))
@settings(deadline=None, max_examples=25)
def test_rows_that_come_and_go_are_answered_as_if_alone(model, tokenizer, guests):
    batch, rows = Batch(model, tokenizer), {}
    for now in range(100):
        new = {i: guest for i, guest in enumerate(guests) if guest[3] == now}
        for i, (prompt, kind, most, _, _) in new.items():
            rows[i] = row(model, tokenizer, prompt, max_new_tokens=most, **kind)
        for i, guest in enumerate(guests):
            if guest[3] + guest[4] == now and rows[i] in batch.rows:
                batch.leave(rows[i])
        if new:
            batch.join([rows[i] for i in new])
        if batch.rows:
            batch.step()
    for i, (prompt, kind, most, _, _) in enumerate(guests):
        (alone,) = generate(model, [prompt], Sampling(max_new_tokens=most, **kind), tokenizer)
        given_out = rows[i].answer
        if given_out.finish_reason:
            assert given_out == alone
        else:  # it left: what it had was right
            assert alone.ids[: len(given_out.ids)] == given_out.ids
    assert batch.cache is None  # nothing is kept for nobody


def test_the_cache_grows_with_its_rows_and_not_beyond_the_context(model, tokenizer):
    batch = Batch(model, tokenizer)
    batch.join([row(model, tokenizer, [50], max_new_tokens=1000)])
    assert batch.cache.max_len == 64
    while batch.rows:
        batch.step()
        assert not batch.cache or batch.cache.max_len in (64, 128, 256)


def test_a_place_is_empty_when_its_row_has_left(model, tokenizer):
    batch = Batch(model, tokenizer)
    first, second, third = (row(model, tokenizer, prompt) for prompt in PROMPTS[:3])
    batch.join([first, second, third])
    batch.leave(first)
    assert batch.rows == [third, second]
    assert not batch.cache.keys[:, 2].any() and not batch.cache.values[:, 2].any()


# ------------------------------------------------------------------------------------------------ penalties, log p


def test_presence_and_frequency_penalties_by_hand():
    logits, counts = torch.tensor([[1.0, 2.0, -3.0]]), torch.tensor([[0.0, 1.0, 3.0]])
    expected = torch.tensor([[1.0, 2.0 - 0.5 - 0.25, -3.0 - 0.5 - 0.75]])
    assert torch.equal(penalise_counts(logits, counts, 0.5, 0.25), expected)


def test_penalties_count_the_answer_and_not_the_prompt(model, tokenizer):
    """With a frequency penalty that outweighs every logit, no token comes twice until all have come."""
    (answer,) = generate(
        model, [[50, 51, 52]], Sampling(frequency_penalty=1e6, max_new_tokens=100, stop=("\0",)), tokenizer
    )
    assert len(set(answer.ids)) == len(answer.ids) > 20
    (free,) = generate(model, [[50]], Sampling(max_new_tokens=1), tokenizer)
    asked = [[50, *free.ids, 50]]  # a token of the prompt alone is not penalised
    plain, penalised = (
        generate(model, asked, Sampling(max_new_tokens=1, presence_penalty=p), tokenizer)[0].ids for p in (0.0, 1e6)
    )
    assert plain == penalised


@torch.no_grad()
def test_log_probabilities_are_the_models_own(model, tokenizer):
    options = {"temperature": 1.3, "top_k": 3, "repetition_penalty": 1.4, "seed": 1, "max_new_tokens": 12}
    (answer,) = generate(model, [PROMPTS[0]], Sampling(logprobs=4, **options), tokenizer)
    banned = [1, *range(3, 16)]
    for i, told in enumerate(answer.logprobs):
        logits = model.logits(torch.tensor([PROMPTS[0] + answer.ids[:i]]))[0, -1]
        logits[banned] = -math.inf
        expected = logits.log_softmax(-1)
        assert told.id == answer.ids[i]
        assert told.logprob == pytest.approx(expected[told.id].item(), abs=1e-4)
        assert [pair[0] for pair in told.likeliest] == expected.topk(4).indices.tolist()
        assert [pair[1] for pair in told.likeliest] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
    assert len(answer.logprobs) == len(answer.ids)
    assert generate(model, [PROMPTS[0]], Sampling(**options), tokenizer)[0].logprobs == []
    text = b"".join(token_bytes(tokenizer, told.id) for told in answer.logprobs)
    assert text.decode(errors="replace") == answer.text


def test_rows_of_different_settings_are_drawn_each_in_its_own_way():
    logits = torch.randn(6, 50)
    each = [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3), Sampling(temperature=0.3)] * 2
    draws = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2]
    together = choose_each(logits, each[:6], draws)
    alone = [choose(logits[i : i + 1], each[i], [draws[i]]).item() for i in range(6)]
    assert together.tolist() == alone


# ------------------------------------------------------------------------------------------------ the engine


class Desk:
    """Somebody who hands in rows and collects the news."""

    def __init__(self, model, tokenizer, seats=4, queue=4):
        self.model, self.tokenizer = model, tokenizer
        self.news: list[News] = []
        self.heard = threading.Condition()
        pairs = {"one": (model, tokenizer), "two": (model, tokenizer)}
        self.engine = Engine(pairs, seats, queue, contextlib.nullcontext, self.hear)

    def hear(self, news):
        with self.heard:
            self.news += news
            self.heard.notify()

    def ask(self, prompts, name="one", **options):
        tickets = [Ticket(row(self.model, self.tokenizer, prompt, **options), i) for i, prompt in enumerate(prompts)]
        self.engine.submit(name, tickets)
        return tickets

    def wait(self, condition, seconds=20):
        with self.heard:
            assert self.heard.wait_for(condition, seconds)

    def ended(self, ticket):
        return next((item.finish_reason for item in self.news if item.ticket is ticket and item.finish_reason), "")

    def text(self, ticket):
        return "".join(item.text for item in self.news if item.ticket is ticket)


@pytest.fixture
def desk(model, tokenizer):
    desk = Desk(model, tokenizer)
    desk.engine.start()
    yield desk
    desk.engine.stop()


def test_everybody_gets_the_answer_that_they_would_get_alone(desk):
    asked = [(prompts, desk.ask(prompts, name, max_new_tokens=30)) for name in ("one", "two") for prompts in
             (PROMPTS[:2], PROMPTS[2:5])]  # fmt: skip
    tickets = [ticket for _, group in asked for ticket in group]
    desk.wait(lambda: all(map(desk.ended, tickets)))
    for prompts, group in asked:
        alone = generate(desk.model, prompts, Sampling(max_new_tokens=30), desk.tokenizer)
        assert [ticket.row.answer for ticket in group] == alone
        assert [desk.text(ticket) for ticket in group] == [answer.text for answer in alone]
    assert all(table["running"] == table["waiting"] == 0 for table in desk.engine.status().values())


def test_the_queue_is_bounded_and_says_when_to_come_again(desk):
    tickets = desk.ask([[50]] * 8, max_new_tokens=200)
    with pytest.raises(Full) as full:
        desk.ask([[50]])
    assert 1 <= full.value.retry_after <= 60
    assert desk.ask([[50]], "two", max_new_tokens=1)  # the other model has places of its own
    with pytest.raises(ValueError, match="9 answers at once are too many: at most 8"):
        desk.ask([[50]] * 9)
    desk.engine.cancel(tickets)
    desk.wait(lambda: True)
    assert desk.ask([[50]] * 4, max_new_tokens=1)


def test_who_leaves_frees_the_place_for_the_next(desk):
    first = desk.ask([[50]] * 4, max_new_tokens=240)
    waiting = desk.ask([[60]], max_new_tokens=3)
    desk.engine.cancel(first)
    desk.wait(lambda: desk.ended(waiting[0]))
    assert not any(map(desk.ended, first))
    (alone,) = generate(desk.model, [[60]], Sampling(max_new_tokens=3), desk.tokenizer)
    assert waiting[0].row.answer == alone


def test_who_leaves_the_queue_is_never_answered(desk):
    first = desk.ask([[50]] * 4, max_new_tokens=200)
    desk.wait(lambda: desk.news)  # they have the places
    second = desk.ask([[60]] * 4, max_new_tokens=200)
    desk.engine.cancel(second)
    assert desk.engine.status()["one"]["waiting"] == 0
    desk.wait(lambda: all(map(desk.ended, first)))
    assert all(ticket.row.answer.ids == [] for ticket in second)


def test_a_failing_model_fails_its_requests_and_not_the_engine(desk, monkeypatch, capsys):
    (ticket,) = desk.ask([[50]], max_new_tokens=1)
    desk.wait(lambda: desk.ended(ticket))
    table = desk.engine.tables["one"]
    monkeypatch.setattr(table.batch, "join", lambda rows: 1 / 0)
    broken = desk.ask([[50], [60]], max_new_tokens=5)
    desk.wait(lambda: all(map(desk.ended, broken)))
    assert [desk.ended(ticket) for ticket in broken] == ["error", "error"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    (after,) = desk.ask([[60]], max_new_tokens=5)
    desk.wait(lambda: desk.ended(after))
    assert after.row.answer == generate(desk.model, [[60]], Sampling(max_new_tokens=5), desk.tokenizer)[0]


def test_a_beam_search_beside_plain_answers_is_that_of_a_search_alone(desk):
    """It takes 3 of the 4 places; requests that come meanwhile are answered, and no text changes."""
    prompts, asked = PROMPTS[:4], []
    for prompt, options in zip(prompts, ({}, {"num_beams": 3}, {}, {"num_beams": 2}), strict=True):
        asked += desk.ask([prompt], max_new_tokens=30, no_repeat_ngram_size=3, **options)
    desk.wait(lambda: all(map(desk.ended, asked)))
    for ticket in asked:
        (alone,) = generate(desk.model, [ticket.row.prompt], ticket.row.settings, desk.tokenizer)
        assert ticket.row.answer == alone and desk.text(ticket) == alone.text
    assert all(table["running"] == table["waiting"] == 0 for table in desk.engine.status().values())


def test_a_beam_search_counts_as_its_beams(model, tokenizer):
    desk = Desk(model, tokenizer, seats=4, queue=4)  # it does not run: no row is decoded yet
    with pytest.raises(ValueError, match="num_beams 5: at most 4 rows are decoded at once"):
        desk.ask([[50]], num_beams=5)
    (search,) = desk.ask([[50]], num_beams=4)
    desk.ask([[50], [60]])
    assert desk.engine.status()["one"]["waiting"] == 6
    with pytest.raises(Full):
        desk.ask([[50]], num_beams=3)
    table = desk.engine.tables["one"]
    assert desk.engine._admit(table) == [search] and desk.engine.status()["one"]["running"] == 4
    assert desk.engine._admit(table) == [], "the two others wait for a place"


def test_plain_answers_get_a_token_for_each_step_of_a_beam_search(desk):
    """One pass serves all rows: a long search delays no other request."""
    (search,) = desk.ask([[50]], max_new_tokens=200, num_beams=3, stop=("\0",))
    desk.wait(lambda: desk.news)
    (plain,) = desk.ask([[60]], max_new_tokens=20)
    desk.wait(lambda: desk.ended(plain))
    steps = [item.ticket for item in desk.news]
    between = steps[steps.index(plain) : len(steps) - steps[::-1].index(plain)]
    assert between.count(search) <= between.count(plain) + 1


def test_a_cancelled_beam_search_frees_all_its_places(desk):
    (search,) = desk.ask([[50]], max_new_tokens=240, num_beams=4)
    desk.wait(lambda: desk.news)
    desk.engine.cancel([search])
    after = desk.ask([[60]] * 4, max_new_tokens=3)
    desk.wait(lambda: all(map(desk.ended, after)))
    assert not desk.ended(search) and search.row.answer.ids == []


def test_the_end_is_told_to_everybody(model, tokenizer):
    desk = Desk(model, tokenizer, seats=2)
    desk.engine.start()
    tickets = desk.ask([[50]] * 5, max_new_tokens=250)
    time.sleep(0.02)
    desk.engine.stop()
    assert all(map(desk.ended, tickets))
    with pytest.raises(Full):
        desk.ask([[50]])


def test_long_prompts_do_not_come_all_at_once(desk, monkeypatch):
    monkeypatch.setattr("serving.scheduler.PREFILL_TOKENS", 100)
    sizes, table = [], desk.engine.tables["one"]
    join = table.batch.join
    monkeypatch.setattr(table.batch, "join", lambda rows: (sizes.append(len(rows)), join(rows))[1])
    tickets = desk.ask([[50] * 60] * 2 + [[50] * 20] * 2, max_new_tokens=60)
    desk.wait(lambda: all(map(desk.ended, tickets)))
    assert sizes == [1, 1, 2]
