"""Beam search: tokens equal those of transformers' generate; scores equal hand-computed ones.

Promises: with num_beams, no_repeat_ngram_size, repetition_penalty and length_penalty the tokens equal transformers',
for one prompt and for a batch of different lengths; the search finds a better answer than greedy decoding; the result
is the same alone, in a batch with other sequences, and streamed; stop strings cut the finished text.
"""

import math

import pytest
import torch

from model.beams import BeamSearch
from model.completion import Completion, Sequence
from model.generate import DecodeBatch, generate, stream
from model.sampling import SamplingParams
from tests.model.test_hf_parity import hf_settings
from tests.serving.server_helpers import make_random_model

PROMPTS = [[50, 60, 70, 50, 60], [100] * 9, [80, 81, 82, 80, 81, 82, 80]]
BEAMS = {"num_beams": 4}
NGRAMS = {"no_repeat_ngram_size": 5}
BEAM_OPTIONS = [
    NGRAMS,
    BEAMS,
    {**BEAMS, **NGRAMS},
    {**BEAMS, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {**BEAMS, "repetition_penalty": 0.8},
    {**BEAMS, "length_penalty": 0.0},
    {**BEAMS, "length_penalty": 2.0, **NGRAMS},
    {"num_beams": 8, "length_penalty": -0.5},
    {"num_beams": 2, "no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
]


def stopping_model(tokenizer, seed, stop_scale):
    """Random weights that generate repetitive text; a larger `stop_scale` gives earlier stop tokens."""
    model = make_random_model(tokenizer, tie_embeddings=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_((0.1 if "layers" in name else 0.4) * torch.randn(weight.shape, generator=generator))
        model.lm_head.weight[tokenizer.stop_ids] *= stop_scale
    return model


def transformers_answers(model, tokenizer, prompts, **options):
    """[(ids without the stop token, finish reason)] from transformers' generate."""
    transformers = pytest.importorskip("transformers")
    if "num_beams" in options and not hasattr(transformers.GenerationMixin, "_check_early_stop_heuristic"):
        pytest.skip("this transformers has the older beam search, which ends at another step in some cases")
    hf_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_settings(model.config))).eval()
    hf_model.load_state_dict(model.state_dict())
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    unfit = [*(tokenizer.special_ids - set(tokenizer.stop_ids))]
    found = hf_model.generate(
        input_ids=torch.tensor([[tokenizer.pad_id] * pad + ids for pad, ids in zip(pads, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
        do_sample=False, eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.pad_id, suppress_tokens=unfit,
        **options,
    )[:, width:].tolist()  # fmt: skip
    answers = []
    for sequence in found:
        end = next((i for i, token in enumerate(sequence) if token in tokenizer.stop_ids), None)
        answers.append((sequence[:end], "length" if end is None else "stop"))
    return answers


@pytest.mark.parametrize("options", BEAM_OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
def test_beam_search_tokens_equal_transformers(options, tokenizer):
    reasons = set()
    for seed, stop_scale in ((1, 0.0), (4, 1.2), (5, 1.2), (8, 1.6), (2, 2.0)):
        model = stopping_model(tokenizer, seed, stop_scale)
        for prompts in (PROMPTS[:1], PROMPTS):
            ours = generate(model, prompts, SamplingParams(max_new_tokens=24, **options), tokenizer)
            theirs = transformers_answers(model, tokenizer, prompts, max_new_tokens=24, **options)
            assert [(answer.ids, answer.finish_reason) for answer in ours] == theirs
            reasons |= {answer.finish_reason for answer in ours}
    assert reasons == {"stop", "length"}, "both ends are compared"


GOLDEN = {  # output of transformers 5.24 for these weights
    "greedy": (
        [234, 63, 95, 225, 19, 24, 161, 63, 95, 225, 19, 24, 161, 63, 129, 143, 91, 182, 143, 91, 182, 260, 95, 225],
        "length",
    ),
    "beams": (
        [234, 63, 95, 225, 19, 99, 225, 19, 176, 234, 225, 19, 176, 234, 63, 95, 225, 19, 176, 234, 225, 19, 176, 234],
        "length",
    ),
    "ngrams": (
        [234, 63, 95, 225, 19, 24, 161, 63, 95, 225, 19, 104, 225, 19, 24, 161, 91, 182, 260, 95, 225, 19, 24, 196],
        "length",
    ),
    "both": ([234, 63, 95, 225, 19, 99, 225, 19, 176, 234, 225, 19, 176, 234, 63, 66], "stop"),
}


def test_beam_search_golden_answers(tokenizer):
    model, found = stopping_model(tokenizer, 4, 1.2), {}
    for name, options in (("greedy", {}), ("beams", BEAMS), ("ngrams", NGRAMS), ("both", {**BEAMS, **NGRAMS})):
        (answer,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=24, **options), tokenizer)
        found[name] = (answer.ids, answer.finish_reason)
    assert found == GOLDEN


# ------------------------------------------------------------------------------------------------------- scores by hand


def log_probs(*sequences):
    return torch.tensor(sequences).log()


def test_beam_search_finds_a_better_answer_than_greedy():
    """0.6 * 0.3 < 0.4 * 1.0: greedy decoding picks the wrong first token. Token 3 is the stop token."""
    search = BeamSearch(2, max_length=3, length_penalty=0.0, stop_ids=[3])
    first = search.advance(log_probs([0.6, 0.4, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]))
    assert first == ([0, 0], [0, 1])  # both from beam 0: the initial beams are copies
    parents, tokens = search.advance(log_probs([0.3, 0.3, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0]))
    assert (parents[0], tokens[0]) == (1, 2) and math.exp(search.scores[0]) == pytest.approx(0.4)
    search.advance(log_probs([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]))
    assert search.done and search.best == [1, 2, 3]
    assert math.exp(search.finished[0][0]) == pytest.approx(0.4)


@pytest.mark.parametrize(("length_penalty", "best"), [(0.0, [3]), (1.0, [0, 3]), (-1.0, [3])])
def test_length_penalty_changes_the_best_answer(length_penalty, best):
    """log 0.5 / 1 = -0.69 against log 0.4 / 2 = -0.46; without a penalty the more probable answer wins."""
    search = BeamSearch(2, max_length=2, length_penalty=length_penalty, stop_ids=[3])
    search.advance(log_probs([0.45, 0.05, 0.0, 0.5], [0.45, 0.05, 0.0, 0.5]))
    search.advance(log_probs([0.0, 0.05, 0.0, 0.9], [1.0, 0.0, 0.0, 0.0]))
    assert search.done and search.best == best


def test_beam_search_ends_when_no_beam_can_improve():
    """Two answers are finished with 0.5 and 0.4 / 2; the remaining beams score less at any length."""
    search = BeamSearch(2, max_length=100, length_penalty=0.0, stop_ids=[3])
    search.advance(log_probs([0.46, 0.04, 0.0, 0.5], [0.46, 0.04, 0.0, 0.5]))
    assert not search.done, "one finished answer is not two"
    search.advance(log_probs([0.05, 0.05, 0.0, 0.9], [0.25, 0.25, 0.25, 0.25]))
    assert search.done and search.length == 2 and [ids for _, ids in search.finished] == [[3], [0, 3]]


def test_beam_search_with_fewer_allowed_tokens_than_beams():
    search = BeamSearch(4, max_length=3, length_penalty=1.0, stop_ids=[3])
    parents, tokens = search.advance(log_probs(*[[0.0, 1.0, 0.0, 0.0]] * 4))
    assert (parents[0], tokens[0]) == (0, 1)
    search.advance(log_probs(*[[0.0, 0.0, 0.0, 1.0]] * 4))
    assert search.done and search.best == [1, 3]


# ----------------------------------------------------------------------------------------------------------- in a batch


@pytest.fixture(scope="module")
def model(tokenizer):
    return stopping_model(tokenizer, 5, 1.2)


KINDS = [
    {**BEAMS, **NGRAMS},
    {},
    {"num_beams": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 1.0, "seed": 3, "no_repeat_ngram_size": 2},
    {"num_beams": 2, "length_penalty": 0.0},
]


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_beam_searches_and_sampled_sequences_in_one_batch_equal_each_alone(use_moe, tokenizer):
    """Sequences join and end at different steps, so the slots of a search move in the cache."""
    model = make_random_model(tokenizer, use_moe=use_moe)
    batch, sequences = DecodeBatch(model, tokenizer), []
    for step in range(60):
        if step % 3 == 0 and step < 30:
            i = step // 3
            options = {**KINDS[i % 5], "max_new_tokens": 5 + 7 * (i % 4)}
            sequences.append(Sequence(model, tokenizer, PROMPTS[i % 3], SamplingParams(**options), Completion()))
            batch.prefill(sequences[-1:])
        elif batch.rows:
            batch.decode()
    assert batch.cache is None and not batch.rows
    for sequence in sequences:
        assert [sequence.completion] == generate(model, [sequence.prompt], sequence.settings, tokenizer)


def test_removing_a_beam_search_frees_all_its_slots(model, tokenizer):
    batch = DecodeBatch(model, tokenizer)
    search, plain = (
        Sequence(model, tokenizer, [50], SamplingParams(max_new_tokens=9, **kind), Completion()) for kind in (BEAMS, {})
    )
    batch.prefill([search, plain])
    assert len(batch.rows) == 5 and batch.sequences == [search, plain]
    batch.remove(search)
    assert [seq for seq, _ in batch.rows] == [plain]
    assert not batch.cache.keys[:, 1:].any() and not batch.cache.values[:, 1:].any()
    while batch.rows:
        batch.decode()
    assert [plain.completion] == generate(model, [[50]], plain.settings, tokenizer)


def test_streamed_beam_search_yields_its_text_at_the_end(model, tokenizer):
    options = SamplingParams(max_new_tokens=10, num_beams=4)
    answer = Completion()
    *before, last = stream(model, PROMPTS[0], options, tokenizer, answer)
    assert [answer] == generate(model, PROMPTS[:1], options, tokenizer)
    assert set(before) == {""} and last == answer.text == tokenizer.decode(answer.ids)
    pieces = stream(model, PROMPTS[0], options, tokenizer)
    next(pieces)
    pieces.close()  # the caller may stop between two tokens
    assert model.training is False


def test_stop_strings_cut_the_finished_text_of_a_beam_search(tokenizer):
    model = stopping_model(tokenizer, 1, 0.0)
    whole = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=40, **BEAMS), tokenizer)[0]
    stop = [char for char in whole.text if char.isascii()][1]
    (cut,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=40, stop=(stop,), **BEAMS), tokenizer)
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)] and tokenizer.decode(cut.ids) == cut.text + stop
    assert len(cut.ids) < len(whole.ids)


