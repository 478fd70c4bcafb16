"""The quick tests of the clean rules never change a result: each against its plain form."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import drop_rules, edit_rules
from curation.prose_rules import RULE_PHRASES, WORD_WITHOUT_LETTER, DocumentView, contains_any

PIECES = (
    "the of and ",
    "中国",
    "加微信",
    "six six ",
    "\n",
    "\n\n",
    "- a\n",
    "loading…\n",
    "½²_ 12 ",
    "١٢٣٤٥٦ ",
    "😀",
    "a b c d e ",
)
PIECES += (
    "Qq号: 123456 ",
    "wechat id: hello_12 ",
    "a@b.cn ",
    "13800138000",
    "11010519491231002X",
    "400-123-4567",
    ". ",
)
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=60).map("".join)


def random_texts(number: int) -> list[str]:
    source = random.Random(3)
    chosen = [source.sample(PIECES, source.randrange(1, 12)) for _ in range(number)]
    return ["".join(source.choices(pieces, k=source.randrange(1, 200))) for pieces in chosen]


@pytest.mark.parametrize("name", ["advert", "unsafe", "menu zh", "menu en"])
@given(text=texts, number=st.integers(0, 200))
def test_contains_any(name, text, number):
    phrases = RULE_PHRASES[name]
    text += phrases[number % len(phrases)] if number % 2 else ""
    assert contains_any(text, phrases) == any(phrase in text for phrase in phrases)


def test_repeated_ngrams(monkeypatch):
    documents = [DocumentView(text) for text in random_texts(1500) if text.strip()]
    fast = [drop_rules.repeated_ngrams(document) for document in documents]
    monkeypatch.setattr(drop_rules, "_may_repeat_words", lambda *_: True)
    monkeypatch.setattr(drop_rules, "_may_repeat_characters", lambda *_: True)
    assert fast == [drop_rules.repeated_ngrams(document) for document in documents]
    assert 100 < sum(map(bool, fast)) < 1400


def plain_repeated_lines(document: DocumentView) -> bool:
    for pieces in (re.split(r"\n{2,}", document.text.strip()), re.split(r"\n+", document.text)):
        counts = Counter(pieces)
        repeated = (len(pieces) - len(counts)) / len(pieces)
        fraction = sum(len(piece) * (count - 1) for piece, count in counts.items()) / len(document.text)
        if len(counts) < len(pieces) and (repeated > 0.30 or fraction > 0.20):
            return True
    return False


def plain_personal(text: str) -> str:
    text = edit_rules._EMAIL.sub("[EMAIL]", text)
    check = lambda match: "[ID]" if edit_rules.is_identity_number(match.group()) else match.group()
    text = edit_rules._PHONE.sub("[PHONE]", edit_rules._IDENTITY_NUMBER.sub(check, text))
    return edit_rules._ACCOUNT.sub(r"\1[ACCOUNT]", text)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_lines_words_and_numbers(text):
    document = DocumentView(text)
    if text:
        assert bool(drop_rules.repeated_lines(document)) == plain_repeated_lines(document)
    without_letter = [
        word for word in document.words if not word[0].isalpha() and drop_rules._NO_LETTER.fullmatch(word)
    ]
    assert without_letter == WORD_WITHOUT_LETTER.findall(text)
    assert edit_rules.personal(text) == plain_personal(text)


def test_short_texts_and_long_texts():
    for length in (0, 1, 3, 4, 16, 17, 5000):
        for text in ("中" * length, "中文" * length, "😀" * length, "".join(map(chr, range(0x4E00, 0x4E00 + length)))):
            fraction = drop_rules._repeated_ngram_fraction(text, 13)
            assert drop_rules._may_repeat_characters(text, 13) or fraction <= 0.5
