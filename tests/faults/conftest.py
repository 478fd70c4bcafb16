"""Fixtures of the fault tests. Each test records its number of attacks and their outcomes; pytest_terminal_summary in
tests/conftest.py prints a table of them.

`make test` runs five minutes of attacks; `make faults` sets FAULTS=full and runs all of them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.faults.stages import FaultHarness

FULL = os.environ.get("FAULTS") == "full"


@pytest.fixture
def num_attacks() -> Callable[[int, int], int]:
    """num_attacks(short, full): number of attacks in `make test` and in `make faults`."""
    return lambda short, full: full if FULL else short


@pytest.fixture
def record_attacks(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record_attacks("flipped bits of a .pth", 300, refused=300): counts for the table at the end of the run."""

    def record(kind: str, number: int, **outcomes: int) -> None:
        request.node.user_properties.append(("attacks", [kind, number, outcomes]))

    return record


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[FaultHarness]":
    """Inputs for every command that writes files, and an injector process that runs the commands with faults."""
    if sys.platform != "linux":
        pytest.skip("forks, pidfd and /proc: Linux only")
    from tests.faults.mirror import mirror
    from tests.faults.stages import FaultHarness

    with mirror() as address:
        harness = FaultHarness(tmp_path_factory.mktemp("lab"), address)
        yield harness
        harness.injector.close()
