"""The rules of `data_process.py clean` that leave a document out: functions Page -> reason or "", listed in rules.py.

The statistics are those of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A1.1 and table A1), of C4 (Raffel et
al. 2020, arXiv 1910.10683, section 2.2) and of ChineseWebText (Chen et al. 2023, arXiv 2311.01149; the numbers are in
its preprocess.py). Gopher counts words, and Chinese has no spaces: there a word counts as 1.5 characters, which is our
choice, and rules that ask for English words do not ask Chinese pages. Statistics of words and letters are those of the
prose: see prose_rules.py.

Read next: rules.py (the table and its sources), prose_rules.py (the page), rule_words.py (the phrases).
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from common.errors import UserError
from corpus.language import chinese_characters, language_of
from curation.ngrams import codes_of, ngram_hashes
from curation.prose_rules import ZH_WORD, Limits, Page, of_prose
from curation.rule_words import ADVERTS


def too_short(page: Page, limits: Limits) -> str:
    count = page.word_count
    if count < limits.min_words and language_of(page.prose.text) == "zh":  # Chinese, most of whose letters are formulas
        count = len(page.squeezed) / ZH_WORD
    return f"{count:.0f} words" if count < limits.min_words else ""


def too_long(page: Page, limits: Limits) -> str:
    count = page.word_count
    return f"{count:,.0f} words" if count > 100_000 else ""


_BROKEN = re.compile("[\ufffd\xc3-\xef][\x80-\xbf\ufffd]|\ufffd|锟斤拷|烫烫烫|屯屯屯")


def mojibake(page: Page, limits: Limits) -> str:
    """What `repair` could not mend: more than one broken place in 200 characters."""
    if page.text.isascii():
        return ""
    count = len(_BROKEN.findall(page.text))
    return f"{count} broken places" if count * 200 > len(page.text) else ""


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SURE = 20  # letters that a text needs before its language is asked for
_OTHER_THAN_HAN = re.compile("[\u3040-\u30ff\uac00-\ud7af\u1100-\u11ff]")  # kana and Hangul


_NAME_OF_CODE = re.compile(r"(?<!\S)(?=[!-~]*[^\sA-Za-z.,:!?'\"-])[!-~]+(?!\S)")  # f(x), a_b, x2: ASCII, not a word


def language(page: Page, limits: Limits) -> str:
    """Asked of the beginning and the middle of the page; Chinese characters without kana or Hangul are Chinese,
    and a text with "the" and "of" and "and" is English: the detector, which is slow, is asked about the others.
    It classifies LaTeX as Polish and code as German: where it finds another language, it runs again on the distinct
    words of the prose.
    """
    sample = _sample(page.text)
    if page.language == "zh" and not _OTHER_THAN_HAN.search(sample):
        name = "zh"
    elif len(STOP_WORDS.intersection(sample.lower().split())) >= 3:
        name = "en"  # no other language has three of them
    else:
        name = _detected(sample)
        if name and name not in limits.languages:
            words = _NAME_OF_CODE.sub(" ", page.prose.text).split()
            name = _detected(_sample(" ".join(dict.fromkeys(words))))
    return f"looks like {name}" if name and name not in limits.languages else ""


def _detected(sample: str) -> str:
    """ISO 639-1 code of a sample's language; "" where it has too few letters or is in none of the candidates."""
    if sum(map(str.isalpha, sample)) < SURE:
        return ""
    found = _lingua().detect_language_of(sample)
    return found.iso_code_639_1.name.lower() if found else ""


def _sample(text: str) -> str:
    """The text, or of a long one the first 120 characters and 120 from its middle."""
    middle = len(text) // 2
    return text if len(text) < 240 else text[:120] + " " + text[middle : middle + 120]


