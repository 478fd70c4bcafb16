"""What a step did to the rows: counts by rule, and for each rule ten examples, so that a person can judge it.

    Mark(rule, characters, detail, example)    one thing that a rule did to one row
    Verdict(kept, language, characters, marks) what became of one row

The examples are not the first ten: they are those with the lowest hash, so that every part of the data has the same
chance, and two runs show the same ones.

Read next: transform.py (who counts), cleaning.py (who marks).
"""

import bisect
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = 10


@dataclass(frozen=True)
class Mark:
    rule: str
    characters: int  # taken or changed
    detail: str = ""
    example: str = ""  # for people; empty when it is none of the ten
    rank: int = 0


@dataclass(frozen=True)
class Verdict:
    kept: bytes | None  # the row as a line of jsonl; None: left out, and the last mark says why
    language: str
    characters: int  # of the row as it came
    marks: list[Mark] = field(default_factory=list)


def rank_of(rule: str, text: str) -> int:
    """32-bit number that decides whether a row is an example for a rule."""
    return zlib.crc32(text[:4096].encode("utf-8", "replace"), zlib.crc32(rule.encode()))


class Chooser:
    """Says whether a rank may still be among the ten lowest. One lives in every process that judges rows."""

    def __init__(self) -> None:
        self.ranks: dict[str, list[int]] = {}

    def wants(self, rule: str, rank: int) -> bool:
        lowest = self.ranks.setdefault(rule, [])
        if len(lowest) >= EXAMPLES and rank >= lowest[-1]:
            return False
        bisect.insort(lowest, rank)
        del lowest[EXAMPLES:]
        return True


class Tally:
    """Counts of one pass. Plain values only, so that a killed run can go on counting."""

    def __init__(self, rules: Iterable[str] = ()) -> None:
        self.read = self.kept = self.characters_read = self.characters_dropped = 0
        self.rules: dict[str, dict[str, Any]] = {name: _nothing() for name in rules}  # also those that take nothing
        self.languages: dict[str, dict[str, int]] = {}

    def add(self, file: str, line: int, verdict: Verdict) -> None:
        self.read += 1
        self.characters_read += verdict.characters
        if verdict.kept is not None:
            self.kept += 1
            mix = self.languages.setdefault(verdict.language, {"rows": 0, "characters": 0})
            mix["rows"] += 1
            mix["characters"] += verdict.characters
        else:
            self.characters_dropped += verdict.characters
        for mark in verdict.marks:
            self._count(mark, file, line, dropped=verdict.kept is None and mark is verdict.marks[-1])

    def _count(self, mark: Mark, file: str, line: int, dropped: bool) -> None:
        rule = self.rules.setdefault(mark.rule, _nothing())
        rule["rows"] += 1
        rule["dropped"] += dropped
        rule["characters"] += mark.characters
        if mark.example:
            entry = [mark.rank, f"{file}:{line}", mark.detail, mark.example]
            bisect.insort(rule["examples"], entry, key=lambda other: other[0])
            del rule["examples"][EXAMPLES:]

    def main_reason(self) -> str:
        drops = {name: rule["dropped"] for name, rule in self.rules.items() if rule["dropped"]}
        if not drops:
            return "there was none"
        name = max(drops, key=lambda name: drops[name])
        return f"{drops[name]:,} by {name}"

    def to_dict(self) -> dict[str, Any]:
        names = ("read", "kept", "characters_read", "characters_dropped", "rules", "languages")
        return {name: getattr(self, name) for name in names}

    def restore(self, content: dict[str, Any]) -> None:
        for name, value in content.items():
            setattr(self, name, value)

    def merge(self, content: dict[str, Any]) -> None:
        """Add the counts of another tally, as its `to_dict` gave them."""
        for name in ("read", "kept", "characters_read", "characters_dropped"):
            setattr(self, name, getattr(self, name) + content[name])
        for language, mix in content["languages"].items():
            ours = self.languages.setdefault(language, dict.fromkeys(mix, 0))
            for name in mix:
                ours[name] += mix[name]
        for name, rule in content["rules"].items():
            mine = self.rules.setdefault(name, _nothing())
            for count in ("rows", "dropped", "characters"):
                mine[count] += rule[count]
            mine["examples"] = sorted(mine["examples"] + rule["examples"], key=lambda entry: entry[0])[:EXAMPLES]

    @classmethod
    def of_report(cls, path: Path) -> "Tally":
        """The counts in a report.json."""
        tally = cls()
        tally.merge(json.loads(path.read_text(encoding="utf-8")))
        return tally

    # ---- showing ----
    def print(self) -> None:
        """The counts as tables (rich; plain text when not a terminal)."""
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=120)
        console.print(self._rules_table())
        said = [f"{language} {mix['rows']:,} rows" for language, mix in sorted(self.languages.items(), reverse=True)]
        console.print(
            f"kept {self.kept:,} of {self.read:,} rows ({self.kept / max(self.read, 1):.1%}): {', '.join(said)}"
        )

    def _rules_table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="what each rule did", title_justify="left")
        for name in ("", "mended rows", "dropped rows", "share", "characters taken", "for example"):
            table.add_column(name, justify="left" if name in ("", "for example") else "right", overflow="fold")
        for name, rule in self.rules.items():
            mended = rule["rows"] - rule["dropped"]
            first = rule["examples"][0][1] if rule["examples"] else ""
            cells = [f"{number:,}" if number else "" for number in (mended, rule["dropped"])]
            share = f"{rule['rows'] / max(self.read, 1):.2%}"
            table.add_row(name, *cells, share, f"{rule['characters']:,}", Text(first))
        return table

    def examples(self, rule: str) -> list[tuple[str, str, str]]:
        """(file:line, detail, example) of the rule, ten at most."""
        return [(where, detail, shown) for _, where, detail, shown in self.rules[rule]["examples"]]

    def markdown(self, step: str) -> str:
        """The report for people: counts, then the examples of each rule."""
        lines = [f"# {step}: {self.kept:,} of {self.read:,} rows kept", "", "| rule | mended | dropped | characters |"]
        lines.append("|---|---|---|---|")
        for name, rule in self.rules.items():
            lines.append(
                f"| {name} | {rule['rows'] - rule['dropped']:,} | {rule['dropped']:,} | {rule['characters']:,} |"
            )
        for name in self.rules:
            lines += ["", f"## {name}", ""]
            for where, detail, shown in self.examples(name):
                lines.append(f"* `{where}`{' ' if detail else ''}{detail}")
                lines += [f"      {line}" for line in shown.split("\n")]
        return "\n".join(lines) + "\n"


def _nothing() -> dict[str, Any]:
    return {"rows": 0, "dropped": 0, "characters": 0, "examples": []}
