"""Train on your own files: check them, choose base, method and epochs, train, compare with the base, chat.

    python train_on.py mine/                     asks before each decision; Enter accepts the recommendation
    python train_on.py mine/ --yes               accepts all recommendations
    python train_on.py mine/ --base out/full_sft_512.pth --run_name second

    text    data_process.py pretrain -> 1-pretrain.py --init_from BASE, then 3-full_sft.py on the chats of the base
    chats   data_process.py sft      -> 4-lora_sft.py; 3-full_sft.py for many chats, or a base without chats
    pairs   data_process.py dpo      -> 5-dpo_train.py

The folder may hold text, chats and pairs in every format and layout that data_process.py reads; the kind of a file is
that of most of its first rows. The base is the model in out/, else that of the demo. Every command is printed, so that
you can run it yourself. An interrupted run continues with the same command and keeps its answers.
Writes out/NAME (NAME: that of the folder, or --run_name): tokens, models, logs, a comparison, steps.json.
Read next: demo.py (the same from scratch), data_process.py and 4-lora_sft.py (the steps).
"""

import json
import math
import re
import sys
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.cli import flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json, write_text
from common.flag_groups import RunFlags
from common.flag_types import max_steps, non_empty_text, path_string, positive_float
from common.locks import lock_output
from common.steps import PROJECT_FOLDER, python_command, run_command
from corpus.job_state import input_fingerprints
from evaluation.own_files import (
    comparable_chats,
    context_of,
    find_base,
    held_out_questions,
    long_fraction,
    meta_of,
    open_facts,
    sort_files,
    stage_of,
    tokenizer_folder,
)
from model.checkpoint import STAGE_SCRIPTS, find_checkpoint, list_checkpoints
from model.config import ModelConfig

FILE_KINDS = {"text": ("pretrain", "texts"), "chat": ("sft", "chats"), "pair": ("dpo", "pairs")}
SFT_CHATS = 2000  # with fewer chats LoRA is recommended: SFT forgets more of what the base knows (LOG.md)
STEPS, BATCH = 500, 16  # a training of few chats repeats them for about this many steps of so many chats
MAX_EPOCHS = {"lora": 20, "sft": 3}
METHODS = {"sft": "SFT (all weights)", "lora": "LoRA (small matrices; the base stays as it is)"}
CHAT_TOKENS = 512  # longer chats lose their last turns; SFT extends a shorter context of the base to it
MAX_LONG_FRACTION = 0.05  # of chats that are longer than the context of the base; LoRA cannot extend it
FEW = {"text": 200_000, "chat": 50, "pair": 100}  # tokens, chats and pairs below which a note is printed
SHOWN_QUESTIONS = 5


@dataclass(frozen=True, kw_only=True)
class TrainOnConfig(RunFlags):
    """Flags of train_on.py."""

    folder: str = flag(MISSING, "your files: a folder or a file", type=path_string, positional=True, metavar="FOLDER")
    base: str = flag("", "model to start from (default: the one in --out_dir, else that of the demo)",
                     type=path_string, metavar="FILE")  # fmt: skip
    yes: bool = flag(False, "accept all recommendations")
    keys: str = flag("", "keys of another row layout, as prompt=ask,answer=reply", type=non_empty_text,
                     metavar="FIELD=KEY,…")  # fmt: skip
    epochs: float = flag(0.0, "passes over your chats (0: chosen by their number)", type=positive_float, metavar="N")
    max_steps: int = flag(0, "quick test: stop each training after this many steps (-1 or 0: no limit)",
                          type=max_steps)  # fmt: skip


class Choices:
    """Asks yes or no. The answers are kept in steps.json: a second run of the same command does not ask again."""

    def __init__(self, record: dict[str, Any], takes_all: bool) -> None:
        self.record, self.takes_all = record, takes_all
        self.answers: dict[str, bool] = record.setdefault("answers", {})

    def ask(self, name: str, question: str) -> bool:
        """Return the answer to a question; raises UserError without a terminal and --yes."""
        if name in self.answers:
            print(f"{question} {'yes' if self.answers[name] else 'no'} (answered before)")
        elif self.takes_all:
            print(f"{question} yes (--yes)")
            self.answers[name] = True
        elif not sys.stdin.isatty():
            raise UserError("there is no terminal to ask on: add --yes to accept all recommendations")
        else:
            self.answers[name] = input(f"{question} [Y/n] ").strip().lower() not in ("n", "no", "否", "不")
        return self.answers[name]


