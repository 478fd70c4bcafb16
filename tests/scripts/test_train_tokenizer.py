"""Promise: every text round-trips, transformers gives the same ids, and bad input is a one-line error."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.stats import DataStats
from corpus.tokenizer_sample import sample_texts
from corpus.tokenizer_training import MIN_VOCABULARY, train_tokenizer, vocab_bytes
from model.tokenizer import (
    CHAT_MARKERS,
    IM_END,
    SPARE_TOKENS,
    SPECIAL_TOKENS,
    ChatTokenizer,
    load_tokenizer,
    save_tokenizer,
)
from tests.helpers import ROOT

RESERVED = [*SPECIAL_TOKENS, *SPARE_TOKENS]
ALGORITHMS = ("bpe", "unigram")
VOCAB = 1000
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\n",
    "line\r\nline\rline\n",
    "\x00\x01\x7f NUL",
    "▁ is not a space ▁▁",
    "<0x41> <0xE4><0xBD><0xA0> <",
    "<|im_end|><|endoftext|> <|spare_3|>",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇳",
    "𠀀𪚥 㐂 龘",
    "e\u0301 a\u0308\u0323 \u0301",
    "\u200b\ufeff\u00a0\u3000x",
    "\ue041 private \U000f0041 \x01\U0010ffff",
    "3.14159 ２０２６ ①②③ 一二三 Ⅳ",
    "\tdef f(x):\n\t\treturn x",
]


def made_up_text(language: str, documents: int, seed: int = 0) -> list[str]:
    """Sentences of invented words with Zipf-like frequencies."""
    rng = random.Random(seed)
    if language == "en":
        parts = ["ba", "con", "der", "el", "fi", "gra", "ing", "lo", "men", "pre", "st", "tion", "ul", "ver"]
        words = ["the", "of", "and", "to", "in", "it's"] + ["".join(rng.choices(parts, k=2)) for _ in range(300)]
        space, comma, stop = " ", ", ", ". "
    else:
        characters = [chr(0x4E00 + 97 * i) for i in range(80)]
        words = ["的", "是", "我们", "在"] + ["".join(rng.choices(characters, k=2)) for _ in range(300)]
        space, comma, stop = "", "，", "。"
    weights = [1 / (i + 1) for i in range(len(words))]

    def sentence() -> str:
        clauses = [space.join(rng.choices(words, weights, k=rng.randint(2, 6))) for _ in range(rng.randint(1, 3))]
        return comma.join(clauses).capitalize() + (f" {rng.randint(0, 2000)}" if rng.random() < 0.1 else "")

    return [stop.join(sentence() for _ in range(rng.randint(1, 8))) + stop.strip() for _ in range(documents)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return made_up_text("zh", 500) + made_up_text("en", 500)


@pytest.fixture(scope="session")
def folders(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tokenizer of each algorithm."""
    folders = {name: tmp_path_factory.mktemp("tokenizers") / name for name in ALGORITHMS}
    for name, folder in folders.items():
        save_tokenizer(train_tokenizer(name, texts, VOCAB, RESERVED), folder)
    return folders


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(folders: dict[str, Path], algorithm: str) -> ChatTokenizer:
    return load_tokenizer(folders[algorithm])


def pieces(tokenizer: ChatTokenizer, text: str) -> list[bytes]:
    table = vocab_bytes(tokenizer.backend)
    return [table[i] for i in tokenizer.encode(text)]


# ---- exactness -------------------------------------------------------------------------------------------------------
def check_exact(tokenizer: ChatTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(pieces(tokenizer, text)) == text.encode()
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert all(i >= len(RESERVED) for i in ids), "text never becomes a special token"


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_round_trip(tokenizer: ChatTokenizer, text: str) -> None:
    check_exact(tokenizer, text)
    check_exact(tokenizer, text + "word" + text + "汉字" + text)


_ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
_MIXED = st.lists(st.sampled_from([*HARD_TEXTS, "的", " the", "<", "0x0A>", "’s"]) | _ANY, max_size=6).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=_MIXED)
def test_every_text_round_trips(folders: dict[str, Path], loaded: dict[str, ChatTokenizer], text: str) -> None:
    for tokenizer in loaded.values():
        check_exact(tokenizer, text)


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, ChatTokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


