"""One HTML page for the runs of an output folder: out/report.html. It needs no network and no other file.

    stages      curves of every {stage}_{size}.jsonl, the band of the reference runs, samples over time, expert load
    answers     of several models to the same questions: 2-eval.py --report, and the files of 2-eval.py --json
    exams       scores of eval_ceval.py (out/ceval/*/summary.csv) and of 2-eval.py --questions --json

Written at the end of every training stage and by 2-eval.py --report; `write_page` reads only what lies in the folder.
report.html is the template (jinja2, which escapes every text); matplotlib draws the images as SVG.
Read next: curves.py (the panels), metrics.py (the logs).
"""

import base64
import csv
import io
import json
import math
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import PathLike, write_text
from model.checkpoint import PARENT_STAGES
from trainer.curves import Draw, Row, panels
from trainer.metrics import is_validation, read_log_rows

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 400  # of a curve
MAX_SAMPLES = 8  # steps of which the page shows samples: the first, the last and some between
MAX_QUESTIONS, MAX_CHARACTERS = 12, 600
MAX_FILE_BYTES = 50_000_000  # of a file with answers

# {"label", "file", "answers": {question: (text, whether it is correct or None)}, "counts": {language: accuracy}}
Answers = dict[str, Any]


def write_page(out_dir: PathLike, report: PathLike | None = None) -> Path:
    """Write report.html in `out_dir`. report: the json file of 2-eval.py --report, if omitted out_dir/eval/report.json.

    Parts that have no data are left out. Damaged files are skipped.
    """
    folder = Path(out_dir)
    runs = [run for path in sorted(folder.glob("*.jsonl"), key=stage_order) if (run := describe_run(path))]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    files = [Path(report or folder / "eval" / "report.json"), *sorted(folder.glob("*.json"))]
    answers = sorted((model for file in files for model in read_answers(file)), key=model_order)
    page = template.render(
        folder=folder.resolve().name,
        runs=runs,
        questions=same_questions(answers),
        charts=[chart for chart in (question_chart(answers), *map(exam_chart, exam_files(folder))) if chart],
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def stage_order(path: Path) -> tuple[int, str]:
    """Sort key: the stages in the order of training, then other files."""
    stages = list(PARENT_STAGES)
    return next((i for i, stage in enumerate(stages) if path.name.startswith(stage)), len(stages)), path.name


def model_order(model: Answers) -> tuple[int, str]:
    return stage_order(Path(model["label"]))


# ---- runs ------------------------------------------------------------------------------------------------------------
def describe_run(path: Path) -> dict[str, Any] | None:
    """Return what the page shows of a log, or None if it has no training rows."""
    try:
        rows = read_log_rows(path, sys.maxsize)
    except OSError:
        return None
    train = [row for row in rows if "loss" in row]
    if not train:
        return None
    last, validations = train[-1], [row for row in rows if is_validation(row)]
    kept = [*train[:: math.ceil(len(train) / MAX_POINTS)], *([last] if len(train) > 1 else []), *validations]
    band = next((np.array(row["reference"]) for row in rows if "reference" in row), None)
    loads = [row for row in rows if "expert_load" in row]
    return {
        "name": path.stem,
        "steps": last["step"],
        "trained": next((f"{last[unit]:,} {unit}" for unit in ("tokens", "pairs", "answers") if unit in last), ""),
        "minutes": last.get("seconds", 0) / 60,
        "loss": last["loss"],
        "validation": validation_text(validations[-1]) if validations else "",
        "images": [image for image in (to_image(draw) for draw in panels(kept, band)) if image],
        "samples": samples_by_prompt(rows),
        "load": to_image(partial(draw_load, load=loads[-1]["expert_load"])) if loads else "",
        "load_step": loads[-1]["step"] if loads else 0,
    }


def validation_text(row: Row) -> str:
    """Return the scores of a validation by split: "zh 1.52, en 1.48"."""
    name = "val_reward" if "val_reward" in row else "val_loss"
    return ("reward " if name == "val_reward" else "") + ", ".join(f"{k} {v:.3f}" for k, v in row[name].items())


def samples_by_prompt(rows: list[Row]) -> list[dict[str, Any]]:
    """Return {"prompt", "reference", "answers": [(step, text)]} of each prompt, for a few steps.

    Rollouts have other prompts at every step: they make one entry each.
    """
    taken = [row for row in rows if isinstance(row.get("samples"), list)]
    if len(taken) > MAX_SAMPLES:
        taken = [taken[i] for i in np.linspace(0, len(taken) - 1, MAX_SAMPLES).round().astype(int)]
    found: dict[str, dict[str, Any]] = {}
    for row in taken:
        for sample in row["samples"]:
            prompt = str(sample.get("prompt", ""))
            entry = found.setdefault(prompt, {"prompt": prompt, "reference": sample.get("reference"), "answers": []})
            entry["answers"].append((row["step"], str(sample.get("answer", ""))[:MAX_CHARACTERS]))
    return list(found.values())


def draw_load(axes: Axes, load: list[list[float]]) -> None:
    """Draw the expert load (layers, experts) as a heat map with the percentages."""
    values = np.array(load)
    axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    if values.size <= 128:
        for (layer, expert), value in np.ndenumerate(values):
            color = "white" if value > values.max() / 2 else "black"
            axes.text(expert, layer, f"{value:.0%}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel(f"expert (an even load is {1 / values.shape[1]:.1%} each)")
    axes.set_ylabel("layer")


# ---- answers and exams -----------------------------------------------------------------------------------------------
def read_answers(path: Path) -> list[Answers]:
    """Return the answers of each model in a json file of 2-eval.py, [] for other files."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return []
        content = json.loads(path.read_text(encoding="utf-8"))
        if "models" in content:
            prompts = [row["prompt"] for row in content["prompts"]]
            return [
                {"label": str(model["label"]), "counts": {}, "file": path.stem, "answers": {
                    prompt: (row["answer"], None) for prompt, row in zip(prompts, model["answers"], strict=True)
                }}
                for model in content["models"]
            ]  # fmt: skip
        answers = {row["question"]: (row["answer"], row["correct"]) for row in content["answers"]}
        counts = {str(lang): float(count["accuracy"]) for lang, count in content.get("counts", {}).items()}
        checkpoint = Path(content["checkpoint"])
        same_folder = checkpoint.parent.name in ("", path.resolve().parent.name)
        label = checkpoint.stem if same_folder else f"{checkpoint.parent.name}/{checkpoint.stem}"
        return [{"label": label, "counts": counts, "file": path.stem, "answers": answers}]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def same_questions(models: list[Answers]) -> dict[str, Any]:
    """Return {"labels", "rows": [(question, [(answer, correct) or None by label])]} of questions of several models."""
    by_model: dict[str, dict[str, tuple[str, Any]]] = {}
    for model in models:
        known = by_model.setdefault(model["label"], {})
        known |= {question: answer for question, answer in model["answers"].items() if question not in known}
    counts: dict[str, int] = {}
    for answers in by_model.values():
        for question in answers:
            counts[question] = counts.get(question, 0) + 1
    most = max(counts.values(), default=0)
    shared = [question for question, count in counts.items() if count == most > 1]
    if len(shared) > MAX_QUESTIONS:
        shared = [shared[i] for i in np.linspace(0, len(shared) - 1, MAX_QUESTIONS).round().astype(int)]
    used = [label for label in by_model if any(question in by_model[label] for question in shared)]
    rows = [(question, [by_model[label].get(question) for label in used]) for question in shared]
    return {"labels": used, "rows": rows}


def question_chart(models: list[Answers]) -> dict[str, str] | None:
    """Return the chart of the accuracy of every model on its questions with keys."""
    scores = {model["file"]: model["counts"] for model in models if model["counts"]}
    if not scores:
        return None
    languages = sorted({lang for counts in scores.values() for lang in counts})
    bars = {lang: [counts.get(lang, math.nan) for counts in scores.values()] for lang in languages}
    title = "Questions with keys 问答准确率 (2-eval.py --questions)"
    return (
        {"title": title, "image": to_image(partial(draw_bars, names=list(scores), bars=bars), len(scores))}
        if scores
        else None
    )


def exam_files(folder: Path) -> Iterable[Path]:
    return sorted((folder / "ceval").glob("*/summary.csv"))


def exam_chart(path: Path) -> dict[str, str] | None:
    """Return the chart of an exam by category and in all, from the summary of eval_ceval.py."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        shown = [row for row in rows if row["kind"] != "subject"] or rows
        names = [f"{row['name']} ({row['questions']})" for row in shown]
        scores = [float(row["accuracy"]) for row in shown]
        chance = float(shown[-1]["chance"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    draw = partial(draw_bars, names=names, bars={"accuracy": scores}, chance=chance)
    return {"title": f"Exam 考试: {path.parent.name}", "image": to_image(draw, len(names))}


def draw_bars(axes: Axes, names: list[str], bars: dict[str, list[float]], chance: float | None = None) -> None:
    """Draw horizontal bars of fractions: `bars` has one list by series, parallel to `names`."""
    places, height = np.arange(len(names)), 0.8 / len(bars)
    for i, (series, values) in enumerate(bars.items()):
        drawn = axes.barh(places + (i - (len(bars) - 1) / 2) * height, values, height, label=series)
        axes.bar_label(
            drawn, [f"{value:.0%}" if math.isfinite(value) else "" for value in values], padding=2, fontsize=8
        )
    if chance is not None:
        axes.axvline(chance, color="0.4", linestyle="--", linewidth=1, label="chance")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4, frameon=False)


def to_image(draw: Draw, bars: int = 0) -> str:
    """Return a drawing as a data URI, "" if the data cannot be drawn. bars: lines of a bar chart, for its height."""
    figure, file = Figure(figsize=(5.4, 3.4 if not bars else 1.2 + 0.34 * bars), layout="constrained"), io.BytesIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "0", "font.size": 9}  # text stays text
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.simplefilter("ignore")  # matplotlib's own font lacks Chinese, a browser's does not
        try:
            draw(figure.subplots())
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        except (KeyError, ValueError, TypeError, IndexError):  # a log of another version, or a damaged one
            return ""
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
