"""Trains the arms of an experiment with the scripts' own settings, losses and training loop.

    arm = space.train("1-pretrain.py", "--dim 64 --max_steps 150", seed=0)                      as the script does
    arm = space.train("1-pretrain.py", "--dim 64 --max_steps 150", seed=0, change=remove_rope)  with one change

`change` gets the Stage before training and may replace its model's modules, its data or its loss. Without it an arm
equals a run of the script with the same flags. All arms with one seed start from the same weights and read the same
rows in the same order, unless the change is about them.
Read next: no_rope.py (the shortest experiment), ../trainer/loop.py, ../trainer/stage.py.
"""

import contextlib
import functools
import importlib.util
import io
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import parse
from common.errors import UserError
from evaluation.qa_data import KeyedQuestion, is_correct
from model.checkpoint import load_model
from model.completion import Completion
from model.config import PRESETS
from model.generate import chat_prompt, generate
from model.lora import LoRAConfig, attach
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer, load_tokenizer
from model.transformer import Transformer
from trainer.chat_data import open_chat_data, tokenized_folder
from trainer.config import TrainConfig
from trainer.datasets import PackedDataset, PreferenceDataset, check_data
from trainer.distributed import DistContext, init_distributed
from trainer.dpo import load_or_compute_reference
from trainer.loop import train
from trainer.metrics import is_validation
from trainer.stage import Stage

PROJECT = Path(__file__).resolve().parent.parent
DEMO_VOCABULARY = 5120  # of the demo's own tokenizer
VOCABULARY = 1024  # a small vocabulary: most of a small model's time goes into its logits
SMALL_MODEL = "--dim 64 --n_layers 3 --n_heads 4 --n_kv_heads 2 --max_seq_len 128 --batch_size 8"
# No validation or save before the end; every step is logged.
QUIET = "--log_interval 1 --eval_interval 1000000000 --save_interval 1000000000 --resume never"
ANSWER_TOKENS = 48
Change = Callable[[Stage], None]
MakeStage = Callable[[Any, TrainConfig, DistContext], Stage]


@dataclass
class Arm:
    """A trained arm. `rows`: its log; `problem`: why its run ended early, or "". `cpu_seconds`: of its training."""

    model: Transformer
    tokenizer: ChatTokenizer
    rows: list[dict[str, Any]]
    cpu_seconds: float
    problem: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = [row for row in self.rows if "loss" in row]
        self.validation = next((row for row in reversed(self.rows) if is_validation(row)), {})

    def validated(self, name: str = "val_loss") -> float:
        """Return the mean of a final validation metric over the splits; infinity if the run broke off."""
        values = self.validation.get(name, {}).values()
        return sum(values) / len(values) if values else float("inf")


