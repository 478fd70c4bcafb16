"""The Markdown page of a report: a table of figures, then the answers of all models to each prompt.

Answers are fenced code blocks; the fence is longer than any run of backticks in the answer.
Called by report.py. Read next: ../model/repetition.py, bits_per_byte.py (the figures).
"""

from collections.abc import Iterable
from typing import Any

from common.markdown import code_block, code_span, escape_inline
from evaluation.length_loss import length_section
from evaluation.tables import table_row

ReportData = dict[str, Any]
_ModelFigures = dict[str, Any]
_MISSING = "–"
_COUNT_ROWS = {"loops": "answers that end in a loop", "empty": "empty answers", "cut_off": "cut-off answers"}
_SPEED_ROWS = {"tokens_per_second": "one answer at a time", "batch_tokens_per_second": "all answers in one batch"}
_ENDS = {"length": ", cut off", "too_long": ", the prompt does not fit into the context"}


def format_report(report: ReportData) -> str:
    """The Markdown page of `report`."""
    parts = ["# Model comparison", "", _settings_line(report), "", *_figure_table(report), ""]
    parts += length_section(report["models"])
    if report["judge"]:
        parts += [*_judge_section(report["judge"]), ""]
    parts += ["## Answers", ""]
    for number, row in enumerate(report["prompts"]):
        kind = f", {row['kind'].replace('_', ' ')}" if row["kind"] else ""
        parts += [f"### {number + 1} · {row['lang']}{kind}", "", code_block(row["prompt"]), ""]
        for model in report["models"]:
            parts += _answer_lines(model["label"], model["answers"][number])
    parts += _safety_section(report)
    return "\n".join(parts).rstrip() + "\n"


def _answer_lines(label: str, answer: dict[str, Any]) -> list[str]:
    tokens = "tokens not counted" if answer["tokens"] is None else f"{answer['tokens']} tokens"
    shown = code_block(answer["answer"]) if answer["answer"] else "*(empty)*"
    return [f"**{escape_inline(label)}** ({tokens}{_ENDS.get(answer['finish_reason'], '')})", "", shown, ""]


def _safety_section(report: ReportData) -> list[str]:
    """The continuations of harmful answer prefixes; no figure includes them."""
    models = [model for model in report["models"] if model["safety"]]
    if not report["safety"] or not models:
        return []
    parts = [
        "## Safety: shown, not scored",
        "",
        "The line after each prompt is an answer prefix that agrees to something harmful; each model continues it. "
        "A safe model corrects itself. No figure of this page includes these answers.",
        "",
    ]
    for number, row in enumerate(report["safety"]):
        parts += [f"### Safety {number + 1} · {row['lang']}", "", code_block(f"{row['prompt']}\n→ {row['start']}"), ""]
        for model in models:
            parts += _answer_lines(model["label"], model["safety"][number])
    return parts


def _settings_line(report: ReportData) -> str:
    settings = report["settings"]
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None and name != "system")
    system = f"System message: {escape_inline(settings['system'])}. " if settings.get("system") else ""
    return (
        f"{len(report['prompts'])} prompts, the same for every model, each in a separate conversation. {system}"
        f"Sampled with {chosen}. A pretrained model continues the prompt; a model of a chat stage answers it."
    )


# ---- figures ---------------------------------------------------------------------------------------------------------
def _figure_table(report: ReportData) -> list[str]:
    models: list[_ModelFigures] = report["models"]
    languages = [name for name in models[0]["answer_figures"] if name != "all"]
    figures = [[model["answer_figures"][lang] for lang in languages] for model in models]  # by model and language
    lines = [
        table_row("", *(escape_inline(model["label"]) for model in models)),
        table_row("---", *["---:"] * len(models)),
    ]

    def add(title: str, cells: Iterable[str]) -> None:
        lines.append(table_row(title, *cells))

    def add_per_language(title: str, cells: Iterable[list[str]]) -> None:
        add(f"{title}, {' / '.join(languages)}", map(" / ".join, cells))

    add("stage", (escape_inline(model["stage"]) for model in models))
    add("parameters", map(_parameter_count, models))
    for name in report["texts"]:
        found = [model["bits_per_byte"].get(name) for model in models]
        add(f"bits per byte, {escape_inline(name)}", (_figure_with_error(one, "bits_per_byte") for one in found))
    for lang in dict.fromkeys(lang for model in models for lang in model["sft_loss"]):
        found = [model["sft_loss"].get(lang) for model in models]
        add(f"held-out SFT loss, {lang}", (_figure_with_error(one, "loss") for one in found))
        bits = (_number(one["bits_per_byte"], 3) if one else _MISSING for one in found)
        add(f"… bits per byte of the answers, {lang}", bits)
    for n in (1, 2, 3):
        add_per_language(f"distinct-{n}", ([_number(f[f"distinct_{n}"], 2) for f in each] for each in figures))
    for name, shown in _COUNT_ROWS.items():  # a percentage of 16 answers suggests too much precision
        add_per_language(shown, ([f"{f[name]} of {f['answers']}" for f in each] for each in figures))
    lengths = ([_number(f["mean_length"], 1) for f in each] for each in figures)
    add_per_language("mean length (characters or words)", lengths)
    for name, shown in _SPEED_ROWS.items():
        add(f"tokens/s, {shown}", (_number(model[name], 0) for model in models))
    return ["## Figures", "", *lines, "", *_figure_notes(report)]


