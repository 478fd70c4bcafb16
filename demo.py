"""The whole path in a few minutes: from nothing to a small model that answers in Chinese and English.

    world      corpus/demo_world.py     writes true texts, chats and held-out questions
    tokenizer  train_tokenizer.py       text becomes tokens
    data       data_process.py          texts and chats become token shards
    pretrain   1-pretrain.py            the model learns to continue text; 2-eval.py puts the questions
    sft        3-full_sft.py            the model learns to answer; 2-eval.py puts the same questions again

    python demo.py                      (`make demo` does the same in its own environment)
    python demo.py --out_dir out/demo2 --seed 1

Every step is a script that you can run yourself: its command line is printed before it runs. A step whose result is
there is not run again; delete the folder to start anew. Writes only --out_dir: models, logs, curves, report.json.
Read next: README.md (the same steps on real text), 1-pretrain.py.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.errors import UserError, fail_in_one_line
from model.config import PRESETS

ROOT = Path(__file__).resolve().parent
DIM = PRESETS["demo"]["dim"]
TRAINING = ("pretrain", "full_sft")
LANGUAGES = ("zh", "en")
SAMPLES_PER_LANGUAGE = 5
KINDS = {
    "seen_fact_new_wording": "the fact was asked for in other words",
    "unasked_fact_new_wording": "the fact was only ever stated, in pretraining",
}

# Time limits decide how long each training takes: its learning rate falls to its end by then, on any machine.
WORLD = ["--statement_rounds", "60", "--chat_rounds", "8"]
TOKENIZER = ["--vocab_size", "4096"]
PRETRAIN = ["--preset", "demo", "--epochs", "2", "--batch_size", "16", "--learning_rate", "8e-3", "--max_minutes", "4"]
SFT = ["--epochs", "2", "--batch_size", "32", "--learning_rate", "3e-3", "--max_minutes", "2"]
LOGGING = ["--log_interval", "25", "--eval_interval", "250", "--eval_tokens", "4096"]


@dataclass(frozen=True)
class Step:
    """One command of the demo. It is complete when it ended well and the files in `results` are there."""

    name: str
    title: str
    command: list[str]  # without the interpreter
    results: list[Path]


def steps_of(out: Path, seed: int, max_steps: int) -> list[Step]:
    world, tokenizer = out / "world", out / "tokenizer"
    words, texts, chats, questions = (world / f"{name}.jsonl" for name in ("words", "pretrain", "chats", "questions"))
    models = {stage: out / f"{stage}_{DIM}.pth" for stage in TRAINING}
    common = ["--out_dir", str(out), "--seed", str(seed), *LOGGING]
    if max_steps:
        common += ["--max_steps", str(max_steps)]

    def train(script: str, stage: str, *flags: str) -> list[str]:
        return [script, "--data_path", str(out / stage.removeprefix("full_")), *flags, *common]

    def score(stage: str) -> tuple[list[str], list[Path]]:
        answers = out / f"answers_{stage}.json"
        files = ["--checkpoint", str(models[stage]), "--questions", str(questions), "--json", str(answers)]
        return ["2-eval.py", *files], [answers]

    def data(kind: str, source: Path) -> tuple[list[str], list[Path]]:
        folders = ["--tokenizer", str(tokenizer), "--out_dir", str(out / kind)]
        return ["data_process.py", kind, str(source), *folders], [out / kind]

    tokenizer_command = ["train_tokenizer.py", str(words), *TOKENIZER, "--out_dir", str(tokenizer)]
    world_command = ["-m", "corpus.demo_world", "--out_dir", str(world), "--seed", str(seed), *WORLD]
    pretrain_command = train("1-pretrain.py", "pretrain", "--tokenizer", str(tokenizer), *PRETRAIN)
    sft_command = train("3-full_sft.py", "full_sft", "--init_from", str(models["pretrain"]), *SFT)
    return [
        Step("world", "Compose the demo world", world_command, [words, texts, chats, questions]),
        Step("tokenizer", "Train the tokenizer", tokenizer_command, [tokenizer / "tokenizer.json"]),
        Step("pretrain_data", "Turn the texts into tokens", *data("pretrain", texts)),
        Step("sft_data", "Turn the chats into tokens", *data("sft", chats)),
        Step("pretrain", "Pretrain: learn to continue text", pretrain_command, [models["pretrain"]]),
        Step("score_pretrain", "Put the held-out questions to the pretrained model", *score("pretrain")),
        Step("full_sft", "Fine-tune: learn to answer", sft_command, [models["full_sft"]]),
        Step("score_full_sft", "Put the same questions again", *score("full_sft")),
    ]


def run_steps(steps: list[Step], out: Path) -> dict[str, float]:
    """Run what is not complete yet; returns the seconds that each step took when it ran.

    out/steps.json remembers the completed commands. When a step has to run, all later ones run again too.
    """
    record_file = out / "steps.json"
    record: dict[str, Any] = {}
    if record_file.is_file():
        record = json.loads(record_file.read_text(encoding="utf-8"))
    for number, step in enumerate(steps, 1):
        done = record.get(step.name, {}).get("command") == step.command and all(path.exists() for path in step.results)
        print(f"\n[{number}/{len(steps)}] {step.title}" + (": already there" if done else ""), flush=True)
        if done:
            continue
        for later in steps[number - 1 :]:
            record.pop(later.name, None)
        seconds = run_command(step.command)
        record[step.name] = {"command": step.command, "seconds": round(seconds, 1)}
        write_json(record_file, record)
    return {name: entry["seconds"] for name, entry in record.items()}


def run_command(command: list[str]) -> float:
    """Print and run `python command…` in the project's folder; returns its seconds. Its failure is our end."""
    print("$ " + subprocess.list2cmdline(["python", *command]), flush=True)
    started, interrupted = time.perf_counter(), False
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:  # Ctrl-C reached the child too: let it save and end
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if code:  # the script has said why
        sys.exit(code if code > 0 else 128 - code)
    return time.perf_counter() - started


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_log(path: Path) -> dict[str, Any]:
    """What a training log says in the end: tokens, tokens a second over the run, last loss, last validation."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "bits_per_byte" in row]
    last = steps[-1]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9)),
        "final_loss": round(last["loss"], 4),
        "bits_per_byte": {k: round(v, 4) for k, v in checks[-1]["bits_per_byte"].items()} if checks else {},
        "validation_loss": {k: round(v, 4) for k, v in checks[-1]["val_loss"].items()} if checks else {},
    }


def make_report(out: Path, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    from model.checkpoint import load_model

    score = {s: json.loads((out / f"answers_{s}.json").read_text(encoding="utf-8")) for s in TRAINING}
    samples: list[dict[str, Any]] = []
    for lang in LANGUAGES:
        answers = [answer for answer in score["full_sft"]["answers"] if answer["lang"] == lang]
        # Drawn by the seed, not picked: wrong answers appear as often as they happen.
        samples += random.Random(seed).sample(answers, min(SAMPLES_PER_LANGUAGE, len(answers)))
    model, _, _ = load_model(out / f"full_sft_{DIM}.pth")
    return {
        "parameters": model.count_parameters()[0],
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "stages": {stage: read_log(out / f"{stage}_{DIM}.jsonl") for stage in TRAINING},
        "bits_per_byte": {stage: read_log(out / f"{stage}_{DIM}.jsonl")["bits_per_byte"] for stage in TRAINING},
        "answer_accuracy": {"before_sft": score["pretrain"]["accuracy"], "after_sft": score["full_sft"]["accuracy"]},
        "answer_kinds": {"before_sft": score["pretrain"]["kinds"], "after_sft": score["full_sft"]["kinds"]},
        "curves": [str(out / f"{stage}_{DIM}.png") for stage in TRAINING],
        "samples": samples,
    }


def show(report: dict[str, Any], out: Path) -> None:
    """The closing: what each stage achieved, ten answers, and how to go on."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.rule("what each stage achieved")
    heads = ("stage", "seconds", "tokens", "tok/s", "loss", "bits/byte\nzh", "\nen", "right\nzh", "\nen")
    table = Table(*heads, box=None, padding=(0, 2, 0, 0))
    for stage, moment in zip(TRAINING, ("before_sft", "after_sft"), strict=True):
        numbers, right = report["stages"][stage], report["answer_accuracy"][moment]
        bits, seconds = numbers["bits_per_byte"], report["seconds"][stage]
        table.add_row(
            *(stage, f"{seconds:.0f}", f"{numbers['tokens']:,}", f"{numbers['tokens_per_second']:,}"),
            *(f"{numbers['final_loss']:.3f}", *(f"{bits[lang]:.3f}" if bits else "-" for lang in LANGUAGES)),
            *(f"{right.get(lang, 0):.1%}" for lang in LANGUAGES),
        )
    console.print(table)
    console.print("tokens: those trained. bits/byte: of held-out texts, and of answers in held-out chats.")
    console.print("right: held-out questions with the exact key in the answer. Nobody trained on these words;")
    for kind, meaning in KINDS.items():
        scores = {lang: report["answer_kinds"]["after_sft"].get(kind, {}).get(lang) for lang in LANGUAGES}
        counts = ", ".join(f"{lang} {s['correct']} of {s['questions']}" for lang, s in scores.items() if s)
        console.print(f"  {meaning}: {counts}", highlight=False)
    console.rule("ten of the held-out questions, drawn by lot")
    for sample in report["samples"]:
        mark = "[green]right[/]" if sample["correct"] else f"[red]wrong[/] (expected: {sample['keys'][0]})"
        console.print(f"[bold]{sample['question']}[/]  {mark}", highlight=False)
        console.print(f"    {sample['answer']}", highlight=False, markup=False)
    console.rule("done")
    minutes, millions = report["total_seconds"] / 60, report["parameters"] / 1e6
    console.print(f"{millions:.1f} M parameters, trained from nothing; all steps took {minutes:.1f} minutes.")
    print(f"loss curves:  {'  '.join(report['curves'])}")
    print(f"everything above, as json:  {out / 'report.json'}")
    print(f"go on chatting:  {interpreter()} 2-eval.py --checkpoint {out / f'full_sft_{DIM}.pth'}")


def interpreter() -> str:
    """How to call this Python from the project's folder: `make demo` has its own in .venv."""
    here = Path(sys.executable)
    return str(here.relative_to(ROOT)) if here.is_relative_to(ROOT) else "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="out/demo", help="everything goes here (default: out/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the weights and the order (default: 0)")
    parser.add_argument("--max_steps", type=int, default=0, help="try the path: stop each training after so many steps")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console in another encoding shows "?" instead of failing
            stream.reconfigure(errors="replace")
    out = Path(args.out_dir)
    if Path.cwd() != ROOT:  # the commands run in the project's folder
        out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir {out} is a file: name a folder")
    os.environ["PYTHONUTF8"] = "1"  # the scripts print Chinese, on Windows as well
    started = time.perf_counter()
    seconds = run_steps(steps_of(out, args.seed, args.max_steps), out)
    report = make_report(out, seconds, args.seed)
    write_json(out / "report.json", report)
    print()
    show(report, out)
    print(f"this run of demo.py: {time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