@dataclass(frozen=True)
class Workspace:
    """Folders of the experiments. demo: data of `make demo`. out: pictures and parents. max_steps: of quick tests."""

    demo: Path
    out: Path
    max_steps: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of every arm: of weights and order of the data."""
        return (0,) if self.max_steps else (0, 1)

    def train(
        self, script: str, flags: str, seed: int = 0, change: Change | None = None, data: Sequence[str] = ()
    ) -> Arm:
        """Train one arm with the flags of a script and return it. Ctrl-C ends it and raises KeyboardInterrupt.

        data: the flags that name data and parent or tokenizer; by default those of `data_flags`.
        """
        lesson, (config_class, make_stage) = load_lesson(script), MAKE_STAGE[script]
        with tempfile.TemporaryDirectory() as folder:
            words = [*(data or self.data_flags(script)), *shlex.split(f"{QUIET} {flags}"), "--seed", str(seed)]
            words += ["--max_steps", str(self.max_steps)] if self.max_steps else []
            config = parse(getattr(lesson, config_class), "", [*words, "--out_dir", folder])
            with init_distributed(config.device, config.dtype, config.seed) as dist, muted():
                stage = make_stage(lesson, config, dist)
                if change:
                    change(stage)
                started, problem = time.process_time(), ""
                try:
                    train(config, stage, dist)
                except UserError as error:  # the guard ends a run that diverges: that is a result
                    problem = str(error)
                seconds = time.process_time() - started
            if dist.stop_requested:
                raise KeyboardInterrupt
            log = stage.checkpoint_path(folder).with_suffix(".jsonl")
            rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        if not rows:
            raise UserError(problem)
        return Arm(stage.model, stage.tokenizer, rows, seconds, problem)

    def train_all(self, script: str, arms: Mapping[str, tuple[str, Change | None]]) -> dict[str, list[Arm]]:
        """Train every arm {name: (flags, change)} with every seed, and print a line for each."""
        trained: dict[str, list[Arm]] = {name: [] for name in arms}
        for seed in self.seeds:
            for name, (flags, change) in arms.items():
                arm = self.train(script, flags, seed, change)
                trained[name].append(arm)
                result = arm.problem or f"validation loss {arm.validated():.3f}"
                print(f"{name}, seed {seed}: {result} ({arm.cpu_seconds:.0f} CPU seconds)", flush=True)
        return trained

    def data_flags(self, script: str) -> list[str]:
        """Return the flags that name the data and the parent, or the tokenizer, of a script."""
        if script == "1-pretrain.py":
            return self.text_flags(VOCABULARY)
        folder, parent = CHAT_DATA[script]
        return ["--data_path", str(self.demo / folder), "--init_from", str(self.parent(parent))]

    def text_flags(self, vocabulary: int) -> list[str]:
        """Return the flags of pretraining with a vocabulary; train its tokenizer and tokenize the texts if need be."""
        tokenizer, texts = self.out / f"tokenizer-{vocabulary}", self.out / f"texts-{vocabulary}"
        if vocabulary == DEMO_VOCABULARY:
            tokenizer, texts = self.demo / "tokenizer", self.demo / "pretrain"
        words, source = (str(self.demo / "world" / f"{name}.jsonl") for name in ("words", "pretrain"))
        if not (tokenizer / "tokenizer.json").exists():
            run_script(["train_tokenizer.py", words, "--vocab_size", str(vocabulary), "--out_dir", str(tokenizer)])
        if not (texts / "meta.json").exists():
            run_script(["data_process.py", "pretrain", source, "--tokenizer", str(tokenizer), "--out_dir", str(texts)])
        return ["--data_path", str(texts), "--tokenizer", str(tokenizer)]

    def demo_model(self, stage: str) -> Path:
        """Return the checkpoint of the demo, "pretrain" or "full_sft"; without one, and in quick tests, `parent`."""
        path = self.demo / f"{stage}_{PRESETS['demo']['dim']}.pth"
        return self.parent(stage) if self.max_steps or not path.exists() else path

    def parent(self, stage: str) -> Path:
        """Return the checkpoint of a small parent, "pretrain" or "full_sft"; train it if it does not exist."""
        folder = self.out / ("parents" + (f"-{self.max_steps}" if self.max_steps else ""))
        path = folder / f"{stage}_{PARENT_DIM}.pth"
        if path.exists() and not path.with_suffix(".resume").exists():
            return path
        script = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py"}[stage]
        command = [script, *self.data_flags(script), "--out_dir", str(folder), *PARENT_FLAGS[stage].split()]
        run_script([*command, *PARENT_STEPS.split(), *(["--max_steps", str(self.max_steps)] if self.max_steps else [])])
        if path.with_suffix(".resume").exists():  # Ctrl-C: it has saved its state and resumes the next time
            raise KeyboardInterrupt
        return path


def run_script(command: list[str]) -> None:
    """Print and run `python command…` in the project's folder. Exits with its code if it fails."""
    print("$ " + subprocess.list2cmdline(["python", *command]), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=PROJECT)  # our scripts  # nosec B603
    if done.returncode:
        sys.exit(done.returncode)


@functools.cache
def load_lesson(script: str) -> Any:
    """Return the module of a numbered script, whose file name is not a module name."""
    spec = importlib.util.spec_from_file_location("lesson_" + script[0], PROJECT / script)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Inside, nothing is printed to stdout: a run of an arm prints dozens of lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ---- the stages, as the scripts make them ----------------------------------------------------------------------------
