"""Runs the whole pipeline in six minutes: trains a small model from scratch that answers in Chinese and English.

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
    python demo.py --fast               ends each training after a fixed time
    python demo.py --rl                 further steps (`make demo-rl`): a calculator, thoughts, 6-grpo_train.py
    python demo.py --experiment no_rope what happens without RoPE; --experiment list prints all of them

The trainings end after a fixed number of steps: on a slower machine the demo takes longer, and its models are as good.
With --fast they take 2.5 minutes on any machine, and a slower machine trains a worse model.

Every step is a script that you can run yourself: its command line is printed first. The flags of the trainings are
recipes/demo-*.args. A step whose results exist is skipped; delete the folder to start over. Writes only --out_dir:
models, logs, curves, report.json.
Read next: README.md (the same steps on real text), 1-pretrain.py.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import flag_types
from common.cli import Config, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json
from common.locks import lock_output
from common.steps import ENVIRONMENT, PROJECT_FOLDER, python_command, read_step_record, run_command
from demo_world.report import LAST_STAGE, TRAINING, answers_file, make_report, print_report
from demo_world.rl_report import make_rl_report, print_rl_report
from demo_world.rl_steps import DemoStep, rl_steps
from demo_world.texts import DemoTexts
from demo_world.timing import Estimate, minutes_text
from evaluation.terminal_texts import terminal_language
from experiments.catalogue import chosen_experiments, experiment_list
from model.config import PRESETS

DIM = PRESETS["demo"]["dim"]
FLAGS = {
    "world": "--statement_rounds 46 --chat_rounds 7",
    "try": "--statement_rounds 4 --chat_rounds 1 --questions 20",  # with --max_steps: a smaller world
    "tokenizer": "--vocab_size 5120",
    "exam": "--method text",  # a model of this size always answers with the same letter, so option texts are scored
}
FAST_MINUTES = {"pretrain": 1.5, "full_sft": 0.5, "lora_sft": 0.25, "dpo": 0.25}
DATA_STEPS = ("world", "tokenizer", "pretrain_data", "sft_data", "identity_data", "dpo_data")
WORLD_FILES = ("words", "pretrain", "chats", "questions", "identity", "identity_questions", "pairs")


@dataclass(frozen=True)
class DemoConfig(Config):
    """Flags of demo.py."""

    out_dir: str = flag("out/demo", "folder for all output", type=flag_types.path_string)
    seed: int = flag(0, "random seed of world, initial weights and data order", type=flag_types.seed)
    max_steps: int = flag(0, "quick test: stop each training after this many steps (-1 or 0: no limit)",
                          type=flag_types.max_steps)  # fmt: skip
    fast: bool = flag(False, "end each training after a fixed time instead of a fixed number of steps")
    rl: bool = flag(
        False, "further steps: a calculator, thoughts, reinforcement learning (their number of steps is fixed)"
    )
    experiment: str = flag("", "run no stage of the demo but this experiment on its data: a name, all, or list",
                           metavar="NAME", type=flag_types.non_empty_text)  # fmt: skip
    lang: str = flag("auto", "language of titles and report (auto: that of $LANG)", choices=("auto", "zh", "en"))


def with_recipe(command: list[str]) -> list[str]:
    """The command with the flags of its recipe: what steps.json records, so that an edited recipe is run again."""
    recipes = [Path(PROJECT_FOLDER, word[1:]).read_text(encoding="utf-8") for word in command if word.startswith("@")]
    return [*command, *recipes]


def make_steps(out: Path, seed: int, max_steps: int, fast: bool = False) -> list[DemoStep]:
    tokenizer, exam = out / "tokenizer", out / "exam"
    files = {name: out / "world" / f"{name}.jsonl" for name in WORLD_FILES}
    models = {stage: out / f"{stage}_{DIM}.pth" for stage in TRAINING}

    def step(name: str, title: str, command: str, *flags: str | Path, results: list[Path]) -> DemoStep:
        return DemoStep(name, title, [*command.split(), *map(str, flags)], results)

    def data(name: str, title: str, kind: str, source: str, *flags: str) -> DemoStep:
        folder = out / name.removesuffix("_data")
        where = ["--tokenizer", tokenizer, "--out_dir", folder]
        return step(name, title, f"data_process.py {kind}", files[source], *where, *flags, results=[folder])

    def train(stage: str, title: str, script: str, folder: str, parent: str = "") -> DemoStep:
        start = ["--init_from", models[parent]] if parent else ["--tokenizer", tokenizer]
        recipe = f"@recipes/demo-{stage.removeprefix('full_').removesuffix('_sft')}.args"
        limit = ["--max_steps", str(max_steps)] if max_steps else []
        limit += ["--max_minutes", str(FAST_MINUTES[stage])] if fast else []
        flags = ["--data_path", out / folder, *start, "--out_dir", out, "--seed", str(seed), *limit, recipe]
        return step(stage, title, script, *flags, results=[models[stage]])

    def ask(name: str, title: str, stage: str, questions: str = "questions") -> DemoStep:
        answers = answers_file(out, stage, questions)
        flags = ["--checkpoint", models[stage], "--questions", files[questions], "--json", answers]
        return step(name, title, "2-eval.py", *flags, results=[answers])

    identity = "identity_questions"
    seed_flags = ["--seed", str(seed)]
    world_flags = ["--out_dir", out / "world", *seed_flags, *FLAGS["try" if max_steps else "world"].split()]
    exam_flags = ["--data", exam, "--checkpoint", models[LAST_STAGE], *FLAGS["exam"].split()]
    exam_flags += ["--out_dir", out, "--json", out / "exam.json"]
    return [
        step("world", "Generate the demo world", "-m demo_world.generator", *world_flags, results=list(files.values())),
        step("tokenizer", "Train the tokenizer", "train_tokenizer.py", files["words"], "--out_dir", tokenizer,
             *FLAGS["tokenizer"].split(), results=[tokenizer / "tokenizer.json"]),
        data("pretrain_data", "Tokenize the texts", "pretrain", "pretrain"),
        data("sft_data", "Tokenize the chats", "sft", "chats"),
        data("identity_data", "Tokenize the chats about a new name", "sft", "identity"),
        data("dpo_data", "Tokenize the preference pairs", "dpo", "pairs", "--val_fraction", "0.1"),
        train("pretrain", "Pretrain on the texts", "1-pretrain.py", "pretrain"),
        ask("score_pretrain", "Ask the pretrained model the held-out questions", "pretrain"),
        train("full_sft", "Fine-tune on the chats", "3-full_sft.py", "sft", "pretrain"),
        ask("score_full_sft", "Ask the same questions after SFT", "full_sft"),
        ask("identity_before", "Ask for its name and job before LoRA", "full_sft", identity),
        train("lora_sft", "LoRA: train a new name and job", "4-lora_sft.py", "identity", "full_sft"),
        ask("identity_after", "Ask for its name and job after LoRA", "lora_sft", identity),
        ask("score_lora_sft", "Ask the held-out questions after LoRA", "lora_sft"),
        train("dpo", "DPO: train on preference pairs", "5-dpo_train.py", "dpo", "lora_sft"),
        ask("score_dpo", "Ask the held-out questions after DPO", "dpo"),
        step("exam", "Generate an exam about the demo world", "-m demo_world.exam", "--out_dir", exam, *seed_flags,
             results=[exam / "subject_mapping.json"]),
        step("score_exam", "Evaluate the exam by log-probabilities", "eval_ceval.py", *exam_flags,
             results=[out / "exam.json"]),
    ]  # fmt: skip


def run_steps(
    steps: list[DemoStep], out: Path, limits: dict[str, float] | None, say: DemoTexts
) -> dict[str, float]:  # fmt: skip
    """Run the steps that are not complete; return step -> seconds, for skipped steps those of their earlier run.

    out/steps.json records the completed commands. If a step runs, all later steps run again.
    limits: training -> seconds after which it ends by itself, for estimates of the time; None: no estimates.
    """
    record = read_step_record(out / "steps.json")
    complete = 0
    for step in steps:
        same = record.get(step.name, {}).get("command") == with_recipe(step.command)
        if not (same and all(path.exists() for path in step.results)):
            break
        complete += 1
    if complete < len(steps):  # the results of further steps (--rl) are those of older models
        record = {step.name: record[step.name] for step in steps[:complete]}
    estimate = None
    if limits is not None and complete < len(steps):
        estimate = Estimate(measure_slowdown(), [step.name for step in steps[complete:]], limits)
        print(estimate.describe(say), flush=True)
    for number, step in enumerate(steps, 1):
        title = f"\n[{number}/{len(steps)}] {say(step.title)}"
        if number <= complete:
            print(say("{title}: already complete", title=title), flush=True)
            continue
        if estimate:
            title = say("{title} ({time} to go)", title=title, time=minutes_text(estimate.seconds_left(), say))
        print(title, flush=True)
        seconds = run_command(step.command, step.results)
        if estimate:
            estimate.finish(step.name, seconds)
        record[step.name] = {"command": with_recipe(step.command), "seconds": round(seconds, 1)}
        write_json(out / "steps.json", record)
    return {step.name: record[step.name]["seconds"] for step in steps}


def run_experiments(config: DemoConfig, out: Path) -> None:
    """Run the chosen experiments on the demo's data; make the data if any of it is missing."""
    names = chosen_experiments(config.experiment)
    steps = [step for step in make_steps(out, config.seed, 0) if step.name in DATA_STEPS]
    with lock_output(out):
        if not all(path.exists() for step in steps for path in step.results):
            run_steps(steps, out, None, DemoTexts(terminal_language(config.lang)))
    flags = ["--demo_dir", str(out), "--out_dir", str(out.parent / "experiments")]
    flags += ["--max_steps", str(config.max_steps)] if config.max_steps else []
    for name in names:
        run_command(["-m", "experiments", name, *flags])


