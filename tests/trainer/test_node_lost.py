"""A node is lost during training: torchrun restarts the processes, and the run resumes from its last save."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, TINY_MODEL_FLAGS, read_jsonl

FLAGS = [*TINY_MODEL_FLAGS, "--device", "cpu", "--dtype", "float32", "--log_interval", "1", "--optimizer", "adamw"]
FLAGS += ["--batch_size", "2", "--epochs", "40", "--eval_interval", "10000", "--save_interval", "20"]


def start_agent(node, port, arguments):
    """Start a torchrun agent that acts as one node: it joins the rendezvous at a port and starts one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "lost"]
    command += ["--rdzv_conf", f"is_host={int(node == 0)}", "--max_restarts", "3", ROOT / "1-pretrain.py", *arguments]
    # Without the variable the surviving agent keeps the store of the first rendezvous, and the restarted agent hangs.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = (arguments[-1].parent / f"agent{node}.txt").open("a")
    return subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )


def child_pids(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def last_step(out):
    log = out / "pretrain_32.jsonl"
    return max((row["step"] for row in read_jsonl(log)), default=0) if log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_run_resumes_after_a_node_is_lost(mode, pretrain_dir, tokenizer_dir, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    arguments = [*FLAGS, "--parallel", mode, "--data_path", pretrain_dir, "--tokenizer", tokenizer_dir]
    arguments += ["--out_dir", out]
    agents = [start_agent(node, port, arguments) for node in (0, 1)]
    try:
        wait_until(lambda: last_step(out) > 45, agents)
        lost = agents[1]  # not the host of the rendezvous
        for pid in [lost.pid, *child_pids(lost.pid)]:
            os.kill(pid, signal.SIGKILL)
        lost.wait()
        agents[1] = start_agent(1, port, arguments)  # the node returns with the same command
        for process in agents:
            assert process.wait(timeout=200) == 0, (tmp_path / "agent0.txt").read_text()[-3000:]
    finally:
        for process in agents:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = "".join((tmp_path / f"agent{node}.txt").read_text() for node in (0, 1))
    assert "resuming after step" in said
    steps = [row["step"] for row in read_jsonl(out / "pretrain_32.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == 40 * 15, "every step once"


def wait_until(true, agents):
    deadline = time.monotonic() + 150
    while not true():
        assert all(process.poll() is None for process in agents)
        assert time.monotonic() < deadline
        time.sleep(0.05)
