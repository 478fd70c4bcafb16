"""Continuous batching: the answer to a request does not depend on the other requests or on when they join and leave.

Promises: sequences that join and leave between any two tokens are answered as if alone, greedy or sampled; a finished
or aborted request frees its slot at once; the queue is bounded; a failing model fails its requests and not the engine;
penalties and log-probabilities match their definitions.
"""

import contextlib
import math
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.completion import Completion, Sequence
from model.detokenizer import token_bytes
from model.generate import DecodeBatch, generate
from model.sampling import SamplingParams, apply_count_penalties, sample, sample_rows
from serving.scheduler import InferenceEngine, QueueFull, Request, TokenEvent
from tests.serving.server_helpers import make_random_model

PROMPTS = [[50, 60, 70], [100] * 40, [80, 81], [90, 91, 92, 93, 94], [33] * 70, [40]]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_random_model(tokenizer)


def make_sequence(model, tokenizer, prompt, number=0, **options):
    return Sequence(model, tokenizer, prompt, SamplingParams(**options), Completion(), number)


# ------------------------------------------------------------------------------------------------ the batch


SAMPLING_OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.0, "top_k": 5},
]
ARRIVALS = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(SAMPLING_OPTIONS),
    st.integers(1, 40),  # max_new_tokens
    st.integers(0, 30),  # step in which it joins
    st.integers(1, 60),  # steps after which it is removed
)


@given(st.lists(ARRIVALS, min_size=1, max_size=7))
@settings(deadline=None, max_examples=25)
def test_sequences_that_join_and_leave_are_answered_as_if_alone(model, tokenizer, arrivals):
    batch, rows = DecodeBatch(model, tokenizer), {}
    for now in range(100):
        new = {i: arrival for i, arrival in enumerate(arrivals) if arrival[3] == now}
        for i, (prompt, options, max_tokens, _, _) in new.items():
            rows[i] = make_sequence(model, tokenizer, prompt, max_new_tokens=max_tokens, **options)
        for i, arrival in enumerate(arrivals):
            if arrival[3] + arrival[4] == now and rows[i] in batch.sequences:
                batch.remove(rows[i])
        if new:
            batch.prefill([rows[i] for i in new])
        if batch.sequences:
            batch.decode()
    for i, (prompt, options, max_tokens, _, _) in enumerate(arrivals):
        (alone,) = generate(model, [prompt], SamplingParams(max_new_tokens=max_tokens, **options), tokenizer)
        completion = rows[i].completion
        if completion.finish_reason:
            assert completion == alone
        else:  # removed before its end
            assert alone.ids[: len(completion.ids)] == completion.ids
    assert batch.cache is None  # freed with the last sequence


def test_the_cache_grows_with_its_sequences_up_to_the_context(model, tokenizer):
    batch = DecodeBatch(model, tokenizer)
    batch.prefill([make_sequence(model, tokenizer, [50], max_new_tokens=1000)])
    assert batch.cache.max_len == 64
    while batch.sequences:
        batch.decode()
        assert not batch.cache or batch.cache.max_len in (64, 128, 256)


def test_a_cache_slot_is_zeroed_when_its_sequence_leaves(model, tokenizer):
    batch = DecodeBatch(model, tokenizer)
    first, second, third = (make_sequence(model, tokenizer, prompt) for prompt in PROMPTS[:3])
    batch.prefill([first, second, third])
    batch.remove(first)
    assert batch.sequences == [third, second]
    assert not batch.cache.keys[:, 2].any() and not batch.cache.values[:, 2].any()


# ------------------------------------------------------------------------------------------------ penalties, log p


def test_presence_and_frequency_penalties_match_their_formula():
    logits, counts = torch.tensor([[1.0, 2.0, -3.0]]), torch.tensor([[0.0, 1.0, 3.0]])
    expected = torch.tensor([[1.0, 2.0 - 0.5 - 0.25, -3.0 - 0.5 - 0.75]])
    assert torch.equal(apply_count_penalties(logits, counts, 0.5, 0.25), expected)


def test_penalties_count_the_answer_and_not_the_prompt(model, tokenizer):
    """With a frequency penalty above every logit, no token occurs twice before all others have occurred."""
    (answer,) = generate(
        model, [[50, 51, 52]], SamplingParams(frequency_penalty=1e6, max_new_tokens=100, stop=("\0",)), tokenizer
    )
    assert len(set(answer.ids)) == len(answer.ids) > 20
    (free,) = generate(model, [[50]], SamplingParams(max_new_tokens=1), tokenizer)
    asked = [[50, *free.ids, 50]]  # a token of the prompt alone is not penalised
    plain, penalised = (
        generate(model, asked, SamplingParams(max_new_tokens=1, presence_penalty=p), tokenizer)[0].ids
        for p in (0.0, 1e6)
    )
    assert plain == penalised


