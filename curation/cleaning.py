"""Documents -> cleaner documents, and an account of what was taken: the step behind `data_process.py clean`.

    row -> every edit rule in turn -> every drop rule in turn -> kept, or left out by the first that says so

Chats and pairs are mended message by message, and asked only the rules that make sense for them.

Read next: rules.py (the rules), transform.py (how the rows come and go), rule_stats.py (the report).
"""

from dataclasses import dataclass, field
from typing import Any

from corpus.language import language_of
from corpus.row_text import READER, RowReader
from corpus.stats import BadRow
from curation.prose_rules import Limits, Page
from curation.rule_stats import Chooser, Mark, Verdict, rank_of
from curation.rules import Rule, choose_rules
from curation.transform import Row, as_line

AROUND = 30  # characters shown before and after a change
SAMPLES = (  # between them they ask every rule's package something
    "\xc3\xa9 is what the letter looks like when a text of some words was decoded with the wrong code page.",
    "Dieser Satz ist weder auf Chinesisch noch auf Englisch geschrieben.",
)


@dataclass
class Clean:
    """The step. `skip` and `also` name rules, see rules.py; `limits` are the numbers that a user may change."""

    skip: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    reader: RowReader = READER
    name: str = "clean"

    def __post_init__(self) -> None:
        self.rules = choose_rules(self.skip, self.also)
        self.chooser = Chooser()

    def rule_names(self) -> list[str]:
        return [rule.name for rule in self.rules]

    def job(self) -> dict[str, Any]:
        limits = {"min_words": self.limits.min_words, "languages": list(self.limits.languages)}
        return {"rules": self.rule_names(), **limits, "unsafe": list(self.limits.unsafe)}

    def about(self) -> dict[str, Any]:
        return {"rules": self.rule_names()}

    def check(self) -> None:
        """Ask every rule once. Raises UserError for a package that one of them lacks, before any work is done."""
        for rule in self.rules:
            for sample in SAMPLES:
                rule.function(sample) if rule.edits else rule.function(Page(sample), self.limits)

    def pass_over(self, row: Row) -> None:
        pass

    def judge(self, rows: list[Row]) -> list[Verdict]:
        return [self.judge_row(row) for row in rows]

    def judge_row(self, row: Row) -> Verdict:
        marks: list[Mark] = []
        is_text = row.kind == "text"
        mended = self.reader.edit(row.row, lambda text: self._mend(text, marks, is_text))
        language, characters = language_of(row.text), len(row.text)
        try:
            text = self.reader.content(mended).text
        except BadRow as reason:
            marks.append(Mark("empty", characters, f"nothing is left: {reason}"))
            return Verdict(None, language, characters, marks)
        page = Page(text)
        for rule in self.rules:
            if not rule.edits and (is_text or rule.of_chats) and (why := rule.function(page, self.limits)):
                return Verdict(None, language, characters, [*marks, self._drop(rule, text, why)])
        return Verdict(as_line(mended), language, characters, marks)

    def _mend(self, text: str, marks: list[Mark], is_text: bool) -> str:
        for rule in self.rules:
            if rule.edits and (is_text or rule.of_chats) and (mended := rule.function(text)) != text:
                rank = rank_of(rule.name, text)
                example = difference(text, mended) if self.chooser.wants(rule.name, rank) else ""
                marks.append(Mark(rule.name, max(len(text) - len(mended), 0), "", example, rank))
                text = mended
        return text

    def _drop(self, rule: Rule, text: str, why: str) -> Mark:
        rank = rank_of(rule.name, text)
        example = text[:300] if self.chooser.wants(rule.name, rank) else ""
        return Mark(rule.name, len(text), why, example, rank)


def difference(before: str, after: str) -> str:
    """The first place where two texts differ, on two lines, with control characters made visible."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - AROUND // 2)
    shown = [repr(text[start : same + AROUND])[1:-1] for text in (before, after)]
    return f"- {shown[0]}\n+ {shown[1]}"
