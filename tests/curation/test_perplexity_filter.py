"""Promise: training chats are selected by the cross-entropy of their answers, each is scored once, and validation chats
are never filtered."""

import contextlib
import json
import random
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from common.errors import UserError
from corpus.dataset_meta import read_meta
from curation.perplexity_filter import (
    HISTOGRAM_BINS,
    ScoreRange,
    ScoreStore,
    bin_edges,
    bin_index,
    clip_text,
    parse_score_range,
    score_interval,
)
from curation.perplexity_scorer import Scorer, batch_by_tokens, encode_plain_chat
from tests.helpers import read_jsonl, write_rows


def make_chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def chats_file(tmp_path):
    rows = [make_chat(f"{i}?", f"n{i % 7}" * (1 + i % 3)) for i in range(60)]
    rows += [make_chat(f"数{i}", "好" * (1 + i % 5)) for i in range(60)]
    return write_rows(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])


@pytest.fixture
def run_sft(chats_file, tokenizer_dir, tiny_parent, tmp_path):
    def run(name, *flags, scorer=True):
        out = tmp_path / name
        common = ["sft", chats_file, "--tokenizer", tokenizer_dir, "--out_dir", out, "--val_share", "0.1"]
        data_process.main([*map(str, [*common, *(["--scorer", tiny_parent] if scorer else []), *flags])])
        return out

    return run


def read_questions(folder, name):
    return [row["messages"][0]["content"] for row in read_jsonl(folder / f"{name}.jsonl")]


# ---- scoring ---------------------------------------------------------------------------------------------------------
def test_a_score_is_the_cross_entropy_of_the_answers(tokenizer, tiny_parent):
    """Compares batched scores with the formula for a single chat, and with scores of batches of one chat."""
    scorer = Scorer(tiny_parent, "cpu", "float32")
    rows = [make_chat("q" * (1 + 3 * i), "答案" * (1 + i)) for i in range(9)]
    rows[0] += make_chat("and?", "yes")
    batched_scores = scorer.score(rows)
    for row, (nats, count) in zip(rows, batched_scores, strict=True):
        text = "\n".join(message["content"] for message in row)
        ids = torch.tensor(tokenizer.encode(text))[: scorer.max_tokens]
        answer = torch.zeros(len(text.encode()), dtype=torch.bool)
        start = 0
        for message in row:
            size = len(message["content"].encode())
            answer[start : start + size] = message["role"] == "assistant"
            start += size + 1
        answer = answer[: scorer.max_tokens]  # this tokenizer has one token per byte
        with torch.no_grad():
            hidden, _ = scorer.model(ids[None, :-1])
            losses = F.cross_entropy(scorer.model.lm_head(hidden)[0], ids[1:], reduction="none")
        assert count == answer[1:].sum()
        assert nats == pytest.approx(losses[answer[1:]].mean().item(), rel=1e-4)
        assert scorer.score([row])[0] == pytest.approx((nats, count), rel=1e-4)


def test_a_pretrained_model_scores_plain_text_and_a_chat_model_its_template(tokenizer, tiny_parent, tmp_path):
    from model.checkpoint import load_model, save_model

    ids, mask = encode_plain_chat(tokenizer, make_chat("hi", "yo"))
    assert tokenizer.decode(ids) == "hi\nyo" and mask == [0, 0, 0, 1, 1]
    model, _, _ = load_model(tiny_parent)
    save_model(tmp_path / "full_sft_32.pth", model, "full_sft", tokenizer, [])
    assert Scorer(tiny_parent, "cpu").score([make_chat("hi", "yo")])[0][1] == 2
    assert Scorer(tmp_path / "full_sft_32.pth", "cpu").score([make_chat("hi", "yo")])[0][1] == 3, (
        "the end-of-turn token is scored too"
    )


def test_a_chat_whose_answer_does_not_fit_is_not_scored(tiny_parent):
    scorer = Scorer(tiny_parent, "cpu", "float32")
    assert scorer.score([make_chat("q" * 500, "a")]) == [(0.0, 0)]
    assert scorer.score([]) == []


@given(lengths=st.lists(st.integers(1, 3000), max_size=40))
def test_batches_contain_every_chat_once_within_the_token_limit(lengths):
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = list(batch_by_tokens(order, lengths))
    assert [i for batch in batches for i in batch] == order
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 8192 for batch in batches)


