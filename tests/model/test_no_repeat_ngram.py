"""no_repeat_ngram_size bans the same tokens as transformers' NoRepeatNGramLogitsProcessor.

Promises: no n-gram of prompt and answer occurs twice with greedy decoding, sampling, streaming, beam search and in a
batch; 0 is off; an answer ends if all tokens are banned.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.completion import Completion, Sequence
from model.generate import DecodeBatch, generate, stream
from model.sampling import NgramBlocker, Penalties, SamplingParams
from tests.serving.server_helpers import make_random_model

LOOPING = [[50, 60, 70] * 4, [100] * 9, [80, 81, 80, 81], [90]]


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model that generates repetitive text: each token has few likely successors."""
    model = make_random_model(tokenizer, tie_embeddings=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() > 1:
                weight.mul_(0.2)
    return model


def count_repeats(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(grams) - len(set(grams))


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
@settings(deadline=None, max_examples=300)
def test_banned_tokens_equal_transformers(ids, n):
    process = pytest.importorskip("transformers.generation.logits_process").NoRepeatNGramLogitsProcessor(n)
    scores = process(torch.tensor([ids], dtype=torch.long), torch.zeros(1, 5))
    assert set(NgramBlocker(n, ids).banned_tokens()) == set((scores[0] == float("-inf")).nonzero().flatten().tolist())


def test_fork_is_independent():
    one = NgramBlocker(2, [1, 2, 1])
    other = one.fork()
    other.append(3)
    assert set(one.banned_tokens()) == {2} and other.banned_tokens() == ()
    other.append(1)
    assert set(other.banned_tokens()) == {2, 3} and set(one.banned_tokens()) == {2}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", [{}, {"temperature": 0.3, "seed": 1}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"]
)
def test_no_ngram_occurs_twice(kind, n, model, tokenizer):
    options = SamplingParams(max_new_tokens=40, no_repeat_ngram_size=n, **kind)
    answers = generate(model, LOOPING, options, tokenizer)
    for prompt, answer in zip(LOOPING, answers, strict=True):
        new = count_repeats(prompt + answer.ids, n) - count_repeats(prompt, n)
        assert new == 0 and answer.ids
    for i, prompt in enumerate(LOOPING):
        seed = {"seed": kind["seed"] + i} if "seed" in kind else {}
        single = SamplingParams(max_new_tokens=40, no_repeat_ngram_size=n, **{**kind, **seed})
        assert "".join(stream(model, prompt, single, tokenizer)) == answers[i].text
    off = generate(model, LOOPING, SamplingParams(max_new_tokens=40, **kind), tokenizer)
    pairs = zip(LOOPING, off, strict=True)
    assert any(count_repeats(prompt + answer.ids, n) > count_repeats(prompt, n) for prompt, answer in pairs)


def test_sequences_with_and_without_ngram_ban_in_one_batch(model, tokenizer):
    sequences = [
        Sequence(model, tokenizer, prompt, SamplingParams(max_new_tokens=20, no_repeat_ngram_size=n), Completion())
        for prompt, n in zip(LOOPING, (2, 0, 1, 3), strict=True)
    ]
    batch = DecodeBatch(model, tokenizer)
    batch.prefill(sequences[:2])
    batch.decode()
    batch.prefill(sequences[2:])
    while batch.sequences:
        batch.decode()
    for sequence in sequences:
        assert [sequence.completion] == generate(model, [sequence.prompt], sequence.settings, tokenizer)
    assert sequences[0].completion != generate(model, LOOPING[:1], SamplingParams(max_new_tokens=20), tokenizer)[0]


@pytest.mark.parametrize(
    "kind", [{}, {"temperature": 1.0, "seed": 1}, {"num_beams": 2}], ids=["greedy", "sampled", "beams"]
)
def test_an_answer_ends_if_all_tokens_are_banned(kind, tokenizer):
    """n = 1 with a prompt of all tokens that may be sampled, including the stop tokens."""
    model = make_random_model(tokenizer, max_seq_len=512)
    allowed = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    options = SamplingParams(no_repeat_ngram_size=1, **kind)
    (answer,) = generate(model, [[*tokenizer.stop_ids, *allowed]], options, tokenizer)
    assert answer == Completion([], "", "stop")


def test_penalties_reorder_copies_rows(tokenizer):
    """Beam 1 continues beam 0: it copies beam 0's tokens and then has its own."""
    options = SamplingParams(num_beams=2, repetition_penalty=2.0, frequency_penalty=0.5, no_repeat_ngram_size=2)
    penalties = Penalties(options, [5, 6, 5], tokenizer.stop_ids, torch.zeros(20, 1))
    penalties.update([6, 7])
    penalties.reorder([1, 1])
    penalties.update([5, 8])
    scores = penalties.apply(torch.full((2, 20), -1.0))
    assert scores[0, 7] == -float("inf"), "5 6 5 7 5: 5 7 would come again"
    assert scores[0, 5] == -2.5 and scores[1, 5] == -2.0 and scores[0, 8] == -1.0 and scores[1, 8] == -2.5
    assert not (scores[1] == -float("inf")).any()
