"""Table of the rules of `data_process.py clean`, in the order in which they run.

    edit   str -> str                                            edits a text        (edit_rules.py)
    drop   (DocumentView, CleaningLimits) -> reason or ""        drops a document    (drop_rules.py)

    python data_process.py clean --list_rules

--skip NAME turns a rule off, --also NAME turns on a rule that is off by default. The report counts each rule.
Rules about the shape of a document do not run on chats: a good answer may be three words long.
Read next: cleaning.py (runs the rules).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from curation import drop_rules, edit_rules

GOPHER = "Gopher, arXiv 2112.11446, A1.1"
REPETITION = "Gopher, arXiv 2112.11446, table A1"
C4 = "C4, arXiv 1910.10683, 2.2"
CHINESE_WEB_TEXT = "ChineseWebText, arXiv 2311.01149"
OURS = "ours"


@dataclass(frozen=True)
class Rule:
    name: str
    description: str  # one line, for --list_rules
    source: str
    function: Callable[..., Any]
    is_edit: bool = False
    enabled: bool = True
    applies_to_chats: bool = False


def _edit(name: str, description: str, source: str, enabled: bool = True, applies_to_chats: bool = True) -> Rule:
    return Rule(
        name,
        description,
        source,
        getattr(edit_rules, name),
        is_edit=True,
        enabled=enabled,
        applies_to_chats=applies_to_chats,
    )


def _drop(name: str, description: str, source: str, enabled: bool = True, applies_to_chats: bool = False) -> Rule:
    return Rule(
        name, description, source, getattr(drop_rules, name), enabled=enabled, applies_to_chats=applies_to_chats
    )


RULES = (
    _edit("repair", "fixes text that was decoded with the wrong code page", "ftfy"),
    _edit("characters", "removes control and invisible characters; full-width letters and digits to ASCII; NFC", OURS),
    _edit("simplify", "traditional to simplified Chinese characters", "OpenCC, t2s", enabled=False),
    _edit("markup", "removes HTML, markdown links, BBCode and wiki markup, keeps their text", OURS),
    _edit("boilerplate", "removes copyright and cookie notices and runs of navigation links; not in chats",
          f"{C4}; patterns ours", applies_to_chats=False),
    _edit("personal", "masks phone, identity card, e-mail and messenger numbers", "GB 11643-1999; patterns ours"),
    _drop("mojibake", "more than one wrongly decoded sequence in 200 characters", OURS, applies_to_chats=True),
    _drop("too_short", "fewer than --min_words words (1.5 Chinese characters)", f"{GOPHER} has 50; number ours"),
    _drop("too_long", "more than 100,000 words", GOPHER),
    _drop("language", "prose in none of --languages (lingua, offline)", "lingua", applies_to_chats=True),
    _drop("few_letters", "< 30 % Chinese characters, or < 80 % of English words with a letter",
          f"{CHINESE_WEB_TEXT}; {GOPHER}"),
    _drop("word_length", "English words shorter than 3 or longer than 10 characters on average", GOPHER),
    _drop("symbols", "more than one '#' or ellipsis per ten words", GOPHER),
    _drop("list_of_lines", "> 90 % of the lines begin with a bullet or > 30 % end with an ellipsis", GOPHER),
    _drop("stop_words", "English text with fewer than two of eight frequent words", GOPHER),
    _drop("repeated_lines", "repeated lines or paragraphs: > 30 % of them, or > 20 % of the characters", REPETITION),
    _drop("repeated_ngrams", "repeated word n-grams (2 to 10); in Chinese > 50 % repeated 13-character n-grams",
          f"{REPETITION}; {CHINESE_WEB_TEXT}"),
    _drop("placeholder", "lorem ipsum", C4),
    _drop("unfinished", "fewer than three lines that end with a sentence mark", C4, enabled=False),
    _drop("short_lines", "fewer than 10 characters per line (drops poems too)", CHINESE_WEB_TEXT, enabled=False),
    _drop("adverts", "two or more advertising phrases, at least one per 200 characters", OURS, applies_to_chats=True),
    _drop("unsafe", "the same for phrases of pornography, gambling, drugs, fraud", OURS, applies_to_chats=True),
)  # fmt: skip
RULE_NAMES = tuple(rule.name for rule in RULES)


def select_rules(skip: list[str], also: list[str]) -> tuple[Rule, ...]:
    """The rules enabled by default plus `also`, without `skip`, in order. Raises UserError for an unknown name."""
    for name in (*skip, *also):
        if name not in RULE_NAMES:
            raise UserError(f"unknown rule {name!r}: the rules are {', '.join(RULE_NAMES)}")
    return tuple(rule for rule in RULES if (rule.enabled or rule.name in also) and rule.name not in skip)


def print_rules() -> None:
    """Print the table: name, edit or drop, description, source."""
    for rule in RULES:
        suffix = "" if rule.enabled else "  (off: --also " + rule.name + ")"
        print(f"{rule.name:16}{'edit' if rule.is_edit else 'drop'}  {rule.description}{suffix}  [{rule.source}]")
