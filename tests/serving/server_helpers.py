"""Test server: the application under uvicorn, in a thread of this process, on a free port."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import save_model
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

CPU = torch.device("cpu")


def make_random_model(tokenizer: ChatTokenizer, **changes) -> Transformer:
    """A model with random weights, whose answers are long and arbitrary."""
    torch.manual_seed(0)
    config = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256}
    model = Transformer(ModelConfig(tokenizer.vocab_size, **{**config, **changes})).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.2)
    return model


def save_random_model(path: Path, tokenizer: ChatTokenizer, stage: str = "full_sft", **changes) -> str:
    save_model(path, make_random_model(tokenizer, **changes), stage, tokenizer, [])
    return str(path)


@dataclass
class RunningServer:
    url: str  # without a trailing slash
    service: Any  # serving.service.CompletionService

    def status(self, name: str | None = None) -> dict[str, int]:
        status = self.service.engine.status()
        return status[name or next(iter(status))]

    def wait_until_idle(self, seconds: float = 5) -> float:
        """Seconds until no request is running or waiting. Fails after `seconds`."""
        started = time.monotonic()
        while any(status["running"] or status["waiting"] for status in self.service.engine.status().values()):
            assert time.monotonic() - started < seconds, self.service.engine.status()
            time.sleep(0.005)
        return time.monotonic() - started


@contextlib.contextmanager
def run_server(checkpoints: list[str], limits: Any = None, max_context: int = 4096) -> Iterator[RunningServer]:
    """`limits`: a serving.limits.ServerLimits. FastAPI is imported here because the engine's tests run without it."""
    from serving.app import make_app
    from serving.connections import make_server
    from serving.limits import ServerLimits
    from serving.models import open_models

    limits = limits or ServerLimits()
    app = make_app(open_models(checkpoints, max_context, CPU), limits, contextlib.nullcontext)
    server = make_server(app, limits)
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [server_socket]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield RunningServer(f"http://127.0.0.1:{server_socket.getsockname()[1]}", app.state.service)
        finally:
            server.should_exit = True
            thread.join()