def measure_slowdown() -> float:
    """Return what demo_world/speed.py measures, in a process of its own: this one need not import torch."""
    command = [sys.executable, "-m", "demo_world.speed"]
    done = subprocess.run(  # nosec B603
        command, cwd=PROJECT_FOLDER, env=ENVIRONMENT | dict(os.environ), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:  # it has printed the reason
        sys.exit(done.returncode)
    return float(done.stdout)


def main() -> None:
    config = parse(DemoConfig, __doc__)
    out = Path(config.out_dir)
    if Path.cwd() != PROJECT_FOLDER:  # the commands run in the project's folder
        out = out.absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir {out} is a file: name a folder")
    os.environ["PYTHONUTF8"] = "1"  # the scripts print Chinese, on Windows as well
    if config.experiment == "list":
        return print(experiment_list())
    if config.experiment:
        return run_experiments(config, out)
    started, say = time.perf_counter(), DemoTexts(terminal_language(config.lang))
    with lock_output(out):
        limits = {stage: 60 * minutes for stage, minutes in FAST_MINUTES.items() if config.fast}
        steps = make_steps(out, config.seed, config.max_steps, config.fast)
        steps += rl_steps(out, DIM, config.seed, config.max_steps) if config.rl else []
        seconds = run_steps(steps, out, None if config.max_steps else limits, say)
        report = make_report(out, DIM, seconds, config.seed)
        if config.rl:
            report["rl"] = make_rl_report(out, DIM)
        write_json(out / "report.json", report)
    print()
    print_report(report, say)
    if config.rl:
        print_rl_report(report["rl"], say)
    print(say("loss curves:  {files}", files=f"{out}/*_{DIM}.png"))
    from trainer.report_page import write_page  # imports torch; the last training wrote the page before its questions

    line = "report to open in a browser:  {page}    as JSON:  {json}"
    print(say(line, page=write_page(out), json=out / "report.json"))
    model = out / f"{'grpo' if config.rl else LAST_STAGE}_{DIM}.pth"
    command = f"{python_command()} 2-eval.py --checkpoint {model}{' --tools calculator' * config.rl}"
    print(say("chat with it:  {command}", command=command))
    print(say("demo.py took {seconds} seconds", seconds=f"{time.perf_counter() - started:.0f}"))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