def _figure_notes(report: ReportData) -> list[str]:
    """Notes on the rows and on missing figures."""
    notes = [f"{escape_inline(label)}: left out because its server stopped answering: {escape_inline(reason)}."
             for label, reason in report["failed"].items()]  # fmt: skip
    for model in report["models"]:
        notes += [f"{escape_inline(model['label'])}: {escape_inline(reason)}." for reason in model["missing"]]
    if report["texts"]:
        files = ", ".join(f"{escape_inline(name)}: {found['bytes']:,} bytes of {code_span(found['file'])}"
                          for name, found in report["texts"].items())  # fmt: skip
        notes.append(
            f"Bits per byte of text ({files}): lower is better, comparable between tokenizers; ± one standard error "
            "over the documents. The texts must not be in the training data of any model."
        )
    else:
        notes.append("Bits per byte: not measured; `--texts zh=FILE en=FILE` names held-out texts.")
    if report["chats"]:
        notes.append(
            f"SFT loss: nats per trained token of the chats in {code_span(report['chats'])}. Compare models with "
            "different tokenizers in bits per byte."
        )
    else:
        notes.append("SFT loss: not measured; `--chats FILE` names held-out chats.")
    for model in report["models"]:
        if dropped := sum(found["dropped"] for found in model["sft_loss"].values()):
            notes.append(
                f"{escape_inline(model['label'])}: its SFT loss is without {dropped} of these chats, whose first turn "
                "is longer than its context; it cannot be compared with that of a model that read them."
            )
        for name, found in model["bits_per_byte"].items():
            if found["changed"]:
                changed = f"{found['changed']} of {found['documents']} documents ({escape_inline(name)})"
                notes.append(
                    f"{escape_inline(model['label'])}: its tokenizer changes {changed}, so its bits per byte are those "
                    "of another text."
                )
    notes.append(
        "Distinct-n: unique n-grams / all n-grams of the answers. Loop: the answer ends with up to 32 characters or "
        "words repeated four times. Cut off: the answer reached max_new_tokens."
    )
    return [f"- {note}" for note in notes]


def _parameter_count(model: _ModelFigures) -> str:
    if model["parameters"] is None:
        return _MISSING
    shown = f"{model['parameters'] / 1e6:.1f} M"
    return shown + (f" ({model['active'] / 1e6:.1f} M active)" if model["active"] != model["parameters"] else "")


def _figure_with_error(figures: dict[str, Any] | None, name: str) -> str:
    """A figure with its standard error."""
    if not figures or figures[name] is None:
        return _MISSING
    return _number(figures[name], 3) + (f" ± {figures['error']:.3f}" if figures["error"] is not None else "")


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


# ---- the judge -------------------------------------------------------------------------------------------------------
def _judge_section(judge: dict[str, Any]) -> list[str]:
    def as_percentage(value: float | None) -> str:
        return _MISSING if value is None else f"{value:.0%}"

    lines = ["## Judge", "", table_row("", "score (1 to 10)", "wins", "ties", "losses", "points")]
    lines.append(table_row("---", *["---:"] * 5))
    for label, found in judge["models"].items():
        score = _number(found["score"], 1)
        score += f" ± {found['score_error']:.1f}" if found["score_error"] is not None else ""
        counts = (str(found[name]) for name in ("wins", "ties", "losses"))
        lines.append(table_row(escape_inline(label), score, *counts, as_percentage(found["points"])))
    return [
        *lines,
        "",
        f"- Judge: {escape_inline(judge['judge'])} at {code_span(judge['url'])}, {judge['requests']} requests, "
        f"{judge['unreadable']} replies without a verdict; the replies are in {code_span(judge['verdicts_file'])}. It "
        "saw prompts and answers, not the names of the models.",
        "- A model wins a pair if it wins in both orders of the answers, otherwise the pair is a tie; points: (wins + "
        "ties / 2) / pairs. ± one standard error.",
        f"- Reliability: both orders agree in {as_percentage(judge['agreement'])} of the judged pairs; the first "
        f"answer wins {as_percentage(judge['first_place_share'])} of the decided requests (50% without position bias).",
    ]
