"""Test helpers: run scripts in this process or a subprocess, write small datasets, create tiny models."""

import collections
import contextlib
import importlib.util
import itertools
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from common import cli
from common.errors import UserError
from model.checkpoint import save_model
from model.completion import Completion
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer, tokenizer_files
from model.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
TINY_MODEL_FLAGS = ["--dim", "32", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "32"]
IGNORE_TOKEN_FOLDERS = shutil.ignore_patterns("tokens-*")  # added to a fixture's folder by other tests
EXACT_FLAGS = ["--device", "cpu", "--dtype", "float32", "--log_interval", "1"]  # for runs that are compared exactly


def load_script(name: str):
    """Import a numbered script, whose file name is not a valid module name."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_").removesuffix(".py"), ROOT / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile imports it by its name
    spec.loader.exec_module(module)
    return module


def run_script(monkeypatch, name: str, *arguments) -> None:
    """Run a script's main() in this process with these command-line arguments."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    load_script(name).main()


def run_here(monkeypatch, capsys, *command) -> subprocess.CompletedProcess:
    """Run a script like `run_process`, but in this process: a new one needs three seconds to import torch."""
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    code = 0
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    return subprocess.CompletedProcess(command, code, *capsys.readouterr())


@contextlib.contextmanager
def one_line_error(*parts):
    """Expects a UserError of one line that contains all `parts`."""
    with pytest.raises(UserError) as error:
        yield error
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


def start_chat(*arguments):
    """The terminal chat of 2-eval.py with these command-line arguments."""
    script = load_script("2-eval.py")
    config = cli.parse(script.EvalConfig, "", [*map(str, arguments)])
    return script.start_chat(config, script.open_chosen_model(config), config.history, script.tool_options(config))


def script_answers(monkeypatch, *texts: str, finish_reason: str = "stop") -> list[str]:
    """Make all chat models generate these texts in turn, in pieces; returns the list of their prompts, as text."""
    left, prompts = iter(texts), []

    def stream(model, ids, settings, tokenizer, completion, decoder=None):
        if len(ids) > model.config.max_seq_len:
            raise ValueError("the prompt is too long")
        prompts.append(tokenizer.decode(ids))
        return pieces_of(next(left), completion)

    def pieces_of(text, completion):
        for start in range(0, len(text), 3):
            completion.ids.append(0)
            completion.text += text[start : start + 3]
            yield text[start : start + 3]
        completion.finish_reason = finish_reason

    def generate(model, batch, settings, tokenizer, decoder=None):
        completions = [Completion() for _ in batch]
        for ids, completion in zip(batch, completions, strict=True):
            collections.deque(stream(model, ids, settings, tokenizer, completion), maxlen=0)
        return completions

    monkeypatch.setattr("evaluation.chat_model.stream", stream)
    monkeypatch.setattr("evaluation.chat_model.generate", generate)
    return prompts


def run_process(*command, **options) -> subprocess.CompletedProcess:
    """Run a command in a subprocess with one thread, in the project's folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options
    )


def visible_names(folder: Path) -> list[str]:
    """The sorted names in a folder, without hidden files such as output locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def free_port() -> int:
    """A free TCP port; tests run in parallel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_cpu_seconds() -> float:
    """CPU seconds of finished child processes. Unlike wall time it does not depend on the load of the machine."""
    used = os.times()
    return used.children_user + used.children_system


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def json_bytes(value, **options) -> bytes:
    return json.dumps(value, ensure_ascii=False, **options).encode()


def jsonl_bytes(rows) -> bytes:
    return b"".join(json_bytes(row) + b"\n" for row in rows)


def apply_changes(content: bytes, changes) -> bytes:
    """Insert and remove bytes: `changes` are (position, added bytes, number of removed bytes)."""
    for place, added, removed in changes:
        place %= len(content) + 1
        content = content[:place] + added + content[place + removed :]
    return content


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write a jsonl file; a text becomes {"text": …}."""
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_folder(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def write_shards(folder: Path, kind: str, tokenizer, splits: dict) -> Path:
    """Write a dataset in the format of data_process.py. `splits`: name -> documents, each ids or (ids, mask)."""
    from corpus.dataset_meta import write_meta
    from corpus.shard_writer import ShardWriter

    folder.mkdir(parents=True)
    meta = {"kind": kind, "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    meta |= {"dtype": "uint16", "splits": {}}
    for split, documents in splits.items():
        writer = ShardWriter(folder, split, "uint16")
        for document in documents:
            ids, mask = document if isinstance(document, tuple) else (document, None)
            writer.add(ids, mask, utf8_bytes=3 * len(ids))
        meta["splits"][split] = writer.close()
    write_meta(folder, meta)
    return folder


def make_chat_row(i: int) -> dict:
    question, answer, lang = (
        (f"{i}?", f"n{i % 7}" * (1 + i % 3), "en") if i % 2 else (f"数{i}", "好" * (1 + i % 3), "zh")
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "lang": lang}


def tiny_model(**changes) -> Transformer:
    """A model in eval mode with random weights: its answers are long and arbitrary. `changes`: fields of its config."""
    torch.manual_seed(0)
    config = {"vocab_size": 272, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32}
    model = Transformer(ModelConfig(**{**config, **changes})).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.2)
    return model


def save_scripted_model(
    path: Path,
    tokenizer: ChatTokenizer,
    pieces: list[str],
    stage: str = "full_sft",
    trigger: str = "\n",
    end_of_turn: bool = True,
    max_seq_len: int = 128,
) -> Path:
    """Save a model that generates `pieces` after the byte `trigger` ("\n" ends chat prompts).

    Without `end_of_turn` it repeats them without end.
    """
    backend = Tokenizer.from_str(tokenizer.files["tokenizer.json"])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    own = ChatTokenizer(tokenizer_files(backend)).with_chat_format(tokenizer.format_name or None)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(own.vocab_size, 64, 1, 2, 2, max_seq_len=max_seq_len, tie_embeddings=False))
    piece_ids = [backend.token_to_id(piece) for piece in pieces]
    chain = [*own.encode(trigger), *piece_ids, own.end_of_turn_id if end_of_turn else piece_ids[0]]
    force_tokens(model, chain)
    save_model(path, model, stage, own, [{"stage": stage, "tokens": 1_500_000, "data": "text"}])
    return path


@torch.no_grad()
def force_tokens(model: Transformer, chain: list[int], logit_scale: float = 4) -> None:
    """Set the weights so that each token of `chain` predicts the next one; `logit_scale` sets its probability."""
    for name, weight in model.named_parameters():
        if "layers" in name:
            weight.zero_()
    model.model.embed_tokens.weight.normal_()
    model.lm_head.weight.zero_()
    for current, following in itertools.pairwise(chain):
        model.lm_head.weight[following] += logit_scale * model.model.embed_tokens.weight[current]


def assign_splits(examples: Sequence[Any], val_fraction: float) -> list[tuple[str, Any]]:
    """(split, example) of all examples, assigned in batches of seven."""
    from corpus.validation_split import ValidationSplit

    split, assigned = ValidationSplit(val_fraction), []
    for start in range(0, len(examples), 7):
        assigned += split.assign(examples[start : start + 7])
    return assigned + split.held_back()
