"""Generation: sampling, stop conditions and incremental detokenization.

Promises: a sequence in a batch is generated as if it were alone; temperature 0 selects the most likely token; filters
keep at least one token; penalties lower seen tokens for logits of either sign; a seed makes sampling deterministic;
markers are never sampled; stop strings are cut; streamed pieces concatenate to the decoded text, without incomplete
characters.
"""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from model.completion import Completion
from model.detokenizer import IncrementalDetokenizer
from model.generate import fit_chat, generate, stream
from model.sampling import SamplingParams, apply_repetition_penalty, filter_logits, sample, top_p_mask
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, ChatTokenizer, tokenizer_files
from model.tokenizer_files import name_spare_tokens
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def fallback_tokenizer():
    """Unigram with byte fallback: a few words; all other text is encoded as bytes."""
    specials = SPECIAL_TOKENS + SPARE_TOKENS
    words = ["hello", " world", "你", "好", "中国", "a", " ", "�"]
    pieces = [*specials, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Tokenizer(models.Unigram([(piece, -5.0) for piece in pieces], unk_id=16, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return ChatTokenizer(tokenizer_files(backend))


class ScriptedHead(torch.nn.Module):
    """Replaces lm_head: returns the logits of step i, independent of the hidden states; repeats the last step."""

    def __init__(self, logits_of_steps):
        super().__init__()
        self.logits, self.step, self.weight = logits_of_steps, -1, torch.zeros(272, 32)

    def forward(self, hidden):
        self.step += 1
        return self.logits[min(self.step, len(self.logits) - 1)].expand(len(hidden), -1)


def model_generating(ids):
    """A model that generates these ids for any prompt."""
    model = tiny_model(max_seq_len=512)
    model.lm_head = ScriptedHead([torch.nn.functional.one_hot(torch.tensor(i), 272) * 9.0 for i in ids])
    return model


GREEDY = SamplingParams(max_new_tokens=12)
PROMPTS = [[50, 60, 70], [100] * 9, [80, 81], [90, 91, 92, 93, 94]]


# ------------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def greedy_without_cache(model, prompt, count, banned, stops):
    ids, new = list(prompt), []
    while len(new) < count and len(ids) < model.config.max_seq_len:
        logits = model.logits(torch.tensor([ids]))[0, -1]
        logits[banned] = -math.inf
        token = int(logits.argmax())
        if token in stops:
            return new, "stop"
        ids.append(token)
        new.append(token)
    return new, "length"


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_greedy_batch_equals_decoding_each_prompt_without_cache(use_moe, tokenizer):
    model = tiny_model(use_moe=use_moe)
    answers = generate(model, PROMPTS, GREEDY, tokenizer)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids, reason = greedy_without_cache(model, prompt, 12, [1, 3, *range(10, 16)], (0, 2))
        assert (answer.ids, answer.finish_reason) == (ids, reason)
        assert answer.text == tokenizer.decode(ids)
        assert generate(model, [prompt], GREEDY, tokenizer) == [answer]


def test_sequences_end_independently_and_at_max_seq_len(tokenizer):
    """Prompts of different lengths, some up to max_seq_len: removed sequences do not affect the others."""
    model = tiny_model()
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(16, 272, (n,), generator=random).tolist() for n in (31, 1, 20, 32, 7, 30, 2, 2)]
    long = SamplingParams(max_new_tokens=100, repetition_penalty=1.3)
    answers = generate(model, prompts, long, tokenizer)
    assert answers == [generate(model, [prompt], long, tokenizer)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(prompt) + len(answer.ids) == 32 or answer.finish_reason == "stop"
    assert answers[3] == Completion([], "", "length")


def test_each_sampled_sequence_has_its_own_seed(tokenizer):
    model = tiny_model()
    filters = {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    hot = SamplingParams(temperature=1.0, max_new_tokens=20, seed=7, **filters)
    together = generate(model, [PROMPTS[0]] * 4, hot, tokenizer)
    assert len({tuple(answer.ids) for answer in together}) == 4
    assert generate(model, [PROMPTS[0]] * 4, hot, tokenizer) == together
    for i, prompt in enumerate(PROMPTS):  # independent of the other prompts in the batch
        alone = generate(model, [prompt], SamplingParams(temperature=1.0, max_new_tokens=20, seed=7 + i), tokenizer)
        mixed = generate(model, PROMPTS, SamplingParams(temperature=1.0, max_new_tokens=20, seed=7), tokenizer)
        assert mixed[i] == alone[0]
    unseeded = SamplingParams(temperature=1.0, max_new_tokens=20)
    assert generate(model, PROMPTS, unseeded, tokenizer) != generate(model, PROMPTS, unseeded, tokenizer)


@pytest.mark.parametrize("beams", [1, 3])
def test_equal_prompts_are_computed_once_and_generated_as_if_alone(beams, tokenizer):
    """`forward` of the prompts has as many rows as there are different prompts."""
    model, widths = tiny_model(max_seq_len=64), []
    settings = dataclasses.replace(GREEDY, num_beams=beams)
    alone = [generate(model, [prompt], settings, tokenizer)[0].ids for prompt in PROMPTS]
    order = [0, 1, 0, 2, 1, 0, 3]
    hook = model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape))
    together = generate(model, [PROMPTS[i] for i in order], settings, tokenizer)
    hook.remove()
    assert widths[0] == (4, 9) and [done.ids for done in together] == [alone[i] for i in order]


def test_answers_to_equal_prompts_have_their_own_seeds_and_logprobs(tokenizer):
    model = tiny_model(max_seq_len=64)
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3, logprobs=0, prompt_logprobs=0)
    together = generate(model, [PROMPTS[1]] * 4, params, tokenizer)
    assert len({tuple(done.ids) for done in together}) > 1
    for i, done in enumerate(together):
        (alone,) = generate(model, [PROMPTS[1]], dataclasses.replace(params, seed=3 + i), tokenizer)
        assert done.ids == alone.ids
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = ([entry.logprob for entry in getattr(c, name)] for c in (done, alone))
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_generate_keeps_the_global_random_state(tokenizer):
    model = tiny_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS, SamplingParams(temperature=1.0, max_new_tokens=4, seed=1), tokenizer)
    assert torch.equal(torch.rand(3), expected)


LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])


def num_kept(**changes):
    return filter_logits(LOGITS, SamplingParams(**changes)).isfinite().sum().item()


def test_filters_keep_the_expected_number_of_tokens():
    assert num_kept() == 5
    assert [num_kept(top_k=k) for k in (0, 1, 2, 5, 10_000)] == [5, 1, 2, 5, 5]
    p = LOGITS.softmax(-1)[0]
    assert num_kept(top_p=1e-9) == 1
    assert num_kept(top_p=p[0].item() + 1e-4) == 2
    assert num_kept(top_p=p[:2].sum().item() - 1e-4) == 2
    assert num_kept(top_p=1.0) == 5
    assert num_kept(min_p=1.0) == 1
    assert num_kept(min_p=math.exp(-1.6)) == 3
    assert num_kept(top_k=3, top_p=0.99999, min_p=0.3) == 2
    shuffled = LOGITS[:, [3, 0, 4, 1, 2]]  # independent of the order of tokens
    likely = filter_logits(shuffled, SamplingParams(top_p=0.9)).isfinite()[0].tolist()
    assert likely == [False, True, False, True, True]


def test_filters_apply_to_each_row():
    rows = torch.cat((LOGITS, LOGITS.flip(-1)))
    for changes in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.3}):
        one, other = filter_logits(rows, SamplingParams(**changes)).isfinite()
        assert one.flip(-1).tolist() == other.tolist() and one.sum() == 2


