"""Early rejection of requests, and limits of slow and idle connections.

Promises: a text that cannot fit is rejected before it is tokenised, and the check does not change the ids of other
texts; only names of this server are accepted in the Host header, and only its own and listed web pages may send
requests; the total size of large bodies is bounded; a long list of wrong entries gives one error; at max_connections
a new connection replaces an idle one; clients that send tiny chunks, send nothing or never read are disconnected.
"""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest

from model.generate import chat_prompt
from serving.config import ServeConfig
from serving.middleware import host_name
from serving.models import open_models
from tests.serving.server_helpers import run_server, save_random_model

QUESTION = {"messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 2}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "full_sft_32.pth", tokenizer, max_seq_len=8192)


@pytest.fixture(scope="module")
def server(checkpoint):
    with run_server([checkpoint], max_context=128) as server:
        yield server


@pytest.fixture(scope="module")
def strict_server(checkpoint):
    """A server of few connections, short timeouts and a small limit for large bodies."""
    limits = {"max_connections": 5, "client_timeout": 1, "max_request_bytes": 200_000, "max_queued_bytes": 200_000}
    with run_server([checkpoint], **limits, max_context=8192) as server:
        yield server


CLIENT = httpx.Client(timeout=30, verify=False)  # shared and without TLS: loading certificates takes half a second


def address(server):
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def post(server, path="chat/completions", headers=None, **body):
    body = {**QUESTION, **body} if path[:4] == "chat" else body
    headers = {"Connection": "close", **(headers or {})}
    return CLIENT.post(f"{server.url}/v1/{path}", json=body, headers=headers)


# ------------------------------------------------------------------------------------------------ lengths


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "system", "content": LONG}, *QUESTION["messages"]]}, "messages"),
        ("chat/completions", {"messages": [*QUESTION["messages"], {"role": "assistant", "content": LONG}],
                              "continue_final_message": True}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}, "messages"),
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": "é" * 2000}, "prompt"),
        ("completions", {"prompt": ["a", LONG], "echo": True, "max_tokens": 0}, "prompt"),
        ("embeddings", {"input": ["a", LONG]}, "input"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_fit_is_rejected_before_it_is_tokenised(server, monkeypatch, path, body, param):
    (served,) = server.service.models.values()
    tokenised = []
    for name in ("encode_document", "render", "render_unfinished"):
        method = getattr(type(served.tokenizer), name)

        def spy(self, text, *more, method=method):
            tokenised.append(len(str(text)))
            return method(self, text, *more)

        monkeypatch.setattr(type(served.tokenizer), name, spy)
    error = post(server, path, **body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "context is 128 tokens" in error["message"] and "at least" in error["message"]
    assert max(tokenised, default=0) < 1000


def test_long_histories_become_the_same_tokens_as_without_the_check(checkpoint):
    (served,) = open_models(ServeConfig(checkpoint=(checkpoint,), max_context=128, device="cpu")).values()
    turns = [{"role": role, "content": f"{role} {i} " + "中" * (i % 7) * 9} for i in range(80)
             for role in ("user", "assistant")]  # fmt: skip
    num_shortened = 0
    for system in ([], [{"role": "system", "content": "kind"}]):
        for count in range(1, 160, 14):
            messages = [*system, *turns[:count]]
            recent = served.drop_old_turns(messages)
            prompts = [chat_prompt(served.model, served.tokenizer, chat, 8) for chat in (messages, recent)]
            assert prompts[0] == prompts[1]
            num_shortened += len(recent) < len(messages)
    assert num_shortened > 10


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [1] * 300_000}),
        ("chat/completions", {"messages": [{}] * 200_000}),
        ("chat/completions", {"messages": QUESTION["messages"] * 20_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{}] * 200_000}]}),
        ("chat/completions", {"stop": [1] * 300_000}),
        ("completions", {"prompt": [1.5] * 200_000}),
        ("completions", {"prompt": [[None] * 3000] * 64}),
        ("embeddings", {"input": [None] * 150_000}),
    ],
)
def test_a_long_list_of_wrong_entries_costs_one_error(server, path, body):
    started = time.perf_counter()
    response = post(server, path, **body)
    assert response.status_code == 400 and len(response.content) < 1000
    assert time.perf_counter() - started < 2  # an error for each entry takes 3 s on an idle machine


# ------------------------------------------------------------------------------------------------ hosts and origins


def test_only_names_of_this_server_are_accepted(server, checkpoint, tmp_path):
    port = address(server)[1]
    for host, allowed in (
        ("localhost", True), (f"LOCALHOST:{port}", True), ("127.0.0.1:1", True), (f"[::1]:{port}", True),
        ("evil.example", False), (f"evil.example:{port}", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False), ("", False), ("[::1", False), ("0.0.0.0", False),
    ):  # fmt: skip
        for path in ("/v1/models", "/health"):
            response = CLIENT.get(server.url + path, headers={"Host": host})
            assert response.status_code == (200 if allowed else 403), host
        assert post(server, headers={"Host": host}).status_code == (200 if allowed else 403)
    assert "--allowed_hosts evil.example" in CLIENT.get(server.url, headers={"Host": "evil.example"}).text
    (tmp_path / "keys").write_text("b\n")
    with run_server([checkpoint], api_key="a", api_key_file=str(tmp_path / "keys")) as keyed:
        for key, status in (("a", 200), ("b", 200), ("c", 401), ("ab", 401)):
            headers = {"Host": "chat.example", "Authorization": f"Bearer {key}"}
            assert CLIENT.get(f"{keyed.url}/v1/models", headers=headers).status_code == status


