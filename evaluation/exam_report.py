"""Print an exam's result as a table and write its files.

    <subject>.csv     every question with its prediction         summary.csv       all scores, one per row
    summary.md        the scores with their interpretation       summary.png       bars, intervals, random baseline
    prompts.txt       (--prompt) the prompts                     submission.json   the answers to submit

Every file is written under a temporary name and renamed. Read next: exam_stats.py (the statistics).
"""

import io
import itertools
import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write
from common.markdown import escape_inline
from evaluation.exam_prompts import ExamPrompt
from evaluation.exam_stats import ExamResult, GroupScore, QuestionResult, interpretation
from evaluation.exam_table import OPTION_LETTERS
from evaluation.subject_strengths import find_strengths, strengths_interpretation
from evaluation.tables import csv_text, table_row
from model.tokenizer import ChatTokenizer

BYTE_ORDER_MARK = "\ufeff"  # by which spreadsheets detect UTF-8


def print_exam_result(result: ExamResult, metadata: dict[str, Any]) -> None:
    """Print the table of scores, the baselines and the interpretation."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("subject", max_width=34, no_wrap=True, overflow="ellipsis")  # the table fits 80 columns
    for name in ("questions", "correct", "accuracy", "95 % CI", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for category in result.categories:
        for subject in result.subjects:
            if subject.category == category.name:
                table.add_row(*_score_cells(subject))
        table.add_row(*(f"[bold]{cell}[/]" for cell in _score_cells(category)), end_section=True)
    table.add_row(*(f"[bold]{cell}[/]" for cell in _score_cells(result.total)))
    console.print(table)
    for line in (*baseline_lines(result), "", *interpretations(result)):
        console.print(line, highlight=False, markup=False)


def interpretations(result: ExamResult) -> list[str]:
    """The interpretation of the score, and the strong and weak subjects."""
    return [text for text in (interpretation(result), strengths_interpretation(find_strengths(result))) if text]


def _score_cells(score: GroupScore) -> list[str]:
    interval = "{:.1%} - {:.1%}".format(*score.interval)
    numbers = [
        f"{score.questions:,}",
        f"{score.correct:.4g}",
        f"{score.accuracy:.1%}",
        interval,
        f"{score.p_value:.2g}",
    ]
    return [score.name, *numbers]


def baseline_lines(result: ExamResult) -> list[str]:
    total = result.total
    predicted = ", ".join(f"{letter} {fraction:.1%}" for letter, fraction in result.letter_frequencies.items())
    return [
        f"baselines: random {total.chance:.1%}; always {total.constant_letter} {total.constant_baseline:.1%}; "
        f"always the longest option {total.longest_option_baseline:.1%}",
        f"predicted letters: {predicted}; mean accuracy of the subjects {result.mean_of_subjects:.1%}",
    ]


def note_lines(metadata: dict[str, Any]) -> list[str]:
    """Numbers of options other than 4, examples that fit, and truncated prompts; [] where none applies."""
    (fewest, most), shots, cut = metadata["options"], metadata["shots"], metadata["cut"]
    number = f"{fewest} to {most}" if fewest < most else f"{most}"
    examples = f"{metadata['mean_examples']:.1f} of {shots} examples fit into the context, on average"
    lines = [f"questions have {number} options"] * ((fewest, most) != (4, 4)) + [examples] * bool(shots)
    return lines + [f"{cut} prompts exceed the context: the beginning of the question was removed"] * bool(cut)


def prepare_folder(folder: Path) -> None:
    """Make the results folder before the evaluation starts. Raises UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}: choose another --out_dir") from None


def write_result_files(folder: Path, result: ExamResult, metadata: dict[str, Any]) -> None:
    """Write all files of a scored exam except the prompts."""
    _write_question_tables(folder, result.question_results)
    groups = {"subject": result.subjects, "category": result.categories, "all": [result.total]}
    rows = [{"kind": kind, **score.to_dict()} for kind, scores in groups.items() for score in scores]
    write_file(folder / "summary.csv", BYTE_ORDER_MARK + csv_text(rows))
    write_file(folder / "summary.md", _markdown_summary(result, metadata))
    plot_result(folder / "summary.png", result, metadata)


