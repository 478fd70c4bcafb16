"""Helpers of the tests: run the scripts in this process or in another one, write small data folders, make models."""

import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from model.checkpoint import save_model
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer, tokenizer_files
from model.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
TINY_MODEL_FLAGS = ["--dim", "32", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "32"]
IGNORE_TOKEN_FOLDERS = shutil.ignore_patterns("tokens-*")  # what other tests have added to a fixture's folder
EXACT_FLAGS = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--log_interval",
    "1",
]  # runs that are compared number by number


def load_script(name: str):
    """A numbered script as a module (its name is no identifier, so `import` cannot)."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_").removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(monkeypatch, name: str, *arguments) -> None:
    """Run a script's main() in this process, as if started with these arguments."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    load_script(name).main()


def run_process(*command, **options) -> subprocess.CompletedProcess:
    """Run a command of the project in a process of its own, one thread, from the project's folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options
    )


def visible_names(folder: Path) -> list[str]:
    """The names in a folder, sorted, without those that begin with a dot: the locks of outputs."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def free_port() -> int:
    """A port that nothing listens on: other tests run at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_cpu_seconds() -> float:
    """CPU seconds of the ended child processes: unlike the time of the clock, the same on a busy machine."""
    used = os.times()
    return used.children_user + used.children_system


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def load_weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def write_shards(folder: Path, kind: str, tokenizer, splits: dict) -> Path:
    """A data folder as data_process.py writes it: splits maps a name to documents, each ids or (ids, mask)."""
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


def save_scripted_model(
    path: Path,
    tokenizer: ChatTokenizer,
    pieces: list[str],
    stage: str = "full_sft",
    trigger: str = "\n",
    end_of_turn: bool = True,
    max_seq_len: int = 128,
) -> Path:
    """Generates `pieces` after `trigger` (one byte; "\n" ends chat prompts), for ever without `end_of_turn`."""
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
    """Make each token of `chain` predict the next one, by embeddings alone; `logit_scale` sets how likely it is."""
    for name, weight in model.named_parameters():
        if "layers" in name:
            weight.zero_()
    model.model.embed_tokens.weight.normal_()
    model.lm_head.weight.zero_()
    for current, following in itertools.pairwise(chain):
        model.lm_head.weight[following] += logit_scale * model.model.embed_tokens.weight[current]
