"""The report of ../demo.py: speed, losses, answers before and after each stage, the exam.

    <stage>_<dim>.jsonl    training log           answers_<stage>.json            answers to the held-out questions
    exam.json              result of the exam     answers_<stage>_identity.json   answers about the new name and job

Read next: ../demo.py (the commands that write these files).
"""

import json
import random
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from common.errors import UserError
from common.metric_keys import with_current_metric_keys
from corpus.language import LANGUAGES
from demo_world.texts import DemoTexts

# Training stage -> key in report.json of its answers to the held-out questions.
TRAINING = {"pretrain": "before_sft", "full_sft": "after_sft", "lora_sft": "after_lora", "dpo": "after_dpo"}
LAST_STAGE = list(TRAINING)[-1]
SAMPLES_PER_LANGUAGE = 5
KINDS = {
    "seen_fact_new_wording": "facts that SFT asks about in other words",
    "unasked_fact_new_wording": "facts that texts and chats state, and none asks about",
    "new_sum": "sums up to 20 + 20 that no training text contains",
}
COLUMNS = {
    "seconds": "time of the script, with loading and saving",
    "tokens": "tokens that the loss counted; for DPO pairs of answers",
    "tok/s": "trained tokens per second",
    "loss": "-log p per token (DPO: per pair) in the last steps; lower is better",
    "bits/byte": "-log2 p of held-out texts (later stages: held-out answers) per byte; lower is better",
    "right": "held-out questions whose answer contains the exact key; no stage trained on their wording",
}
EXAM_FIELDS = ("questions", "accuracy", "low", "high", "chance", "sentence")


def answers_file(out: Path, stage: str, questions: str = "questions") -> Path:
    return out / f"answers_{stage}{'_identity' if questions != 'questions' else ''}.json"


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