def write_submission(folder: Path, question_results: list[QuestionResult]) -> Path:
    """Write C-Eval's submission {subject: {number: letter}} (github.com/hkust-nlp/ceval). Returns the json file."""
    answers: dict[str, dict[str, str]] = {}
    for question in question_results:
        answers.setdefault(question.item.subject, {})[question.item.number] = question.prediction
    _write_question_tables(folder, question_results)
    path = folder / "submission.json"
    write_file(path, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")
    return path


def write_prompts(folder: Path, prompts: list[ExamPrompt], tokenizer: ChatTokenizer) -> Path:
    """Write every prompt with its special tokens and the options compared. Returns the file."""
    parts = []
    for prompt in prompts:
        head = f"{prompt.item.subject} {prompt.item.number}, {len(prompt.prompt)} tokens, {prompt.num_shots} examples"
        options = " | ".join(tokenizer.decode(option) for option in prompt.options)
        parts.append(f"==== {head}\n{tokenizer.decode(prompt.prompt)}\n---- {options}\n")
    path = folder / "prompts.txt"
    write_file(path, "\n".join(parts))
    return path


def result_to_dict(result: ExamResult, metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of --json: metadata and all scores, without single questions."""
    strengths = find_strengths(result)
    return {
        **metadata,
        **{name: value for name, value in result.total.to_dict().items() if name not in ("name", "category")},
        "mean_of_subjects": round(result.mean_of_subjects, 6),
        "said": {letter: round(fraction, 6) for letter, fraction in result.letter_frequencies.items()},
        "sentence": interpretation(result),
        "strengths": strengths.to_dict(),
        "strengths_sentence": strengths_interpretation(strengths),
        "categories": [score.to_dict() for score in result.categories],
        "subjects": [score.to_dict() for score in result.subjects],
    }


def write_file(path: Path, text: str | bytes) -> None:
    """Write the file atomically. Raises UserError when it cannot be written."""
    with atomic_write(path) as file:
        file.write(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))


def _write_question_tables(folder: Path, question_results: list[QuestionResult]) -> None:
    """Write a csv file for each subject."""
    rows: dict[str, list[dict[str, Any]]] = {}
    letters = OPTION_LETTERS[: max(len(question.item.options) for question in question_results)]
    for question in question_results:
        item, log_probs = question.item, [f"{value:.5f}" for value in question.mean_log_probs]
        row = {"id": item.number, "question": item.question}
        row |= itertools.zip_longest(letters, item.options, fillvalue="")
        row |= {"answer": item.answer, "prediction": question.prediction}
        row["correct"] = f"{question.correct:.4g}" if item.answer else ""
        row |= itertools.zip_longest([f"log_prob_{letter}" for letter in letters], log_probs, fillvalue="")
        rows.setdefault(item.subject, []).append(row)
    for subject, of_subject in rows.items():
        write_file(folder / f"{subject}.csv", BYTE_ORDER_MARK + csv_text(of_subject))


def _markdown_summary(result: ExamResult, metadata: dict[str, Any]) -> str:
    title = "# {exam}, {split}: {model}".format(**{key: escape_inline(str(value)) for key, value in metadata.items()})
    setting = "{method}, {shots}-shot, {orders} order(s) of the options, {style}.".format(**metadata)
    groups = [(f"**{escape_inline(score.name)}**", score) for score in (result.total, *result.categories)]
    groups += [(escape_inline(score.name), score) for score in result.subjects]
    lines = [title, "", *(f"{escape_inline(note)}.\n" for note in note_lines(metadata))]
    lines += ["\n\n".join(map(escape_inline, interpretations(result))), "", setting, ""]
    lines += ["| | questions | correct | accuracy | 95 % confidence interval | p |", "|---|---|---|---|---|---|"]
    lines += [table_row(name, *_score_cells(score)[1:]) for name, score in groups]
    return "\n".join([*lines, "", *(f"* {escape_inline(note)}" for note in baseline_lines(result))]) + "\n"


def plot_result(path: Path, result: ExamResult, metadata: dict[str, Any]) -> None:
    """Plot a bar for each subject with its 95 % interval, coloured by category, and the baselines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    total, groups = result.total, [*result.categories, result.total]
    rows = [*result.subjects, *groups][::-1]
    colours = {category.name: f"C{i}" for i, category in enumerate(result.categories)}
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.21 * len(rows)), layout="constrained")
    values = [100 * row.accuracy for row in rows]
    below = [100 * (row.accuracy - row.interval[0]) for row in rows]
    above = [100 * (row.interval[1] - row.accuracy) for row in rows]
    style: dict[str, Any] = {"ecolor": "0.35", "height": 0.72, "error_kw": {"elinewidth": 1}}
    bars = axes.barh(range(len(rows)), values, xerr=(below, above), **style)
    axes.set_yticks(range(len(rows)), [f"{row.name} ({row.questions})" for row in rows], fontsize=7)
    for bar, label, row in zip(bars, axes.get_yticklabels(), rows, strict=True):
        bar.set_color(colours.get(row.category, "0.4"))
        bar.set_alpha(1 if row in groups else 0.55)
        label.set_fontweight("bold" if row in groups else "normal")
    guessing, always = (
        f"random baseline, {total.chance:.0%}",
        f"always {total.constant_letter}, {total.constant_baseline:.1%}",
    )
    axes.axvline(100 * total.chance, color="black", linestyle="--", linewidth=1, label=guessing)
    axes.axvline(100 * total.constant_baseline, color="crimson", linestyle=":", linewidth=1, label=always)
    axes.set(xlim=(0, 100), ylim=(-0.7, len(rows) - 0.3), xlabel="accuracy (%), with 95 % confidence interval")
    title = f"{Path(metadata['model']).name}: {total.accuracy:.1%} of {total.questions:,} ({metadata['split']})"
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)  # below the axes, where it covers no bar
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write_file(path, picture.getvalue())