def test_web_pages_of_other_hosts_get_403(checkpoint, server):
    for origin, allowed in (
        ("http://localhost:3000", True), ("http://[::1]", True), ("chrome-extension://abcdef", True),
        ("https://evil.example", False), ("null", False), ("http://localhost.evil.example", False), ("http://[", False),
    ):  # fmt: skip
        assert post(server, headers={"Origin": origin}).status_code == (200 if allowed else 403), origin
    with run_server([checkpoint], cors=("https://chat.example.org",)) as other:
        assert post(other, headers={"Origin": "https://chat.example.org"}).status_code == 200
        assert post(other, headers={"Origin": "https://chat.example.org:444"}).status_code == 403
    with run_server([checkpoint], cors=("*",)) as other:
        assert post(other, headers={"Origin": "https://chat.example.org"}).status_code == 200


def test_host_names_are_parsed_from_authorities():
    assert [host_name(text) for text in ("A:80", "[::1]:80", "a", "", "[x", ":80")] == ["a", "::1", "a", "", "", ""]


# ------------------------------------------------------------------------------------------------ bytes and connections


def test_large_bodies_together_are_bounded_and_small_ones_are_not(checkpoint):
    half = b'{"user": "' + b"x" * 150_000
    with run_server([checkpoint], max_request_bytes=200_000, max_queued_bytes=200_000) as server:
        with socket.create_connection(address(server)) as first:
            first.sendall(HEAD + b"Content-Length: 190000\r\n\r\n" + half)
            time.sleep(0.3)
            rejected = post(server, user="x" * 150_000)
            assert rejected.status_code == 429 and rejected.headers["retry-after"] == "1"
            assert rejected.json()["error"]["code"] == "rate_limit_exceeded"
            assert post(server).status_code == 200
        deadline = time.monotonic() + 5
        while post(server, user="x" * 150_000).status_code != 200:  # the first client has disconnected
            assert time.monotonic() < deadline
        assert post(server, user="x" * 210_000).status_code == 413


def is_closed_by_server(connection, seconds=5):
    """Whether the server closes the connection within that time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(
    "sent", [b"", b"P", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n"]
)
def test_a_client_that_does_not_send_is_cut_off(strict_server, sent):
    with socket.create_connection(address(strict_server)) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        assert is_closed_by_server(connection) and time.monotonic() - started < 3


def test_a_body_in_tiny_chunks_is_rejected(server):
    with socket.create_connection(address(server)) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 5000)
        assert is_closed_by_server(connection)
    pieces = [json.dumps({**QUESTION, "user": "x" * 200_000}).encode()]
    pieces = [pieces[0][i : i + 500] for i in range(0, len(pieces[0]), 500)]
    response = CLIENT.post(
        f"{server.url}/v1/chat/completions", content=iter(pieces), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200


def test_header_blocks_are_bounded_for_any_chunking(server):
    for headers in (b"A: " + b"x" * 40_000, b"A: b\r\n" * 8000, b"A: " + b"x" * 10_000):
        with socket.create_connection(address(server)) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n")
            assert connection.recv(100)[9:12] == (b"200" if len(headers) < 12_000 else b"400")


def test_an_idle_connection_is_closed_for_a_new_one_and_an_answer_never_is(strict_server):
    body = {**QUESTION, "messages": [{"role": "user", "content": "1"}], "max_tokens": 8000, "stream": True}
    with CLIENT.stream("POST", f"{strict_server.url}/v1/chat/completions", json=body) as stream:
        pieces = stream.iter_text()
        next(pieces)
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(address(strict_server))) for _ in range(12)]
            assert post(strict_server).status_code == 200
            assert all(is_closed_by_server(connection, 0.4) for connection in idle[:6])
        next(pieces)


def test_connections_above_the_limit_get_503(strict_server):
    body = json.dumps({**QUESTION, "messages": [{"role": "user", "content": "1"}], "max_tokens": 8000, "n": 3})
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body.encode()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(address(strict_server))).sendall(request)
        time.sleep(0.3)
        rejected = CLIENT.get(f"{strict_server.url}/health")
        assert rejected.status_code == 503 and rejected.json()["error"]["code"] == "too_many_connections"
    strict_server.wait_until_idle()
    assert CLIENT.get(f"{strict_server.url}/health").status_code == 200


def test_a_client_that_never_reads_frees_its_slot(strict_server):
    body = {**QUESTION, "messages": [{"role": "user", "content": "1"}], "max_tokens": 8000, "stream": True}
    body = json.dumps({**body, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address(strict_server))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not strict_server.status()["running"]:
            time.sleep(0.01)
        (request,) = next(iter(strict_server.service.schedulers.values())).running.values()
        strict_server.wait_until_idle(20)
        assert len(request.sequence.completion.ids) < 8000, "aborted, not finished"


def test_small_requests_do_not_wait_behind_large_ones(server, monkeypatch):
    """The worker thread of large bodies is kept busy for a second."""
    pool, has_begun = server.service.large_bodies, threading.Event()
    pool.executor.submit(lambda: (has_begun.set(), time.sleep(1)))
    has_begun.wait()
    started = time.perf_counter()
    assert post(server).status_code == 200 and time.perf_counter() - started < 0.9
    assert post(server, user="x" * 50_000).status_code == 200 and time.perf_counter() - started > 0.9
