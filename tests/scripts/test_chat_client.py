"""chat_openai_api.py against this project's server and servers that are not OpenAI-compatible.

Promises: --prompt prints one answer; each request contains the history and the system message; the first model is the
default; thoughts, calls and results are printed under headings, and calls are run; Ctrl-C stops the answer but not the
program; errors print one line and exit with code 2.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from common.errors import UserError, escape_controls
from model.generate import generate
from model.sampling import SamplingParams
from serving import service
from tests.helpers import ROOT, run_process, run_script
from tests.serving.server_helpers import run_server, save_random_model, script_answers

SCRIPT = "chat_openai_api.py"


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    path = save_random_model(folder / "full_sft_32.pth", tokenizer, max_seq_len=4096)
    with run_server([f"first={path}", f"second={path}"], api_key="secret-1") as server:
        yield server


@pytest.fixture(autouse=True)
def api_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-1")


def run_client(monkeypatch, server, *flags, lines=()):
    """Run the script. `input()` returns the lines, then raises EOFError."""
    lines = iter(lines)

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    run_script(monkeypatch, SCRIPT, "--base_url", f"{server.url}/v1", *flags)


@pytest.fixture
def requests(monkeypatch):
    """Request bodies that the server has received. It decodes greedily, so the answers are deterministic."""
    bodies = []
    make_requests = service.make_requests

    def record_body(body, served):
        bodies.append(body)
        return make_requests(body.model_copy(update={"temperature": 0.0}), served)

    monkeypatch.setattr(service, "make_requests", record_body)
    return bodies


def test_prompt_flag_prints_one_answer(monkeypatch, server, requests, capsys):
    run_client(monkeypatch, server, "--prompt", "Hi 你好", "--max_tokens", 9, "--system", "kind")
    served = server.service.models["first"]
    messages = [{"role": "system", "content": "kind"}, {"role": "user", "content": "Hi 你好"}]
    ids = served.tokenizer.render(messages, True)[0]
    (expected,) = generate(served.model, [ids], SamplingParams(max_new_tokens=9), served.tokenizer)
    assert capsys.readouterr().out == escape_controls(expected.text, keep="\n\t") + "\n"
    (body,) = requests
    assert (body.model, body.max_tokens, body.stream) == ("first", 9, True)


def test_each_request_contains_the_history(monkeypatch, server, requests, capsys):
    run_client(monkeypatch, server, "--model", "second", "--max_tokens", 5, lines=["one", "two", "", "three"])
    first, second = ([(m.role, m.text) for m in body.messages] for body in requests)
    assert first == [("user", "one")]
    assert second[0] == first[0] and second[1][0] == "assistant" and second[2] == ("user", "two")
    assert second[1][1] in capsys.readouterr().out
    assert {body.model for body in requests} == {"second"}


def test_end_of_input_ends_the_program(monkeypatch, server, requests):
    run_client(monkeypatch, server, "--max_tokens", 5, lines=["one"])
    assert len(requests) == 1


THOUGHT, CALL = "<think>\nby 工具\n</think>\n\n", '<tool_call>\n{"name": "calculator", "arguments": %s}\n</tool_call>'


def test_calls_are_run_and_printed_with_their_results(monkeypatch, server, requests, capsys):
    first = THOUGHT + "Two:\n" + CALL % '{"expression": "17 * 23"}' + "\n" + CALL % '{"expression": "1/0"}'
    script_answers(monkeypatch, lambda prompt: "391!" if "391" in prompt else first)
    run_client(monkeypatch, server, "--tools", "calculator,clock", lines=["17 * 23?", "1\x1b"])
    printed = capsys.readouterr().out
    assert printed.partition("\n")[2].startswith(
        '[thought]\nby 工具\n[answer]\nTwo:\n[call] calculator {"expression": "17 * 23"}\n'
        '[call] calculator {"expression": "1/0"}\n[result] 391\n[result] error: '
    )
    assert printed.endswith("[answer]\n391!\n391!\n\n"), "also beside a history with calls"
    (asked, answered, again) = requests
    assert [tool.function.name for tool in asked.tools] == ["calculator", "clock"]
    assert [m.role for m in answered.messages] == ["user", "assistant", "tool", "tool"]
    assert answered.messages[1].reasoning_content == "by 工具" and answered.messages[2].text == "391"
    assert [m.role for m in again.messages][4:] == ["assistant", "user"]


def test_the_rounds_of_calls_are_limited(monkeypatch, server, requests, capsys):
    script_answers(monkeypatch, lambda prompt: CALL % '{"expression": "1"}')
    run_client(monkeypatch, server, "--tools", "calculator", "--prompt", "?")
    assert [bool(body.tools) for body in requests] == [True] * 4 + [False]
    assert capsys.readouterr().out.endswith("</tool_call>\n"), "without tools, the answer is text"


def test_the_thinking_switch_is_sent(monkeypatch, server, requests, capsys):
    script_answers(monkeypatch, lambda prompt: "silent" if prompt.endswith(THOUGHT.replace("by 工具", "")) else "loud")
    run_client(monkeypatch, server, "--prompt", "?", "--enable_thinking", "false")
    run_client(monkeypatch, server, "--prompt", "?")
    assert capsys.readouterr().out == "silent\nloud\n" and [body.thinking for body in requests] == [False, None]


def test_errors_are_one_line(monkeypatch, server):
    url = f"{server.url}/v1"
    for flags, message in (
        (
            ["--base_url", "http://127.0.0.1:9/v1"],
            r"no answer from http://127\.0\.0\.1:9/v1 \(.*refused\): is the server",
        ),
        (["--base_url", "localhost:8000"], "--base_url localhost:8000: not an address: use one like http"),
        (["--base_url", "http://[::/v1"], "not an address: use one like http"),
        (["--base_url", url, "--api_key", "other"], "rejects the key: set --api_key or the variable OPENAI_API_KEY"),
        (["--base_url", url, "--api_key", "schlüssel"], "--api_key: must be printable ASCII"),
        (
            ["--base_url", url, "--model", "gpt-4"],
            "no model 'gpt-4' on this server: use first, second: see --model gpt-4",
        ),
        (["--base_url", server.url], "GET /models: Not Found: see --base_url, which usually ends with /v1"),
        (["--base_url", url, "--max_tokens", "0"], "argument --max_tokens: 0 is not a whole number"),
        (["--base_url", url, "--prompt", " "], "--prompt is empty"),
        (["--base_url", url, "--tools", "python"], "--tools python: unknown tool; choose from calculator"),
        (["--base_url", url, "--prompt", "x" * 5000], "context is 4096 tokens"),
    ):
        flags = flags if "--prompt" in flags else [*flags, "--prompt", "?"]
        with pytest.raises(UserError, match=message) as error:
            run_script(monkeypatch, SCRIPT, *flags)
        assert "\n" not in str(error.value)


class IncompatibleServer(http.server.BaseHTTPRequestHandler):
    """A server that is not OpenAI-compatible. `server.reply`: content type, body, number of bytes missing from it."""

    def do_GET(self):
        content_type, body, num_missing = self.server.reply
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body) + num_missing))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


EVENT = json.dumps(
    {"id": "1", "object": "x", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "A"}}]}
)
ERROR_EVENT = json.dumps({"error": {"message": "out\nof memory", "type": "server_error"}})


@pytest.mark.parametrize(
    ("reply", "flags", "message"),
    [
        (("text/html", b"<html>", 0), [], "the response is not OpenAI's API"),
        (("application/json", b"<html>", 0), [], "the response is not OpenAI's API"),
        (("application/json", b'{"data": []}', 0), [], "lists no models: name one with --model"),
        (("text/html", b"<html>", 0), ["--model", "m"], "the response is not OpenAI's API"),
        (("text/event-stream", f"data: {EVENT}\n\n".encode(), 9), ["--model", "m"], "no answer from|connection lost"),
        (("text/event-stream", f"data: {ERROR_EVENT}\n\n".encode(), 0), ["--model", "m"], "out of memory"),
    ],
)
def test_incompatible_servers_and_broken_streams_are_one_line_errors(monkeypatch, reply, flags, message):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), IncompatibleServer) as other:
        other.reply = reply
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=message) as error:
            url = f"http://127.0.0.1:{other.server_port}/v1"
            run_script(monkeypatch, SCRIPT, "--base_url", url, "--prompt", "?", *flags)
        assert "\n" not in str(error.value)
        other.shutdown()


def test_missing_openai_package_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match='the client needs openai: pip install "openai>=2,<4"'):
        run_script(monkeypatch, SCRIPT, "--prompt", "?")


def test_help_needs_no_packages_and_errors_exit_with_2():
    result = run_process(sys.executable, "-S", SCRIPT, "--help")  # -S: without any installed package
    assert result.returncode == 0 and "--base_url" in result.stdout
    result = run_process(sys.executable, SCRIPT, "--base_url", "http://127.0.0.1:9/v1", "--prompt", "?")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no answer from") and result.stderr.count("\n") == 1


def test_ctrl_c_stops_the_answer_but_not_the_program(server, requests):
    command = [sys.executable, SCRIPT, "--base_url", f"{server.url}/v1"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    try:
        assert process.stdout.readline().startswith(b"first at http")
        process.stdin.write(b"1\n")  # greedy decoding answers this with thousands of tokens
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while not server.status("first")["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        while server.status("first")["running"]:
            assert time.monotonic() < deadline, "Ctrl-C did not abort the request"
            time.sleep(0.01)
        assert process.poll() is None
        out, errors = process.communicate(b"\n", timeout=20)
        assert (process.returncode, errors) == (0, b"") and len(out) > 10
    finally:
        process.kill()
