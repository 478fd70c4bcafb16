"""The quick tests of the clean rules never change a result: each against its plain form."""

import html
import random
import re
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from curation import drop_rules, edit_rules
from curation.character_flags import flag_texts
from curation.phrases import RULE_PHRASES, phrases_in, scan_phrases
from curation.prose_rules import WORD_WITHOUT_LETTER, DocumentView
from curation.word_arrays import WordArrays

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


ALL_PHRASES = [phrase for phrases in RULE_PHRASES.values() for phrase in phrases]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*ALL_PHRASES, *PIECES, "İ", "K", "\ud800"]) | st.text(max_size=4), max_size=20),
    st.booleans(),
)
def test_phrases(pieces, upper):
    text = "".join(pieces).upper() if upper else "".join(pieces)
    assert scan_phrases(text) == (text.lower(), {phrase for phrase in ALL_PHRASES if phrase in text.lower()})
    for phrases in (RULE_PHRASES["advert"], (*RULE_PHRASES["unsafe"], "six", "国中", "")):
        assert phrases_in(text, phrases) == [phrase for phrase in phrases if phrase in text.lower()]


def test_every_phrase_is_found_at_every_position():
    for phrase in ALL_PHRASES:
        for text in (phrase, f"x{phrase}", f"中{phrase}中", f"{phrase}. " * 9):
            assert phrase in scan_phrases(text).found
        assert phrase not in scan_phrases(phrase[:-1]).found


@given(st.text() | texts)
def test_character_flags(text):
    classes = {1: "[a-z]", 2: r"\d", 64: "[\ud800-\udfff]", 128: "[é中]"}
    units = text.encode("utf-16-le", "surrogatepass")
    characters = "".join(chr(units[i] + 256 * units[i + 1]) for i in range(0, len(units), 2))
    flags = sum(flag for flag, pattern in classes.items() if re.search(pattern, characters))
    assert flag_texts(classes)(text) == flags


@settings(max_examples=300, deadline=None)
@given(texts | st.text())
def test_word_arrays(text):
    arrays = WordArrays(text)
    assert (arrays.length == len(text)) == all(character < "\U00010000" for character in text)
    if arrays.length == len(text):
        words = text.split()
        assert len(arrays.word_starts) == len(words)
        assert arrays.num_visible == sum(map(len, words))
        assert arrays.initial_letters() == sum(bool(re.match("[A-Za-z]", word)) for word in words)
        keys, lengths = arrays.tokens()
        tokens = drop_rules._WORD_OR_SIGN.findall(text)
        assert lengths.tolist() == [*map(len, tokens)]
        by_token = dict(zip(tokens, keys.tolist(), strict=True))
        assert keys.tolist() == [by_token[token] for token in tokens]


def texts_near_the_limits(number: int) -> list[str]:
    """Different words, and a phrase that is repeated until it takes up 5 to 30 % of the text."""
    source, texts = random.Random(4), []
    for _ in range(number):
        words = [f"{source.randrange(10**5):x}" for _ in range(source.randrange(50, 500))]
        phrase = " ".join(
            f"w{source.randrange(100)}{source.choice(('', ',', '’s'))}" for _ in range(source.randrange(1, 9))
        )
        total = sum(map(len, words)) * source.uniform(0.05, 0.3)
        for _ in range(round(total / len(phrase))):
            words.insert(source.randrange(len(words)), phrase)
        texts.append(source.choice((" ", "  ", "\n")).join(words))
    return texts


def test_repeated_ngrams(monkeypatch):
    documents = [DocumentView(text) for text in random_texts(1500) + texts_near_the_limits(500) if text.strip()]
    fast = [drop_rules.repeated_ngrams(document) for document in documents]
    is_sure = [document.arrays is not None and not may_repeat(document) for document in documents]
    monkeypatch.setattr(WordArrays, "may_repeat", lambda *_: True)
    monkeypatch.setattr(drop_rules, "_may_repeat_characters", lambda *_: True)
    assert fast == [drop_rules.repeated_ngrams(document) for document in documents]
    assert 100 < sum(map(bool, fast)) < 1400
    assert sum(is_sure) > 100  # the quick test decides about many of them