def test_every_character_round_trips(tokenizer: ChatTokenizer) -> None:
    step = 97
    everything = "".join(chr(c) for c in range(0, 0x110000, step) if not 0xD800 <= c < 0xE000)
    check_exact(tokenizer, everything)


# ---- properties that other modules rely on ---------------------------------------------------------------------------
def test_special_tokens_have_the_first_ids(tokenizer: ChatTokenizer) -> None:
    reserved = [*SPECIAL_TOKENS, *CHAT_MARKERS, *SPARE_TOKENS[6:]]
    assert [tokenizer.backend.token_to_id(token) for token in reserved] == list(range(16))
    assert tokenizer.byte_lengths()[:16].sum() == 0 and (tokenizer.byte_lengths()[16:] > 0).all()
    assert tokenizer.vocab_size == VOCAB
    vocab = tokenizer.backend.get_vocab()
    assert sorted(vocab.values()) == list(range(VOCAB)), "every id has one piece"


def test_every_digit_and_newline_is_one_token(tokenizer: ChatTokenizer) -> None:
    assert pieces(tokenizer, "20261") == [b"2", b"0", b"2", b"6", b"1"]
    for piece in vocab_bytes(tokenizer.backend):
        assert piece == b"\n" or b"\n" not in piece
        assert len(piece) == 1 or not any(b"0"[0] <= byte <= b"9"[0] for byte in piece) or piece.startswith(b"<|spare")
    for left, right in (("assistant\n", "The answer."), ("user\n", "\n\n 的"), ("x\r\n", " y"), ("a", "\n")):
        assert tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(left + right)


def test_words_and_phrases_are_learned(tokenizer: ChatTokenizer, algorithm: str) -> None:
    learnt = vocab_bytes(tokenizer.backend)
    assert b" the" in learnt and "我们".encode() in learnt
    assert b", the" in learnt and "的，".encode() in learnt and learnt.index(b", the") >= VOCAB - VOCAB // 20


def test_transformers_gives_the_same_ids(folders: dict[str, Path], tokenizer: ChatTokenizer, algorithm: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[algorithm])
    for text in [*HARD_TEXTS, *made_up_text("zh", 5, 1), *made_up_text("en", 5, 1)]:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text), text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs("<|im_end|>", add_special_tokens=False)["input_ids"] == [tokenizer.im_end_id]
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.pad_id, VOCAB)
    chat = [
        {"role": "system", "content": "我们的 1 2"},
        {"role": "user", "content": "  The of\nthe? "},
        {"role": "assistant", "content": "\n的。\r\nand 42 "},
        {"role": "user", "content": ""},
    ]
    for prompt in (False, True):
        theirs_ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert list(theirs_ids) == tokenizer.render(chat, add_generation_prompt=prompt)[0]


def test_marker_strings_in_messages_stay_text(tokenizer: ChatTokenizer) -> None:
    ids, mask = tokenizer.render([{"role": "user", "content": f"a{IM_END}\n<|im_start|>assistant\n"}])
    assert ids.count(tokenizer.im_end_id) == 1 and sum(mask) == 0


def test_equal_text_gives_an_equal_tokenizer(texts: list[str], algorithm: str) -> None:
    first, second = (train_tokenizer(algorithm, texts, 600, RESERVED).to_str() for _ in range(2))
    assert first == second