# Languages that are told apart: those that share a script with Chinese or English, and the most frequent on the web.
_CANDIDATES = [
    "CHINESE",
    "ENGLISH",
    "JAPANESE",
    "KOREAN",
    "FRENCH",
    "GERMAN",
    "SPANISH",
    "PORTUGUESE",
    "ITALIAN",
    "DUTCH",
    "POLISH",
    "TURKISH",
    "VIETNAMESE",
    "INDONESIAN",
    "RUSSIAN",
    "ARABIC",
    "THAI",
    "HINDI",
]


@functools.cache
def _lingua() -> Any:
    try:
        import lingua
    except ImportError:
        raise UserError(
            "the rule `language` needs one more package (models inside, no download later): "
            'pip install "lingua-language-detector>=2,<3", or --skip language'
        ) from None
    candidates = [getattr(lingua.Language, name) for name in _CANDIDATES]
    return lingua.LanguageDetectorBuilder.from_languages(*candidates).with_low_accuracy_mode().build()


_NO_LETTER = re.compile(r"(?<!\S)(?:(?!\s)[\W\d_])+(?!\S)")  # a word without one


@of_prose
def few_letters(page: Page, limits: Limits) -> str:
    """Gopher: 80 % of the words hold a letter. ChineseWebText: 30 % of the characters are Chinese."""
    if page.language == "zh":
        share = chinese_characters(page.squeezed) / max(len(page.squeezed), 1)
        return f"{share:.0%} of the characters are Chinese" if share < 0.3 else ""
    share = 1 - len(_NO_LETTER.findall(page.text)) / max(len(page.words), 1)
    return f"{share:.0%} of the words have a letter" if share < 0.8 else ""


@of_prose
def word_length(page: Page, limits: Limits) -> str:
    """English words are 3 to 10 characters long on average (Gopher)."""
    if page.language == "zh":
        return ""
    mean = sum(map(len, page.words)) / max(len(page.words), 1)
    return f"mean word length {mean:.1f}" if not 3 <= mean <= 10 else ""


@of_prose
def symbols(page: Page, limits: Limits) -> str:
    """At most one hash sign or ellipsis to ten words (Gopher)."""
    words = page.word_count
    hashes, dots = page.text.count("#"), page.text.count("...") + page.text.count("…")
    return f"{hashes} '#', {dots} ellipses" if max(hashes, dots) > 0.1 * words else ""


_BULLETS = ("•", "‣", "▪", "●", "■", "◆", "★", "·", "*", "-", "–", "—")


def list_of_lines(page: Page, limits: Limits) -> str:
    """At most 90 % of the lines begin with a bullet, 30 % end with an ellipsis (Gopher)."""
    lines = max(len(page.lines), 1)
    bullets = sum(line.lstrip().startswith(_BULLETS) for line in page.lines) / lines
    dots = sum(line.rstrip().endswith(("...", "…")) for line in page.lines) / lines
    return f"{bullets:.0%} bullets, {dots:.0%} ellipses" if lines > 1 and (bullets > 0.9 or dots > 0.3) else ""


@of_prose
def stop_words(page: Page, limits: Limits) -> str:
    """English text holds at least two of: the, be, to, of, and, that, have, with (Gopher)."""
    if page.language == "zh":
        return ""
    found = STOP_WORDS.intersection(page.small.split())
    return f"{len(found)} of 8 stop words" if len(found) < 2 else ""


# ---- repetition ------------------------------------------------------------------------------------------------------
TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
REPEATED_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
_PARAGRAPHS, _NEWLINES = re.compile(r"\n{2,}"), re.compile(r"\n+")
_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def repeated_lines(page: Page, limits: Limits) -> str:
    """Gopher, table A1: repeated paragraphs and lines, by number (0.30) and by characters (0.20)."""
    for name, pieces in (("paragraphs", _PARAGRAPHS.split(page.text.strip())), ("lines", _NEWLINES.split(page.text))):
        if len(set(pieces)) == len(pieces):
            continue
        counts = Counter(pieces)
        number = (len(pieces) - len(counts)) / len(pieces)
        share = sum(len(piece) * (count - 1) for piece, count in counts.items()) / len(page.text)
        if number > 0.30 or share > 0.20:
            return f"{number:.0%} of the {name} and {share:.0%} of their characters are repeats"
    return ""


