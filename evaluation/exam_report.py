"""How an exam's result is shown and kept: a table on the screen, and files.

    <subject>.csv     every question and the prediction          summary.csv       all scores, one a row
    summary.md        the same as a table, with what it means    summary.png       bars, intervals, the chance line
    prompts.txt       (--prompt) what the model was given        submission.json   answers to hand in

Every file is written under a temporary name and renamed. Read next: exam_stats.py (what the numbers are).
"""

import csv
import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write
from common.markdown import plain
from evaluation.exam_prompts import Asked
from evaluation.exam_stats import Marked, Result, Score, sentence
from evaluation.exam_table import OPTION_LETTERS
from evaluation.subject_tests import strengths_of, strengths_sentence
from model.tokenizer import ChatTokenizer


def follow(batches: Iterable[int], total: int) -> None:
    """Work through the batches, with a progress bar where somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("questions", total=total)
        for count in batches:
            progress.advance(task, count)


def show(result: Result, about: dict[str, Any]) -> None:
    """The table on the screen, the baselines, and the sentence."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("subject", max_width=34, no_wrap=True, overflow="ellipsis")  # all fits 80 columns
    for name in ("asked", "right", "accuracy", "95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for category in result.categories:
        for subject in result.subjects:
            if subject.category == category.name:
                table.add_row(*_cells(subject))
        table.add_row(*(f"[bold]{cell}[/]" for cell in _cells(category)), end_section=True)
    table.add_row(*(f"[bold]{cell}[/]" for cell in _cells(result.total)))
    console.print(table)
    for line in (*baselines(result), *notes(about), "", *sentences(result)):
        console.print(line, highlight=False, markup=False)


def sentences(result: Result) -> list[str]:
    """What the score means, and which subjects are strong or weak."""
    return [text for text in (sentence(result), strengths_sentence(strengths_of(result))) if text]


def _cells(score: Score) -> list[str]:
    low, high = score.interval
    right = f"{score.correct:.4g}"
    return [
        *(score.name, f"{score.questions:,}", right, f"{score.accuracy:.1%}", f"{low:.1%} - {high:.1%}"),
        f"{score.p_value:.2g}",
    ]


def baselines(result: Result) -> list[str]:
    total = result.total
    said = ", ".join(f"{letter} {share:.1%}" for letter, share in result.said.items())
    return [
        f"guessing {total.chance:.1%} (the chance line); always {total.always_letter} {total.always:.1%}; "
        f"always the longest option {total.longest:.1%}",
        f"the model chose {said}; mean of the subjects {result.mean_of_subjects:.1%}",
    ]


def notes(about: dict[str, Any]) -> list[str]:
    """What was done to the questions, where something was."""
    found = []
    fewest, most = about["options"]
    if (fewest, most) != (4, 4):
        found.append(
            f"questions have {fewest} to {most} options" if fewest < most else f"questions have {most} options"
        )
    if about["shots"]:
        found.append(f"{about['mean_examples']:.1f} of {about['shots']} examples fitted into the context, on average")
    if about["cut"]:
        found.append(f"{about['cut']} prompts lost the beginning of the question: too long for the model")
    return found


def make_room(folder: Path) -> None:
    """The folder for all files, before the work begins: a place that cannot be written shall be said at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}: choose another --out_dir") from None


def write_pages(folder: Path, result: Result, about: dict[str, Any]) -> None:
    """All files of a scored exam but the prompts."""
    _write_questions(folder, result.marked)
    scores = [*result.subjects, *result.categories, result.total]
    kinds = ["subject"] * len(result.subjects) + ["category"] * len(result.categories) + ["all"]
    rows = [{"kind": kind, **score.to_dict()} for kind, score in zip(kinds, scores, strict=True)]
    write(folder / "summary.csv", _csv(rows))
    write(folder / "summary.md", _markdown(result, about))
    draw(folder / "summary.png", result, about)


def write_submission(folder: Path, marked: list[Marked]) -> Path:
    """C-Eval's submission: {subject: {number: letter}} (github.com/hkust-nlp/ceval). Returns the json file."""
    answers: dict[str, dict[str, str]] = {}
    for one in marked:
        answers.setdefault(one.item.subject, {})[one.item.number] = one.prediction
    _write_questions(folder, marked)
    path = folder / "submission.json"
    write(path, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")
    return path


def write_prompts(folder: Path, asked: list[Asked], tokenizer: ChatTokenizer) -> Path:
    """Every prompt, special tokens included, with what was compared behind it."""
    parts = []
    for one in asked:
        head = f"==== {one.item.subject} {one.item.number}, {len(one.prompt)} tokens, {one.examples} examples"
        options = " | ".join(tokenizer.decode(option) for option in one.options)
        parts.append(f"{head}\n{tokenizer.decode(one.prompt)}\n---- {options}\n")
    path = folder / "prompts.txt"
    write(path, "\n".join(parts))
    return path


def as_json(result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """Everything but the single questions, for --json."""
    return {
        **about,
        **{name: value for name, value in result.total.to_dict().items() if name not in ("name", "category")},
        "mean_of_subjects": round(result.mean_of_subjects, 6),
        "said": {letter: round(share, 6) for letter, share in result.said.items()},
        "sentence": sentence(result),
        "strengths": strengths_of(result).to_dict(),
        "strengths_sentence": strengths_sentence(strengths_of(result)),
        "categories": [score.to_dict() for score in result.categories],
        "subjects": [score.to_dict() for score in result.subjects],
    }


def write(path: Path, text: str | bytes) -> None:
    """The whole file or none. Raises UserError when it cannot be written."""
    with atomic_write(path) as file:
        file.write(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))


def _write_questions(folder: Path, marked: list[Marked]) -> None:
    """A csv for each subject."""
    rows: dict[str, list[dict[str, Any]]] = {}
    letters = OPTION_LETTERS[: max(len(one.item.options) for one in marked)]
    for one in marked:
        scores = {f"log_prob_{letter}": f"{value:.5f}" for letter, value in zip(letters, one.scores, strict=False)}
        rows.setdefault(one.item.subject, []).append(
            {
                "id": one.item.number,
                "question": one.item.question,
                **dict(itertools.zip_longest(letters, one.item.options, fillvalue="")),
                "answer": one.item.answer,
                "prediction": one.prediction,
                "correct": f"{one.correct:.4g}" if one.item.answer else "",
                **{f"log_prob_{letter}": "" for letter in letters},
                **scores,
            }
        )
    for subject, of_subject in rows.items():
        write(folder / f"{subject}.csv", _csv(of_subject))


def _csv(rows: list[dict[str, Any]]) -> str:
    """With a byte order mark, by which spreadsheets know that it is UTF-8."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return "\ufeff" + text.getvalue()


def _markdown(result: Result, about: dict[str, Any]) -> str:
    title = f"# {plain(about['exam'])}, {plain(about['split'])}: {plain(about['model'])}"
    setting = f"{about['method']}, {about['shots']}-shot, {about['orders']} order(s) of the options, {about['style']}"
    lines = [title, "", "\n\n".join(map(plain, sentences(result))), "", setting + ".", ""]
    lines += ["| | questions | right | accuracy | 95 % interval | p |", "|---|---|---|---|---|---|"]
    lines += [
        f"| **{plain(s.name)}** | " + " | ".join(_cells(s)[1:]) + " |" for s in (result.total, *result.categories)
    ]
    lines += [f"| {plain(s.name)} | " + " | ".join(_cells(s)[1:]) + " |" for s in result.subjects]
    lines += ["", *(f"* {plain(line)}" for line in (*baselines(result), *notes(about)))]
    return "\n".join(lines) + "\n"


def draw(path: Path, result: Result, about: dict[str, Any]) -> None:
    """A bar for each subject with its interval, coloured by category, and the chance line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [*result.subjects, *result.categories, result.total][::-1]
    colours = {category.name: f"C{i}" for i, category in enumerate(result.categories)}
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.21 * len(rows)), layout="constrained")
    values = [100 * row.accuracy for row in rows]
    bounds = [row.interval for row in rows]
    below = [100 * (row.accuracy - low) for row, (low, _) in zip(rows, bounds, strict=True)]
    above = [100 * (high - row.accuracy) for row, (_, high) in zip(rows, bounds, strict=True)]
    strong = [row.category != row.name and row.name != "all" for row in rows]
    bars = axes.barh(
        range(len(rows)), values, xerr=(below, above), ecolor="0.35", height=0.72, error_kw={"elinewidth": 1}
    )
    for bar, row, is_subject in zip(bars, rows, strong, strict=True):
        bar.set_color(colours.get(row.category, "0.4"))
        bar.set_alpha(0.55 if is_subject else 1)
    total = result.total
    guessing = f"guessing, {total.chance:.0%}"
    axes.axvline(100 * total.chance, color="black", linestyle="--", linewidth=1, label=guessing)
    always = f"always {total.always_letter}, {total.always:.1%}"
    axes.axvline(100 * total.always, color="crimson", linestyle=":", linewidth=1, label=always)
    axes.set_yticks(range(len(rows)), [f"{row.name} ({row.questions})" for row in rows], fontsize=7)
    for label, is_subject in zip(axes.get_yticklabels(), strong, strict=True):
        label.set_fontweight("normal" if is_subject else "bold")
    axes.set(xlim=(0, 100), ylim=(-0.7, len(rows) - 0.3), xlabel="% right, with 95 % interval")
    axes.set_title(
        f"{Path(about['model']).name}: {total.accuracy:.1%} of {total.questions:,} ({about['split']})", fontsize=10
    )
    axes.legend(loc="upper right", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())