# ---- score ranges ----------------------------------------------------------------------------------------------------
def test_score_ranges_are_parsed():
    assert parse_score_range("2.5,4") == ScoreRange(2.5, 4.0, False)
    assert parse_score_range("zh=10%,90%") == ScoreRange(10.0, 90.0, True, "zh")
    for wrong in ("", "3", "4,2.5", "a,b", "10%,90", "10%,190%", "fr=1,2", "-1,2", "1,1"):
        with pytest.raises(UserError, match="--keep_entropy"):
            parse_score_range(wrong)


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(0, 12), min_size=1, max_size=200),
    low=st.floats(0, 50),
    more=st.floats(1, 50),
    share=st.floats(0.05, 1),
)
def test_an_interval_keeps_the_requested_range_and_fraction(scores, low, more, share):
    values = np.array(scores)
    bottom, top = score_interval(values, ScoreRange(low, low + more, True), 1.0)
    assert bottom == np.percentile(values, low) and top == np.percentile(values, low + more)
    assert score_interval(values, None, 1.0) == (-np.inf, np.inf)
    bottom, top = score_interval(values, None, share)
    assert bottom <= np.median(values) <= top
    if len(set(scores)) == len(scores):
        kept = ((values >= bottom - 1e-9) & (values <= top + 1e-9)).sum()
        assert kept >= share * (len(values) - 1)


def test_interval_bins_and_clipping_match_hand_computed_values():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert score_interval(values, ScoreRange(2, 4, False), 1.0) == (2.0, 4.0)
    assert score_interval(values, None, 0.5) == (2.0, 4.0)
    edges = bin_edges(np.linspace(1, 7, 1000))
    assert len(edges) == HISTOGRAM_BINS + 1 and [bin_index(edges, x) for x in (0.0, 1.06, 6.9, 99.0)] == [
        0,
        0,
        HISTOGRAM_BINS - 1,
        HISTOGRAM_BINS - 1,
    ]
    assert clip_text("a\nb\x1b[31m" + "c" * 99, 10) == "a b [31mc…"


# ---- the command -----------------------------------------------------------------------------------------------------
def test_only_training_chats_are_dropped_and_each_is_counted(run_sft, capsys):
    whole, kept = run_sft("whole", scorer=False), run_sft("kept", "--keep_entropy", "25%,75%")
    output = capsys.readouterr().out
    assert read_questions(kept, "val") == read_questions(whole, "val")
    train = read_questions(kept, "train")
    assert set(train) < set(read_questions(whole, "train")) and 40 <= len(train) <= 75
    meta = read_meta_json(kept)
    left_out = sum(entry["count"] for name, entry in meta["report"]["dropped"].items() if name.startswith("entropy"))
    assert left_out + len(train) == len(read_questions(whole, "train"))
    assert "nats per token" in output and "zh: 60 chats" in output and "数" in output, "a histogram with examples"
    assert set(meta["chosen"]["kept_between"]) == {"zh", "en"}
    assert read_meta(kept / meta["tokens"])["splits"]["train"]["documents"] == len(train)


