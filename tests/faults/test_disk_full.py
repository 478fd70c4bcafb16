"""A full, broken or read-only disk ends a command with one line and exit code 2, and costs nothing that was there.

`make faults`: at every file operation of every command (of a row of writes to one file: the first, the middle and the
last) one of: no space from there on, one I/O error, read-only from there on. `make test`: a few of each. Then a limit
on the size of files, which native writers meet too, and a real file system (tmpfs) with too little space.

An error where something old is removed may be passed over: then the exit code is 0 and the result is complete. In
every case what has a final name is the older result, the new one or a readable step; the same command then succeeds.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.faults.inject import Done, Fault
from tests.faults.mirror import mirror
from tests.faults.stages import NAMES, Lab, Stage
from tests.faults.test_kill_matrix import ALL, OWN_FILES, last_lines, noted, points, recover

FAULTS = (
    Fault(error="ENOSPC", lasting=True),
    Fault(error="EIO"),
    Fault(error="EROFS", lasting=True),
)


def check_one_line(done: Done, after: str) -> None:
    """Exit code 2 and one line that begins with error:, or exit code 0."""
    assert done.code in (0, 2), f"{after}: exit code {done.code}: {last_lines(done)}"
    assert "Traceback" not in done.output, f"{after}: {last_lines(done)}"
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == (done.code == 2), f"{after}: {last_lines(done)}"


def attack(lab: Lab, stage: Stage, fault: Fault, failures: list[str]) -> int:
    """Run the stage under the fault, check, and run it again. Returns the exit code of the first run."""
    lab.begin(stage)
    done = lab.run(stage, fault)
    where = (
        " ".join(done.operations[fault.at - 1]) if 0 < fault.at <= len(done.operations) else f"{fault.file_size} bytes"
    )
    after = f"{stage.name}, {fault.error or 'EFBIG'} at operation {fault.at}, {where}"
    with noted(failures):
        check_one_line(done, after)
        lab.check_whole(stage, after)
    with noted(failures):
        recover(lab, stage, after)
    return done.code


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_an_error_at_any_file_operation_is_one_line_and_loses_nothing(name, lab, scaled, attacks):
    stage = lab.stage(name)
    failures: list[str] = []
    only = OWN_FILES.get(name, "")
    operations = [operation for operation in lab.undisturbed[name].operations if re.search(only, operation[1])]
    chosen = points(operations, scaled(0 if name == "demo" else 1, ALL))  # the demo's scripts are stages of their own
    codes = []
    for number, at in enumerate(chosen, NAMES.index(name)):
        kind = FAULTS[number % len(FAULTS)]
        fault = Fault(at=at, error=kind.error, lasting=kind.lasting, only=only)
        codes.append(attack(lab, stage, fault, failures))
    attacks(f"{name}: I/O errors at file operations", len(codes), refused=codes.count(2), passed_over=codes.count(0))
    assert not failures, f"{len(failures)} of {len(chosen)}:\n" + "\n".join(failures)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_a_place_that_cannot_be_written_is_one_line(name, lab, scaled, attacks):
    """Read-only from the start, access denied from the start, and files that may not grow."""
    stage = lab.stage(name)
    failures: list[str] = []
    largest = max(path.stat().st_size for path in lab.work.rglob("*") if path.is_file())
    faults = [Fault(at=1, error="EROFS", lasting=True)]
    if scaled(0, 1):
        faults += [Fault(at=1, error="EACCES", lasting=True)]
        faults += [Fault(file_size=size) for size in (largest // 2, largest - 1)]
    codes = [attack(lab, stage, fault, failures) for fault in faults]
    attacks(f"{name}: read-only places and limits", len(codes), refused=codes.count(2))
    assert not failures, f"{len(failures)} of {len(codes)}:\n" + "\n".join(failures)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A lab on a tmpfs that only its scripts see: no rights are needed for that where namespaces are allowed."""
    can = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    if not can:
        pytest.skip("`unshare -rm` is not allowed here: no file system can be mounted")
    folder = tmp_path_factory.mktemp("disk")
    (folder / "mounted").mkdir()
    with mirror() as address:
        lab = Lab(folder, address, folder / "mounted")
        yield lab
        lab.injector.close()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_a_disk_that_is_too_small_is_one_line_and_loses_nothing(name, scaled, attacks, request):
    """0, 1/8, ... 8/8 of the space that the older and the new result take together is free when the command begins."""
    if not scaled(0, 1):
        pytest.skip("a part of `make faults`")
    lab = request.getfixturevalue("small_disk")
    stage, ballast = lab.stage(name), lab.view.parent / "ballast"
    need = sum(path.stat().st_size for path in lab.view.rglob("*") if path.is_file()) * 2
    failures: list[str] = []
    codes = []
    for eighths in range(9):
        lab.begin(stage)
        disk = os.statvfs(lab.view)
        ballast.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - need * eighths // 8)))
        done = lab.run(stage)
        codes.append(done.code)
        after = f"{name} with {need * eighths // 8} bytes free"
        with noted(failures):
            check_one_line(done, after)
            lab.check_whole(stage, after)
        ballast.unlink()
        with noted(failures):
            recover(lab, stage, after)
    attacks(f"{name}: disks that are too small", len(codes), refused=codes.count(2), large_enough=codes.count(0))
    assert not failures, f"{len(failures)} of {len(codes)}:\n" + "\n".join(failures)
