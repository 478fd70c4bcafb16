"""model/fast_bpe.py gives the ids of the `tokenizers` library, for trained vocabularies and for adverse ones."""

import json
import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from corpus.tokenizer_training import train_tokenizer
from demo_world.world import DemoWorld
from model import fast_bpe
from model.fast_bpe import LINE_PATTERN, FastBPE, is_line_bpe
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, save_tokenizer

RESERVED = (*SPECIAL_TOKENS, *SPARE_TOKENS)
# Characters that share bytes: 一丁丂 E4 B8 80 … 82, 倀 E5 80 80, é C3 A9, ĩ C4 A9; １ and ² are numbers.
ALPHABET = "ab 一丁丂倀éĩ１²1\n<😀😁，。"
SAME_LAST_BYTE = "a，" * 30 + "".join(map(chr, range(0x4E00, 0x6200, 64)))


def random_text(source: random.Random, length: int, alphabet: str = ALPHABET) -> str:
    return "".join(source.choices(alphabet, k=length))


@pytest.fixture(scope="module")
def trained():
    texts = [text for language in ("zh", "en") for text in islice(DemoWorld(language, 0).texts(1), 300)]
    return train_tokenizer("bpe", texts, 1200, RESERVED), texts


@pytest.fixture(scope="module", params=[(320, ALPHABET), (900, ALPHABET), (400, SAME_LAST_BYTE)])
def adverse(request):
    """Pieces over whole lines of random characters: many begin or end inside a character."""
    vocab_size, alphabet = request.param
    source = random.Random(vocab_size)
    backend = Tokenizer(models.BPE())
    by_line = pre_tokenizers.Split(Regex(LINE_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([by_line, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(RESERVED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([random_text(source, 200, alphabet) for _ in range(60)], trainer)
    return backend


def encode_plain(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def encode_fast(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    state = json.loads(backend.to_str())
    assert is_line_bpe(state)
    return [ids.tolist() for ids in FastBPE(state).encode(texts)]


def test_trained_vocabulary(trained):
    backend, texts = trained
    texts = [*texts, "", "<|endoftext|>", "a" * 500, "，" * 50, "\ud7ff\ue000\U0010ffff\0", "", "of the of the"]
    assert encode_fast(backend, texts) == encode_plain(backend, texts)


def test_pieces_inside_characters(adverse):
    source = random.Random(7)
    texts = [random_text(source, source.randrange(300), alphabet) for alphabet in (ALPHABET, SAME_LAST_BYTE) * 100]
    assert encode_fast(adverse, texts) == encode_plain(adverse, texts)


def test_no_text(trained):
    assert encode_fast(trained[0], []) == []
    assert encode_fast(trained[0], ["", ""]) == [[], []]


def test_the_last_merges_overlap(trained):
    """Where two of the last merges share a token, the one of lower rank comes first, then the one on the left."""
    state = json.loads(trained[0].to_str())
    merges, vocab = state["model"]["merges"], state["model"]["vocab"]
    for merge in (["x", "y"], ["y", "x"], ["x", "x"], ["y", "z"]):
        vocab.setdefault("".join(merge), len(vocab) + len(RESERVED))
        merges += [merge] if merge not in merges else []
    state["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(state))
    source = random.Random(1)
    texts = ["".join(source.choices("xyz", k=40)) for _ in range(200)]
    assert encode_fast(backend, texts) == encode_plain(backend, texts)


def test_full_cache_and_colliding_slots(trained, monkeypatch):
    monkeypatch.setattr(fast_bpe, "MAX_CACHED_CHARACTERS", 50)
    monkeypatch.setattr(fast_bpe, "SLOT_BITS", 3)
    encoder, texts = FastBPE(json.loads(trained[0].to_str())), trained[1][:30]
    for text in texts:
        assert [ids.tolist() for ids in encoder.encode([text])] == encode_plain(trained[0], [text])
    assert encoder.cached_characters < 2000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text() | st.text(ALPHABET), max_size=5))
def test_any_text(trained, adverse, texts):
    for backend in (trained[0], adverse):
        assert encode_fast(backend, texts) == encode_plain(backend, texts)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].update(dropout=0.1),
        lambda state: state["model"].update(ignore_merges=True),
        lambda state: state["model"]["vocab"].pop("Ā"),
        lambda state: state.update(normalizer={"type": "NFC"}),
        lambda state: state["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda state: state["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\n| ?\w+|."}),
        lambda state: state["added_tokens"][0].update(special=False),
        lambda state: state.update(pre_tokenizer=None),
    ],
)
def test_other_tokenizers_are_left_to_the_library(trained, change):
    state = json.loads(trained[0].to_str())
    change(state)
    assert not is_line_bpe(state)


def test_arrays_of_any_tokenizer(trained, tmp_path):
    unigram = train_tokenizer("unigram", trained[1], 600, RESERVED)
    for name, backend in (("bpe", trained[0]), ("unigram", unigram)):
        tokenizer = save_tokenizer(backend, tmp_path / name)
        arrays = tokenizer.encode_arrays(trained[1])
        assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(trained[1])
        assert {ids.dtype.name for ids in arrays} == {"uint32"}
