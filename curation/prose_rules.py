"""DocumentView, the input of the drop rules, and its prose: the text without formulas, code blocks and number tables.

    "Solve $2x + 3 = 7$ for x."  -> "Solve for x."         LaTeX, equations and reactions in plain text
    "| 1990 | 5.3 |"             -> ""                     table rows, lines of numbers, ``` fences

The rules of drop_rules.py count letters, words and stop words. These statistics describe prose: a document whose prose
passes a rule is not dropped for its formulas. All patterns have bounded repeats.

Read next: drop_rules.py (the rules).
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from corpus.language import detect_language
from curation.phrases import RULE_PHRASES, scan_phrases
from curation.word_arrays import WordArrays

_FORMULA = "\0"  # placeholder for a formula until its line is processed
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.S)
_LATEX = re.compile(
    r"\$\$[^$]{1,2000}\$\$|\$[^$\n]{0,200}[\\^_=+<>{}][^$\n]{0,200}\$"
    r"|\\\(.{1,300}?\\\)|\\\[.{1,500}?\\\]|\\begin\{[a-z*]{1,20}\}.{1,1000}?\\end\{[a-z*]{1,20}\}"
    r"|\\[A-Za-z]{1,20}(?:\{[^{}\n]{0,200}\}|[_^])*",
    re.S,
)
# operand (operator operand)+ on one line; the character classes hardly overlap, which limits backtracking
_OPERAND = r"[A-Za-z0-9\u0370-\u03ff.,'′()\[\]{}|^_\\%!°√∑∏∫∂∞²³¹\u2070-\u209f↑↓]{1,40}"
_OPERATOR = r"[ \t]{0,2}[=<>≤≥≈≠≡∝→⇌⇒+−\-·×÷*/±][=<>+−\-*]{0,2}[ \t]{0,2}[+−\-±√]?"
_EQUATION = re.compile(rf"{_OPERAND}(?:{_OPERATOR}{_OPERAND}){{1,40}}")
_RELATION = re.compile(r"[=<>≤≥≈≠≡∝→⇌⇒^²³]")  # without one, "the river - wide" would be a formula
WORD_WITHOUT_LETTER = re.compile(r"(?<!\S)(?:(?!\s)[\W\d_])+(?!\S)")
_NUMBERS = re.compile(r"[\s\d.,:;%+\-–−/()$€£¥|]*\d[\s,;|/]+[\s\d.,:;%+\-–−/()$€£¥|]*\d[\s\d.,:;%+\-–−/()$€£¥|]{0,9}")


@dataclass(frozen=True)
class Prose:
    text: str
    has_formulas: bool


def extract_prose(text: str) -> Prose:
    """The text without fences, formulas and table rows. Numbers and signs in a line with a formula are removed too."""
    text = _LATEX.sub(_FORMULA, _FENCE.sub("\n", text))
    lines, has_formulas = [], False
    for line in text.split("\n"):
        if line.count("|") > 1 or (len(line) < 500 and _NUMBERS.fullmatch(line)):
            continue
        if _RELATION.search(line):
            line = _EQUATION.sub(lambda match: _FORMULA if _RELATION.search(match.group()) else match.group(), line)
        if _FORMULA in line:
            has_formulas = True
            line = WORD_WITHOUT_LETTER.sub(" ", line.replace(_FORMULA, " "))
        lines.append(line)
    return Prose("\n".join(lines), has_formulas)


# ---- the document ----------------------------------------------------------------------------------------------------
ZH_WORD_CHARACTERS = 1.5  # Chinese characters that count as one word


@dataclass(frozen=True)
class CleaningLimits:
    """Settings of the drop rules that have a flag: --min_words, --languages, --unsafe_words."""

    min_words: int = 10  # Gopher: 50, but poems and dictionary entries are good text and shorter
    languages: tuple[str, ...] = ("zh", "en")
    unsafe: tuple[str, ...] = RULE_PHRASES["unsafe"]  # lowercase


@dataclass
class DocumentView:
    """A document with cached statistics that several rules use, and the limits of the rules."""

    text: str
    limits: CleaningLimits = CleaningLimits()

    @cached_property
    def language(self) -> str:
        return detect_language(self.text)

    @cached_property
    def lowercase(self) -> str:
        return scan_phrases(self.text).lowercase

    @cached_property
    def without_spaces(self) -> str:
        """The text in lowercase without white space."""
        return "".join(self.lowercase.split())

    @cached_property
    def words(self) -> list[str]:
        """The text split at white space: English words with their punctuation, as in Gopher."""
        return self.text.split()

    @cached_property
    def arrays(self) -> WordArrays | None:
        """The words as arrays; None if the text has a character that they count as two."""
        arrays = WordArrays(self.text)
        return arrays if arrays.length == len(self.text) else None

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line]

    @cached_property
    def prose(self) -> Prose:
        return extract_prose(self.text)

    @cached_property
    def word_count(self) -> float:
        if self.language == "zh":
            return len(self.without_spaces) / ZH_WORD_CHARACTERS
        return len(self.arrays.word_starts) if self.arrays else len(self.words)


DropFunction = Callable[[DocumentView], str]
MIN_PROSE_WORDS, MIN_WORDS_BESIDE_FORMULAS = 10, 30  # fewest words of prose for a statistic


def recheck_on_prose(drop_function: DropFunction) -> DropFunction:
    """Decorator: a rule that matches a document must match its prose too, or the document is kept.

    A document with formulas and fewer than 30 words of prose is kept: they are too few for statistics. If the prose has
    fewer than 10 words otherwise (tables, code), the result for the whole document counts.
    """

    @functools.wraps(drop_function)
    def rechecked(document: DocumentView) -> str:
        if not (reason := drop_function(document)):
            return ""
        prose = DocumentView(document.prose.text, document.limits)
        if document.prose.has_formulas and prose.word_count < MIN_WORDS_BESIDE_FORMULAS:
            return ""
        return reason if prose.word_count < MIN_PROSE_WORDS else drop_function(prose)

    return rechecked
