"""Promise: a command that is killed at any point and started again writes the same files as an uninterrupted run.

`make faults` sends SIGKILL before every file operation (for consecutive writes to a file: the first, the middle and the
last, each half written) and at 20 random times, up to three kills in a row. `make test` sends a few. After each kill,
each final name has the older result, the new one or a readable step. The repeated command exits with 0, its files equal
those of an uninterrupted run (weights and shards bit by bit), no temporary file is left and no lock is held.
"""

import contextlib
import random
import re
from collections.abc import Iterator, Sequence

import pytest

from tests.faults.inject import Fault, RunResult
from tests.faults.stages import READ_ONLY, STAGE_NAMES, STAGES, FaultHarness, Stage
from tests.helpers import ROOT, run_here

ALL_OPERATIONS = 1_000_000
OWN_FILES = {"demo": r"demo/\.?(steps|report)\.json"}  # its steps are separate stages


def choose_operations(operations: Sequence[tuple[str, str]], number: int) -> list[int]:
    """At most `number` operation numbers, from 1; for consecutive writes to a file the first, middle and last one."""
    writes: dict[str, list[int]] = {}
    chosen = set()
    for at, (kind, path) in enumerate(operations, 1):
        if kind == "write":
            writes.setdefault(path, []).append(at)
            continue
        chosen.add(at)
        if row := writes.pop(path, []):
            chosen |= {row[0], row[len(row) // 2], row[-1]}
    for row in writes.values():
        chosen |= {row[0], row[len(row) // 2], row[-1]}
    found = sorted(chosen)
    return found if len(found) <= number else [found[(2 * i + 1) * len(found) // (2 * number)] for i in range(number)]


def last_lines(done: RunResult) -> str:
    return " | ".join(done.output.split("\n")[-4:])[-500:]


@contextlib.contextmanager
def collect_failures(failures: list[str]) -> Iterator[None]:
    """Append failed assertions to the list, so that the remaining attacks run."""
    try:
        yield
    except (AssertionError, TimeoutError) as error:
        failures.append(str(error).split("\nassert ")[0][-1500:])


def recover_and_check(harness: FaultHarness, stage: Stage, after: str) -> None:
    done = harness.run(stage)
    assert done.code == 0, f"{after}: the same command ends with {done.code}: {last_lines(done)}"
    harness.check_finished(stage, after)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_kill_at_any_file_operation_does_not_change_the_result(name, harness, num_attacks, record_attacks):
    stage = harness.stage(name, twice=bool(num_attacks(0, 1)))
    failures: list[str] = []
    only = OWN_FILES.get(name, "")
    operations = [operation for operation in harness.undisturbed[name].operations if re.search(only, operation[1])]
    chosen = choose_operations(operations, num_attacks(1, ALL_OPERATIONS))
    struck = 0
    for at in chosen:
        harness.reset_work_folder(stage)
        killed = harness.run(stage, Fault(at=at, only=only))
        struck += killed.code == -9
        after = f"{name} killed at operation {at}, {' '.join(killed.operations[-1])}"
        with collect_failures(failures):
            # 0: this run had fewer operations.
            assert killed.code in (-9, 0), f"{after}: {killed.code} {last_lines(killed)}"
            harness.check_no_partial_output(stage, after)
            recover_and_check(harness, stage, after)
    record_attacks(f"{name}: kills at file operations", len(chosen), killed=struck, equal=len(chosen) - len(failures))
    assert not failures, f"{len(failures)} of {len(chosen)}:\n" + "\n".join(failures)
    assert struck >= 0.9 * len(chosen)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_kill_at_any_time_does_not_change_the_result(name, harness, num_attacks, record_attacks):
    stage = harness.stage(name)
    failures: list[str] = []
    number, seed = num_attacks(0 if name == "demo" else 1, 20), random.Random(name)
    kills = struck = 0
    for _ in range(number):
        harness.reset_work_folder(stage)
        moments = [seed.uniform(0, harness.undisturbed[name].seconds) for _ in range(seed.randint(1, 3))]
        after = f"{name} killed after {', '.join(f'{moment:.3f}' for moment in moments)} s"
        with collect_failures(failures):
            for moment in moments:
                killed = harness.run(stage, Fault(seconds=moment))
                kills, struck = kills + 1, struck + (killed.code == -9)
                assert killed.code in (-9, 0), f"{after}: {killed.code} {last_lines(killed)}"
                harness.check_no_partial_output(stage, after)
            recover_and_check(harness, stage, after)
    record_attacks(f"{name}: kills at random moments", kills, killed=struck, equal=kills - len(failures))
    assert not failures, f"{len(failures)} of {number}:\n" + "\n".join(failures)
    assert struck >= kills / 2 or kills < 10  # a kill near the end may come after the exit


def test_every_command_that_writes_is_attacked(monkeypatch, capsys):
    """Each script, each module with a __main__ part and each subcommand of data_process.py is a stage or read-only."""
    started = {path.name for path in ROOT.glob("*.py")}
    for path in ROOT.glob("*/*.py"):
        if path.parent.name != "tests" and re.search(
            r'^if __name__ == "__main__"', path.read_text(encoding="utf-8"), re.M
        ):
            started.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    commands = [stage.command.replace("tests.faults.small_demo", "demo.py").removeprefix("-m ") for stage in STAGES]
    assert started == {command.split()[0] for command in commands} | READ_ONLY

    subcommands = {command.split()[1] for command in commands if command.startswith("data_process.py")}
    help_text = run_here(monkeypatch, capsys, "data_process.py", "--help").stdout
    assert subcommands == set(re.search(r"pretrain\|[\w|]+", help_text)[0].split("|"))