@dataclass
class OwnRun:
    """The run out/NAME: its folder, record, base and answers."""

    config: TrainOnConfig
    out: Path
    record: dict[str, Any]
    base: Path
    choices: Choices
    done: dict[str, list[str]] = field(default_factory=dict)  # the steps that are complete now

    def do(self, name: str, title: str, command: list[Any], result: Path, quiet: bool = False) -> None:
        """Run a command, unless it is complete: recorded with the same flags, and its result exists."""
        words = [str(word) for word in command]
        self.done[name] = words
        if self.record.get("steps", {}).get(name) == words and result.exists():
            print(f"\n{title}: already complete")
            return
        print(f"\n{title}", flush=True)
        self.record["steps"] = {step: self.done[step] for step in self.done if step != name}
        write_json(self.out / "steps.json", self.record)  # with the answers, in case of an interruption
        try:
            run_command(words, [result], quiet)
        except KeyboardInterrupt:
            print("The same command of train_on.py continues. A training is shorter with --epochs 1 or --max_steps N.")
            raise
        self.record["steps"][name] = words
        write_json(self.out / "steps.json", self.record)

    def train(self, stage: str, parent: Path, data: Path, title: str, *flags: Any, folder: str = "") -> Path:
        """Run a training script on a prepared folder; returns its model, in out/NAME or a folder in it."""
        model = self.out / folder / f"{stage}_{ModelConfig(**open_facts(parent)['config']).name}.pth"
        place = ["--out_dir", self.out.parent, "--run_name", self.out.name]
        place = ["--out_dir", self.out, "--run_name", folder] if folder else place
        limit = ["--max_steps", self.config.max_steps] if self.config.max_steps else []
        command = [STAGE_SCRIPTS[stage], "--data_path", data, "--init_from", parent, *place, *flags, *limit]
        self.do(f"{stage}{folder}", title, command, model)
        return model


# ---- the run ---------------------------------------------------------------------------------------------------------
def run_name(config: TrainOnConfig) -> str:
    """--run_name, else the name of the folder with "_" for other characters than letters, digits, "." and "-"."""
    name = Path(config.folder).resolve().name.split(".")[0]
    return config.run_name or re.sub(r"[^\w.-]|^\W", "_", name) or "mine"


def open_record(out: Path, inputs: list[Any]) -> dict[str, Any]:
    """The record of this run: {inputs, answers, steps}. Raises UserError if `out` belongs to other files."""
    path = out / "steps.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        record = {}
    if not isinstance(record, dict) or not isinstance(record.get("answers", {}), dict):
        record = {}
    if "inputs" not in record and out.is_dir() and any(out.glob("*.pth")):
        raise UserError(f"{out} holds other models: add --run_name OTHER_NAME")
    if record.get("inputs", inputs) != inputs:
        problem = f"{out} was trained on other files or from another base"
        raise UserError(f"{problem}: add --run_name OTHER_NAME, or delete {out} to start over")
    return record | {"inputs": inputs}


# ---- the steps -------------------------------------------------------------------------------------------------------
def prepare(run: OwnRun, kind: str, files: list[str], tokenizer: Path) -> Path | None:
    """Check the files, ask, and tokenize them; returns the prepared folder, None if the answer is no."""
    command, plural = FILE_KINDS[kind]
    flags: list[Any] = ["--tokenizer", tokenizer]
    flags += [] if kind == "text" else ["--max_seq_len", max(CHAT_TOKENS, context_of(run.base))]
    flags += ["--keys", run.config.keys] if run.config.keys else []
    result = run.out / command
    checks = run.record.get("steps", {}).get(f"{command}_data") is None
    if checks:  # prints the report of the rows, so that the command below need not
        print(f"\nCheck the {plural}: what is read, what is left out, and a sample", flush=True)
        run_command(list(map(str, ["data_process.py", command, *files, *flags, "--check", "--samples", 1])))
    if not run.choices.ask(f"use_{kind}", f"\nTrain on these {plural}?"):
        print("Other keys: --keys prompt=KEY,answer=KEY; other layouts: data_process.py --list_layouts")
        return None
    run.do(f"{command}_data", f"Prepare the {plural}",
           ["data_process.py", command, *files, *flags, "--out_dir", result], result, quiet=checks)  # fmt: skip
    print(f"written: {result}")
    return result


