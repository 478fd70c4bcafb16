"""Clients that attack a server on localhost; test_server_under_attack.py starts each as a process.

    python tests/faults/attackers.py KIND PORT NUMBER

    malformed     invalid HTTP, invalid JSON, or invalid values of fields               idle    open connections
    flood         bodies of almost 1 MB                                                 slow    one byte at a time
    unread        long streams whose client does not read

Prints {outcome: number} as JSON. Uses the standard library only, to start quickly.
"""

import collections
import concurrent.futures
import contextlib
import json
import random
import socket
import sys
import time

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HEAD += "Connection: close\r\n"
CHAT = '{"messages": [{"role": "user", "content": "?"}], "max_tokens": 2%s}'
TOOL = '{"type": "function", "function": {"name": "f", "parameters": {"a": %s}}}'
CALL = (
    '{"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "%s"}}]}]}'
)
MEGABYTE = 2**20 - 500


def post(body, path="chat/completions"):
    body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return HEAD.replace("chat/completions", path).encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def odd_field_requests(random):
    """Bodies of JSON, valid or nearly so, with invalid values of fields."""
    digits = "9" * random.choice([30, 400, 4000, 5000])
    values = ["NaN", "Infinity", "-Infinity", "1e999", "-0", digits, f"-{digits}", f"1e{digits[:9]}", "null", "true"]
    values += ['"\\ud800"', '"\\u0000"', "[]", "{}", "[[]]", "[null]", '"x"', "1.5", "2", '["", "\\udfff"]']
    names = ["temperature", "top_p", "top_k", "n", "stop", "seed", "logprobs", "top_logprobs", "stream", "model"]
    names += ["messages", "max_tokens", "num_beams", "tools", "user", "logit_bias", "\\ud800", "x" * 5000]
    names += ["tool_choice", "parallel_tool_calls", "enable_thinking", "chat_template_kwargs"]
    more = "".join(f', "{random.choice(names)}": {random.choice(values)}' for _ in range(random.randint(1, 3)))
    yield post(CHAT % more)
    yield post(f'{{"prompt": {random.choice(values)}{more}}}', "completions")
    yield post(f'{{"input": {random.choice(values)}{more}}}', "embeddings")


def non_json_requests(random):
    depth = random.choice([500, 990, 5000, 200_000])
    yield post(random.choice(["[", '{"a":', "[{"]) * depth)
    yield post(CHAT % (', "tools": ' + "[" * depth + "]" * depth))
    yield post(CHAT % f', "tools": [{TOOL % ("[" * depth + "]" * depth)}]')
    yield post(CALL % ("[" * depth))
    text = bytearray((CHAT % "").encode())
    for _ in range(random.randint(1, 5)):
        text[random.randrange(len(text))] = random.randrange(256)
    yield post(bytes(text))
    yield post(bytes(random.randrange(256) for _ in range(random.randint(0, 300))))
    yield post(b"\xef\xbb\xbf" + (CHAT % "").encode())
    yield post((CHAT % "").encode("utf-16"))


