"""Promise: the fault injector triggers the requested fault; otherwise the fault tests would pass without a fault."""

import shutil
import signal
import sys

import pytest

from tests.faults.inject import Fault, Injector

SCRIPT = """
import os, pathlib, shutil, subprocess, sys
folder = pathlib.Path(sys.argv[1])
(folder / "new").mkdir()
with (folder / "new" / "a.tmp").open("wb") as file:
    file.write(b"12345678")
    file.flush()
    os.fsync(file.fileno())
os.replace(folder / "new" / "a.tmp", folder / "a")
pathlib.Path(sys.argv[2]).write_text("elsewhere")  # outside the watched folder: not counted
shutil.rmtree(folder / "new")
if len(sys.argv) < 4:
    child = subprocess.Popen([sys.executable, __file__, sys.argv[1], sys.argv[2], "in a child"])
    sys.exit(child.wait())
"""
OPERATIONS = [("mkdir", "new"), ("open", "new/a.tmp"), ("write", "new/a.tmp"), ("fsync", "new/a.tmp")]
OPERATIONS += [("close", "new/a.tmp"), ("rename", "a"), ("rmdir", "new")]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, pidfd and /proc: Linux only")


@pytest.fixture(scope="module")
def injector():
    injector = Injector()
    yield injector
    injector.close()


@pytest.fixture
def run(injector, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "watched").mkdir()

    def start(**fault):
        command = [tmp_path / "script.py", tmp_path / "watched", tmp_path / "elsewhere.txt"]
        return injector.run(command, [tmp_path / "watched"], Fault(**fault))

    return start


def test_operations_of_the_script_and_of_its_child_processes_are_counted(run, tmp_path):
    done = run()
    assert done.code == 0, done.output
    assert done.operations == [(kind, str(tmp_path / "watched" / name)) for kind, name in OPERATIONS * 2]
    assert (tmp_path / "elsewhere.txt").read_text() == "elsewhere"
    only = run(only=r"a\.tmp$")
    assert len(only.operations) == 8, "only operations on one file"


@pytest.mark.parametrize("at", range(1, 2 * len(OPERATIONS) + 1))
def test_a_kill_happens_before_the_chosen_operation(run, tmp_path, at):
    done = run(at=at)
    assert done.code == -signal.SIGKILL and len(done.operations) == at
    if at == 3:
        assert (tmp_path / "watched/new/a.tmp").read_bytes() == b"1234", "half of a write"
    if at == 6:
        assert (tmp_path / "watched/new/a.tmp").read_bytes() == b"12345678" and not (tmp_path / "watched/a").exists()


@pytest.mark.parametrize("at", range(1, len(OPERATIONS) + 1))
def test_an_error_is_raised_by_the_chosen_operation(run, at):
    done = run(at=at, error="EIO")
    assert done.code == 1 and "OSError: [Errno 5] Input/output error" in done.output, done.output


def test_a_lasting_full_disk_still_allows_removal(run, tmp_path):
    done = run(at=3, error="ENOSPC", lasting=True)
    assert done.code == 1 and [kind for kind, _ in done.operations] == ["mkdir", "open", "write", "write", "close"]
    assert "No space left on device" in done.output and (tmp_path / "watched/new/a.tmp").read_bytes() == b""


def test_the_injector_applies_size_limits_signals_and_timed_kills(run, tmp_path):
    assert "File too large" in run(file_size=7).output
    shutil.rmtree(tmp_path / "watched/new")
    assert run(at=1, signal=signal.SIGTERM).code == -signal.SIGTERM
    assert run(seconds=0.001).code == -signal.SIGKILL
