"""Promise: after a signal, a closed terminal, or a killed, stopped or orphaned rank, the training state is saved and
one line gives the reason."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from common.errors import fail_in_one_line
from common.signals import BestEffortStream, Terminated, handle_signals, raise_terminated
from corpus.dataset_writer import dataset_staging_folder
from tests.helpers import ROOT, TINY_MODEL_FLAGS, read_jsonl

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
LONG_RUN_FLAGS = [*TINY_MODEL_FLAGS, "--device", "cpu", "--dtype", "float32", "--batch_size", "4", "--epochs", "4000"]
LONG_RUN_FLAGS += ["--log_interval", "1", "--eval_interval", "1000000", "--save_interval", "20"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def start_training(pretrain_dir, tokenizer_dir, tmp_path):
    """start_training(*launcher, flags=(), **options of Popen) starts pretraining and waits for its first save."""
    started = []

    def start(*launcher, flags=(), **options):
        data = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out"]
        process = start_process(
            [*launcher, ROOT / "1-pretrain.py", *LONG_RUN_FLAGS, *data, *flags], tmp_path, **options
        )
        started.append(process)
        wait_for(lambda: saved_step(tmp_path / "out") and last_step(tmp_path / "out") > 21, process)
        return process

    yield start
    for process in started:
        for pid in [process.pid, *children(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start_process(command, folder, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    with (folder / "out.txt").open("a") as out, (folder / "err.txt").open("a") as err:
        options = {"stdout": out, "stderr": err, "start_new_session": True, **options}
        return subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, **options)


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listing.stdout.split()]


def is_alive(pid):
    """True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def saved_step(out):
    return max((int(folder.name[5:]) for folder in out.glob("*.resume/step_*")), default=0)


def last_step(out):
    log = out / "pretrain_32.jsonl"
    with contextlib.suppress(ValueError, FileNotFoundError):
        return max((row["step"] for row in read_jsonl(log)), default=0)
    return 0


def message_lines(folder):
    lines = (folder / "err.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("error:", "terminated", "interrupted", "Traceback"))]


# ---- one process -----------------------------------------------------------------------------------------------------
def test_a_closed_terminal_saves_before_the_exit(start_training, tmp_path):
    """The test closes a real terminal: the system sends SIGHUP, and every print raises EIO."""
    master, terminal = os.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    session = [sys.executable, "-c", "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
               "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]  # fmt: skip
    process = start_training(*session, **streams)
    os.close(terminal)
    os.close(master)
    assert process.wait(60) == 0
    assert saved_step(tmp_path / "out") == last_step(tmp_path / "out"), "no step is lost"


def test_under_nohup_training_ignores_a_closed_terminal_and_a_closed_pipe(start_training, tmp_path):
    """`nohup python 1-pretrain.py | tee log` after tee exits: SIGHUP is ignored, prints raise EPIPE."""
    reader, writer = os.pipe()
    process = start_training("nohup", sys.executable, stdout=writer)
    os.close(writer)
    os.close(reader)
    process.send_signal(signal.SIGHUP)
    step = last_step(tmp_path / "out")
    wait_for(lambda: last_step(tmp_path / "out") > step + 20, process)
    process.terminate()
    process.send_signal(signal.SIGTERM)  # a second signal does not interrupt the save
    assert process.wait(60) == 0
    assert saved_step(tmp_path / "out") == last_step(tmp_path / "out")


def test_writes_to_a_closed_pipe_are_ignored(tmp_path):
    reader, writer = os.pipe()
    stream = BestEffortStream(os.fdopen(writer, "w", buffering=1))
    os.close(reader)
    assert [stream.write("lost\n") for _ in range(3)] == [5, 5, 5]
    stream.flush()
    assert stream.fileno() == writer and not stream.isatty()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_prints_one_line_after_the_cleanup(number, code, capsys):
    cleaned = []
    with pytest.raises(SystemExit) as ended, fail_in_one_line():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            cleaned.append(True)
            raise
    assert ended.value.code == code and cleaned == [True]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_ignored_signal_stays_ignored_and_sighup_reaches_a_library_as_sigterm():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals(raise_terminated):
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        seen = []
        with handle_signals(raise_terminated):
            ours = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))  # as uvicorn does
            signal.raise_signal(signal.SIGHUP)
            assert seen == [signal.SIGTERM]
            signal.signal(signal.SIGTERM, ours)
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_data_process_leaves_no_partial_output(number, tmp_path, num_attacks):
    """After the signal only the staging folder exists; the same command completes it."""
    if number == signal.SIGHUP and num_attacks(True, False):
        pytest.skip("make faults")
    source, out = tmp_path / "rows.jsonl", tmp_path / "clean"
    text = (
        "It is said that the sun rises over the river, and that the {} people of the village were there to see it. "
        "They were with their children, and this is what they told us of the day: it was a good one for all of them."
    )
    rows = [json.dumps({"text": text.format(i)}) for i in range(30_000)]
    source.write_text("\n".join(rows) + "\n")
    command = [sys.executable, ROOT / "data_process.py", "clean", source, "--out_dir", out]
    process = start_process(command, tmp_path)
    wait_for(lambda: list(dataset_staging_folder(out).glob("*")), process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert message_lines(tmp_path) == [f"terminated by {number.name}"]
    assert not out.exists()
    assert start_process(command, tmp_path).wait(240) == 0
    assert not dataset_staging_folder(out).exists() and out.is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_exits_with_one_line(number, tiny_parent, tmp_path, num_attacks):
    if number == signal.SIGTERM and num_attacks(True, False):
        pytest.skip("make faults")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = [sys.executable, ROOT / "serve_openai_api.py", "--checkpoint", tiny_parent, "--device", "cpu"]
    process = start_process([*server, "--port", port], tmp_path)

    def answers():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").status == 200
        return False

    wait_for(answers, process)
    process.send_signal(number)
    assert process.wait(60) == 143
    assert (tmp_path / "err.txt").read_text().splitlines() == ["terminated by SIGTERM"]


# ---- several processes -----------------------------------------------------------------------------------------------
def check_resumes(start_training, tmp_path):
    """The same command resumes from the last save, and a SIGTERM to the launcher saves."""
    step = saved_step(tmp_path / "out")
    process = start_training(*TORCHRUN)
    assert f"resuming after step {step} of" in (tmp_path / "out.txt").read_text()
    process.terminate()
    process.wait(60)
    assert saved_step(tmp_path / "out") >= step
    return True


def test_a_killed_rank_is_named_and_the_others_end(start_training, tmp_path, num_attacks, record_attacks):
    for lost in (1, 0)[: num_attacks(1, 2)]:
        launcher = start_training(*TORCHRUN)
        ranks = children(launcher.pid)
        os.kill(ranks[lost], signal.SIGKILL)
        assert launcher.wait(60) == 1
        (line,) = message_lines(tmp_path)[:1]
        assert f"error: rank {lost} (process {ranks[lost]} on " in line and "the same command resumes" in line
        assert "exitcode  : 2" in (tmp_path / "err.txt").read_text()
        (tmp_path / "err.txt").write_text("")
    assert check_resumes(start_training, tmp_path) if num_attacks(False, True) else True
    record_attacks("ranks killed", num_attacks(1, 2), named=num_attacks(1, 2))


def test_a_killed_launcher_leaves_no_process_and_loses_no_step(start_training, tmp_path):
    launcher = start_training(*TORCHRUN)
    ranks = children(launcher.pid)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(is_alive, ranks)), seconds=60)
    assert saved_step(tmp_path / "out") == last_step(tmp_path / "out"), "the ranks save and exit"
    assert message_lines(tmp_path) == [] and "run again to resume" in (tmp_path / "out.txt").read_text()


