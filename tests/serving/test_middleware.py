"""API keys, CORS, body limits, a full queue, and clients that disconnect.

Promises: requests without the key get 401; only listed origins get CORS headers; a body that is too large or not JSON
is rejected unread; a full queue answers 429 with Retry-After; a client that disconnects frees its slot at once, whether
its request is streamed, not streamed or waiting; with 50 clients, 10 of which disconnect, no request fails, no slot
stays occupied and memory stays flat.
"""

import asyncio
import contextlib
import gc
import json
import threading
import time

import httpx
import psutil
import pytest

from tests.serving.server_helpers import run_server, save_random_model

QUESTION = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}
# The model of these tests never ends its answer to this question.
LONG = {"messages": [{"role": "user", "content": "1"}], "temperature": 0, "max_tokens": 4000, "stream": True}
JSON_HEADERS = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "full_sft_32.pth", tokenizer, max_seq_len=8192)


@pytest.fixture(scope="module")
def server_with_key(checkpoint):
    flags = {"api_key": "secret-1", "max_request_bytes": 2000, "cors": ("https://chat.example.org",)}
    with run_server([checkpoint], **flags) as server:
        yield server


@pytest.fixture
def small_server(checkpoint):
    """max_num_seqs 2 and a queue of 2."""
    with run_server([checkpoint], max_num_seqs=2, max_queue=2, max_context=8192) as server:
        yield server


@contextlib.contextmanager
def open_stream(server, body):
    """A streamed response whose first event has arrived."""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=20) as response:
        pieces = response.iter_text()  # a reference: httpx disconnects when it is garbage-collected
        next(pieces)
        yield response


# ------------------------------------------------------------------------------------------------ keys, origins, bodies


@pytest.mark.parametrize("given", [None, "", "secret-1", "Bearer", "Bearer secret-2", "Bearer secret-", "Bearer \xff"])
def test_requests_without_the_key_get_401(server_with_key, given):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/openapi.json")):
        response = httpx.request(method, server_with_key.url + path, headers=headers, json=QUESTION)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server_with_key.url}/health", headers=headers).status_code == 200


def test_requests_with_the_key_are_answered(server_with_key):
    headers = {"Authorization": "Bearer secret-1"}
    assert httpx.get(f"{server_with_key.url}/v1/models", headers=headers).status_code == 200
    body = {**QUESTION, "max_tokens": 2}
    answer = httpx.post(f"{server_with_key.url}/v1/chat/completions", headers=headers, json=body)
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_cors_headers_are_sent_to_listed_origins_only(server_with_key, small_server):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    for server, origin, allowed in (
        (server_with_key, "https://chat.example.org", True),
        (server_with_key, "https://evil.example.org", False),
        (small_server, "https://chat.example.org", False),
    ):
        preflight = httpx.options(f"{server.url}/v1/chat/completions", headers={"Origin": origin, **ask})
        models = httpx.get(f"{server.url}/v1/models", headers={"Origin": origin})
        for response in (preflight, models):
            assert response.headers.get("access-control-allow-origin") == (origin if allowed else None)
        assert (preflight.status_code == 200) == allowed
        assert ("x-served-model" in models.headers.get("access-control-expose-headers", "")) == (
            server is server_with_key
        )


