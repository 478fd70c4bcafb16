"""Test server: the application under uvicorn, in a thread of this process, on a free port."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from model.checkpoint import save_model
from model.completion import Completion, Sequence
from model.config import ModelConfig
from model.generate import DecodeBatch, generate
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from serving.config import ServeConfig
from serving.scheduler import Request, Scheduler, TokenEvent


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


def make_sequence(model, tokenizer, prompt, index=0, **options) -> Sequence:
    return Sequence(model, tokenizer, prompt, SamplingParams(**options), Completion(), index)


class SchedulerDriver:
    """A scheduler without a thread, and the events of its steps."""

    def __init__(self, model, tokenizer, max_num_seqs=4, max_queue=4):
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(model, tokenizer, max_num_seqs, max_queue)
        self.events: list[TokenEvent] = []

    def add(self, prompts, **options) -> list[Request]:
        sequences = [make_sequence(self.model, self.tokenizer, prompt, **options) for prompt in prompts]
        requests = [Request(sequence, i) for i, sequence in enumerate(sequences)]
        self.scheduler.add(requests)
        return requests

    def step(self, count=1) -> None:
        for _ in range(count):
            self.events += self.scheduler.step() + self.scheduler.step_job()

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    @property
    def num_running(self) -> int:
        return self.scheduler.status()["running"]

    @property
    def num_waiting(self) -> int:
        return self.scheduler.status()["waiting"]

    def finish_reason(self, request) -> str:
        return next((item.finish_reason for item in self.events if item.request is request and item.finish_reason), "")

    def text_of(self, request) -> str:
        return "".join(item.text for item in self.events if item.request is request)


def script_answers(monkeypatch: Any, answer_to: Callable[[str], str]) -> None:
    """All models generate `answer_to(the prompt as text)` and the end of the turn; its markers become added tokens."""
    next_text, scripts = DecodeBatch._next_text, {}

    def scripted(batch: DecodeBatch, rows: list[Any], logits: torch.Tensor) -> list[Any]:
        for (sequence, _), row in zip(rows, logits, strict=True):
            if sequence not in scripts:
                answer = answer_to(batch.tokenizer.decode(sequence.prompt))
                ids = batch.tokenizer.renderer.backend.encode(answer, add_special_tokens=False).ids
                scripts[sequence] = [*ids, batch.tokenizer.end_of_turn_id]
            row[:] = -100
            row[scripts[sequence][len(sequence.completion.ids)]] = 100
        return next_text(batch, rows, logits)

    monkeypatch.setattr(DecodeBatch, "_next_text", scripted)


@dataclass
class RunningServer:
    url: str  # without a trailing slash
    service: Any  # serving.service.CompletionService

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        """Without TLS, because loading certificates takes half a second."""
        return httpx.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=60, verify=False)

    def generate(self, name: str, prompt: str | list[dict[str, str]], **options: Any) -> Completion:
        """The completion of a text or of a chat's messages in a batch of one, without the server."""
        served = self.service.models[name]
        is_text = isinstance(prompt, str)
        ids = served.tokenizer.encode_document(prompt) if is_text else served.tokenizer.render(prompt, True)[0]
        options = {"max_new_tokens": 20, "stop": () if is_text else served.stop_strings, **options}
        return generate(served.model, [ids], SamplingParams(**options), served.tokenizer)[0]

    def status(self, name: str | None = None) -> dict[str, int]:
        status = self.service.status()
        return status[name or next(iter(status))]

    def wait_until_idle(self, seconds: float = 5) -> float:
        """Seconds until no request is running or waiting. Fails after `seconds`."""
        started = time.monotonic()
        while any(status["running"] or status["waiting"] for status in self.service.status().values()):
            assert time.monotonic() - started < seconds, self.service.status()
            time.sleep(0.005)
        return time.monotonic() - started


def text_of(response: httpx.Response) -> str:
    """The text of the first choice of a successful response."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@contextlib.contextmanager
def run_server(checkpoints: list[str], **flags: Any) -> Iterator[RunningServer]:
    """Serve the models with these flags of ServeConfig. FastAPI is imported here: the scheduler's tests run without."""
    from serving.app import make_app
    from serving.connections import make_server
    from serving.models import open_models

    config = ServeConfig(checkpoint=tuple(checkpoints), device="cpu", **flags)
    app = make_app(open_models(config), config)
    server = make_server(app, config)
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