def test_a_stopped_rank_is_named_and_the_others_end(start_training, tmp_path, num_attacks, record_attacks):
    for stopped in (1, 0)[: num_attacks(1, 2)]:
        launcher = start_training(*TORCHRUN, flags=["--dist_timeout", "6"])
        ranks = children(launcher.pid)
        os.kill(ranks[stopped], signal.SIGSTOP)
        wait_for(lambda rank=ranks[1 - stopped]: not is_alive(rank), seconds=60)
        os.kill(ranks[stopped], signal.SIGKILL)  # torchrun does the same after --shutdown-timeout
        assert launcher.wait(60) == 1
        (line,) = message_lines(tmp_path)[:1]
        assert f"error: rank {stopped} (process {ranks[stopped]} on " in line and "has sent no heartbeat" in line
        (tmp_path / "err.txt").write_text("")
    record_attacks("ranks stopped", num_attacks(1, 2), named=num_attacks(1, 2))


def test_a_rank_that_does_not_join_a_collective_is_named(tmp_path, num_attacks):
    """One rank sleeps in its main thread: its heartbeat continues, the collective of the other rank times out."""
    if num_attacks(True, False):
        pytest.skip("make faults")
    text = run_ranks(tmp_path, "if dist.rank == 1: time.sleep(60)\ndist.all_reduce_sum([1.0])")
    assert "error: rank 1 (process " in text and "is alive and has not taken part for 4 s (--dist_timeout)" in text


def test_work_of_one_rank_may_take_longer_than_the_timeout(tmp_path, num_attacks):
    """`rank0_first` (used to tokenize chats) and `barrier` have no time limit as long as all ranks are alive."""
    if num_attacks(True, False):
        pytest.skip("make faults")
    work = "with dist.rank0_first():\n    if dist.is_rank0: time.sleep(25)\n"
    work += "print('done', dist.rank, dist.all_reduce_sum([1.0]))"
    text = run_ranks(tmp_path, work, code=0)
    assert "done 0 [2.0]" in text and "done 1 [2.0]" in text


def test_an_error_of_one_rank_is_printed_once(tmp_path, num_attacks):
    if num_attacks(True, False):
        pytest.skip("make faults")
    text = run_ranks(tmp_path, "if dist.is_rank0: raise UserError('the disk is full')\ndist.all_reduce_sum([1.0])")
    assert [line for line in text.splitlines() if line.startswith("error")] == ["error: the disk is full"]


def run_ranks(tmp_path, work, code=1):
    """Run `work` on two ranks with a timeout of 4 seconds; returns their output."""
    lines = "".join(f"        {line}\n" for line in work.splitlines())
    (tmp_path / "ranks.py").write_text(
        "import os, time\nos.environ['TORCH_CPP_LOG_LEVEL'] = 'ERROR'\n"
        "from common.errors import UserError, fail_in_one_line\nfrom trainer.distributed import init_distributed\n"
        f"with fail_in_one_line():\n    with init_distributed('cpu', 'float32', 0, 4) as dist:\n{lines}"
    )
    assert start_process([*TORCHRUN, tmp_path / "ranks.py"], tmp_path).wait(120) == code
    return (tmp_path / "out.txt").read_text() + (tmp_path / "err.txt").read_text()