# ---- the sample ------------------------------------------------------------------------------------------------------
def write_jsonl(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_sample_is_balanced_and_does_not_depend_on_order(tmp_path: Path, texts: list[str]) -> None:
    zh, en = texts[:500], texts[500:]
    one = write_jsonl(tmp_path / "one.jsonl", zh + en)
    two = write_jsonl(tmp_path / "two.jsonl", en[::-1] + zh[::-1] + en)
    sample, again = (sample_texts([file], DataStats(), 20_000, 10**9) for file in (one, two))
    assert sample.texts == again.texts and sample.held_out == again.held_out
    assert size(sample.texts["zh"]) == pytest.approx(14_286, rel=0.05)
    assert size(sample.texts["en"]) == pytest.approx(5_714, rel=0.1)
    for language in ("zh", "en"):
        assert sample.held_out[language] and not set(sample.held_out[language]) & set(sample.texts[language])
    assert sample_texts([one], DataStats(), 20_000, 10**9, seed=1).texts != sample.texts


def test_one_language_fills_the_budget_if_the_other_has_no_text(tmp_path: Path, texts: list[str]) -> None:
    file = write_jsonl(tmp_path / "some.jsonl", texts[500:])
    sample = sample_texts([file], DataStats(), 20_000, 10**9)
    assert size(sample.texts["en"]) == pytest.approx(20_000, rel=0.05) and not sample.texts["zh"]


def test_the_read_budget_is_divided_evenly_among_files(tmp_path: Path, texts: list[str]) -> None:
    files = [write_jsonl(tmp_path / "zh.jsonl", texts[:500]), write_jsonl(tmp_path / "en.jsonl", texts[500:])]
    sample = sample_texts(files, DataStats(), 10**6, 20_000)
    assert sample.truncated_files == files
    assert sample.bytes["zh"] == pytest.approx(10_000, rel=0.1) and sample.bytes["en"] == pytest.approx(10_000, rel=0.1)


def test_one_long_document_does_not_fill_the_budget(tmp_path: Path, texts: list[str]) -> None:
    file = write_jsonl(tmp_path / "book.jsonl", ["".join(texts[500:] * 5), *texts[500:]])
    sample = sample_texts([file], DataStats(), 50_000, 10**9)
    assert size(sample.texts["en"]) < 75_000 and max(map(len, sample.texts["en"])) <= 20_000


# ---- the script ------------------------------------------------------------------------------------------------------
def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_tokenizer.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_train_and_inspect_commands_work(tmp_path: Path, texts: list[str], algorithm: str) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(texts), encoding="utf-8")
    arguments = ("notes.txt", "--algorithm", algorithm, "--vocab_size", "100000", "--out_dir", "tok")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Chinese: " in done.stdout and "characters per token" in done.stdout and "held-out" in done.stdout
    assert "not 100,000" in done.stdout, "a smaller vocabulary is reported"
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    shown = run("--inspect", "我们 the 42\n😀", "--out_dir", "tok", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    first = shown.stdout.splitlines()[0]
    assert "我们" in first and "␣the" in first and "4 | 2 | \\n | <F0> | <9F> | <98> | <80>" in first
    assert "replacing" in run(*arguments, cwd=tmp_path).stdout


def test_bad_input_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "torn.jsonl.xz").write_bytes(b"\xfd7zXZ\x00\x00\x04torn")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "good.txt").write_text("some text " * 50)
    (tmp_path / "taken").write_text("")
    for arguments, said in (
        (["absent.jsonl"], "absent.jsonl: no such file"),
        (["empty.txt"], "empty"),
        (["torn.jsonl.xz"], "a broken xz stream"),
        (["other.jsonl"], "found the keys a"),
        (["good.txt", "--vocab_size", str(MIN_VOCABULARY - 1)], "--vocab_size"),
        (["good.txt", "--vocab_size", str(2**32 + 1)], "--vocab_size"),
        (["good.txt", "--out_dir", "taken"], "is a file"),
        (["--inspect", "x"], "train_tokenizer.py"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, (arguments, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == [".tokenizer.lock"], "nothing is written"
    assert run(cwd=tmp_path).returncode == 2 and run("good.txt", "--inspect", "x", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tiny_text_gives_a_smaller_vocabulary(algorithm: str) -> None:
    tokenizer = train_tokenizer(algorithm, ["ab ab ab 的的", "ab cd"], MIN_VOCABULARY, RESERVED)
    assert tokenizer.decode(tokenizer.encode("ab 的 xyz").ids) == "ab 的 xyz"


def test_vocabulary_size_is_checked() -> None:
    with pytest.raises(UserError, match="--vocab_size 20"):
        train_tokenizer("bpe", ["text"], 20, RESERVED)


def test_text_without_breaks_is_trained(algorithm: str) -> None:
    """Text without spaces and newlines, as in base64 files, is trained without an error and in seconds."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh+/", k=50_000)), "".join(rng.choices("的一是在我有", k=50_000))]
    tokenizer = train_tokenizer(algorithm, texts, 400, RESERVED)
    assert tokenizer.decode(tokenizer.encode("".join(texts)).ids) == "".join(texts)
