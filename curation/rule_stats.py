"""Statistics of a transform: counts per rule, and ten examples per rule for manual review.

    RuleHit(rule, characters, detail, example)     one match of a rule in a row
    Decision(kept, language, characters, hits)     the result for a row

The examples of a rule are the ten hits with the lowest hash: a uniform sample of the data, the same in every run.

Read next: transform.py (calls RuleStats.add), cleaning.py (creates the hits).
"""

import bisect
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from corpus.stats_tables import print_table

EXAMPLES_PER_RULE = 10


@dataclass(frozen=True)
class RuleHit:
    rule: str
    characters: int  # number of characters removed
    detail: str = ""
    example: str = ""  # text for the report; empty if the hit is not among the ten examples
    sample_key: int = 0


@dataclass(frozen=True)
class Decision:
    kept: bytes | None  # the row as a line of jsonl; None: dropped by the rule of the last hit
    language: str
    characters: int  # length of the row before the edits
    hits: list[RuleHit] = field(default_factory=list)


def compute_sample_key(rule: str, text: str) -> int:
    """32-bit hash of a rule and a row; the ten lowest hashes of a rule are its examples."""
    return zlib.crc32(text[:4096].encode("utf-8", "replace"), zlib.crc32(rule.encode()))


class ExampleReservoir:
    """The ten lowest sample keys of each rule that this process has seen. Each worker process has its own."""

    def __init__(self) -> None:
        self.sample_keys: dict[str, list[int]] = {}

    def offer(self, rule: str, sample_key: int) -> bool:
        """Insert a key; False if it cannot be among the ten lowest, so no example text is needed."""
        lowest = self.sample_keys.setdefault(rule, [])
        if len(lowest) >= EXAMPLES_PER_RULE and sample_key >= lowest[-1]:
            return False
        bisect.insort(lowest, sample_key)
        del lowest[EXAMPLES_PER_RULE:]
        return True


class RuleStats:
    """Counts of one run. They are plain values, which the progress file stores for resuming."""

    def __init__(self, rules: Iterable[str] = ()) -> None:
        self.read = self.kept = self.characters_read = self.characters_dropped = 0
        self.rules: dict[str, dict[str, Any]] = {name: _no_counts() for name in rules}  # rules without a hit too
        self.languages: dict[str, dict[str, int]] = {}

    def add(self, file: str, line: int, decision: Decision) -> None:
        self.read += 1
        self.characters_read += decision.characters
        if decision.kept is not None:
            self.kept += 1
            counts = self.languages.setdefault(decision.language, {"rows": 0, "characters": 0})
            counts["rows"] += 1
            counts["characters"] += decision.characters
        else:
            self.characters_dropped += decision.characters
        for hit in decision.hits:
            self._add_hit(hit, file, line, dropped=decision.kept is None and hit is decision.hits[-1])

    def _add_hit(self, hit: RuleHit, file: str, line: int, dropped: bool) -> None:
        rule = self.rules.setdefault(hit.rule, _no_counts())
        rule["rows"] += 1
        rule["dropped"] += dropped
        rule["characters"] += hit.characters
        if hit.example:
            entry = [hit.sample_key, f"{file}:{line}", hit.detail, hit.example]
            bisect.insort(rule["examples"], entry, key=lambda other: other[0])
            del rule["examples"][EXAMPLES_PER_RULE:]

    def main_drop_reason(self) -> str:
        dropped, name = max(
            ((rule["dropped"], name) for name, rule in self.rules.items()), default=(0, ""), key=lambda drop: drop[0]
        )
        return f"{dropped:,} by {name}" if dropped else "the input has no row"

    def to_dict(self) -> dict[str, Any]:
        names = ("read", "kept", "characters_read", "characters_dropped", "rules", "languages")
        return {name: getattr(self, name) for name in names}

    def restore(self, content: dict[str, Any]) -> None:
        for name, value in content.items():
            setattr(self, name, value)

    def merge(self, content: dict[str, Any]) -> None:
        """Add the counts of another RuleStats, given as its `to_dict`."""
        for name in ("read", "kept", "characters_read", "characters_dropped"):
            setattr(self, name, getattr(self, name) + content[name])
        for language, counts in content["languages"].items():
            own_counts = self.languages.setdefault(language, dict.fromkeys(counts, 0))
            for name in counts:
                own_counts[name] += counts[name]
        for name, rule in content["rules"].items():
            own_rule = self.rules.setdefault(name, _no_counts())
            for count in ("rows", "dropped", "characters"):
                own_rule[count] += rule[count]
            examples = sorted(own_rule["examples"] + rule["examples"], key=lambda entry: entry[0])
            own_rule["examples"] = examples[:EXAMPLES_PER_RULE]

    # ---- output ----
    def print(self) -> None:
        """Print the counts as a table and a summary line."""
        rows = []
        for name, rule in self.rules.items():
            counts = [f"{n:,}" if n else "" for n in (rule["rows"] - rule["dropped"], rule["dropped"])]
            fraction = f"{rule['rows'] / max(self.read, 1):.2%}"
            location = rule["examples"][0][1] if rule["examples"] else ""
            rows.append((name, *counts, fraction, f"{rule['characters']:,}", location))
        headers = ("rule", "edited rows", "dropped rows", "fraction", "characters removed", "example")
        print_table("counts per rule", headers, rows, left=(0, 5))
        languages = [f"{name} {counts['rows']:,} rows" for name, counts in sorted(self.languages.items(), reverse=True)]
        kept = f"kept {self.kept:,} of {self.read:,} rows ({self.kept / max(self.read, 1):.1%})"
        print(f"{kept}: {', '.join(languages)}")

    def to_markdown(self, transform_name: str) -> str:
        """The content of report.md: the counts, then the examples of each rule."""
        lines = [f"# {transform_name}: {self.kept:,} of {self.read:,} rows kept", ""]
        lines += ["| rule | edited | dropped | characters |", "|---|---|---|---|"]
        for name, rule in self.rules.items():
            edited = rule["rows"] - rule["dropped"]
            lines.append(f"| {name} | {edited:,} | {rule['dropped']:,} | {rule['characters']:,} |")
        for name, rule in self.rules.items():
            lines += ["", f"## {name}", ""]
            for _, location, detail, example in rule["examples"]:
                lines.append(f"* `{location}`{' ' if detail else ''}{detail}")
                lines += [f"      {line}" for line in example.split("\n")]
        return "\n".join(lines) + "\n"


def _no_counts() -> dict[str, Any]:
    return {"rows": 0, "dropped": 0, "characters": 0, "examples": []}
