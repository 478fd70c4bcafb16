"""Promise: on a full, broken or read-only disk a command ends with one line and exit code 2 and keeps older results.

`make faults` injects one fault at every file operation of every command (for consecutive writes to a file: the first,
the middle and the last): no space from that operation, one I/O error, or read-only from that operation. `make test`
injects a few. Further tests limit the file size, which also applies to native code, and use a tmpfs that is too small.

A command may ignore an error while it deletes an old file: then the exit code is 0 and the result is complete. In all
cases each final name has the older result, the new one or a readable step, and repeating the command succeeds.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.faults.inject import Fault, RunResult
from tests.faults.mirror import mirror
from tests.faults.stages import STAGE_NAMES, FaultHarness, Stage
from tests.faults.test_kill_matrix import (
    ALL_OPERATIONS,
    OWN_FILES,
    choose_operations,
    collect_failures,
    last_lines,
    recover_and_check,
)

FAULTS = (
    Fault(error="ENOSPC", lasting=True),
    Fault(error="EIO"),
    Fault(error="EROFS", lasting=True),
)


def check_error_line(done: RunResult, after: str) -> None:
    """Exit code 2 and one line that begins with "error: ", or exit code 0."""
    assert done.code in (0, 2), f"{after}: exit code {done.code}: {last_lines(done)}"
    assert "Traceback" not in done.output, f"{after}: {last_lines(done)}"
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == (done.code == 2), f"{after}: {last_lines(done)}"


def run_with_fault(harness: FaultHarness, stage: Stage, fault: Fault, failures: list[str]) -> int:
    """Run the stage with the fault, check its output, and run it again. Returns the exit code of the first run."""
    harness.reset_work_folder(stage)
    done = harness.run(stage, fault)
    where = (
        " ".join(done.operations[fault.at - 1]) if 0 < fault.at <= len(done.operations) else f"{fault.file_size} bytes"
    )
    after = f"{stage.name}, {fault.error or 'EFBIG'} at operation {fault.at}, {where}"
    with collect_failures(failures):
        check_error_line(done, after)
        harness.check_no_partial_output(stage, after)
    with collect_failures(failures):
        recover_and_check(harness, stage, after)
    return done.code


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_an_error_at_any_file_operation_is_one_line_and_loses_nothing(name, harness, num_attacks, record_attacks):
    stage = harness.stage(name)
    failures: list[str] = []
    only = OWN_FILES.get(name, "")
    operations = [operation for operation in harness.undisturbed[name].operations if re.search(only, operation[1])]
    chosen = choose_operations(
        operations, num_attacks(0 if name == "demo" else 1, ALL_OPERATIONS)
    )  # the scripts of the demo are separate stages
    codes = []
    for number, at in enumerate(chosen, STAGE_NAMES.index(name)):
        kind = FAULTS[number % len(FAULTS)]
        fault = Fault(at=at, error=kind.error, lasting=kind.lasting, only=only)
        codes.append(run_with_fault(harness, stage, fault, failures))
    record_attacks(f"{name}: I/O errors at file operations", len(codes), refused=codes.count(2), ignored=codes.count(0))
    assert not failures, f"{len(failures)} of {len(chosen)}:\n" + "\n".join(failures)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in STAGE_NAMES if name != "demo"])
def test_an_unwritable_path_is_one_line(name, harness, num_attacks, record_attacks):
    """Read-only or access denied from the first operation, and limits of the file size."""
    stage = harness.stage(name)
    failures: list[str] = []
    largest = max(path.stat().st_size for path in harness.work.rglob("*") if path.is_file())
    faults = [Fault(at=1, error="EROFS", lasting=True)]
    if num_attacks(0, 1):
        faults += [Fault(at=1, error="EACCES", lasting=True)]
        faults += [Fault(file_size=size) for size in (largest // 2, largest - 1)]
    codes = [run_with_fault(harness, stage, fault, failures) for fault in faults]
    record_attacks(f"{name}: read-only paths and size limits", len(codes), refused=codes.count(2))
    assert not failures, f"{len(failures)} of {len(codes)}:\n" + "\n".join(failures)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A harness on a small tmpfs in a mount namespace, which needs no root where user namespaces are allowed."""
    is_allowed = (
        shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    )
    if not is_allowed:
        pytest.skip("`unshare -rm` is not allowed here: no file system can be mounted")
    folder = tmp_path_factory.mktemp("disk")
    (folder / "mounted").mkdir()
    with mirror() as address:
        harness = FaultHarness(folder, address, folder / "mounted")
        yield harness
        harness.injector.close()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in STAGE_NAMES if name != "demo"])
def test_a_disk_that_is_too_small_is_one_line_and_loses_nothing(name, num_attacks, record_attacks, request):
    """The free space at the start is 0, 1/8, ... 8/8 of the size of the older and the new result together."""
    if not num_attacks(0, 1):
        pytest.skip("a part of `make faults`")
    harness = request.getfixturevalue("small_disk")
    stage, ballast = harness.stage(name), harness.view.parent / "ballast"
    need = sum(path.stat().st_size for path in harness.view.rglob("*") if path.is_file()) * 2
    failures: list[str] = []
    codes = []
    for eighths in range(9):
        harness.reset_work_folder(stage)
        disk = os.statvfs(harness.view)
        ballast.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - need * eighths // 8)))
        done = harness.run(stage)
        codes.append(done.code)
        after = f"{name} with {need * eighths // 8} bytes free"
        with collect_failures(failures):
            check_error_line(done, after)
            harness.check_no_partial_output(stage, after)
        ballast.unlink()
        with collect_failures(failures):
            recover_and_check(harness, stage, after)
    record_attacks(f"{name}: disks that are too small", len(codes), refused=codes.count(2), large_enough=codes.count(0))
    assert not failures, f"{len(failures)} of {len(codes)}:\n" + "\n".join(failures)
