"""A small demo folder for the experiments: a world, a tokenizer of 320 entries, token folders; two steps per arm."""

import sys

import pytest

from experiments import training
from experiments.training import Workspace
from tests.helpers import run_process

COMMANDS = (
    "-m demo_world.generator --out_dir DEMO/world --statement_rounds 1 --chat_rounds 1 --questions 20",
    "train_tokenizer.py DEMO/world/words.jsonl --vocab_size 320 --out_dir DEMO/tokenizer",
    "data_process.py pretrain DEMO/world/pretrain.jsonl --tokenizer DEMO/tokenizer --out_dir DEMO/pretrain",
    "data_process.py sft DEMO/world/chats.jsonl --tokenizer DEMO/tokenizer --out_dir DEMO/sft",
    "data_process.py sft DEMO/world/identity.jsonl --tokenizer DEMO/tokenizer --out_dir DEMO/identity",
    "data_process.py dpo DEMO/world/pairs.jsonl --tokenizer DEMO/tokenizer --out_dir DEMO/dpo --val_fraction 0.1",
)
RUN_ALL = """
import runpy, sys
for line in sys.argv[2].splitlines():
    words = line.replace("DEMO", sys.argv[1]).split()
    run, name, *flags = (runpy.run_module, *words[1:]) if words[0] == "-m" else (runpy.run_path, *words)
    demo, sys.argv = sys.argv, [name, *flags]
    run(name, run_name="__main__")
    sys.argv = demo
"""  # one process: each new one needs seconds to import torch


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    demo = tmp_path_factory.mktemp("experiments") / "demo"
    done = run_process(sys.executable, "-c", RUN_ALL, demo, "\n".join(COMMANDS))
    assert done.returncode == 0, done.stdout + done.stderr
    return demo, demo.parent / "out"


@pytest.fixture
def space(folders, monkeypatch) -> Workspace:
    monkeypatch.setattr(training, "VOCABULARY", training.DEMO_VOCABULARY)  # one tokenizer for all arms
    monkeypatch.setitem(training.PARENT_FLAGS, "pretrain", training.SMALL_MODEL + " --dim 16 --n_layers 1")
    monkeypatch.setattr(training, "PARENT_DIM", 16)
    folders[1].mkdir(exist_ok=True)
    return Workspace(*folders, max_steps=2)
