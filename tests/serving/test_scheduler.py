"""Continuous batching: the answer to a request does not depend on the other requests or on when they join and leave.

Promises: sequences that join and leave between any two tokens are answered as if alone, greedy or sampled; a finished
or aborted request frees its slot at once; the queue is bounded; a failing model fails its running requests only;
penalties and log-probabilities match their definitions.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detokenizer import token_bytes
from model.generate import DecodeBatch, generate
from model.sampling import Penalties, SamplingParams, apply_count_penalties, sample, sample_rows
from serving.scheduler import QueueFull, abort
from tests.serving.server_helpers import SchedulerDriver, make_random_model, make_sequence

PROMPTS = [[50, 60, 70], [100] * 40, [80, 81], [90, 91, 92, 93, 94], [33] * 70, [40]]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_random_model(tokenizer)


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


def test_a_penalty_window_counts_the_last_tokens_of_the_answer(model, tokenizer):
    """Equals counting anew at every step, also after beams change places; outside the window a token is free again."""
    settings = SamplingParams(num_beams=2, frequency_penalty=0.5, penalty_window=3)
    penalties, answers = Penalties(settings, [1, 2], [], torch.zeros(9)), [[], []]
    for step, tokens in enumerate([[4, 5], [4, 6], [7, 5], [4, 4], [8, 4], [7, 7], [0, 4]]):
        if step == 4:
            penalties.reorder([1, 1])
            answers = [answers[1][:], answers[1][:]]
        penalties.update(tokens)
        answers = [[*answer, token] for answer, token in zip(answers, tokens, strict=True)]
        expected = torch.stack([torch.bincount(torch.tensor(answer[-3:]), minlength=9) for answer in answers])
        assert torch.equal(penalties.apply(torch.zeros(2, 9)), -0.5 * expected)
    wide, whole = (
        generate(model, [[50]], SamplingParams(frequency_penalty=1.0, penalty_window=n, max_new_tokens=20), tokenizer)
        for n in (20, 0)
    )
    assert wide == whole


@torch.no_grad()
def test_logprobs_are_those_of_the_model_before_penalties(model, tokenizer):
    options = {"temperature": 1.3, "top_k": 3, "repetition_penalty": 1.4, "seed": 1, "max_new_tokens": 12}
    (answer,) = generate(model, [PROMPTS[0]], SamplingParams(logprobs=4, **options), tokenizer)
    banned = sorted(tokenizer.special_ids - set(tokenizer.stop_ids))
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


# ------------------------------------------------------------------------------------------------ the scheduler


@pytest.fixture
def driver(model, tokenizer):
    return SchedulerDriver(model, tokenizer)


def test_every_request_gets_the_answer_it_would_get_alone(driver):
    groups = [(prompts, driver.add(prompts, max_new_tokens=30)) for prompts in (PROMPTS[:2], PROMPTS[2:5])]
    driver.run()
    for prompts, group in groups:
        alone = generate(driver.model, prompts, SamplingParams(max_new_tokens=30), driver.tokenizer)
        assert [request.sequence.completion for request in group] == alone
        assert [driver.text_of(request) for request in group] == [answer.text for answer in alone]
    assert driver.num_running == driver.num_waiting == 0


def test_the_queue_is_bounded_and_says_when_to_retry(driver):
    requests = driver.add([[50]] * 8, max_new_tokens=200)
    driver.step()
    assert (driver.num_running, driver.num_waiting) == (4, 4)
    for check in (driver.scheduler.check_capacity, lambda: driver.add([[50]])):
        with pytest.raises(QueueFull) as full:
            check()
        assert 1 <= full.value.retry_after <= 60
    with pytest.raises(ValueError, match="9 answers in one request are too many: at most 8"):
        driver.add([[50]] * 9)
    abort(requests)
    assert driver.add([[50]] * 4, max_new_tokens=1)


def test_an_aborted_request_frees_its_slot_for_the_next(driver):
    first = driver.add([[50]] * 4, max_new_tokens=240)
    (waiting,) = driver.add([[60]], max_new_tokens=3)
    driver.step()
    abort(first)
    driver.run()
    assert not any(map(driver.finish_reason, first))
    (alone,) = generate(driver.model, [[60]], SamplingParams(max_new_tokens=3), driver.tokenizer)
    assert waiting.sequence.completion == alone


def test_a_request_aborted_in_the_queue_is_never_answered(driver):
    first = driver.add([[50]] * 4, max_new_tokens=200)
    driver.step()
    second = driver.add([[60]] * 4, max_new_tokens=200)
    abort(second)
    assert driver.num_waiting == 0
    driver.run()
    assert all(map(driver.finish_reason, first))
    assert all(request.sequence.completion.ids == [] for request in second)


def test_a_failing_model_fails_its_running_requests_only(driver, monkeypatch, capsys):
    monkeypatch.setattr(driver.scheduler.batch, "decode", lambda: 1 / 0)
    broken, waiting = driver.add([[50]] * 4, max_new_tokens=5), driver.add([[60]], max_new_tokens=5)
    driver.run()
    assert [driver.finish_reason(request) for request in broken] == ["error"] * 4
    assert "ZeroDivisionError" in capsys.readouterr().err
    expected = generate(driver.model, [[60]], SamplingParams(max_new_tokens=5), driver.tokenizer)
    assert [request.sequence.completion for request in waiting] == expected


def test_a_beam_search_beside_plain_requests_equals_a_search_alone(driver):
    """It takes 3 of 4 rows; other requests are answered meanwhile, and no text changes."""
    prompts, asked = PROMPTS[:4], []
    for prompt, options in zip(prompts, ({}, {"num_beams": 3}, {}, {"num_beams": 2}), strict=True):
        asked += driver.add([prompt], max_new_tokens=30, no_repeat_ngram_size=3, **options)
    driver.run()
    for request in asked:
        (alone,) = generate(driver.model, [request.sequence.prompt], request.sequence.settings, driver.tokenizer)
        assert request.sequence.completion == alone and driver.text_of(request) == alone.text
    assert driver.num_running == driver.num_waiting == 0


def test_a_beam_search_counts_as_its_beams(driver):
    with pytest.raises(ValueError, match="num_beams 5: this server decodes at most 4 rows at once"):
        driver.add([[50]], num_beams=5)
    (search,) = driver.add([[50]], num_beams=4)
    driver.add([[50], [60]])
    assert driver.num_waiting == 6
    with pytest.raises(QueueFull):
        driver.add([[50]], num_beams=3)
    driver.step()
    assert list(driver.scheduler.running.values()) == [search]
    assert (driver.num_running, driver.num_waiting) == (4, 2)


def test_plain_requests_get_a_token_for_each_step_of_a_beam_search(driver):
    """One forward pass serves all rows, so a long search delays no other request."""
    (search,) = driver.add([[50]], max_new_tokens=200, num_beams=3, stop=("\0",))
    driver.step()
    (plain,) = driver.add([[60]], max_new_tokens=20)
    driver.step(19)  # the first step prefills and decodes
    assert driver.finish_reason(plain) and not driver.finish_reason(search)


def test_an_aborted_beam_search_frees_all_its_slots(driver):
    (search,) = driver.add([[50]], max_new_tokens=240, num_beams=4)
    driver.step()
    abort([search])
    after = driver.add([[60]] * 4, max_new_tokens=3)
    driver.run()
    assert all(map(driver.finish_reason, after))
    assert not driver.finish_reason(search) and search.sequence.completion.ids == []


def test_fail_ends_every_open_request(driver):
    requests = driver.add([[50]] * 6, max_new_tokens=250)
    driver.step()
    events = driver.scheduler.fail(including_waiting=True)
    assert [event.request for event in events] == requests and {event.finish_reason for event in events} == {"error"}
    assert not driver.scheduler.has_work and driver.num_running == driver.num_waiting == 0


def test_prefill_is_bounded_by_its_token_budget(driver, monkeypatch):
    monkeypatch.setattr("serving.scheduler.PREFILL_TOKENS", 100)
    sizes, prefill = [], driver.scheduler.batch.prefill
    monkeypatch.setattr(driver.scheduler.batch, "prefill", lambda rows: (sizes.append(len(rows)), prefill(rows))[1])
    driver.add([[50] * 60] * 2 + [[50] * 20] * 2, max_new_tokens=60)
    driver.run()
    assert sizes == [1, 1, 2]