@torch.no_grad()
def test_logprobs_are_those_of_the_model_before_penalties(model, tokenizer):
    options = {"temperature": 1.3, "top_k": 3, "repetition_penalty": 1.4, "seed": 1, "max_new_tokens": 12}
    (answer,) = generate(model, [PROMPTS[0]], SamplingParams(logprobs=4, **options), tokenizer)
    banned = [1, *range(3, 16)]
    for i, entry in enumerate(answer.logprobs):
        logits = model.logits(torch.tensor([PROMPTS[0] + answer.ids[:i]]))[0, -1]
        logits[banned] = -math.inf
        expected = logits.log_softmax(-1)
        assert entry.id == answer.ids[i]
        assert entry.logprob == pytest.approx(expected[entry.id].item(), abs=1e-4)
        assert [pair[0] for pair in entry.top_logprobs] == expected.topk(4).indices.tolist()
        assert [pair[1] for pair in entry.top_logprobs] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
    assert len(answer.logprobs) == len(answer.ids)
    assert generate(model, [PROMPTS[0]], SamplingParams(**options), tokenizer)[0].logprobs == []
    text = b"".join(token_bytes(tokenizer, entry.id) for entry in answer.logprobs)
    assert text.decode(errors="replace") == answer.text


def test_sequences_with_different_settings_are_sampled_independently():
    logits = torch.randn(6, 50)
    each = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=0.3),
    ] * 2
    draws = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2]
    together = sample_rows(logits, each[:6], draws)
    alone = [sample(logits[i : i + 1], each[i], [draws[i]]).item() for i in range(6)]
    assert together.tolist() == alone


# ------------------------------------------------------------------------------------------------ the engine


class EngineClient:
    """Submits requests to an engine and collects its events."""

    def __init__(self, model, tokenizer, max_num_seqs=4, max_queue=4):
        self.model, self.tokenizer = model, tokenizer
        self.events: list[TokenEvent] = []
        self.received = threading.Condition()
        pairs = {"one": (model, tokenizer), "two": (model, tokenizer)}
        self.engine = InferenceEngine(pairs, max_num_seqs, max_queue, contextlib.nullcontext, self.on_events)

    def on_events(self, events):
        with self.received:
            self.events += events
            self.received.notify()

    def submit(self, prompts, name="one", **options):
        requests = [
            Request(make_sequence(self.model, self.tokenizer, prompt, **options), i) for i, prompt in enumerate(prompts)
        ]
        self.engine.add_requests(name, requests)
        return requests

    def wait_for(self, condition, seconds=20):
        with self.received:
            assert self.received.wait_for(condition, seconds)

    def finish_reason(self, request):
        return next((item.finish_reason for item in self.events if item.request is request and item.finish_reason), "")

    def text_of(self, request):
        return "".join(item.text for item in self.events if item.request is request)


@pytest.fixture
def client(model, tokenizer):
    client = EngineClient(model, tokenizer)
    client.engine.start()
    yield client
    client.engine.stop()


def test_every_request_gets_the_answer_it_would_get_alone(client):
    asked = [(prompts, client.submit(prompts, name, max_new_tokens=30)) for name in ("one", "two") for prompts in
             (PROMPTS[:2], PROMPTS[2:5])]  # fmt: skip
    requests = [request for _, group in asked for request in group]
    client.wait_for(lambda: all(map(client.finish_reason, requests)))
    for prompts, group in asked:
        alone = generate(client.model, prompts, SamplingParams(max_new_tokens=30), client.tokenizer)
        assert [request.sequence.completion for request in group] == alone
        assert [client.text_of(request) for request in group] == [answer.text for answer in alone]
    assert all(status["running"] == status["waiting"] == 0 for status in client.engine.status().values())


def test_the_queue_is_bounded_and_says_when_to_retry(client):
    requests = client.submit([[50]] * 8, max_new_tokens=200)
    with pytest.raises(QueueFull) as full:
        client.submit([[50]])
    assert 1 <= full.value.retry_after <= 60
    assert client.submit([[50]], "two", max_new_tokens=1)  # max_num_seqs counts per model
    with pytest.raises(ValueError, match="9 answers in one request are too many: at most 8"):
        client.submit([[50]] * 9)
    client.engine.abort(requests)
    client.wait_for(lambda: True)
    assert client.submit([[50]] * 4, max_new_tokens=1)


def test_an_aborted_request_frees_its_slot_for_the_next(client):
    first = client.submit([[50]] * 4, max_new_tokens=240)
    waiting = client.submit([[60]], max_new_tokens=3)
    client.engine.abort(first)
    client.wait_for(lambda: client.finish_reason(waiting[0]))
    assert not any(map(client.finish_reason, first))
    (alone,) = generate(client.model, [[60]], SamplingParams(max_new_tokens=3), client.tokenizer)
    assert waiting[0].sequence.completion == alone


