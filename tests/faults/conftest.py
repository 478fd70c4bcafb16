"""The attacks: each test says how often it attacked, and the run ends with a table of these counts.

`make test` runs a part of five minutes; `make faults` sets FAULTS=full and runs everything.
"""

import os
from collections.abc import Callable

import pytest

FULL = os.environ.get("FAULTS") == "full"


@pytest.fixture
def scaled() -> Callable[[int, int], int]:
    """scaled(short, full): how often to attack, in `make test` and in `make faults`."""
    return lambda short, full: full if FULL else short


@pytest.fixture
def attacks(request: pytest.FixtureRequest) -> Callable[..., None]:
    """attacks("flipped bits of a .pth", 300, found=300): counts for the table at the end of the run."""

    def note(kind: str, number: int, **outcomes: int) -> None:
        request.node.user_properties.append(("attacks", [kind, number, outcomes]))

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [value for report in reports if getattr(report, "when", "") == "call"
            for name, value in report.user_properties if name == "attacks"]  # fmt: skip
    if rows:
        terminalreporter.section("attacks")
    for kind, number, outcomes in sorted(rows, key=lambda row: row[0]):
        shown = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in outcomes.items())
        terminalreporter.write_line(f"{number:>9,}  {kind}" + (f": {shown}" if shown else ""))