def test_beam_search_ends_at_max_seq_len(tokenizer):
    model = make_random_model(tokenizer, max_seq_len=32)
    for length in (1, 20, 31, 32):
        (answer,) = generate(model, [[50] * length], SamplingParams(max_new_tokens=100, **BEAMS), tokenizer)
        assert length + len(answer.ids) == 32 or answer.finish_reason == "stop"
    assert answer == Completion([], "", "length")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beam_search_runs_in_half_precision(dtype, model, tokenizer):
    with torch.autocast("cpu", dtype):
        answers = generate(model, PROMPTS, SamplingParams(max_new_tokens=8, **BEAMS, **NGRAMS), tokenizer)
    assert all(answer.finish_reason for answer in answers)


def test_params_that_beam_search_does_not_support_raise():
    for wrong, message in (
        ({"num_beams": 0}, "num_beams must be from 1 to 8, not 0"),
        ({"num_beams": 9}, "num_beams must be from 1 to 8, not 9"),
        ({"num_beams": 2, "temperature": 0.7}, "temperature must be 0 with num_beams above 1, not 0.7"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs must be left out with num_beams above 1"),
        ({"length_penalty": math.nan}, "length_penalty must be from -10 to 10"),
        ({"length_penalty": 11.0}, "length_penalty must be from -10 to 10"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**wrong)