def test_a_request_aborted_in_the_queue_is_never_answered(client):
    first = client.submit([[50]] * 4, max_new_tokens=200)
    client.wait_for(lambda: client.events)  # they are running
    second = client.submit([[60]] * 4, max_new_tokens=200)
    client.engine.abort(second)
    assert client.engine.status()["one"]["waiting"] == 0
    client.wait_for(lambda: all(map(client.finish_reason, first)))
    assert all(request.sequence.completion.ids == [] for request in second)


def test_a_failing_model_fails_its_requests_and_not_the_engine(client, monkeypatch, capsys):
    (request,) = client.submit([[50]], max_new_tokens=1)
    client.wait_for(lambda: client.finish_reason(request))
    scheduler = client.engine.schedulers["one"]
    monkeypatch.setattr(scheduler.batch, "prefill", lambda rows: 1 / 0)
    broken = client.submit([[50], [60]], max_new_tokens=5)
    client.wait_for(lambda: all(map(client.finish_reason, broken)))
    assert [client.finish_reason(request) for request in broken] == ["error", "error"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    (after,) = client.submit([[60]], max_new_tokens=5)
    client.wait_for(lambda: client.finish_reason(after))
    assert (
        after.sequence.completion
        == generate(client.model, [[60]], SamplingParams(max_new_tokens=5), client.tokenizer)[0]
    )


def test_a_beam_search_beside_plain_requests_equals_a_search_alone(client):
    """It takes 3 of 4 rows; other requests are answered meanwhile, and no text changes."""
    prompts, asked = PROMPTS[:4], []
    for prompt, options in zip(prompts, ({}, {"num_beams": 3}, {}, {"num_beams": 2}), strict=True):
        asked += client.submit([prompt], max_new_tokens=30, no_repeat_ngram_size=3, **options)
    client.wait_for(lambda: all(map(client.finish_reason, asked)))
    for request in asked:
        (alone,) = generate(client.model, [request.sequence.prompt], request.sequence.settings, client.tokenizer)
        assert request.sequence.completion == alone and client.text_of(request) == alone.text
    assert all(status["running"] == status["waiting"] == 0 for status in client.engine.status().values())


def test_a_beam_search_counts_as_its_beams(model, tokenizer):
    client = EngineClient(model, tokenizer, max_num_seqs=4, max_queue=4)  # not started: nothing is decoded
    with pytest.raises(ValueError, match="num_beams 5: this server decodes at most 4 rows at once"):
        client.submit([[50]], num_beams=5)
    (search,) = client.submit([[50]], num_beams=4)
    client.submit([[50], [60]])
    assert client.engine.status()["one"]["waiting"] == 6
    with pytest.raises(QueueFull):
        client.submit([[50]], num_beams=3)
    scheduler = client.engine.schedulers["one"]
    assert client.engine._admit(scheduler) == [search] and client.engine.status()["one"]["running"] == 4
    assert client.engine._admit(scheduler) == [], "the other two wait"


def test_plain_requests_get_a_token_for_each_step_of_a_beam_search(client):
    """One forward pass serves all rows, so a long search delays no other request."""
    (search,) = client.submit([[50]], max_new_tokens=200, num_beams=3, stop=("\0",))
    client.wait_for(lambda: client.events)
    (plain,) = client.submit([[60]], max_new_tokens=20)
    client.wait_for(lambda: client.finish_reason(plain))
    steps = [item.request for item in client.events]
    between = steps[steps.index(plain) : len(steps) - steps[::-1].index(plain)]
    assert between.count(search) <= between.count(plain) + 1


def test_an_aborted_beam_search_frees_all_its_slots(client):
    (search,) = client.submit([[50]], max_new_tokens=240, num_beams=4)
    client.wait_for(lambda: client.events)
    client.engine.abort([search])
    after = client.submit([[60]] * 4, max_new_tokens=3)
    client.wait_for(lambda: all(map(client.finish_reason, after)))
    assert not client.finish_reason(search) and search.sequence.completion.ids == []


def test_stopping_the_engine_fails_every_open_request(model, tokenizer):
    client = EngineClient(model, tokenizer, max_num_seqs=2)
    client.engine.start()
    requests = client.submit([[50]] * 5, max_new_tokens=250)
    time.sleep(0.02)
    client.engine.stop()
    assert all(map(client.finish_reason, requests))
    with pytest.raises(QueueFull):
        client.submit([[50]])


def test_prefill_is_bounded_by_its_token_budget(client, monkeypatch):
    monkeypatch.setattr("serving.scheduler.PREFILL_TOKENS", 100)
    sizes, scheduler = [], client.engine.schedulers["one"]
    join = scheduler.batch.prefill
    monkeypatch.setattr(scheduler.batch, "prefill", lambda rows: (sizes.append(len(rows)), join(rows))[1])
    requests = client.submit([[50] * 60] * 2 + [[50] * 20] * 2, max_new_tokens=60)
    client.wait_for(lambda: all(map(client.finish_reason, requests)))
    assert sizes == [1, 1, 2]