def non_http_requests(random):
    good = post(CHAT % "")
    for line in ("Content-Length: -5", "Content-Length: 1e3", "Content-Length: 99999999999999999999",
                 "Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked, x",
                 "Content-Length: 5\r\nTransfer-Encoding: chunked", "X" * 40_000, "A: b\r\n" * 9000, " folded",
                 "N\0UL: 1", "A: \0", "A: \xff\xfe", ": nameless", "Upgrade: websocket\r\nConnection: Upgrade",
                 "Expect: 100-continue\r\nContent-Length: 3", "Connection: \xff", "Host: b"):  # fmt: skip
        yield HEAD.encode() + line.encode("latin-1") + b"\r\n\r\n" + (CHAT % "").encode()
    for method in ("GET", "HEAD", "PUT", "TRACE", "CONNECT", "OPTIONS", "get", "G\0T", "", "M" * 5000):
        yield good.replace(b"POST", method.encode(), 1)
    for path in ("*", "//", "/%00", "/%ff%fe", "/../../etc/passwd", "http://[", "/" + "a" * 30_000, "/v1/models/\xe4"):
        yield good.replace(b"/v1/chat/completions", path.encode("latin-1"), 1)
    for version in ("HTTP/9.9", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", ""):
        yield good.replace(b"HTTP/1.1", version.encode(), 1)
    for host in ("", "evil.example", "[::1", "a@b:c", "127.0.0.1:x", "\xff"):
        yield good.replace(b"127.0.0.1", host.encode("latin-1"), 1)
    chunked = HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
    for chunks in (b"zz\r\n", b"-1\r\n", b"5\r\nab", b"ffffffffffffffff\r\nx", b"1\r\n{\r\n" * 3000, b"3\r\nabcdef",
                   b"0\r\n" + b"T: x\r\n" * 5000 + b"\r\n", b"1;" + b"e" * 40_000, b"2\r\n{}\r\n0\r\n\r\n"
                   ):  # fmt: skip
        yield chunked + chunks
    yield good[: random.randrange(len(good))]
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(200)  # TLS
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield random.randbytes(random.randint(1, 2000))
    yield b"\r\n" * 5000
    yield good * 3  # pipelined
    yield good + random.randbytes(100)


def json_list(entry, size):
    """A list of equal entries, about `size` bytes long."""
    return f"[{','.join([entry] * (size // (len(entry) + 1)))}]"


def json_array(name, entry, size):
    """A body with such a list."""
    return f'{{"{name}": {json_list(entry, size)}}}'


def flood_bodies():
    """Bodies of almost 1 MB, each expensive for a different part of the server."""
    chat = '{"messages": [{"role": "user", "content": "X"}]}'
    yield post(chat.replace("X", "a" * MEGABYTE))
    yield post(chat.replace("X", "中文" * (MEGABYTE // 6)))
    yield post(json_array("messages", '{"role": "user", "content": "?"}', MEGABYTE))
    yield post(json_array("messages", "1", MEGABYTE))
    yield post(json_array("x", "[]", MEGABYTE)[:-1] + "," + (CHAT % "")[1:])
    yield post(json.dumps({"prompt": "a \n" * (MEGABYTE // 4), "echo": True}), "completions")
    yield post(json_array("prompt", "1", MEGABYTE), "completions")
    yield post(json_array("prompt", "1.5", MEGABYTE), "completions")
    yield post(json.dumps({"prompt": "?", "stop": "a" * MEGABYTE}), "completions")
    yield post(json_array("input", '"' + "b" * 500 + '"', MEGABYTE), "embeddings")
    yield post(json.dumps({"input": ["b" * MEGABYTE]}), "embeddings")
    yield post(CHAT % f', "tools": [{TOOL % json_list("[]", MEGABYTE)}]')
    yield post(CHAT % f', "tools": {json_list(TOOL % json_list("[]", 8000), MEGABYTE)}')
    yield post(CALL % json_list("[]", MEGABYTE))
    yield post(json.dumps({"model": "m" * MEGABYTE, **json.loads(CHAT % "")}))


def send_request(port, data, return_response=False):
    """Send a request; returns the status code, "closed" (no status), "silent" (30 s), or the whole response."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # the server may answer and close before it has read everything
            connection.sendall(data)
        try:
            answer = connection.recv(65536)
            while part := connection.recv(65536):
                answer += part if return_response else b""
        except TimeoutError:
            return "silent"
        except OSError:
            answer = b""
    if return_response:
        return answer
    return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"


def send_in_threads(port, requests):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return collections.Counter(pool.map(lambda data: send_request(port, data), requests))


def malformed(port, number):
    rng = random.Random(7)
    requests = []
    while len(requests) < number:
        requests += [
            *non_http_requests(rng),
            *(data for _ in range(20) for data in (*odd_field_requests(rng), *non_json_requests(rng))),
        ]
    rng.shuffle(requests)
    return send_in_threads(port, requests[:number])


def flood(port, number):
    bodies = list(flood_bodies())
    return send_in_threads(port, (bodies[i % len(bodies)] for i in range(number)))


def idle(port, number):
    """Connections that send nothing, or one byte."""
    connections = []
    for i in range(number):
        connections.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        if i % 2:
            connections[-1].send(b"P")
    time.sleep(1)
    return {"opened": len(connections)}


def slow(port, number):
    """Send one byte of each request every 50 ms; returns how many connections the server closed within 15 s."""
    waiting = HEAD.encode() + b"Content-Length: 900\r\n\r\n"
    chunked = HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
    kinds = [(b"", HEAD.encode() * 9), (waiting, b" " * 900), (chunked, b"1\r\n \r\n" * 900), (b"", b"\r\n" * 900)]
    connections, closed = [], 0
    for i in range(number):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        at_once, later = kinds[i % len(kinds)]
        connection.sendall(at_once)
        connections.append((connection, later))
    deadline = time.monotonic() + 15
    position = 0
    while connections and time.monotonic() < deadline:
        time.sleep(0.05)
        open_still = []
        for connection, later in connections:
            try:
                connection.send(later[position : position + 1])
                open_still.append((connection, later))
            except OSError:
                closed += 1
        connections, position = open_still, position + 1
    return {"closed": closed, "open": len(connections)}


def unread(port, number):
    """Streams with many log-probabilities, read only after the server has stopped them: how many it cut off."""
    more = ', "stream": true, "logprobs": true, "top_logprobs": 20, "temperature": 0}'
    body = (CHAT % "").replace('"max_tokens": 2}', '"max_tokens": 8000' + more)
    body = body.replace("?", "1")  # the tests' model never ends its answer to this prompt
    connections = []
    for _ in range(number):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(post(body))
        connections.append(connection)
    for is_reached in (lambda running: running >= number, lambda running: not running):
        deadline = time.monotonic() + 60
        while not is_reached(running_answers(port)):
            if time.monotonic() > deadline:
                return {"open": number}
            time.sleep(0.02)
    return collections.Counter(
        "finished" if b"[DONE]" in read_to_end(connection) else "cut_off" for connection in connections
    )


def running_answers(port):
    health = send_request(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", True)
    (status,) = json.loads(health.partition(b"\r\n\r\n")[2])["models"].values()
    return status["running"]


def read_to_end(connection):
    """Read until the server closes the connection; returns the last 1,000 bytes."""
    connection.settimeout(30)
    last = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            last = (last + part)[-1000:]
    return last


if __name__ == "__main__":
    kind, port, number = sys.argv[1:]
    print(json.dumps(globals()[kind](int(port), int(number))))
