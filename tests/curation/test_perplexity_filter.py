"""Promise: chats are chosen by the cross-entropy of their answers, scored once, and the validation chats stay whole."""

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
from curation.perplexity_filter import BINS, Band, Scores, bin_edges, bin_of, clip, interval, parse_band
from curation.perplexity_scorer import Scorer, bare_chat, batches_of


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def chats_file(tmp_path):
    rows = [chat(f"{i}?", f"n{i % 7}" * (1 + i % 3)) for i in range(60)]
    rows += [chat(f"数{i}", "好" * (1 + i % 5)) for i in range(60)]
    lines = [json.dumps({"messages": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "chats.jsonl"


@pytest.fixture
def sft(chats_file, tokenizer_dir, tiny_parent, tmp_path):
    def run(name, *flags, scorer=True):
        out = tmp_path / name
        common = ["sft", chats_file, "--tokenizer", tokenizer_dir, "--out_dir", out, "--val_share", "0.1"]
        data_process.main([*map(str, [*common, *(["--scorer", tiny_parent] if scorer else []), *flags])])
        return out

    return run


def questions(folder, name):
    return [json.loads(line)["messages"][0]["content"] for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


# ---- scoring ---------------------------------------------------------------------------------------------------------
def test_a_score_is_the_cross_entropy_of_the_answers(tokenizer, tiny_parent):
    """Against the plain formula, one chat at a time; in one batch or many, alone or among others."""
    scorer = Scorer(tiny_parent, "cpu", "float32")
    rows = [chat("q" * (1 + 3 * i), "答案" * (1 + i)) for i in range(9)]
    rows[0] += chat("and?", "yes")
    together = scorer.scores(rows)
    for row, (nats, count) in zip(rows, together, strict=True):
        text = "\n".join(message["content"] for message in row)
        ids = torch.tensor(tokenizer.encode(text))[: scorer.limit]
        answer = torch.zeros(len(text.encode()), dtype=torch.bool)
        start = 0
        for message in row:
            size = len(message["content"].encode())
            answer[start : start + size] = message["role"] == "assistant"
            start += size + 1
        answer = answer[: scorer.limit]  # one token is one byte here
        with torch.no_grad():
            hidden, _ = scorer.model(ids[None, :-1])
            losses = F.cross_entropy(scorer.model.lm_head(hidden)[0], ids[1:], reduction="none")
        assert count == answer[1:].sum()
        assert nats == pytest.approx(losses[answer[1:]].mean().item(), rel=1e-4)
        assert scorer.scores([row])[0] == pytest.approx((nats, count), rel=1e-4)


def test_a_pretrained_model_sees_words_and_a_chat_model_its_format(tokenizer, tiny_parent, tmp_path):
    from model.checkpoint import load_model, save_model

    ids, mask = bare_chat(tokenizer, chat("hi", "yo"))
    assert tokenizer.decode(ids) == "hi\nyo" and mask == [0, 0, 0, 1, 1]
    model, _, _ = load_model(tiny_parent)
    save_model(tmp_path / "full_sft_32.pth", model, "full_sft", tokenizer, [])
    assert Scorer(tiny_parent, "cpu").scores([chat("hi", "yo")])[0][1] == 2
    assert Scorer(tmp_path / "full_sft_32.pth", "cpu").scores([chat("hi", "yo")])[0][1] == 3, "and the closing marker"


def test_a_chat_whose_answer_does_not_fit_is_not_scored(tiny_parent):
    scorer = Scorer(tiny_parent, "cpu", "float32")
    assert scorer.scores([chat("q" * 500, "a")]) == [(0.0, 0)]
    assert scorer.scores([]) == []


@given(lengths=st.lists(st.integers(1, 3000), max_size=40))
def test_batches_hold_everything_once_and_little_each(lengths):
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = list(batches_of(order, lengths))
    assert [i for batch in batches for i in batch] == order
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 8192 for batch in batches)


# ---- the band --------------------------------------------------------------------------------------------------------
def test_bands_are_read():
    assert parse_band("2.5,4") == Band(2.5, 4.0, False)
    assert parse_band("zh=10%,90%") == Band(10.0, 90.0, True, "zh")
    for wrong in ("", "3", "4,2.5", "a,b", "10%,90", "10%,190%", "fr=1,2", "-1,2", "1,1"):
        with pytest.raises(UserError, match="--keep_entropy"):
            parse_band(wrong)


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(0, 12), min_size=1, max_size=200),
    low=st.floats(0, 50),
    more=st.floats(1, 50),
    share=st.floats(0.05, 1),
)
def test_an_interval_keeps_what_was_asked_for(scores, low, more, share):
    values = np.array(scores)
    bottom, top = interval(values, Band(low, low + more, True), 1.0)
    assert bottom == np.percentile(values, low) and top == np.percentile(values, low + more)
    assert interval(values, None, 1.0) == (-np.inf, np.inf)
    bottom, top = interval(values, None, share)
    assert bottom <= np.median(values) <= top
    if len(set(scores)) == len(scores):
        kept = ((values >= bottom - 1e-9) & (values <= top + 1e-9)).sum()
        assert kept >= share * (len(values) - 1)


def test_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval(values, Band(2, 4, False), 1.0) == (2.0, 4.0)
    assert interval(values, None, 0.5) == (2.0, 4.0)
    edges = bin_edges(np.linspace(1, 7, 1000))
    assert len(edges) == BINS + 1 and [bin_of(edges, x) for x in (0.0, 1.06, 6.9, 99.0)] == [0, 0, BINS - 1, BINS - 1]
    assert clip("a\nb\x1b[31m" + "c" * 99, 10) == "a b [31mc…"


# ---- the command -----------------------------------------------------------------------------------------------------
def test_only_training_chats_are_left_out_and_every_one_is_accounted_for(sft, capsys):
    whole, kept = sft("whole", scorer=False), sft("kept", "--keep_entropy", "25%,75%")
    said = capsys.readouterr().out
    assert questions(kept, "val") == questions(whole, "val")
    train = questions(kept, "train")
    assert set(train) < set(questions(whole, "train")) and 40 <= len(train) <= 75
    meta = read_meta_json(kept)
    left_out = sum(entry["count"] for name, entry in meta["report"]["dropped"].items() if name.startswith("entropy"))
    assert left_out + len(train) == len(questions(whole, "train"))
    assert "nats a token" in said and "zh: 60 chats" in said and "数" in said, "a histogram with examples"
    assert set(meta["chosen"]["kept_between"]) == {"zh", "en"}
    assert read_meta(kept / meta["tokens"])["splits"]["train"]["documents"] == len(train)


def read_meta_json(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def test_a_band_for_one_language_leaves_the_other_whole(sft):
    whole, kept = sft("whole", scorer=False), sft("kept", "--keep_entropy", "zh=0,0.001")
    assert {q for q in questions(whole, "train") if "数" not in q} == set(questions(kept, "train"))


def test_scores_are_computed_once_and_survive_a_kill(sft, tmp_path, monkeypatch, capsys):
    from curation import perplexity_scorer

    monkeypatch.setattr(perplexity_scorer, "POOL", 16)
    real, calls = perplexity_scorer.Scorer.scores, []

    def killed(self, chats):
        calls.append(len(chats))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, chats)

    monkeypatch.setattr(perplexity_scorer.Scorer, "scores", killed)
    with pytest.raises(KeyboardInterrupt):
        sft("out", "--keep_share", "0.5")
    assert not capsys.readouterr().out.count("written")
    (scores,) = tmp_path.glob("out.scores-*.jsonl")
    with scores.open("a") as file:
        file.write("[12345, 1.2")  # the line that a kill has cut
    calls[:] = [0] * 9
    sft("out", "--keep_share", "0.5")
    assert "scored 72 chats" in (said := capsys.readouterr().out) and "48 were scored before" in said
    sft("out", "--keep_entropy", "10%,60%")
    assert "scored 0 chats" in capsys.readouterr().out, "another band needs no scoring"


def test_check_shows_the_histogram_and_writes_no_data(sft, tmp_path, capsys):
    sft("out", "--check")
    said = capsys.readouterr().out
    assert "nats a token" in said and not (tmp_path / "out").exists()


def test_mistakes_are_one_line(sft, tmp_path, chats_file):
    with pytest.raises(UserError, match="need --scorer MODEL"):
        sft("out", "--keep_entropy", "1,2", scorer=False)
    with pytest.raises(UserError, match="no checkpoint at"):
        sft("out", "--scorer", str(tmp_path / "none.pth"), scorer=False)
    with pytest.raises(UserError, match=r"keeps no chat: .*from \d+\.\d\d to"):
        sft("out", "--keep_entropy", "0,0.0001")


def test_foreign_lines_in_the_scores_file_mean_nothing(tmp_path):
    path = tmp_path / "s.jsonl"
    foreign = ["nonsense", "[1]", '{"a": 1}', '[2, "x", 3, "en"]', '[3, 1.0, 4, "fr"]', ""]
    path.write_text("\n".join(['[1, 2.5, 3, "zh"]', *foreign, '[4, 1.0, 2, "en"]']))
    scores = Scores(path)
    assert looked_up(scores, range(9)) == {1: (2.5, "zh"), 4: (1.0, "en")}
    scores.add([(5, 3.0, 1, "en")])
    scores.close()
    for again in (scores, Scores(path)):
        assert looked_up(again, range(9)) == {1: (2.5, "zh"), 4: (1.0, "en"), 5: (3.0, "en")}


def looked_up(scores, keys):
    return {key: found for key in keys if (found := scores.get(key))}


KEYS = st.one_of(st.integers(0, 6), st.integers(2**64 - 4, 2**64 - 1), st.integers(0, 2**64 - 1))
LINES = st.tuples(KEYS, st.floats(0, 50), st.integers(1, 99), st.sampled_from(["zh", "en"]))


@settings(max_examples=80, deadline=None)
@given(old=st.lists(LINES, max_size=30), new=st.lists(LINES, max_size=30), cut=st.integers(0, 40))
def test_a_lookup_finds_the_last_line_of_a_chat(old, new, cut):
    """Against a dict of the lines; the last of the old ones is perhaps cut by a kill."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.jsonl"
        text = "".join(json.dumps([key, round(nats, 4), *rest]) + "\n" for key, nats, *rest in old)
        text = text[: max(0, len(text) - cut)]
        path.write_text(text)
        wanted = {}
        for line in text.split("\n"):
            with contextlib.suppress(ValueError, TypeError):
                key, nats, _, language = json.loads(line)
                wanted[key] = (nats, language)
        scores = Scores(path)
        asked = [key for key, *_ in old + new] + [3, 2**63]
        assert looked_up(scores, asked) == wanted
        scores.add(new)
        scores.close()
        wanted |= {key: (round(nats, 4), language) for key, nats, _, language in new}
        assert looked_up(scores, asked) == wanted
        for language in ("zh", "en"):
            assert sorted(scores.of(language)) == sorted(nats for nats, own in wanted.values() if own == language)
        again = Scores(path)
        again.close()
        assert again.digest() == scores.digest()


def test_scores_take_thirteen_bytes_a_chat(tmp_path):
    path, count = tmp_path / "s.jsonl", 200_000
    pick = random.Random(0)
    with path.open("w") as file:
        file.writelines(
            json.dumps([pick.getrandbits(64), round(pick.uniform(0, 9), 4), 50, ("zh", "en")[i % 2]]) + "\n"
            for i in range(count)
        )
    tracemalloc.start()
    scores = Scores(path)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scores.close()
    assert len(scores.keys) == count
    assert now / count < 14 and peak / count < 45, (now / count, peak / count)