def stages_cut_short(out: Path, dim: int, stages: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Training stage -> why it ended before its last step. A time limit keeps the resume folder of a run."""
    from model.checkpoint import read_checkpoint

    found = {}
    for stage, log in stages.items():
        path = out / f"{stage}_{dim}.pth"
        last = (read_checkpoint(path, weights=False)["lineage"] or [{}])[-1]
        if path.with_suffix(".resume").is_dir():
            found[stage] = f"a time limit, after {log['steps']:,} steps"
        elif reason := last.get("stopped"):
            found[stage] = f"{reason} (after {log['steps']:,} steps)"
    return found


def make_report(out: Path, dim: int, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    """The content of report.json. `seconds`: step -> seconds. Raises UserError for a damaged result."""
    from model.checkpoint import load_model  # imports torch, which the process that starts the steps does not need

    score = {stage: read_result(answers_file(out, stage)) for stage in TRAINING}
    samples: list[dict[str, Any]] = []
    for lang in LANGUAGES:
        answers = [answer for answer in score[LAST_STAGE]["answers"] if answer["lang"] == lang]
        # Sampled with the seed, not selected: the fraction of wrong answers is representative.
        samples += random.Random(seed).sample(answers, min(SAMPLES_PER_LANGUAGE, len(answers)))
    model, _, _ = load_model(out / f"{LAST_STAGE}_{dim}.pth")
    stages = {stage: summarize_log(out / f"{stage}_{dim}.jsonl") for stage in TRAINING}
    identity = {
        moment: read_result(answers_file(out, stage, "identity_questions"))["counts"]
        for moment, stage in (("before_lora", "full_sft"), ("after_lora", "lora_sft"))
    }
    return {
        "parameters": model.count_parameters()[0],
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "stages": stages,
        "cut_short": stages_cut_short(out, dim, stages),
        "bits_per_byte": {stage: log["bits_per_byte"] for stage, log in stages.items() if log["bits_per_byte"]},
        "answer_accuracy": {moment: score[stage]["accuracy"] for stage, moment in TRAINING.items()},
        "answer_kinds": {moment: score[stage]["kinds"] for stage, moment in TRAINING.items()},
        "identity": identity,
        "exam": {name: read_result(out / "exam.json")[name] for name in EXAM_FIELDS},
        "curves": [str(out / f"{stage}_{dim}.png") for stage in TRAINING],
        "samples": samples,
    }


def print_report(report: dict[str, Any], say: DemoTexts) -> None:
    """Print the results of each stage and ten sampled answers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.rule(say("results of each stage"))
    bits_zh, right_zh = f"{say('bits/byte')}\nzh", f"{say('right')}\nzh"
    headers = [say(name) for name in ("stage", "seconds", "tokens", "tok/s", "loss")]
    headers += [bits_zh, "\nen", right_zh, "\nen"]
    table = Table(*headers, box=None, padding=(0, 2, 0, 0))
    for stage, moment in TRAINING.items():
        log, right = report["stages"][stage], report["answer_accuracy"][moment]
        bits, seconds = log["bits_per_byte"], report["seconds"][stage]
        amount = say("{count} pairs", count=f"{log['pairs']:,}") if "pairs" in log else f"{log['tokens']:,}"
        speed = "" if "pairs" in log else f"{log['tokens_per_second']:,}"
        table.add_row(
            *(stage, f"{seconds:.0f}", amount, speed, f"{log['final_loss']:.3f}"),
            *(f"{bits[lang]:.3f}" if bits else "" for lang in LANGUAGES),
            *(f"{right.get(lang, 0):.1%}" for lang in LANGUAGES),
        )
    console.print(table)
    for line in explain_columns(report, say):
        console.print(line, highlight=False)
    console.rule(say("ten of the held-out questions, sampled at random"))
    for sample in report["samples"]:
        mark = f"[green]{say('right')}[/]"
        if not sample["correct"]:
            mark = f"[red]{say('wrong')}[/] ({say('expected: {key}', key=sample['keys'][0])})"
        console.print(f"[bold]{sample['question']}[/]  {mark}", highlight=False)
        console.print(f"    {sample['answer']}", highlight=False, markup=False)
    console.rule(say("done"))
    for stage, reason in report["cut_short"].items():
        console.print(say("{stage} was cut short: {reason}", stage=stage, reason=reason), highlight=False, markup=False)
    minutes, millions = f"{report['total_seconds'] / 60:.1f}", f"{report['parameters'] / 1e6:.1f}"
    last = "{millions} M parameters, trained from scratch; all steps took {minutes} minutes."
    console.print(say(last, millions=millions, minutes=minutes))


def explain_columns(report: dict[str, Any], say: DemoTexts) -> list[str]:
    """Lines below the table: the meaning of its columns, and the results without a column."""

    def counts(scores: dict[str, Any]) -> str:
        return ", ".join(
            say("{lang} {right} of {questions}", lang=k, right=scores[k]["correct"], questions=scores[k]["questions"])
            for k in LANGUAGES
            if k in scores
        )

    kinds, identity, exam = report["answer_kinds"]["after_sft"], report["identity"], report["exam"]
    before, after = counts(identity["before_lora"]), counts(identity["after_lora"])
    dpo = report["stages"]["dpo"]
    width = max(cell_len(say(name)) for name in COLUMNS)
    lines = [
        *(f"{set_cell_size(say(name), width)}  {say(meaning)}" for name, meaning in COLUMNS.items()),
        say("Right after SFT:"),
        *(
            "  " + say("{meaning}: {counts}", meaning=say(meaning), counts=counts(kinds[kind]))
            for kind, meaning in KINDS.items()
            if kind in kinds
        ),
        say("Right when asked for the new name and job that LoRA trains, in words of no training text:"),
        "  " + say("before LoRA: {before}; after: {after}", before=before, after=after),
    ]
    if "val_reward_accuracy" in dpo:
        lines += [
            say("Held-out pairs of DPO:"),
            "  " + say("preferred: pairs whose chosen answer has the higher log-probability per token"),
            "  " + say("moved: pairs whose chosen answer has gained more log-probability than the rejected one"),
        ]
        for lang, moved in dpo.get("val_reward_accuracy", {}).items():
            preferred = {
                moment: f"{dpo[f'val_chosen_preferred{suffix}'][lang]:.1%}"
                for moment, suffix in (("before", "_before"), ("after", ""))
            }
            line = "{lang}: preferred {before} before, {after} after; moved {moved}"
            lines.append("  " + say(line, lang=lang, moved=f"{moved:.1%}", **preferred))
    percent = {name: f"{exam[name]:.1%}" for name in ("accuracy", "low", "high", "chance")}
    line = "{accuracy} correct, 95 % confidence interval {low} to {high}; random guessing scores {chance} on average"
    title = say("Exam, {questions} questions with four options each:", questions=exam["questions"])
    return [*lines, title, "  " + (say(line, **percent) if say.chinese else exam["sentence"])]
