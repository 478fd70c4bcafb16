"""Runs the whole pipeline in a few minutes: trains a small model from scratch that answers in Chinese and English.

    world      demo_world/generator.py  writes true texts, chats and held-out questions
    tokenizer  train_tokenizer.py       trains a tokenizer on the texts
    data       data_process.py          converts texts and chats to token shards
    pretrain   1-pretrain.py            trains on the texts; 2-eval.py asks the held-out questions
    sft        3-full_sft.py            trains on the chats; 2-eval.py asks the same questions again
    lora       4-lora_sft.py            trains a new name and job into low-rank matrices; the base weights are frozen
    dpo        5-dpo_train.py           trains to prefer a correct, short answer to a wrong, rambling or rude one
    exam       eval_ceval.py            multiple choice in C-Eval's layout, with a confidence interval and the baseline

    python demo.py                      (`make demo` does the same in its own environment)
    python demo.py --out_dir out/demo2 --seed 1

Every step is a script that you can run yourself: its command line is printed first. A step whose results exist is
skipped; delete the folder to start over. Writes only --out_dir: models, logs, curves, report.json.
Read next: README.md (the same steps on real text), 1-pretrain.py.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from common.files import write_json
from common.locks import lock_output
from common.metric_keys import with_current_metric_keys
from common.signals import Terminated
from model.config import PRESETS

PROJECT_FOLDER = Path(__file__).resolve().parent
DIM = PRESETS["demo"]["dim"]
# Training stage -> key in report.json of its answers to the held-out questions.
TRAINING = {"pretrain": "before_sft", "full_sft": "after_sft", "lora_sft": "after_lora", "dpo": "after_dpo"}
LAST_STAGE = list(TRAINING)[-1]
REPORT_LANGUAGES = ("zh", "en")
SAMPLES_PER_LANGUAGE = 5
QUESTION_KINDS = {
    "seen_fact_new_wording": "after SFT, facts seen in SFT, new wording",
    "unasked_fact_new_wording": "after SFT, facts seen only in pretraining",
}

# --max_minutes bounds each training on any machine; the learning rate schedule ends at that time.
FLAGS = {
    "world": "--statement_rounds 60 --chat_rounds 8",
    "tokenizer": "--vocab_size 4096",
    "pretrain": "--preset demo --epochs 2 --batch_size 16 --learning_rate 8e-3 --max_minutes 3.75",
    "full_sft": "--epochs 2 --batch_size 32 --learning_rate 3e-3 --max_minutes 2",
    "lora_sft": "--rank 16 --alpha 32 --epochs 3 --batch_size 16 --learning_rate 2.5e-3 --max_minutes 0.7",
    "dpo": "--epochs 1 --batch_size 32 --learning_rate 1e-4 --max_minutes 0.7 --log_interval 2 --eval_interval 15",
    "exam": "--method text",  # a model of this size always answers with the same letter, so option texts are scored
    "try": "--statement_rounds 4 --chat_rounds 1 --questions 20",  # with --max_steps: a smaller world
    "training": "--log_interval 25 --eval_interval 250 --eval_tokens 4096",
}
EXAM_FIELDS = ("questions", "accuracy", "low", "high", "chance", "sentence")
WORLD_FILES = ("words", "pretrain", "chats", "questions", "identity", "identity_questions", "pairs")


@dataclass(frozen=True)
class DemoStep:
    """One command of the demo. It is complete if it exited with 0 and the files in `results` exist."""

    name: str
    title: str
    command: list[str]  # without the interpreter
    results: list[Path]


def make_steps(out: Path, seed: int, max_steps: int) -> list[DemoStep]:
    world, tokenizer = out / "world", out / "tokenizer"
    files = {name: world / f"{name}.jsonl" for name in WORLD_FILES}
    models = {stage: out / f"{stage}_{DIM}.pth" for stage in TRAINING}
    common = ["--out_dir", str(out), "--seed", str(seed), *FLAGS["training"].split()]
    if max_steps:
        common += ["--max_steps", str(max_steps)]

    def data(folder: str, kind: str, source: str, *flags: str) -> tuple[list[str], list[Path]]:
        folders = ["--tokenizer", str(tokenizer), "--out_dir", str(out / folder)]
        return ["data_process.py", kind, str(files[source]), *folders, *flags], [out / folder]

    def train(script: str, stage: str, folder: str, parent: str = "") -> tuple[list[str], list[Path]]:
        start = ["--init_from", str(models[parent])] if parent else ["--tokenizer", str(tokenizer)]
        return [script, "--data_path", str(out / folder), *start, *common, *FLAGS[stage].split()], [models[stage]]

    def score(stage: str, questions: str = "questions") -> tuple[list[str], list[Path]]:
        answers = answers_file(out, stage, questions)
        asked = ["--checkpoint", str(models[stage]), "--questions", str(files[questions]), "--json", str(answers)]
        return ["2-eval.py", *asked], [answers]

    identity = "identity_questions"
    words = [str(files["words"]), "--out_dir", str(tokenizer)]
    tokenizer_command = ["train_tokenizer.py", *words, *FLAGS["tokenizer"].split()]
    world_command = ["-m", "demo_world.generator", "--out_dir", str(world), "--seed", str(seed)]
    world_command += FLAGS["try" if max_steps else "world"].split()
    exam = out / "exam"
    exam_command = ["-m", "demo_world.exam", "--out_dir", str(exam), "--seed", str(seed)]
    exam_eval_command = [
        "eval_ceval.py",
        "--data",
        str(exam),
        "--checkpoint",
        str(models[LAST_STAGE]),
        *FLAGS["exam"].split(),
    ]
    exam_eval_command += ["--out_dir", str(out), "--json", str(out / "exam.json")]
    steps: list[tuple[str, str, tuple[list[str], list[Path]]]] = [
        ("world", "Generate the demo world", (world_command, list(files.values()))),
        ("tokenizer", "Train the tokenizer", (tokenizer_command, [tokenizer / "tokenizer.json"])),
        ("pretrain_data", "Tokenize the texts", data("pretrain", "pretrain", "pretrain")),
        ("sft_data", "Tokenize the chats", data("sft", "sft", "chats")),
        ("identity_data", "Tokenize the chats about a new name", data("identity", "sft", "identity")),
        ("dpo_data", "Tokenize the preference pairs", data("dpo", "dpo", "pairs", "--val_share", "0.1")),
        ("pretrain", "Pretrain on the texts", train("1-pretrain.py", "pretrain", "pretrain")),
        ("score_pretrain", "Ask the pretrained model the held-out questions", score("pretrain")),
        ("full_sft", "Fine-tune on the chats", train("3-full_sft.py", "full_sft", "sft", "pretrain")),
        ("score_full_sft", "Ask the same questions after SFT", score("full_sft")),
        ("identity_before", "Ask for its name and job before LoRA", score("full_sft", identity)),
        ("lora_sft", "LoRA: train a new name and job", train("4-lora_sft.py", "lora_sft", "identity", "full_sft")),
        ("identity_after", "Ask for its name and job after LoRA", score("lora_sft", identity)),
        ("score_lora_sft", "Ask the held-out questions after LoRA", score("lora_sft")),
        ("dpo", "DPO: train on preference pairs", train("5-dpo_train.py", "dpo", "dpo", "lora_sft")),
        ("score_dpo", "Ask the held-out questions after DPO", score("dpo")),
        ("exam", "Generate an exam about the demo world", (exam_command, [exam / "subject_mapping.json"])),
        ("score_exam", "Evaluate the exam by log-probabilities", (exam_eval_command, [out / "exam.json"])),
    ]
    return [DemoStep(name, title, *command) for name, title, command in steps]


def answers_file(out: Path, stage: str, questions: str = "questions") -> Path:
    return out / f"answers_{stage}{'_identity' if questions != 'questions' else ''}.json"


def run_steps(steps: list[DemoStep], out: Path) -> dict[str, float]:
    """Run the steps that are not complete; return step -> seconds, for skipped steps those of their earlier run.

    out/steps.json records the completed commands. If a step runs, all later steps run again.
    """
    record_file = out / "steps.json"
    record = read_step_record(record_file)
    for number, step in enumerate(steps, 1):
        done = record.get(step.name, {}).get("command") == step.command and all(path.exists() for path in step.results)
        print(f"\n[{number}/{len(steps)}] {step.title}" + (": already complete" if done else ""), flush=True)
        if done:
            continue
        for later in steps[number - 1 :]:
            record.pop(later.name, None)
        seconds = run_command(step.command)
        record[step.name] = {"command": step.command, "seconds": round(seconds, 1)}
        write_json(record_file, record)
    return {name: entry["seconds"] for name, entry in record.items()}


def read_step_record(path: Path) -> dict[str, Any]:
    """step -> {"command", "seconds"} of the completed steps. Damaged entries are dropped."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    entries = record.items() if isinstance(record, dict) else ()
    return {name: e for name, e in entries if isinstance(e, dict) and type(e.get("seconds")) in (int, float)}


