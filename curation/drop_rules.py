"""Drop rules of `data_process.py clean`: functions DocumentView -> reason, or "" to keep.

The statistics follow Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A1.1 and table A1), C4 (Raffel et al. 2020,
arXiv 1910.10683, section 2.2) and ChineseWebText (Chen et al. 2023, arXiv 2311.01149; thresholds from its
preprocess.py). Gopher counts words. Chinese has no spaces, so 1.5 Chinese characters count as a word (our choice), and
rules about English words skip Chinese documents. Rules about words and letters are checked again on the prose alone:
see prose_rules.py.

Read next: cleaning.py (the table of the rules), prose_rules.py (DocumentView), phrases.txt.
"""

import functools
import re
from collections import Counter
from typing import Any

import numpy as np

from common.errors import import_package
from common.packages import install_advice
from corpus.language import count_chinese, detect_language
from curation.edit_rules import MOJIBAKE_FLAG, character_flags
from curation.ngrams import code_points, ngram_hashes
from curation.phrases import RULE_PHRASES, phrases_in
from curation.prose_rules import ZH_WORD_CHARACTERS, DocumentView, recheck_on_prose


def too_short(document: DocumentView) -> str:
    count = document.word_count
    if count < document.limits.min_words and detect_language(document.prose.text) == "zh":  # Chinese with formulas
        count = len(document.without_spaces) / ZH_WORD_CHARACTERS
    return f"{count:.0f} words" if count < document.limits.min_words else ""


def too_long(document: DocumentView) -> str:
    count = document.word_count
    return f"{count:,.0f} words" if count > 100_000 else ""


_MOJIBAKE = re.compile("[\ufffd\xc3-\xef][\x80-\xbf\ufffd]|\ufffd|锟斤拷|烫烫烫|屯屯屯")


def mojibake(document: DocumentView) -> str:
    """More than one wrongly decoded sequence in 200 characters, after the edit rule `repair`."""
    if not character_flags(document.text) & MOJIBAKE_FLAG:
        return ""
    count = len(_MOJIBAKE.findall(document.text))
    return f"{count} wrongly decoded sequences" if count * 200 > len(document.text) else ""


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
MIN_DETECTION_LETTERS = 20  # fewest letters for language detection
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af\u1100-\u11ff]")  # kana and Hangul


_CODE_IDENTIFIER = re.compile(r"(?<!\S)(?=[!-~]*[^\sA-Za-z.,:!?'\"-])[!-~]+(?!\S)")  # f(x), a_b, x2: ASCII, not a word


def language(document: DocumentView) -> str:
    """Detects the language of the beginning and the middle of the document.

    Chinese characters without kana or Hangul are Chinese; a text with three English stop words is English. The slow
    detector classifies only the other texts. It takes LaTeX for Polish and code for German: if it finds a language
    outside --languages, it runs again on the distinct words of the prose.
    """
    sample = _sample_text(document.text)
    if document.language == "zh" and not _KANA_OR_HANGUL.search(sample):
        name = "zh"
    elif len(STOP_WORDS.intersection(sample.lower().split())) >= 3:
        name = "en"  # texts in other languages do not have three of them
    else:
        name = _detect_language(sample)
        if name and name not in document.limits.languages:
            words = _CODE_IDENTIFIER.sub(" ", document.prose.text).split()
            name = _detect_language(_sample_text(" ".join(dict.fromkeys(words))))
    return f"looks like {name}" if name and name not in document.limits.languages else ""


def _detect_language(sample: str) -> str:
    """ISO 639-1 code of a sample's language; "" if it has too few letters or matches no candidate."""
    if sum(map(str.isalpha, sample)) < MIN_DETECTION_LETTERS:
        return ""
    found = _language_detector().detect_language_of(sample)
    return found.iso_code_639_1.name.lower() if found else ""


def _sample_text(text: str) -> str:
    """The text; if it is long, its first 120 characters and 120 from the middle."""
    middle = len(text) // 2
    return text if len(text) < 240 else text[:120] + " " + text[middle : middle + 120]


# Candidates of the detector: languages that share a script with Chinese or English, and the most frequent on the web.
_CANDIDATE_LANGUAGES = (
    "CHINESE", "ENGLISH", "JAPANESE", "KOREAN", "FRENCH", "GERMAN", "SPANISH", "PORTUGUESE", "ITALIAN", "DUTCH",
    "POLISH", "TURKISH", "VIETNAMESE", "INDONESIAN", "RUSSIAN", "ARABIC", "THAI", "HINDI",
)  # fmt: skip


@functools.cache
def _language_detector() -> Any:
    advice = install_advice("the rule `language`", "lingua", otherwise="--skip language")
    lingua = import_package("lingua", advice)  # contains its models, downloads nothing
    candidates = [getattr(lingua.Language, name) for name in _CANDIDATE_LANGUAGES]
    return lingua.LanguageDetectorBuilder.from_languages(*candidates).with_low_accuracy_mode().build()


