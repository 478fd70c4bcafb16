"""Rule-based cleaning: the table of the rules and the transform of `data_process.py clean`.

    edit   str -> str                      edits a text        (edit_rules.py)
    drop   DocumentView -> reason or ""    drops a document    (drop_rules.py)

    row -> every edit rule in order -> every drop rule in order -> kept, or dropped by the first rule that matches

--skip NAME turns a rule off, --also NAME turns on a rule that is off by default; --list_rules prints the table. Chats
and preference pairs are edited message by message.

Read next: edit_rules.py, drop_rules.py, transform.py (reading and writing rows), rule_stats.py (the report).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import ExitAction, NameList, flag
from common.errors import UserError
from common.flag_types import non_negative_int, path_string
from common.packages import missing_packages, require_packages
from corpus.language import detect_language
from corpus.stats import BadRow
from curation import drop_rules, edit_rules
from curation.phrases import RULE_PHRASES
from curation.prose_rules import CleaningLimits, DocumentView
from curation.rule_stats import Decision, ExampleReservoir, RuleHit, compute_sample_key
from curation.transform import CurationConfig, NumberedRow, Transform, to_json_line

CONTEXT_CHARACTERS = 30  # characters shown before and after a change
RULE_PACKAGES = {"repair": "ftfy", "language": "lingua", "simplify": "opencc"}


# ---- the rules, in the order in which they run -----------------------------------------------------------------------
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
    is_edit: bool
    enabled: bool  # without --also
    applies_to_chats: bool  # rules about the shape of a document do not: a good answer may be three words long


def _edit(name: str, description: str, source: str, enabled: bool = True, applies_to_chats: bool = True) -> Rule:
    return Rule(name, description, source, getattr(edit_rules, name), True, enabled, applies_to_chats)


def _drop(name: str, description: str, source: str, enabled: bool = True, applies_to_chats: bool = False) -> Rule:
    return Rule(name, description, source, getattr(drop_rules, name), False, enabled, applies_to_chats)


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


def select_rules(skip: Sequence[str], also: Sequence[str]) -> tuple[Rule, ...]:
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


# ---- the command -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CleanConfig(CurationConfig):
    """edit texts and drop bad ones by rules; --skip and --also choose them, the report counts each"""

    main_flags = (
        "files", "out_dir", "check_only", "list_rules", "skip", "also", "languages", "min_words", "unsafe_words",
        "workers",
    )  # fmt: skip
    out_dir: str = "dataset/clean"
    list_rules: bool = flag(False, "print every rule with its source and exit",
                            action=ExitAction, nargs=0, function=print_rules)  # fmt: skip
    # nargs=None: a list is one argument, because FILES may follow
    skip: tuple[str, ...] = flag((), "rules to turn off", action=NameList, nargs=None, metavar="RULE,…")
    also: tuple[str, ...] = flag((), "rules to turn on: simplify, …", action=NameList, nargs=None, metavar="RULE,…")
    min_words: int = flag(10, "drop shorter texts (Gopher: 50)", type=non_negative_int)
    languages: tuple[str, ...] = flag(("zh", "en"), "languages to keep (ISO 639-1)", action=NameList, nargs=None)
    unsafe_words: str | None = flag(None, "more phrases for the rule `unsafe`, one per line",
                                    type=path_string, metavar="FILE")  # fmt: skip
    check_only: bool = flag(False, "dry run: print the report with its examples, write nothing", name="check")

    def unsafe_phrases(self) -> tuple[str, ...]:
        """The phrases of the rule `unsafe` and those of --unsafe_words. Raises UserError if the file cannot be read."""
        if not self.unsafe_words:
            return RULE_PHRASES["unsafe"]
        try:
            lines = Path(self.unsafe_words).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--unsafe_words {self.unsafe_words}: cannot be read as UTF-8 text ({error})") from None
        return (*RULE_PHRASES["unsafe"], *(line.strip().lower() for line in lines if line.strip()))


class CleaningTransform(Transform):
    """Applies the edit rules and the drop rules to each row."""

    name = "clean"

    def __init__(self, config: CleanConfig) -> None:
        self.reader = config.reader
        self.rules = select_rules(config.skip, config.also)
        self.limits = CleaningLimits(config.min_words, config.languages, config.unsafe_phrases())
        self.reservoir = ExampleReservoir()

    def rule_names(self) -> list[str]:
        return [rule.name for rule in self.rules]

    def fingerprint_fields(self) -> dict[str, Any]:
        limits = {"min_words": self.limits.min_words, "languages": list(self.limits.languages)}
        return {"rules": self.rule_names(), **limits, "unsafe": list(self.limits.unsafe)}

    def provenance(self) -> dict[str, Any]:
        return {"rules": self.rule_names()}

    def check_packages(self) -> None:
        """Raises UserError with all packages that the rules need and lack."""
        needed = {name: RULE_PACKAGES[name] for name in self.rule_names() if name in RULE_PACKAGES}
        lacking = [name for name, package in needed.items() if missing_packages([package])]
        require_packages("clean", *(needed[name] for name in lacking), otherwise=f"--skip {','.join(lacking)}")

    def apply_to_row(self, row: NumberedRow) -> Decision:
        hits: list[RuleHit] = []
        is_text = row.kind == "text"
        edited = self.reader.edit_row(row.raw, lambda text: self._edit_text(text, hits, is_text))
        language, characters = detect_language(row.text), len(row.text)
        try:
            text = row.text if edited == row.raw else self.reader.read_content(edited).text
        except BadRow as error:
            hits.append(RuleHit("empty", characters, f"nothing is left: {error}"))
            return Decision(None, language, characters, hits)
        document = DocumentView(text, self.limits)
        if text is row.text:
            document.language = language
        for rule in self.rules:
            if rule.is_edit or not (is_text or rule.applies_to_chats):
                continue
            if reason := rule.function(document):
                sample_key = compute_sample_key(rule.name, text)
                example = text[:300] if self.reservoir.offer(rule.name, sample_key) else ""
                hits.append(RuleHit(rule.name, len(text), reason, example, sample_key))
                return Decision(None, language, characters, hits)
        return Decision(to_json_line(edited), language, characters, hits)

    def _edit_text(self, text: str, hits: list[RuleHit], is_text: bool) -> str:
        for rule in self.rules:
            if rule.is_edit and (is_text or rule.applies_to_chats) and (edited := rule.function(text)) != text:
                sample_key = compute_sample_key(rule.name, text)
                example = describe_first_difference(text, edited) if self.reservoir.offer(rule.name, sample_key) else ""
                hits.append(RuleHit(rule.name, max(len(text) - len(edited), 0), "", example, sample_key))
                text = edited
        return text


def describe_first_difference(before: str, after: str) -> str:
    """An excerpt of both texts around their first difference, as two lines with control characters escaped."""
    first_difference = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, first_difference - CONTEXT_CHARACTERS // 2)
    excerpts = [repr(text[start : first_difference + CONTEXT_CHARACTERS])[1:-1] for text in (before, after)]
    return f"- {excerpts[0]}\n+ {excerpts[1]}"
