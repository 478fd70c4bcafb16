"""One writer per output: the error of a second writer describes the first; a kill releases the lock."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.locks import lock_output
from tests.helpers import ROOT

HOLDER_SCRIPT = "import sys, time; sys.argv[0] = 'hold.py'\nfrom common.locks import lock_output\n" + (
    "with lock_output(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def start_holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER_SCRIPT, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_gets_the_holder_in_the_error(tmp_path):
    holder = start_holder(tmp_path / "data")
    try:
        with pytest.raises(
            UserError, match=rf"data is being written by `hold.py .*` \(process {holder.pid} on .*, since 2"
        ):
            with lock_output(tmp_path / "data"):
                pass
        with lock_output(tmp_path / "other"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_kill_releases_the_lock_and_the_next_writer_removes_leftovers(tmp_path):
    holder = start_holder(tmp_path / "data")
    (tmp_path / f".data.{holder.pid}.tmp").write_text("half")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with lock_output(tmp_path / "data"):
        assert not (tmp_path / f".data.{holder.pid}.tmp").exists()
    assert time.monotonic() - started < 5


def test_an_uncreatable_folder_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        with lock_output(tmp_path / "file" / "data"):
            pass


def test_one_process_may_lock_again_after_it_has_released(tmp_path):
    for _ in range(2):
        with lock_output(tmp_path / "data"):
            pass


def test_wait_prints_the_holder_and_runs_after_it(tmp_path, capsys):
    holder = start_holder(tmp_path / "data")
    threading.Timer(0.5, holder.kill).start()
    with lock_output(tmp_path / "data", wait=True):
        assert holder.wait(timeout=5) == -signal.SIGKILL
    assert re.search(r"data is being written by `hold.py .*: waiting for it\n", capsys.readouterr().out)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_prints_one_note_and_continues(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / ".data.17.tmp").write_text("another machine may be writing it")
    with lock_output(tmp_path / "data"):
        (tmp_path / "data").write_text("x")
    assert capsys.readouterr().err.count("\n") == 1 and (tmp_path / ".data.17.tmp").exists()
    monkeypatch.undo()
    with lock_output(tmp_path / "data"):
        assert not (tmp_path / ".data.17.tmp").exists()


def test_leftovers_of_the_holder_file_are_removed(tmp_path):
    (tmp_path / "..data.lock.json.17.tmp").write_text("")
    with lock_output(tmp_path / "data"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", ".data.lock.json"]