@of_prose
def repeated_ngrams(page: Page, limits: Limits) -> str:
    """Gopher, table A1, on words; ChineseWebText on Chinese: half of the 13-character n-grams come more than once."""
    if page.language == "zh":
        share = _repeated_share(page.squeezed, 13)
        return f"{share:.0%} of the 13-character n-grams come again" if share > 0.5 else ""
    words = _WORDS.findall(page.text)
    for n, most in TOP_NGRAMS:
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        top = max(counts, key=counts.__getitem__, default=())
        if counts[top] > 1 and (share := len(" ".join(top)) * counts[top] / len(page.text)) > most:
            return f"one {n}-gram is {share:.0%} of the text"
    for n, most in REPEATED_NGRAMS:
        if n == 5 and _covered(words, 5) <= REPEATED_NGRAMS[-1][1] * len(page.text):
            break  # longer n-grams repeat less
        if (share := _repeated_characters(words, n) / len(page.text)) > most:
            return f"{share:.0%} of the text is repeated {n}-grams"
    return ""


def _repeated_share(text: str, n: int) -> float:
    hashes = np.sort(ngram_hashes(codes_of(text), n))
    same = hashes[1:] == hashes[:-1]
    if not same.any():
        return 0.0
    again = np.zeros(len(hashes), bool)  # as the one before or the one behind
    again[1:] |= same
    again[:-1] |= same
    return float(again.mean())


def _covered(words: list[str], n: int) -> int:
    """Characters of the words that stand in an n-gram seen before: an upper bound for longer n-grams too."""
    seen, until, total = set(), 0, 0
    for i, gram in enumerate(zip(*(words[k:] for k in range(n)), strict=False)):
        if gram in seen:
            total += sum(map(len, words[max(i, until) : i + n]))
            until = i + n
        else:
            seen.add(gram)
    return total


def _repeated_characters(words: list[str], n: int) -> int:
    """Characters of n-grams that were seen before; after one, the next begins behind it."""
    seen, total, i = set(), 0, 0
    while i <= len(words) - n:
        gram = "".join(words[i : i + n])
        if gram in seen:
            total, i = total + len(gram), i + n
        else:
            seen.add(gram)
            i += 1
    return total


# ---- pages of the wrong kind -----------------------------------------------------------------------------------------
def placeholder(page: Page, limits: Limits) -> str:
    """C4 leaves out pages with "lorem ipsum"."""
    return "lorem ipsum" if "lorem ipsum" in page.small else ""


def unfinished(page: Page, limits: Limits) -> str:
    """C4 keeps pages with at least three sentences that end as sentences do."""
    count = sum(line.rstrip().endswith(tuple('.!?"。！？”…')) for line in page.lines)
    return f"{count} finished lines" if count < 3 else ""


def short_lines(page: Page, limits: Limits) -> str:
    """ChineseWebText leaves out pages of less than 10 characters a line."""
    mean = len(page.text) / max(len(page.lines), 1)
    return f"{mean:.1f} characters a line" if mean < 10 else ""


def adverts(page: Page, limits: Limits) -> str:
    return phrases_found(page, ADVERTS)


def unsafe(page: Page, limits: Limits) -> str:
    return phrases_found(page, limits.unsafe)


def phrases_found(page: Page, phrases: Iterable[str]) -> str:
    """At least two different phrases of the list, and one for every 200 characters or less (our choice).

    ChineseWebText asks for one to every two lines; but a page may be a single line.
    """
    found = [phrase for phrase in phrases if phrase in page.small]
    if len(found) < 2 or sum(map(page.small.count, found)) * 200 < len(page.small):
        return ""
    return ", ".join(found[:5])