def run_command(command: list[str]) -> float:
    """Print and run `python command…` in the project's folder; return the seconds. Exits with its code if it fails."""
    print("$ " + subprocess.list2cmdline(["python", *command]), flush=True)
    started, interrupted = time.perf_counter(), None
    child = subprocess.Popen([sys.executable, *command], cwd=PROJECT_FOLDER)  # our own scripts and flags  # nosec B603
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt as stop:  # the child got Ctrl-C too: wait until it has saved
            interrupted = stop
            if isinstance(stop, Terminated):
                child.terminate()
    if interrupted:
        raise interrupted
    if code:  # the script has printed the reason
        sys.exit(code if code > 0 else 128 - code)
    return time.perf_counter() - started


def read_result(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run demo.py again") from None


def summarize_log(path: Path) -> dict[str, Any]:
    """The last values of a training log: steps, tokens (or pairs), speed, loss, validation metrics."""
    rows = [with_current_metric_keys(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val_loss" in row]
    last, unit = steps[-1], "tokens" if "tokens" in steps[-1] else "pairs"
    validation = {
        name: {lang: round(value, 4) for lang, value in scores.items()}
        for name, scores in (validations[-1] if validations else {}).items()
        if name.startswith(("val_", "bits_"))
    }
    return {
        "steps": last["step"],
        unit: last[unit],
        f"{unit}_per_second": round(last[unit] / max(last["seconds"], 1e-9)),
        "final_loss": round(last["loss"], 4),
        "bits_per_byte": validation.pop("bits_per_byte", {}),
        "validation_loss": validation.pop("val_loss", {}),
        **validation,
    }


def make_demo_report(out: Path, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    from model.checkpoint import load_model

    score = {stage: read_result(answers_file(out, stage)) for stage in TRAINING}
    samples: list[dict[str, Any]] = []
    for lang in REPORT_LANGUAGES:
        answers = [answer for answer in score[LAST_STAGE]["answers"] if answer["lang"] == lang]
        # Sampled with the seed, not selected: the fraction of wrong answers is representative.
        samples += random.Random(seed).sample(answers, min(SAMPLES_PER_LANGUAGE, len(answers)))
    model, _, _ = load_model(out / f"{LAST_STAGE}_{DIM}.pth")
    stages = {stage: summarize_log(out / f"{stage}_{DIM}.jsonl") for stage in TRAINING}
    identity = {
        moment: read_result(answers_file(out, stage, "identity_questions"))["counts"]
        for moment, stage in (("before_lora", "full_sft"), ("after_lora", "lora_sft"))
    }
    return {
        "parameters": model.count_parameters()[0],
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "stages": stages,
        "bits_per_byte": {stage: log["bits_per_byte"] for stage, log in stages.items() if log["bits_per_byte"]},
        "answer_accuracy": {moment: score[stage]["accuracy"] for stage, moment in TRAINING.items()},
        "answer_kinds": {moment: score[stage]["kinds"] for stage, moment in TRAINING.items()},
        "identity": identity,
        "exam": {name: read_result(out / "exam.json")[name] for name in EXAM_FIELDS},
        "curves": [str(out / f"{stage}_{DIM}.png") for stage in TRAINING],
        "samples": samples,
    }


def print_report(report: dict[str, Any], out: Path) -> None:
    """Print the results of each stage, ten sampled answers, and the command for a chat."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.rule("results of each stage")
    headers = ("stage", "seconds", "tokens", "tok/s", "loss", "bits/byte\nzh", "\nen", "right\nzh", "\nen")
    table = Table(*headers, box=None, padding=(0, 2, 0, 0))
    for stage, moment in TRAINING.items():
        log, right = report["stages"][stage], report["answer_accuracy"][moment]
        bits, seconds = log["bits_per_byte"], report["seconds"][stage]
        amount = (
            (f"{log['tokens']:,}", f"{log['tokens_per_second']:,}")
            if "tokens" in log
            else (f"{log['pairs']:,} pairs", "")
        )
        table.add_row(
            *(stage, f"{seconds:.0f}", *amount, f"{log['final_loss']:.3f}"),
            *(f"{bits[lang]:.3f}" if bits else "" for lang in REPORT_LANGUAGES),
            *(f"{right.get(lang, 0):.1%}" for lang in REPORT_LANGUAGES),
        )
    console.print(table)
    for line in explain_columns(report):
        console.print(line, highlight=False)
    console.rule("ten of the held-out questions, sampled at random")
    for sample in report["samples"]:
        mark = "[green]right[/]" if sample["correct"] else f"[red]wrong[/] (expected: {sample['keys'][0]})"
        console.print(f"[bold]{sample['question']}[/]  {mark}", highlight=False)
        console.print(f"    {sample['answer']}", highlight=False, markup=False)
    console.rule("done")
    minutes, millions = report["total_seconds"] / 60, report["parameters"] / 1e6
    console.print(f"{millions:.1f} M parameters, trained from scratch; all steps took {minutes:.1f} minutes.")
    print(f"loss curves:  {out}/*_{DIM}.png")
    print(f"report as JSON:  {out / 'report.json'}")
    print(f"chat with it:  {python_command()} 2-eval.py --checkpoint {out / f'{LAST_STAGE}_{DIM}.pth'}")


def explain_columns(report: dict[str, Any]) -> list[str]:
    """Lines below the table: the meaning of its columns, and results without a column."""

    def counts(scores: dict[str, Any]) -> str:
        return ", ".join(
            f"{k} {scores[k]['correct']} of {scores[k]['questions']}" for k in REPORT_LANGUAGES if k in scores
        )

    kinds, identity, dpo = report["answer_kinds"]["after_sft"], report["identity"], report["stages"]["dpo"]
    exam = report["exam"]
    lines = [
        "tokens: trained tokens. bits/byte: on held-out texts and answers.",
        "right: the answer contains the exact key; no model was trained on the wording of these questions.",
        *(f"  {meaning}: {counts(kinds[kind])}" for kind, meaning in QUESTION_KINDS.items() if kind in kinds),
        "LoRA trained a new name and job; questions with held-out wordings answered right:",
        f"  before: {counts(identity['before_lora'])}; after: {counts(identity['after_lora'])}",
    ]
    if "val_reward_accuracy" in dpo:
        lines.append("DPO, held-out pairs whose chosen answer has the higher log-probability per token:")
    for lang, gained in dpo.get("val_reward_accuracy", {}).items():
        before, after = dpo["val_chosen_preferred_before"][lang], dpo["val_chosen_preferred"][lang]
        lines.append(f"  {lang}: before {before:.1%}, after {after:.1%}; reward accuracy {gained:.1%}")
    return [*lines, f"Exam, {exam['questions']} questions with four options each:", f"  {exam['sentence']}"]


def python_command() -> str:
    """The command that starts this Python from the project's folder: `make demo` uses one in .venv."""
    here = Path(sys.executable)
    return str(here.relative_to(PROJECT_FOLDER)) if here.is_relative_to(PROJECT_FOLDER) else "python"


def main() -> None:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out_dir", type=flag_types.path_string, default="out/demo", help="folder for all output (default: out/demo)"
    )
    parser.add_argument("--seed", type=flag_types.seed, default=0,
        help="random seed of world, initial weights and data order (default: 0)")  # fmt: skip
    parser.add_argument("--max_steps", type=flag_types.max_steps, default=0,
                        help="quick test: stop each training after this many steps (-1 or 0: no limit)")  # fmt: skip
    args = parser.parse_args()
    out = Path(args.out_dir)
    if Path.cwd() != PROJECT_FOLDER:  # the commands run in the project's folder
        out = out.absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir {out} is a file: name a folder")
    os.environ["PYTHONUTF8"] = "1"  # the scripts print Chinese, on Windows as well
    started = time.perf_counter()
    with lock_output(out):
        seconds = run_steps(make_steps(out, args.seed, args.max_steps), out)
        report = make_demo_report(out, seconds, args.seed)
        write_json(out / "report.json", report)
    print()
    print_report(report, out)
    print(f"demo.py took {time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