def may_repeat(document: DocumentView) -> bool:
    return document.arrays.may_repeat(drop_rules.TOP_NGRAMS, *drop_rules.REPEATED_NGRAMS_BOUND)


def plain_markup(text: str) -> str:
    parts = text.split("```")
    for i in range(0, len(parts), 2):
        part = edit_rules._TAG.sub("", edit_rules._BREAK.sub("\n", edit_rules._remove_hidden_elements(parts[i])))
        for pattern, group in ((edit_rules._IMAGE, 1), (edit_rules._LINK, 1), (edit_rules._BBCODE, 2),
                               (edit_rules._WIKI_LINK, 1)):  # fmt: skip
            part = pattern.sub(rf"\{group}", part)
        parts[i] = edit_rules._ENTITY.sub(lambda match: html.unescape(match.group()), part)
    joined = "```".join(parts)
    return text if joined == text else joined.replace("\0", "")


MARKUP = ("<b>", "</b>", "<br>", "<!--", "-->", "<script>", "</script>", "[", "]", "(https:a)", "![", "](b.png)",
          "[[", "]]", "[b]", "[/b]", "|", "&amp;", "&", "```", "a < b", "\0", "页")  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(MARKUP) | st.text(max_size=3), max_size=20).map("".join))
def test_markup(text):
    assert edit_rules.markup(text) == plain_markup(text)


@given(texts | st.text())
def test_stop_words_and_letters(text):
    document = DocumentView(text)
    found = drop_rules.STOP_WORDS.intersection(text.lower().split())
    assert bool(drop_rules.stop_words.__wrapped__(document)) == (document.language != "zh" and len(found) < 2)
    plain = DocumentView(text)
    plain.arrays = None
    for rule in (drop_rules.few_letters, drop_rules.word_length, drop_rules.too_short):
        rule = getattr(rule, "__wrapped__", rule)
        assert rule(document) == rule(plain)


@given(texts | st.text())
def test_flags_of_the_edit_rules(text):
    flags, codes = edit_rules.character_flags(text), edit_rules._CHARACTER_MAP
    to_normalise = "[" + "".join(f"\\u{code:04x}" for code in codes) + "\r\u0300-\u036f]"
    assert bool(flags & edit_rules.NORMALISE_FLAG) == bool(re.search(to_normalise, text))
    for flag, pattern in ((edit_rules.MISREAD_FLAG, edit_rules._WRONGLY_DECODED),
                          (edit_rules.MOJIBAKE_FLAG, drop_rules._MOJIBAKE),
                          (edit_rules.FOREIGN_DIGIT_FLAG, re.compile(r"[^\D0-9]"))):  # fmt: skip
        assert flags & flag or not pattern.search(text)


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


def plain_list_of_lines(document):
    lines = len(document.lines)
    if lines <= 1:
        return ""
    bullets = sum(line.lstrip().startswith(drop_rules._BULLETS) for line in document.lines) / lines
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in document.lines) / lines
    return f"{bullets:.0%} bullets, {ellipses:.0%} ellipses" if bullets > 0.9 or ellipses > 0.3 else ""


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.integers(0, 6), st.integers(0, 15), st.randoms(use_true_random=False))
def test_lists_of_lines(bullets, others, ellipses, source):
    """Numbers of lines around the limits of 90 and 30 %, in any order."""
    lines = [" - a", "• b"] * bullets + ["c", "d "] * others + ["e...", "f… "] * ellipses
    source.shuffle(lines)
    document = DocumentView("\n".join(lines))
    assert drop_rules.list_of_lines(document) == plain_list_of_lines(document)


def test_a_list_whose_first_lines_have_no_bullet():
    """Two of 21 lines without a bullet, and the first of 11: above 90 %."""
    for lines in (["a", "b"] + ["- c"] * 19, ["a"] + ["- c"] * 10):
        assert drop_rules.list_of_lines(DocumentView("\n".join(lines))).endswith("ellipses")