def read_meta_json(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def test_a_score_range_for_one_language_keeps_all_of_the_other(run_sft):
    whole, kept = run_sft("whole", scorer=False), run_sft("kept", "--keep_entropy", "zh=0,0.001")
    assert {q for q in read_questions(whole, "train") if "数" not in q} == set(read_questions(kept, "train"))


def test_scores_are_computed_once_and_survive_a_kill(run_sft, tmp_path, monkeypatch, capsys):
    from curation import perplexity_scorer

    monkeypatch.setattr(perplexity_scorer, "SCORER_POOL_CHATS", 16)
    score, calls = perplexity_scorer.Scorer.score, []

    def interrupt(self, chats):
        calls.append(len(chats))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, chats)

    monkeypatch.setattr(perplexity_scorer.Scorer, "score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_sft("out", "--keep_share", "0.5")
    assert not capsys.readouterr().out.count("written")
    (scores,) = tmp_path.glob("out.scores-*.jsonl")
    with scores.open("a") as file:
        file.write("[12345, 1.2")  # a line truncated by a kill
    calls[:] = [0] * 9
    run_sft("out", "--keep_share", "0.5")
    assert "scored 72 chats" in (output := capsys.readouterr().out) and "48 had a score already" in output
    run_sft("out", "--keep_entropy", "10%,60%")
    assert "scored 0 chats" in capsys.readouterr().out, "another range needs no scoring"


def test_check_shows_the_histogram_and_writes_no_data(run_sft, tmp_path, capsys):
    run_sft("out", "--check")
    output = capsys.readouterr().out
    assert "nats per token" in output and not (tmp_path / "out").exists()


def test_invalid_flags_are_reported_in_one_line(run_sft, tmp_path, chats_file):
    with pytest.raises(UserError, match="need --scorer MODEL"):
        run_sft("out", "--keep_entropy", "1,2", scorer=False)
    with pytest.raises(UserError, match="no checkpoint at"):
        run_sft("out", "--scorer", str(tmp_path / "none.pth"), scorer=False)
    with pytest.raises(UserError, match=r"keeps no chat: .*from \d+\.\d\d to"):
        run_sft("out", "--keep_entropy", "0,0.0001")


def test_foreign_lines_in_the_scores_file_are_ignored(tmp_path):
    path = tmp_path / "s.jsonl"
    foreign = ["nonsense", "[1]", '{"a": 1}', '[2, "x", 3, "en"]', '[3, 1.0, 4, "fr"]', ""]
    path.write_text("\n".join(['[1, 2.5, 3, "zh"]', *foreign, '[4, 1.0, 2, "en"]']))
    scores = ScoreStore(path)
    assert lookup_scores(scores, range(9)) == {1: (2.5, "zh"), 4: (1.0, "en")}
    scores.add([(5, 3.0, 1, "en")])
    scores.close()
    for again in (scores, ScoreStore(path)):
        assert lookup_scores(again, range(9)) == {1: (2.5, "zh"), 4: (1.0, "en"), 5: (3.0, "en")}


def lookup_scores(scores, keys):
    return {key: found for key in keys if (found := scores.get(key))}


KEY_STRATEGY = st.one_of(st.integers(0, 6), st.integers(2**64 - 4, 2**64 - 1), st.integers(0, 2**64 - 1))
LINE_STRATEGY = st.tuples(KEY_STRATEGY, st.floats(0, 50), st.integers(1, 99), st.sampled_from(["zh", "en"]))


@settings(max_examples=80, deadline=None)
@given(old=st.lists(LINE_STRATEGY, max_size=30), new=st.lists(LINE_STRATEGY, max_size=30), cut=st.integers(0, 40))
def test_a_lookup_finds_the_last_line_of_a_chat(old, new, cut):
    """Compares the store with a dict of the lines; `cut` characters at the end of the old file are missing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.jsonl"
        text = "".join(json.dumps([key, round(nats, 4), *rest]) + "\n" for key, nats, *rest in old)
        text = text[: max(0, len(text) - cut)]
        path.write_text(text)
        expected = {}
        for line in text.split("\n"):
            with contextlib.suppress(ValueError, TypeError):
                key, nats, _, language = json.loads(line)
                expected[key] = (nats, language)
        scores = ScoreStore(path)
        keys = [key for key, *_ in old + new] + [3, 2**63]
        assert lookup_scores(scores, keys) == expected
        scores.add(new)
        scores.close()
        expected |= {key: (round(nats, 4), language) for key, nats, _, language in new}
        assert lookup_scores(scores, keys) == expected
        for language in ("zh", "en"):
            assert sorted(scores.for_language(language)) == sorted(
                nats for nats, own in expected.values() if own == language
            )
        again = ScoreStore(path)
        again.close()
        assert again.digest() == scores.digest()


def test_scores_take_thirteen_bytes_per_chat(tmp_path):
    path, count = tmp_path / "s.jsonl", 200_000
    pick = random.Random(0)
    with path.open("w") as file:
        file.writelines(
            json.dumps([pick.getrandbits(64), round(pick.uniform(0, 9), 4), 50, ("zh", "en")[i % 2]]) + "\n"
            for i in range(count)
        )
    tracemalloc.start()
    scores = ScoreStore(path)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scores.close()
    assert len(scores.keys) == count
    assert now / count < 14 and peak / count < 45, (now / count, peak / count)