def size_of(folder: Path, kind: str) -> int:
    """Training tokens of texts; training rows of chats and pairs, without those that are too long to train on."""
    meta = meta_of(folder)
    dropped = meta.get("report", {}).get("dropped", {}) if kind != "text" else {}
    too_long = sum(found["count"] for reason, found in dropped.items() if "longer than" in reason)
    count = int(meta["splits"]["train"]["tokens"] if kind == "text" else meta["rows"]["train"]) - too_long
    if count < FEW[kind]:
        unit = "tokens" if kind == "text" else FILE_KINDS[kind][1]
        print(f"note: {count:,} {unit} are few: the model will learn their wording by heart rather than what they say")
    return count


def train_on_text(run: OwnRun, data: Path, tokenizer: Path) -> Path:
    """Continue the pretraining of the base on the texts, then fine-tune on the chats of the base, if they are there."""
    size_of(data, "text")
    folder, stage = run.base.parent, stage_of(run.base)
    if stage != "pretrain" and not list_checkpoints(folder, "pretrain"):
        print(f"note: the texts are not used: {folder} has no pretrained model, from which text training continues")
        return run.base
    parent = run.base if stage == "pretrain" else find_checkpoint(folder, "pretrain")
    if not run.choices.ask("text", f"Continue the pretraining of {parent} on the texts, 2 epochs?"):
        return run.base
    flags = ["--tokenizer", tokenizer, "--epochs", 2, "--learning_rate", 2e-3]
    model = run.train("pretrain", parent, data, "Continue pretraining on your texts", *flags)
    lineage = open_facts(run.base)["lineage"]
    chats = Path(next((entry.get("data", "") for entry in lineage if entry["stage"] == "full_sft"), ""))
    if not (chats / "train.jsonl").is_file():
        print("note: this model continues texts; it answers after a training on chats")
        return model
    title = "Fine-tune on the chats of the base, so that the model answers again"
    return run.train("full_sft", model, chats, title, "--epochs", 1, folder="base_chats")


def train_on_chats(run: OwnRun, parent: Path, data: Path) -> Path:
    """LoRA or SFT, by the number of chats and the parent."""
    count, context = size_of(data, "chat"), context_of(parent)
    longer = long_fraction(data, context)
    method, why = ("sft", f"from {SFT_CHATS:,} chats") if count >= SFT_CHATS else ("lora", f"below {SFT_CHATS:,} chats")
    if stage_of(parent) == "pretrain":
        method, why = "sft", "because the model has seen no chats"
    elif longer > MAX_LONG_FRACTION:
        method, why = "sft", f"because {longer:.0%} of them are longer than its context of {context} tokens"
    if not run.choices.ask("method", f"{count:,} chats: {METHODS[method]}, recommended {why}?"):
        method = "lora" if method == "sft" else "sft"
        print(f"then {METHODS[method]}")
    epochs = run.config.epochs or max(1, min(MAX_EPOCHS[method], round(STEPS * BATCH / count)))
    steps = run.config.max_steps or math.ceil(count / BATCH * epochs)
    print("The training prints the time that is left (eta). Ctrl-C stops it, and the same command continues.")
    if not run.choices.ask("epochs", f"Train for {epochs:g} epochs, {steps:,} steps of {BATCH} chats?"):
        raise UserError("then add --epochs N; nothing was trained on the chats")
    flags = ["--epochs", epochs, "--batch_size", BATCH]
    if method == "sft":
        flags += ["--max_seq_len", CHAT_TOKENS] if longer and context < CHAT_TOKENS else []
        return run.train("full_sft", parent, data, "Fine-tune on your chats", *flags)
    return run.train("lora_sft", parent, data, "LoRA on your chats", *flags, "--rank", 16, "--alpha", 32)