_NO_LETTER = re.compile(r"[\W\d_]+")


@recheck_on_prose
def few_letters(document: DocumentView) -> str:
    """English: fewer than 80 % of the words have a letter (Gopher). Chinese: fewer than 30 % Chinese characters
    (ChineseWebText)."""
    if document.language == "zh":
        fraction = count_chinese(document.without_spaces) / max(len(document.without_spaces), 1)
        return f"{fraction:.0%} of the characters are Chinese" if fraction < 0.3 else ""
    if document.arrays and document.arrays.initial_letters() >= 0.81 * len(document.arrays.word_starts):
        return ""
    without_letter = sum(1 for word in document.words if not word[0].isalpha() and _NO_LETTER.fullmatch(word))
    fraction = 1 - without_letter / max(len(document.words), 1)
    return f"{fraction:.0%} of the words have a letter" if fraction < 0.8 else ""


@recheck_on_prose
def word_length(document: DocumentView) -> str:
    """The mean length of English words is below 3 or above 10 characters (Gopher)."""
    if document.language == "zh":
        return ""
    if document.arrays:
        mean = document.arrays.num_visible / max(len(document.arrays.word_starts), 1)
    else:
        mean = sum(map(len, document.words)) / max(len(document.words), 1)
    return f"mean word length {mean:.1f}" if not 3 <= mean <= 10 else ""


@recheck_on_prose
def symbols(document: DocumentView) -> str:
    """More than one hash sign or ellipsis per ten words (Gopher)."""
    words = document.word_count
    hashes, ellipses = document.text.count("#"), document.text.count("...") + document.text.count("…")
    return f"{hashes} '#', {ellipses} ellipses" if max(hashes, ellipses) > 0.1 * words else ""


_BULLETS = ("•", "‣", "▪", "●", "■", "◆", "★", "·", "*", "-", "–", "—")


