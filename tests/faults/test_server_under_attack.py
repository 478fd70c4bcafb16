"""Promise: a server process under attack (attackers.py) serves a normal client at the same time.

During malformed requests, floods of large bodies, idle connections, slow senders and clients that do not read, the
normal client gets the same text within three times its usual latency. No request gets a 5xx or adds a line to the
server's log, memory is bounded, and afterwards no request is running or waiting.
"""

import collections
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers import ROOT
from tests.serving.server_helpers import save_random_model

CLIENT_TIMEOUT = 2  # seconds, --client_timeout of the server
QUESTION = {"messages": [{"role": "user", "content": "1"}], "temperature": 0, "max_tokens": 60}
MEGABYTE = 2**20


class Server:
    """A process of serve_openai_api.py and a client for it."""

    def __init__(self, checkpoint, log):
        self.log = log
        command = [sys.executable, "serve_openai_api.py", "--checkpoint", checkpoint, "--port", "0"]
        command += ["--client_timeout", str(CLIENT_TIMEOUT), "--max_context", "8192", "--max_connections", "64"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("MENGYA_API_KEY", None)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.process.stdout.readline()
        self.port = int(self.process.stdout.readline().split("/v1")[0].rpartition(":")[2])

    def ask(self, method="POST", path="/v1/chat/completions", body=QUESTION):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 200, answer
        return answer

    def text(self):
        return self.ask()["choices"][0]["message"]["content"]

    def seconds(self):
        """Latency of one request; checks the text of the answer."""
        started = time.perf_counter()
        assert self.text() == self.usual_text
        return time.perf_counter() - started

    def status(self):
        return self.ask("GET", "/health")["models"]["full_sft_32"]

    def memory(self):
        """Resident memory in MB."""
        return psutil.Process(self.process.pid).memory_info().rss / MEGABYTE

    def wait_until_empty(self, seconds=10):
        deadline = time.monotonic() + seconds
        while (status := self.status())["running"] or status["waiting"]:
            assert time.monotonic() < deadline, status
            time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    checkpoint = save_random_model(folder / "full_sft_32.pth", tokenizer, max_seq_len=8192)
    server = Server(checkpoint, folder / "errors.txt")
    server.usual_text = server.text()
    yield server
    server.process.send_signal(signal.SIGINT)
    server.process.wait(20)


def median_answer_seconds(server):
    return statistics.median(server.seconds() for _ in range(5))


def attack_server(server, kind, number):
    """Attack while the normal client sends requests; up to three tries, as other processes slow the machine too.

    Returns the outcomes of the attackers, and the client's latency in percent of its latency without an attack.
    """
    for _ in range(3):
        outcomes, client_stats, times = attack_server_once(server, kind, number)
        assert server.log.read_text() == ""
        if client_stats["percent_of_quiet_time"] <= 300:
            return outcomes, client_stats
    raise AssertionError((kind, client_stats, times))


def attack_server_once(server, kind, number):
    """Repeat the attack until the normal client has sent five requests."""
    quiet_times, memory, times = [median_answer_seconds(server)], [], []
    outcomes = collections.Counter()
    command = [sys.executable, "tests/faults/attackers.py", kind, str(server.port), str(number)]
    before = server.memory()
    while len(times) < 5:
        attackers = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while attackers.poll() is None:
            times.append(server.seconds())
            memory.append(server.memory())
        assert attackers.returncode == 0
        outcomes.update(json.loads(attackers.stdout.read()))
    server.wait_until_empty()
    quiet_times.append(median_answer_seconds(server))
    percent = round(100 * statistics.median(times) / max(quiet_times))
    return outcomes, {"MB_more": round(max(memory) - before), "percent_of_quiet_time": percent}, times


def test_malformed_requests_are_refused(server, num_attacks, record_attacks):
    outcomes, client_stats = attack_server(server, "malformed", num_attacks(150, 2000))
    assert not [status for status in outcomes if status[0] == "5"] and outcomes["400"] > outcomes.total() / 2, outcomes
    assert client_stats["MB_more"] < 60
    record_attacks("malformed requests to the server", outcomes.total(), **outcomes, **client_stats)


def test_floods_of_large_bodies_leave_the_server_responsive(server, num_attacks, record_attacks):
    outcomes, client_stats = attack_server(server, "flood", num_attacks(60, 600))
    assert not outcomes.keys() - {"200", "400", "404", "429", "closed"}, outcomes
    assert client_stats["MB_more"] < 150
    record_attacks("bodies of 1 MB", outcomes.total(), **outcomes, **client_stats)


def test_idle_connections_do_not_block_clients(server, num_attacks, record_attacks):
    outcomes, client_stats = attack_server(server, "idle", num_attacks(100, 500))  # --max_connections is 64
    record_attacks("idle connections", outcomes.total(), **client_stats)


def test_slow_senders_are_cut_off(server, num_attacks, record_attacks):
    outcomes, client_stats = attack_server(server, "slow", num_attacks(16, 60))
    assert outcomes["closed"] and not outcomes["open"]
    record_attacks("senders of a byte every 50 ms", outcomes.total(), **outcomes, **client_stats)


def test_clients_that_never_read_are_cut_off(server, num_attacks, record_attacks):
    outcomes, client_stats = attack_server(server, "unread", num_attacks(2, 4))
    assert outcomes["cut_off"] == outcomes.total()
    record_attacks("clients that never read", outcomes.total(), **outcomes, **client_stats)


def test_memory_does_not_grow_with_requests(server, num_attacks, record_attacks):
    number = num_attacks(200, 2000)
    bodies = [{**QUESTION, "max_tokens": 3}, {**QUESTION, "max_tokens": 3, "logprobs": True, "top_logprobs": 20}]
    bodies += [{**QUESTION, "max_tokens": 2, "user": "x" * 100_000}]
    memory = []
    for i in range(number + 50):
        server.ask(body=bodies[i % len(bodies)])
        if i >= 50:
            memory.append(server.memory())
    assert memory[-1] - memory[0] < 20
    record_attacks("requests with constant memory", number, MB_more=round(memory[-1] - memory[0]))
