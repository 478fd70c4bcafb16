"""The command line of serve_openai_api.py: its errors, and a run from start to Ctrl-C.

Promises: invalid numbers, files, names and ports are one-line errors with exit code 2; without a key only this machine
is served; a missing package is one line with the pip command; an adapter and a transformers folder are served beside a
checkpoint; 8 concurrent requests get at least 3 times the tokens per second of 8 sequential ones, and the same greedy
text (slow).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from common import cli
from common.errors import UserError
from serving.config import ServeConfig
from tests.helpers import ROOT, child_cpu_seconds, run_process, run_script
from tests.serving.server_helpers import run_server, save_random_model

SCRIPT = "serve_openai_api.py"


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    return save_random_model(tmp_path / "full_sft_32.pth", tokenizer)


def test_invalid_flags_are_one_line_errors(monkeypatch, checkpoint, tmp_path):
    monkeypatch.delenv("MENGYA_API_KEY", raising=False)
    twin = shutil.copytree(tmp_path, tmp_path / "other") / "full_sft_32.pth"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, message in (
            (["--max_num_seqs", "0"], "--max_num_seqs: 0 is not a whole number of at least 1"),
            (["--queue", "-1"], "--queue: -1 is not a whole number of at least 0"),
            (["--port", "70000"], "--port: 70000 is not a whole number from 0 to 65535"),
            (
                ["--host", "0.0.0.0"],
                r"--host 0\.0\.0\.0 accepts other machines: set --api_key KEY or --api_key_file FILE",
            ),
            (["--host", "::"], "set --api_key KEY"),
            (["--host", "example.org"], "set --api_key KEY"),
            (["--api_key", "schlüssel"], "--api_key: a key must be printable ASCII"),
            (["--host", "not a host", "--api_key", "k"], "cannot listen on not a host"),
            (["--port", port], f"cannot listen on 127.0.0.1 port {port} .*in use.*: choose another --port"),
            (["--checkpoint", tmp_path / "no.pth"], r"no checkpoint at .*no\.pth"),
            (["--checkpoint", tmp_path], "is not a transformers model"),
            (["--checkpoint", checkpoint, twin], "two models are called full_sft_32: write --checkpoint OTHER_NAME="),
            (["--out_dir", tmp_path / "nothing"], r"run `python 1-pretrain\.py` first"),
            (["--device", "abacus"], "--device: abacus: not a device"),
            (["--dtype", "int3"], "--dtype: invalid choice: .int3"),
        ):
            with pytest.raises(UserError, match=message) as error:
                run_script(monkeypatch, SCRIPT, *([] if "--port" in flags else ["--port", "0"]), *flags)
            assert "\n" not in str(error.value)


def parse_config(*flags):
    return cli.parse(ServeConfig, None, [*map(str, flags)])


def test_keys_come_from_a_flag_the_environment_and_a_file(monkeypatch, tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("first\n\n  second \n")
    monkeypatch.delenv("MENGYA_API_KEY", raising=False)
    assert parse_config().api_keys == ()
    assert parse_config("--api_key_file", file).api_keys == ("first", "second")
    assert parse_config("--api_key", "flag", "--api_key_file", file).api_keys == ("flag", "first", "second")
    monkeypatch.setenv("MENGYA_API_KEY", "from-the-environment")
    assert parse_config().api_keys == ("from-the-environment",)
    assert parse_config("--api_key", "flag").api_keys == ("flag",)
    assert parse_config("--host", "0.0.0.0").api_keys == ("from-the-environment",)
    for content, message in ((b"\n \n", "no key in it"), (b"\xff\xfe", "not UTF-8 text"), (b"a b\n", "without spaces"),
                             (None, "No such file")):  # fmt: skip
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=f"--api_key_file .*{message}") as error:
            parse_config("--api_key_file", file)
        assert "\n" not in str(error.value)


def test_a_server_without_a_key_restricts_host_names(monkeypatch):
    monkeypatch.delenv("MENGYA_API_KEY", raising=False)
    local = {"localhost", "127.0.0.1", "::1"}
    assert parse_config().accepted_hosts == local
    assert parse_config("--host", "127.0.0.2").accepted_hosts == local | {"127.0.0.2"}
    named = parse_config("--allowed_hosts", "A.example,b.example")
    assert named.accepted_hosts == local | {"a.example", "b.example"}
    assert parse_config("--host", "0.0.0.0", "--api_key", "k").accepted_hosts is None
    named = parse_config("--host", "0.0.0.0", "--api_key", "k", "--allowed_hosts", "chat.example")
    assert "chat.example" in named.accepted_hosts


def test_old_spellings_of_flags_are_accepted():
    config = parse_config("--seats", 3, "--queue", 0)
    assert (config.max_num_seqs, config.max_queue) == (3, 0)


def test_max_queued_bytes_follows_max_request_bytes(monkeypatch):
    monkeypatch.delenv("MENGYA_API_KEY", raising=False)
    assert parse_config().queued_bytes_limit == 2**24
    assert parse_config("--max_request_bytes", 100).queued_bytes_limit == 1600
    with pytest.raises(UserError, match="--max_queued_bytes 99 is less than --max_request_bytes 100"):
        parse_config("--max_request_bytes", 100, "--max_queued_bytes", 99)


@pytest.mark.parametrize("packages", [("fastapi",), ("uvicorn",), ("fastapi", "uvicorn")])
def test_all_missing_packages_are_named_with_one_command(monkeypatch, checkpoint, packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    command = " ".join(f'"{package}>=[^"]*"' for package in packages)
    with pytest.raises(UserError, match=f"the server needs {' and '.join(packages)}: pip install {command}$"):
        run_script(monkeypatch, SCRIPT, "--checkpoint", checkpoint, "--port", "0")


def test_help_is_quick_and_needs_neither_torch_nor_the_servers_packages():
    before = child_cpu_seconds()
    blocked = "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'fastapi', 'uvicorn', 'pydantic')))"
    run = f"sys.argv = ['{SCRIPT}', '--help']; runpy.run_path('{SCRIPT}', run_name='__main__')"
    result = run_process(sys.executable, "-c", f"{blocked}; {run}")
    assert result.returncode == 0 and "--api_key" in result.stdout and child_cpu_seconds() - before < 2


def test_the_server_starts_answers_and_stops_on_ctrl_c(checkpoint, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MENGYA_API_KEY": "from-the-environment"}
    command = [sys.executable, SCRIPT, "--out_dir", str(tmp_path), "--port", "0", "--max_context", "100"]
    command.append("--strict_model_names")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        about, listening = process.stdout.readline(), process.stdout.readline()
        assert about == "full_sft_32: full_sft, 0.0 M parameters, 100 tokens of context, cpu, float32\n"
        url = listening.split()[2]
        body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "max_tokens": 3}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer from-the-environment"}
        request = urllib.request.Request(f"{url}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 3
        unknown = urllib.request.Request(f"{url}/chat/completions", body[:-1] + b', "model": "gpt-4"}', headers)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(unknown, timeout=30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (130, "interrupted\n")
    finally:
        process.kill()


def test_adapters_and_transformers_folders_are_served_too(tokenizer, checkpoint, tmp_path):
    import httpx

    from model.checkpoint import load_model, record_parent, save_model
    from model.lora import LoRAConfig, attach
    from tests.export.test_hf_import import make_folder

    model, _, _ = load_model(checkpoint)
    attach(model, LoRAConfig(rank=2))
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    record_parent(model, checkpoint, tmp_path / "lora_sft_32.pth")
    save_model(tmp_path / "lora_sft_32.pth", model, "lora_sft", tokenizer, [])
    make_folder(tmp_path / "theirs")
    names = ["full_sft_32", "lora_sft_32", "theirs"]
    paths = [checkpoint, str(tmp_path / "lora_sft_32.pth"), str(tmp_path / "theirs")]
    with run_server(paths) as server:
        texts = {}
        for name in names:
            body = {"model": name, "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 20}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
            texts[name] = answer["choices"][0]["message"]["content"]
        assert len(set(texts.values())) == 3


@pytest.mark.slow
def test_eight_concurrent_requests_are_three_times_as_fast_as_sequential_ones(tokenizer, tmp_path):
    """With an untrained model of the default size, which needs the same computation."""
    import asyncio

    import httpx

    from model.config import PRESETS

    path = save_random_model(tmp_path / "full_sft_512.pth", tokenizer, **PRESETS["small"])
    questions = [[{"role": "user", "content": f"question {i} 问题"}] for i in range(8)]
    bodies = [{"messages": messages, "temperature": 0, "max_tokens": 48} for messages in questions]
    with run_server([path]) as server:
        url = f"{server.url}/v1/chat/completions"

        async def at_once():
            async with httpx.AsyncClient(timeout=120) as client:
                return [r.json() for r in await asyncio.gather(*(client.post(url, json=body) for body in bodies))]

        def measure():
            started = time.perf_counter()
            row = [httpx.post(url, json=body, timeout=120).json() for body in bodies]
            between = time.perf_counter()
            together = asyncio.run(at_once())
            assert [a["choices"][0]["message"] for a in row] == [a["choices"][0]["message"] for a in together]
            return (between - started) / (time.perf_counter() - between)

        measure()
        assert max(measure() for _ in range(3)) >= 3
