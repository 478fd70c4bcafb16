"""Rule-based cleaning: the transform of `data_process.py clean`.

    row -> every edit rule in order -> every drop rule in order -> kept, or dropped by the first rule that matches

Chats and preference pairs are edited message by message. Only rules with `applies_to_chats` run on them.

Read next: rules.py (the rules), transform.py (reading and writing rows), rule_stats.py (the report).
"""

from dataclasses import dataclass, field
from typing import Any

from corpus.language import detect_language
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import BadRow
from curation.prose_rules import CleaningLimits, DocumentView
from curation.rule_stats import Decision, ExampleReservoir, RuleHit, compute_sample_key
from curation.rules import Rule, select_rules
from curation.transform import NumberedRow, to_json_line

CONTEXT_CHARACTERS = 30  # characters shown before and after a change
PROBE_TEXTS = (  # together they make every rule import its optional package
    "\xc3\xa9 is what the letter looks like when a text of some words was decoded with the wrong code page.",
    "Dieser Satz ist weder auf Chinesisch noch auf Englisch geschrieben.",
)


@dataclass
class CleaningTransform:
    """Applies the edit rules and the drop rules to each row. `skip` and `also` hold rule names (rules.py)."""

    skip: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    limits: CleaningLimits = field(default_factory=CleaningLimits)
    reader: RowReader = DEFAULT_READER
    name: str = "clean"

    def __post_init__(self) -> None:
        self.rules = select_rules(self.skip, self.also)
        self.reservoir = ExampleReservoir()

    def rule_names(self) -> list[str]:
        return [rule.name for rule in self.rules]

    def fingerprint_fields(self) -> dict[str, Any]:
        limits = {"min_words": self.limits.min_words, "languages": list(self.limits.languages)}
        return {"rules": self.rule_names(), **limits, "unsafe": list(self.limits.unsafe)}

    def provenance(self) -> dict[str, Any]:
        return {"rules": self.rule_names()}

    def check_packages(self) -> None:
        """Run every rule once on PROBE_TEXTS. Raises UserError if a rule needs a package that is not installed."""
        for rule in self.rules:
            for probe in PROBE_TEXTS:
                rule.function(probe) if rule.is_edit else rule.function(DocumentView(probe), self.limits)

    def skip_row(self, row: NumberedRow) -> None:
        pass

    def apply(self, rows: list[NumberedRow]) -> list[Decision]:
        return [self.apply_to_row(row) for row in rows]

    def apply_to_row(self, row: NumberedRow) -> Decision:
        hits: list[RuleHit] = []
        is_text = row.kind == "text"
        edited = self.reader.edit_row(row.raw, lambda text: self._edit_text(text, hits, is_text))
        language, characters = detect_language(row.text), len(row.text)
        try:
            text = self.reader.read_content(edited).text
        except BadRow as reason:
            hits.append(RuleHit("empty", characters, f"nothing is left: {reason}"))
            return Decision(None, language, characters, hits)
        document = DocumentView(text)
        for rule in self.rules:
            if (
                not rule.is_edit
                and (is_text or rule.applies_to_chats)
                and (drop_reason := rule.function(document, self.limits))
            ):
                return Decision(None, language, characters, [*hits, self._make_drop_hit(rule, text, drop_reason)])
        return Decision(to_json_line(edited), language, characters, hits)

    def _edit_text(self, text: str, hits: list[RuleHit], is_text: bool) -> str:
        for rule in self.rules:
            if rule.is_edit and (is_text or rule.applies_to_chats) and (edited := rule.function(text)) != text:
                sample_key = compute_sample_key(rule.name, text)
                example = describe_first_difference(text, edited) if self.reservoir.offer(rule.name, sample_key) else ""
                hits.append(RuleHit(rule.name, max(len(text) - len(edited), 0), "", example, sample_key))
                text = edited
        return text

    def _make_drop_hit(self, rule: Rule, text: str, drop_reason: str) -> RuleHit:
        sample_key = compute_sample_key(rule.name, text)
        example = text[:300] if self.reservoir.offer(rule.name, sample_key) else ""
        return RuleHit(rule.name, len(text), drop_reason, example, sample_key)


def describe_first_difference(before: str, after: str) -> str:
    """An excerpt of both texts around their first difference, as two lines with control characters escaped."""
    first_difference = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, first_difference - CONTEXT_CHARACTERS // 2)
    excerpts = [repr(text[start : first_difference + CONTEXT_CHARACTERS])[1:-1] for text in (before, after)]
    return f"- {excerpts[0]}\n+ {excerpts[1]}"