def test_bodies_of_wrong_type_or_size_are_rejected_unread(server_with_key):
    headers = {"Authorization": "Bearer secret-1"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx.post(
            f"{server_with_key.url}/v1/chat/completions",
            content=json.dumps(QUESTION),
            headers={**headers, "content-type": kind},
        )
        assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    large = json.dumps({**QUESTION, "user": "x" * 3000}).encode()

    def in_chunks():
        yield from (large[i : i + 500] for i in range(0, len(large), 500))

    for content in (large, in_chunks()):
        response = httpx.post(
            f"{server_with_key.url}/v1/chat/completions", content=content, headers={**headers, **JSON_HEADERS}
        )
        assert response.status_code == 413 and "2000 bytes" in response.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ queue and disconnects


def test_a_full_queue_gets_429_with_retry_after(small_server):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(open_stream(small_server, LONG))
        waiting = stack.enter_context(
            httpx.stream("POST", f"{small_server.url}/v1/chat/completions", json={**LONG, "n": 2})
        )
        assert waiting.status_code == 200 and small_server.status()["waiting"] == 2
        rejected = httpx.post(f"{small_server.url}/v1/chat/completions", json=QUESTION)
        assert rejected.status_code == 429 and 1 <= int(rejected.headers["retry-after"]) <= 60
        assert rejected.json()["error"]["type"] == "rate_limit_error"
    small_server.wait_until_idle()
    too_many = httpx.post(f"{small_server.url}/v1/chat/completions", json={**QUESTION, "n": 5})
    assert too_many.status_code == 400 and "at most 4" in too_many.json()["error"]["message"]


def test_a_disconnect_frees_its_slot_at_once(small_server):
    for stream in (True, False):
        body = {**LONG, "stream": stream, "n": 2}
        task = threading.Thread(target=disconnect_after, args=(small_server, body, 0.3))
        task.start()
        deadline = time.monotonic() + 5
        while small_server.status()["running"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        task.join()
        assert small_server.wait_until_idle() < 1.0  # 4,000 tokens would take several seconds


def disconnect_after(server, body, seconds):
    with contextlib.suppress(httpx.TimeoutException):
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=seconds) as response:
            ends = time.monotonic() + seconds
            for _ in response.iter_text():
                if time.monotonic() > ends:
                    return


def test_a_disconnect_while_waiting_frees_its_queue_slot(small_server):
    with open_stream(small_server, {**LONG, "n": 2}):
        for stream in (True, False):
            disconnect_after(small_server, {**LONG, "stream": stream}, 0.2)
            deadline = time.monotonic() + 2
            while small_server.status()["waiting"]:
                assert time.monotonic() < deadline, "still in the queue"
                time.sleep(0.005)
        assert small_server.status()["running"] == 2
    small_server.wait_until_idle()


# ------------------------------------------------------------------------------------------------ many clients


async def ask_concurrently(server, size, num_disconnects):
    """Run `size` clients at once, the first `num_disconnects` of which disconnect early; [(status, text or None)]."""
    limits = httpx.Limits(max_connections=size)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:

        async def one(i):
            body = {"messages": [{"role": "user", "content": f"{i % 7}?"}], "temperature": 0, "max_tokens": 40}
            if i >= num_disconnects and i % 2:
                response = await client.post("/v1/chat/completions", json=body)
                return response.status_code, response.json()["choices"][0]["message"]["content"]
            if i < num_disconnects:
                body |= LONG
            text = ""
            async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        text += "".join(choice["delta"].get("content") or "" for choice in choices)
                    if i < num_disconnects and len(text) > 3 + i:
                        return response.status_code, None
                assert i < num_disconnects or line == "" or line.startswith("data: [DONE]")
            return response.status_code, text

        return await asyncio.gather(*map(one, range(size)))


def test_fifty_clients_with_ten_disconnects_leave_no_request_and_flat_memory(checkpoint, capfd):
    process = psutil.Process()
    with run_server([checkpoint], max_context=8192) as server:
        memory = []
        for _ in range(6):
            answers = asyncio.run(ask_concurrently(server, 50, 10))
            assert [status for status, _ in answers] == [200] * 50
            for i, (_, text) in enumerate(answers[10:], 10):
                assert text == next(t for j, (_, t) in enumerate(answers[10:], 10) if j % 7 == i % 7), "equal questions"
            server.wait_until_idle()
            gc.collect()
            memory.append(process.memory_info().rss / 2**20)
        assert len(server.service.schedulers["full_sft_32"].running) == 0
        assert memory[-1] - memory[2] < 10, memory  # MiB, over 150 requests
    assert "Traceback" not in capfd.readouterr().err