def top_p_of_sorted_pairs(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The plain form: sort the tokens with their ids, keep those before which the probability mass is below top_p."""
    ordered, ids = logits.sort(descending=True, stable=True)
    mass_before = torch.cat((torch.zeros(len(logits), 1), ordered.softmax(-1).cumsum(-1)[:, :-1]), -1)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, mass_before < top_p)


# Few values: many ties.
FEW_LOGITS = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1e-7, 1.0, 1.0000001, 3.5, 1e30])
TEMPERATURES = st.sampled_from([1e-6, 0.1, 1.0, 100.0])


@given(st.data(), st.integers(1, 40), TEMPERATURES, st.floats(0, 1, width=32, exclude_min=True, exclude_max=True))
@settings(deadline=None)
def test_top_p_keeps_the_tokens_of_the_plain_form(data, vocab, temperature, top_p):
    values = st.lists(FEW_LOGITS | st.floats(-20, 20, width=32), min_size=vocab, max_size=vocab)
    logits = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=4)))
    logits[:, 0].clamp_(min=-5)  # a row has at least one token
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    assert torch.equal(top_p_mask(logits, top_p), top_p_of_sorted_pairs(logits, top_p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_p_of_a_large_vocabulary_keeps_the_tokens_of_the_plain_form(dtype):
    """In bf16 there are few different values; in the first row all are equal."""
    logits = (torch.randn(16, 6400) * torch.linspace(0, 6, 16)[:, None]).to(dtype).float()
    for top_p in (1e-6, 0.5, 0.9, 0.9999999):
        assert torch.equal(top_p_mask(logits, top_p), top_p_of_sorted_pairs(logits, top_p))


def test_samples_follow_the_probabilities():
    p = LOGITS.softmax(-1)[0]
    draws = [(i + 0.5) / 10_000 for i in range(10_000)]
    chosen = sample(LOGITS.expand(10_000, -1), SamplingParams(temperature=1.0), draws)
    torch.testing.assert_close(chosen.bincount(minlength=5) / 10_000, p, rtol=0, atol=2e-4)
    cold = sample(LOGITS.expand(10_000, -1), SamplingParams(temperature=0.5), draws)
    torch.testing.assert_close(cold.bincount(minlength=5) / 10_000, (LOGITS / 0.5).softmax(-1)[0], rtol=0, atol=2e-4)


def test_extreme_uniforms_and_temperatures_give_valid_tokens():
    ruled_out = LOGITS.clone()
    ruled_out[0, 0] = ruled_out[0, 4] = -math.inf
    for draw in (0.0, 0.5, math.nextafter(1, 0)):
        for hot in ({"temperature": 1.0}, {"temperature": 100.0}, {"temperature": 1.0, "top_p": 0.5}):
            assert sample(ruled_out, SamplingParams(**hot), [draw]).item() in (1, 2, 3)
        for tiny in (0.0, 1e-300, 1e-45, 1e-10):
            assert sample(LOGITS, SamplingParams(temperature=tiny), [draw]).item() == 0
        assert sample(LOGITS * 1e30, SamplingParams(temperature=1e-3), [draw]).item() == 0


@given(st.floats(-50, 50, width=32), st.floats(1.0, 10.0))
@settings(deadline=None)
def test_penalty_lowers_a_seen_token_of_either_sign(logit, penalty):
    logits = torch.full((2, 2), logit)
    seen = torch.tensor([[True, False], [False, False]])
    out = apply_repetition_penalty(logits, seen, penalty)
    assert out[0, 0] <= logit and (out[0, 0] < logit or penalty == 1 or abs(logit) < 1e-30 or penalty < 1 + 1e-6)
    assert (out[~seen] == logit).all()


@pytest.mark.parametrize("top", [5.0, -5.0], ids=["positive", "negative"])
def test_penalty_sees_each_rows_own_prompt_and_answer(top, tokenizer):
    logits = torch.full((272,), -90.0)
    logits[100:200] = top - 0.01 * torch.arange(100)
    model = tiny_model()
    model.lm_head = ScriptedHead([logits])
    prompts, three = [[100], [40, 41, 42], [101, 103]], {"max_new_tokens": 3}
    answers = generate(model, prompts, SamplingParams(repetition_penalty=3.0, **three), tokenizer)
    assert [answer.ids for answer in answers] == [[101, 102, 103], [100, 101, 102], [100, 102, 104]]
    assert generate(model, prompts, SamplingParams(**three), tokenizer)[0].ids == [100, 100, 100]


def test_penalty_spares_the_closing_marker(tokenizer):
    """It occurs after every turn of a chat; with a penalty the answers would never end."""
    logits = torch.full((272,), 0.0)
    logits[tokenizer.im_end_id], logits[100] = 5.0, 4.0
    model = tiny_model()
    model.lm_head = ScriptedHead([logits])
    prompt = [tokenizer.im_end_id, 50, tokenizer.im_end_id]
    assert generate(model, [prompt], SamplingParams(repetition_penalty=2.0), tokenizer) == [Completion([], "", "stop")]


# ------------------------------------------------------------------------------------------------------ stop conditions


def sampled_ids(tokenizer, likely):
    logits = torch.zeros(300)  # more rows than the tokenizer has tokens
    logits[likely] = 50.0
    model = tiny_model(vocab_size=300)
    model.lm_head = ScriptedHead([logits])
    model.lm_head.weight = torch.zeros(300, 32)
    settings = SamplingParams(temperature=1.0, max_new_tokens=31, seed=0)
    return set(generate(model, [[50]], settings, tokenizer)[0].ids)


def test_control_and_spare_tokens_are_never_sampled(tokenizer):
    assert sampled_ids(tokenizer, [1, 3, 10, 15, 272, 299]) <= set(range(16, 272))


def test_markers_of_thoughts_and_calls_are_sampled_unless_they_are_an_old_models_spare_tokens(tokenizer):
    markers = [4, 5, 6, 7, 8, 9]
    assert tokenizer.chat_marker_ids == set(markers) and sampled_ids(tokenizer, markers) == set(markers)
    old = ChatTokenizer({**tokenizer.files, "tokenizer.json": name_spare_tokens(tokenizer.files["tokenizer.json"])})
    assert old.files == tokenizer.files and sampled_ids(old, markers) <= set(range(16, 272))


@pytest.mark.parametrize("marker", ["im_end_id", "eos_id"])
def test_closing_markers_end_an_answer(marker, tokenizer):
    hi = tokenizer.encode("hi")
    model = model_generating([*hi, getattr(tokenizer, marker), *hi])
    assert generate(model, [[50]], GREEDY, tokenizer) == [Completion(hi, "hi", "stop")]


def test_max_new_tokens_counts_new_tokens(tokenizer):
    model = model_generating(tokenizer.encode("abcdef"))
    assert generate(model, [[50] * 30], SamplingParams(max_new_tokens=4), tokenizer)[0].text == "abcd"
    with_stop = model_generating([*tokenizer.encode("ab"), tokenizer.im_end_id])
    exact = generate(with_stop, [[50]], SamplingParams(max_new_tokens=2), tokenizer)[0]
    assert (exact.text, exact.finish_reason) == ("ab", "length")


@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["zzz"], "one two three"),
        ("你好。再见。", ["。"], "你好"),
        ("aab!", ["ab"], "a"),
        ("ababac!", ["abac"], "ab"),
        ("xabc!", ["xabd", "ab"], "x"),
        ("xabc!", ["xabc", "ab"], "x"),  # "ab" is complete first
        ("tail st", ["stop"], "tail st"),  # an incomplete stop string is part of the text
        ("User: hi", ["User:"], ""),
    ],
)
def test_stop_strings_are_cut_from_the_text(said, stop, shown, tokenizer):
    ids = tokenizer.encode(said)
    options = SamplingParams(max_new_tokens=len(ids), stop=tuple(stop))
    answer = generate(model_generating(ids), [[50]], options, tokenizer)[0]
    assert answer.text == shown
    assert answer.finish_reason == ("length" if shown == said else "stop")
    pieces = list(stream(model_generating(ids), [50], options, tokenizer))
    assert "".join(pieces) == shown and "" not in pieces


def test_stop_strings_do_not_depend_on_token_boundaries(fallback_tokenizer):
    text = IncrementalDetokenizer(fallback_tokenizer, ("hello", "el"))
    (whole,) = fallback_tokenizer.encode("hello")
    assert text.push(whole) == "h" and text.stopped and text.finish() == ""
    text = IncrementalDetokenizer(fallback_tokenizer, ("hello", "el"))
    letters = [17 + byte for byte in b"hello"]
    assert "".join(map(text.push, letters)) + text.finish() == "h"


def test_empty_and_too_long_prompts_raise(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="33 tokens, the model reads at most 32"):
        generate(model, [[50], [50] * 33], GREEDY, tokenizer)
    with pytest.raises(ValueError, match="33 tokens"):
        stream(model, [50] * 33, GREEDY, tokenizer)  # at the call, not at the first piece
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[]], GREEDY, tokenizer)
    assert generate(model, [], GREEDY, tokenizer) == []
    wrong = [("temperature", -1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0), ("top_p", 1.1)]
    wrong += [("min_p", -0.1), ("repetition_penalty", 0), ("max_new_tokens", 0), ("stop", ("",))]
    for name, value in wrong:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})


# ---------------------------------------------------------------------------------------------- training mode and dtype


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_restored(training, tokenizer):
    model = tiny_model(dropout=0.5).train(training)
    assert generate(model, PROMPTS, GREEDY, tokenizer) == generate(model, PROMPTS, GREEDY, tokenizer)  # no dropout
    assert model.training == training
    pieces = stream(model, [50], GREEDY, tokenizer)
    next(pieces)
    pieces.close()  # also if the caller stops early
    assert model.training == training
    model.train().logits(torch.tensor([PROMPTS[0]])).sum().backward()  # inference mode has ended


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_runs_in_half_precision(dtype, tokenizer):
    model = tiny_model()
    with torch.autocast("cpu", dtype):
        automatic = generate(model, PROMPTS, GREEDY, tokenizer)
    cast = generate(model.to(dtype), PROMPTS, GREEDY, tokenizer)
    assert all(answer.finish_reason for answer in automatic + cast)


def test_stream_equals_generate(tokenizer):
    model = tiny_model()
    for prompt in PROMPTS:
        hot = SamplingParams(temperature=1.5, max_new_tokens=20, seed=3)
        answer = Completion()
        text = "".join(stream(model, prompt, hot, tokenizer, answer))
        assert [answer] == generate(model, [prompt], hot, tokenizer)
        assert text == answer.text == tokenizer.decode(answer.ids)


# ------------------------------------------------------------------------------------------------------- detokenization


def stream_pieces(tokenizer, ids):
    text = IncrementalDetokenizer(tokenizer)
    return [*map(text.push, ids), text.finish()]


@functools.cache
def _byte_ids(tokenizer):
    """{byte: id}, from encoding two-byte characters."""
    ids = {}
    for code in range(0x80):
        ids[code] = tokenizer.encode(chr(code))[0]
    for code in (*range(0x80, 0x800), *range(0x800, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x40000)):
        if not 0xD800 <= code < 0xE000:
            ids.update(zip(chr(code).encode(), tokenizer.encode(chr(code)), strict=True))
    unused = sorted(set(range(16, 272)) - set(ids.values()))  # bytes that never occur in UTF-8: C0, C1, F5 and above
    return ids | dict(zip(sorted(set(range(256)) - ids.keys()), unused, strict=True))


BYTES = st.binary(max_size=12).map(list)
TEXTS = st.text("你好世界中国ab é🙂👩\u200d🚀𠮷\ufffd\n", max_size=8).map(lambda text: list(text.encode()))


@given(st.lists(BYTES | TEXTS, max_size=6))
@settings(deadline=None, max_examples=300)
def test_streamed_text_is_the_decoded_text_byte_level(tokenizer, parts):
    ids = [_byte_ids(tokenizer)[byte] for part in parts for byte in part]
    assert "".join(stream_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 271), max_size=40))
@settings(deadline=None, max_examples=300)
def test_streamed_text_is_the_decoded_text_any_ids(tokenizer, ids):
    assert "".join(stream_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(BYTES | TEXTS | st.integers(0, 280), max_size=8))
@settings(deadline=None, max_examples=300)
def test_streamed_text_is_the_decoded_text_byte_fallback(fallback_tokenizer, parts):
    ids = [i for part in parts for i in ([part] if isinstance(part, int) else [17 + byte for byte in part])]
    assert "".join(stream_pieces(fallback_tokenizer, ids)) == fallback_tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["你好🙂", "👩\u200d🚀 𠮷 é", "a\r\nb"])
def test_no_piece_has_an_incomplete_character(text, tokenizer, fallback_tokenizer):
    for each in (tokenizer, fallback_tokenizer):
        pieces = stream_pieces(each, each.encode(text))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    pieces = stream_pieces(tokenizer, tokenizer.encode(text))
    assert [piece for piece in pieces if piece] == list(text)  # each as soon as it is complete


def test_an_incomplete_character_at_the_end_equals_decode(tokenizer):
    half = tokenizer.encode("好")[:2]
    assert stream_pieces(tokenizer, half) == ["", "", "\ufffd"]
    answer = generate(model_generating(half), [[50]], SamplingParams(max_new_tokens=2), tokenizer)[0]
    assert answer.text == "\ufffd" == tokenizer.decode(half)


def test_marker_strings_in_text_do_not_end_an_answer(tokenizer):
    ids = tokenizer.encode("a<|im_end|>b")
    (answer,) = generate(model_generating(ids), [[50]], SamplingParams(max_new_tokens=len(ids)), tokenizer)
    assert answer.text == "a<|im_end|>b"


# --------------------------------------------------------------------------------------------------------- chat history


def test_fit_chat_drops_whole_turns(tokenizer):
    system = {"role": "system", "content": "be kind"}
    turns = [{"role": role, "content": f"{role} {i} 说"} for i in range(5) for role in ("user", "assistant")]
    messages = [system, *turns, {"role": "user", "content": "last?"}]
    whole = tokenizer.render(messages, True)[0]
    assert fit_chat(tokenizer, messages, len(whole)) == whole
    for start in range(6):
        expected = tokenizer.render([system, *messages[1 + 2 * start :]], True)[0]
        assert fit_chat(tokenizer, messages, len(expected)) == expected
        assert fit_chat(tokenizer, messages, len(expected) + 1) == expected
    assert fit_chat(tokenizer, messages, 3) == tokenizer.render([system, messages[-1]], True)[0]
    assert fit_chat(tokenizer, messages[1:], 3) == tokenizer.render([messages[-1]], True)[0]