def list_of_lines(document: DocumentView) -> str:
    """More than 90 % of the lines begin with a bullet or more than 30 % end with an ellipsis (Gopher)."""
    lines = len(document.lines)
    # If more than 90 % begin with a bullet, one of the first tenth does.
    may_be_list = any(line.lstrip().startswith(_BULLETS) for line in document.lines[: lines // 10 + 1])
    if lines <= 1 or not (may_be_list or "..." in document.text or "…" in document.text):
        return ""
    bullets = sum(line.lstrip().startswith(_BULLETS) for line in document.lines) / lines
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in document.lines) / lines
    return f"{bullets:.0%} bullets, {ellipses:.0%} ellipses" if bullets > 0.9 or ellipses > 0.3 else ""


@recheck_on_prose
def stop_words(document: DocumentView) -> str:
    """English text with fewer than two of: the, be, to, of, and, that, have, with (Gopher)."""
    if document.language == "zh":
        return ""
    found = STOP_WORDS.intersection(document.text[:500].lower().split()[:-1])  # most texts have two of them here
    if len(found) < 2:
        found = STOP_WORDS.intersection(document.lowercase.split())
    return f"{len(found)} of 8 stop words" if len(found) < 2 else ""


# ---- repetition ------------------------------------------------------------------------------------------------------
TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
REPEATED_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
REPEATED_NGRAMS_BOUND = (5, 0.10)  # longer n-grams repeat less than the 5-grams, and 0.10 is the lowest limit
_PARAGRAPHS = re.compile(r"\n{2,}")
_WORD_OR_SIGN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def _split_paragraphs(text: str) -> list[str]:
    """Split at runs of two or more line feeds; [] for a text without one."""
    return _PARAGRAPHS.split(text) if "\n\n\n" in text else text.split("\n\n") if "\n\n" in text else []


def repeated_lines(document: DocumentView) -> str:
    """Repeated paragraphs or lines: more than 0.30 of their number or 0.20 of the characters (Gopher, table A1)."""
    if "\n" not in document.text:
        return ""
    if len(set(document.lines)) == len(document.lines) and document.text.strip() == document.text:
        return ""
    for name, pieces in (
        ("paragraphs", _split_paragraphs(document.text.strip())),
        ("lines", [*[""] * document.text.startswith("\n"), *document.lines, *[""] * document.text.endswith("\n")]),
    ):
        if len(set(pieces)) == len(pieces):
            continue
        counts = Counter(pieces)
        repeated_fraction = (len(pieces) - len(counts)) / len(pieces)
        fraction = sum(len(piece) * (count - 1) for piece, count in counts.items()) / len(document.text)
        if repeated_fraction > 0.30 or fraction > 0.20:
            return f"{repeated_fraction:.0%} of the {name} and {fraction:.0%} of their characters are repeats"
    return ""


@recheck_on_prose
def repeated_ngrams(document: DocumentView) -> str:
    """English: word n-grams above the thresholds of Gopher, table A1. Chinese: more than half of the 13-character
    n-grams occur more than once (ChineseWebText)."""
    if document.language == "zh":
        if not _may_repeat_characters(document.without_spaces, 13):
            return ""
        fraction = _repeated_ngram_fraction(document.without_spaces, 13)
        return f"{fraction:.0%} of the 13-character n-grams are repeated" if fraction > 0.5 else ""
    if document.arrays and not document.arrays.may_repeat(TOP_NGRAMS, *REPEATED_NGRAMS_BOUND):
        return ""
    words = _WORD_OR_SIGN.findall(document.text)
    for n, max_fraction in TOP_NGRAMS:
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        most_frequent = max(counts, key=counts.__getitem__, default=())
        if (
            counts[most_frequent] > 1
            and (fraction := len(" ".join(most_frequent)) * counts[most_frequent] / len(document.text)) > max_fraction
        ):
            return f"one {n}-gram is {fraction:.0%} of the text"
    for n, max_fraction in REPEATED_NGRAMS:
        if n == 5 and _max_repeated_characters(words, 5) <= REPEATED_NGRAMS[-1][1] * len(document.text):
            break  # longer n-grams repeat less
        if (fraction := _repeated_characters(words, n) / len(document.text)) > max_fraction:
            return f"{fraction:.0%} of the text is repeated {n}-grams"
    return ""


def _may_repeat_characters(text: str, n: int) -> bool:
    """False if at most half of the n-grams occur more than once, n > 4: each of them begins with a repeated 4-gram.

    Counts the 4-grams of UTF-16 units, which are 64-bit numbers at every second byte.
    """
    data = text.encode("utf-16-le", "surrogatepass")
    grams = np.sort(np.ndarray(max(len(data) // 2 - 3, 0), "<u8", data, strides=(2,)))
    return 4 * int(np.count_nonzero(grams[1:] == grams[:-1])) > len(text) - n + 1


def _repeated_ngram_fraction(text: str, n: int) -> float:
    hashes = np.sort(ngram_hashes(code_points(text), n))
    equal_to_previous = hashes[1:] == hashes[:-1]
    if not equal_to_previous.any():
        return 0.0
    repeated = np.zeros(len(hashes), bool)  # equal to the previous or the next hash
    repeated[1:] |= equal_to_previous
    repeated[:-1] |= equal_to_previous
    return float(repeated.mean())


def _max_repeated_characters(words: list[str], n: int) -> int:
    """Characters of the words inside an n-gram seen before: an upper bound for longer n-grams too."""
    seen, covered_until, total = set(), 0, 0
    for i, gram in enumerate(zip(*(words[k:] for k in range(n)), strict=False)):
        if gram in seen:
            total += sum(map(len, words[max(i, covered_until) : i + n]))
            covered_until = i + n
        else:
            seen.add(gram)
    return total


def _repeated_characters(words: list[str], n: int) -> int:
    """Characters of non-overlapping n-grams that were seen before."""
    seen, total, i = set(), 0, 0
    while i <= len(words) - n:
        gram = "".join(words[i : i + n])
        if gram in seen:
            total, i = total + len(gram), i + n
        else:
            seen.add(gram)
            i += 1
    return total


# ---- unwanted kinds of documents -------------------------------------------------------------------------------------
def placeholder(document: DocumentView) -> str:
    """Contains "lorem ipsum" (C4)."""
    return "lorem ipsum" if "lorem ipsum" in document.lowercase else ""


def unfinished(document: DocumentView) -> str:
    """Fewer than three lines end with a sentence mark (C4)."""
    count = sum(line.rstrip().endswith(tuple('.!?"。！？”…')) for line in document.lines)
    return f"{count} finished lines" if count < 3 else ""


def short_lines(document: DocumentView) -> str:
    """Fewer than 10 characters per line on average (ChineseWebText)."""
    mean = len(document.text) / max(len(document.lines), 1)
    return f"{mean:.1f} characters per line" if mean < 10 else ""


def adverts(document: DocumentView) -> str:
    return matched_phrases(document, RULE_PHRASES["advert"])


def unsafe(document: DocumentView) -> str:
    return matched_phrases(document, document.limits.unsafe)


def matched_phrases(document: DocumentView, phrases: tuple[str, ...]) -> str:
    """Up to five phrases of the list in the text, if it has at least two and one per 200 characters (our choice).

    ChineseWebText requires one phrase per two lines, but a document may be a single line.
    """
    found = phrases_in(document.text, phrases)
    if len(found) < 2 or sum(map(document.lowercase.count, found)) * 200 < len(document.lowercase):
        return ""
    return ", ".join(found[:5])