def train_on_pairs(run: OwnRun, parent: Path, data: Path) -> Path:
    count = size_of(data, "pair")
    if stage_of(parent) == "pretrain":
        print("note: the pairs are not used: they need a model that has seen chats")
        return parent
    if not run.choices.ask("dpo", f"DPO on {count:,} pairs, 1 epoch?"):
        return parent
    return run.train("dpo", parent, data, "DPO on your pairs", "--epochs", 1)


def shown_loss(lang: str, found: dict[str, Any]) -> str:
    """'zh 5.48', with the number of chats that are not in this mean: the context of a base may be shorter."""
    loss = "not measured" if found["loss"] is None else f"{found['loss']:.2f}"
    return f"{lang} {loss}" + (f" (without {found['dropped']} longer than its context)" if found["dropped"] else "")


def compare_with_base(run: OwnRun, model: Path, chats: Path | None) -> None:
    """Compare the model with the base on held-out chats: loss, and answers side by side."""
    questions = held_out_questions(chats, run.base, SHOWN_QUESTIONS) if chats else []
    flags: list[Any] = []
    if chats and questions:
        write_text(run.out / "questions.txt", "\n".join(questions) + "\n")
        shared = comparable_chats(chats, run.base, run.out / "compared.jsonl")
        flags = ["--prompts", run.out / "questions.txt", "--chats", shared]
    report = run.out / "comparison.json"
    run.do("comparison", "Compare with the base",
           ["2-eval.py", "--report", run.base, model, *flags, "--json", report], report)  # fmt: skip
    for entry in json.loads(report.read_text(encoding="utf-8"))["models"]:
        losses = ", ".join(shown_loss(lang, found) for lang, found in entry["sft_loss"].items())
        print(f"{entry['label']}: loss on held-out chats {losses}" if losses else entry["label"])
        for question, row in zip(questions, entry["answers"], strict=False):
            print(f"    {question}\n        {' '.join(row['answer'].split())[:160]}")


def main() -> None:
    config = parse(TrainOnConfig, __doc__)
    if Path.cwd() != PROJECT_FOLDER:  # the commands run in the project's folder
        absolute = {name: str(Path(getattr(config, name)).absolute()) for name in ("folder", "out_root")}
        config = replace(config, **absolute, base=str(Path(config.base).absolute()) if config.base else "")
    files = sort_files(config.folder, config.keys)
    name = run_name(config)
    out = Path(config.out_root, name)
    base = find_base(config.out_root, config.base)
    with lock_output(out):
        inputs = [str(base), config.keys, *input_fingerprints([file for paths in files.values() for file in paths])]
        record = open_record(out, json.loads(json.dumps(inputs)))
        run = OwnRun(config, out, record, base, Choices(record, config.yes))
        model = train_all(run, files)
    if model == base:
        print("nothing was trained")
        return
    chat = ["2-eval.py", "--checkpoint", str(model)]
    print(f"\nchat with it:  {python_command()} {' '.join(chat)}")
    if sys.stdin.isatty() and not config.yes and input("Chat now? [Y/n] ").strip().lower() not in ("n", "no"):
        run_command(chat)


def train_all(run: OwnRun, files: dict[str, list[str]]) -> Path:
    """Prepare and train on all kinds of files; returns the last model."""
    counts = ", ".join(f"{len(paths)} with {FILE_KINDS[kind][1]}" for kind, paths in files.items())
    print(f"files: {counts}\nbase: {run.base} ({stage_of(run.base)})")
    if run.base.parent.name == "demo":
        print("note: the demo's model knows only the small world of the demo, and its tokenizer only those words. For "
              "other subjects train a base on more text first, as README.md describes")  # fmt: skip
    if not run.choices.ask("base", "Start from this base?"):
        raise UserError("name another one with --base FILE")
    tokenizer, model = tokenizer_folder(run.base, run.out), run.base
    folders = {kind: prepare(run, kind, files[kind], tokenizer) for kind in FILE_KINDS if kind in files}
    if text := folders.get("text"):
        model = train_on_text(run, text, tokenizer)
    chats = folders.get("chat")
    if chats:
        model = train_on_chats(run, model, chats)
    if pairs := folders.get("pair"):
        model = train_on_pairs(run, model, pairs)
    if model != run.base:
        compare_with_base(run, model, chats)
    return model


if __name__ == "__main__":
    with fail_in_one_line():
        main()