def pretrain_stage(lesson: Any, config: Any, dist: DistContext) -> Stage:
    tokenizer = load_tokenizer(config.tokenizer)
    splits = check_data(config.data_path, "pretrain", tokenizer)
    model, lineage = lesson.make_model(config, tokenizer)
    data = {
        split.removeprefix("val_"): PackedDataset(config.data_path, split, model.config.max_seq_len) for split in splits
    }
    return Stage("pretrain", model, tokenizer, lesson.compute_loss, data.pop("train"), data, lineage)


def chat_stage(lesson: Any, config: Any, dist: DistContext, name: str = "full_sft") -> Stage:
    model, tokenizer, parent = load_model(config.init_from)
    data, validation = open_chat_data(config.data_path, model.config.max_seq_len, tokenizer, dist)
    return Stage(name, model, tokenizer, lesson.compute_loss, data, validation, parent["lineage"])


def lora_stage(lesson: Any, config: Any, dist: DistContext) -> Stage:
    stage = chat_stage(lesson, config, dist, "lora_sft")
    attach(stage.model, LoRAConfig(config.rank, config.alpha, config.lora_dropout, config.targets), config.seed)
    stage.model.adapter |= {"parent": config.init_from, "parent_fingerprint": ""}
    return stage


def dpo_stage(lesson: Any, config: Any, dist: DistContext) -> Stage:
    model, tokenizer, parent = load_model(config.init_from)
    folder = tokenized_folder(config.data_path, "pairs", model.config.max_seq_len, tokenizer, dist)
    file = Path(config.out_dir) / "dpo.reference"
    reference = load_or_compute_reference(dist, model, folder, tokenizer.pad_id, file, 2 * config.batch_size)
    pairs = {
        split.removeprefix("val_"): PreferenceDataset(folder, split, tokenizer.pad_id, log_probs)
        for split, log_probs in reference.items()
    }
    loss = functools.partial(lesson.compute_loss, config=config)
    return Stage("dpo", model, tokenizer, loss, pairs.pop("train"), pairs, parent["lineage"], loss_unit="pair")


MAKE_STAGE: dict[str, tuple[str, MakeStage]] = {
    "1-pretrain.py": ("PretrainConfig", pretrain_stage),
    "3-full_sft.py": ("SFTConfig", chat_stage),
    "4-lora_sft.py": ("LoRASFTConfig", lora_stage),
    "5-dpo_train.py": ("DPOConfig", dpo_stage),
}
# Script -> (folder of the demo's data, stage of the parent).
CHAT_DATA = {
    "3-full_sft.py": ("sft", "pretrain"),
    "4-lora_sft.py": ("identity", "full_sft"),
    "5-dpo_train.py": ("dpo", "full_sft"),
}
PARENT_DIM = 96
PARENT_FLAGS = {
    "pretrain": f"--dim {PARENT_DIM} --n_layers 4 --n_heads 4 --n_kv_heads 2 --max_seq_len 128 --batch_size 8",
    "full_sft": "--batch_size 16 --learning_rate 4e-3",
}
PARENT_STEPS = "--max_steps 500 --log_interval 100 --eval_interval 500 --eval_tokens 4096"


# ---- answers ---------------------------------------------------------------------------------------------------------
def answer_all(
    model: Transformer, tokenizer: ChatTokenizer, questions: list[KeyedQuestion], settings: SamplingParams
) -> list[Completion]:
    """Return the answer of a chat model to every question, in one batch."""
    prompts = [
        chat_prompt(model, tokenizer, [{"role": "user", "content": row["question"]}], settings.max_new_tokens)
        for row in questions
    ]
    return generate(model, prompts, settings, tokenizer)


def fraction_correct(answers: list[Completion], questions: list[KeyedQuestion]) -> float:
    right = [is_correct(answer.text, row["keys"]) for answer, row in zip(answers, questions, strict=True)]
    return sum(right) / len(right)
