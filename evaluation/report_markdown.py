"""The Markdown page of a report: a table of figures, then the answers of all models to each prompt.

Answers are fenced code blocks; the fence is longer than any run of backticks in the answer.
Called by report.py. Read next: ../model/repetition.py, bits_per_byte.py (the figures).
"""

from typing import Any

from common.markdown import code_block, code_span, escape_inline
from evaluation.length_loss import length_section

ReportData = dict[str, Any]
_ModelFigures = dict[str, Any]
_MISSING = "–"
_COUNT_ROWS = {"loops": "answers that end in a loop", "empty": "empty answers", "cut_off": "cut-off answers"}


def format_report(report: ReportData) -> str:
    """The Markdown page of `report`."""
    parts = [
        "# Model comparison",
        "",
        _settings_line(report),
        "",
        *_figure_table(report),
        "",
        *length_section(report["models"]),
    ]
    if report["judge"]:
        parts += [*_judge_section(report["judge"]), ""]
    parts += ["## Answers", ""]
    for number, row in enumerate(report["prompts"]):
        kind = f" · {row['lang']}, {row['kind'].replace('_', ' ')}" if row["kind"] else f" · {row['lang']}"
        parts += [f"### {number + 1}{kind}", "", code_block(row["prompt"]), ""]
        for model in report["models"]:
            parts += _answer_lines(model["label"], model["answers"][number])
    parts += _safety_section(report)
    return "\n".join(parts).rstrip() + "\n"


def _answer_lines(label: str, answer: dict[str, Any]) -> list[str]:
    end = {"length": ", cut off", "too_long": ", the prompt does not fit into the context"}
    tokens = "tokens not counted" if answer["tokens"] is None else f"{answer['tokens']} tokens"
    shown = code_block(answer["answer"]) if answer["answer"] else "*(empty)*"
    return [f"**{escape_inline(label)}** ({tokens}{end.get(answer['finish_reason'], '')})", "", shown, ""]


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
    language_names = " / ".join(languages)
    lines = [
        _table_row("", *(escape_inline(model["label"]) for model in models)),
        _table_row("---", *("---:" for _ in models)),
    ]
    lines.append(_table_row("stage", *(escape_inline(model["stage"]) for model in models)))
    lines.append(_table_row("parameters", *map(_parameter_count, models)))
    for name in report["texts"]:
        found = [model["bits_per_byte"].get(name) for model in models]
        lines.append(
            _table_row(
                f"bits per byte, {escape_inline(name)}", *(_figure_with_error(one, "bits_per_byte") for one in found)
            )
        )
    for lang in dict.fromkeys(lang for model in models for lang in model["sft_loss"]):
        found = [model["sft_loss"].get(lang) for model in models]
        lines.append(_table_row(f"held-out SFT loss, {lang}", *(_figure_with_error(one, "loss") for one in found)))
        bits = (_number(one["bits_per_byte"], 3) if one else _MISSING for one in found)
        lines.append(_table_row(f"… bits per byte of the answers, {lang}", *bits))
    for n in (1, 2, 3):
        lines.append(
            _table_row(
                f"distinct-{n}, {language_names}",
                *(_figure_per_language(model, languages, f"distinct_{n}") for model in models),
            )
        )
    for name, shown in _COUNT_ROWS.items():
        lines.append(
            _table_row(
                f"{shown}, {language_names}", *(_counts_per_language(model, languages, name) for model in models)
            )
        )
    lengths = (_figure_per_language(model, languages, "mean_length", 1) for model in models)
    lines.append(_table_row(f"mean length (characters or words), {language_names}", *lengths))
    speeds = {"tokens_per_second": "one answer at a time", "batch_tokens_per_second": "all answers in one batch"}
    for name, shown in speeds.items():
        lines.append(_table_row(f"tokens/s, {shown}", *(_number(model[name], 0) for model in models)))
    return ["## Figures", "", *lines, "", *_figure_notes(report)]


def _figure_notes(report: ReportData) -> list[str]:
    """Notes on the rows and on missing figures."""
    notes = [f"{escape_inline(label)}: left out because its server stopped answering: {escape_inline(reason)}."
             for label, reason in report["failed"].items()]  # fmt: skip
    notes += [
        f"{escape_inline(model['label'])}: {escape_inline(reason)}."
        for model in report["models"]
        for reason in model["missing"]
    ]
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
        changed = {name: found["changed"] for name, found in model["bits_per_byte"].items() if found["changed"]}
        for name, count in changed.items():
            notes.append(
                f"{escape_inline(model['label'])}: its tokenizer changes {count} of "
                f"{model['bits_per_byte'][name]['documents']} documents ({escape_inline(name)}), "
                "so its bits per byte are those of another text."
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


def _figure_with_error(found: dict[str, Any] | None, name: str) -> str:
    """A figure with its standard error."""
    if not found or found[name] is None:
        return _MISSING
    return _number(found[name], 3) + (f" ± {found['error']:.3f}" if found["error"] is not None else "")


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def _figure_per_language(model: _ModelFigures, languages: list[str], name: str, digits: int = 2) -> str:
    return " / ".join(_number(model["answer_figures"][lang][name], digits) for lang in languages)


def _counts_per_language(model: _ModelFigures, languages: list[str], name: str) -> str:
    """Counts, because a percentage of 16 answers suggests too much precision."""
    figures = [model["answer_figures"][lang] for lang in languages]
    return " / ".join(f"{found[name]} of {found['answers']}" for found in figures)


# ---- the judge -------------------------------------------------------------------------------------------------------
def _judge_section(judge: dict[str, Any]) -> list[str]:
    def as_percentage(value: float | None) -> str:
        return _MISSING if value is None else f"{value:.0%}"

    lines = ["## Judge", "", _table_row("", "score (1 to 10)", "wins", "ties", "losses", "points")]
    lines.append(_table_row("---", *["---:"] * 5))
    for label, found in judge["models"].items():
        counts = (str(found[name]) for name in ("wins", "ties", "losses"))
        error = f" ± {found['score_error']:.1f}" if found["score_error"] is not None else ""
        lines.append(
            _table_row(
                escape_inline(label), _number(found["score"], 1) + error, *counts, as_percentage(found["points"])
            )
        )
    lines += [
        "",
        f"- Judge: {escape_inline(judge['judge'])} at {code_span(judge['url'])}, {judge['requests']} requests, "
        f"{judge['unreadable']} replies without a verdict; the replies are in {code_span(judge['verdicts_file'])}. It "
        "saw prompts and answers, not the names of the models.",
        "- A model wins a pair if it wins in both orders of the answers, otherwise the pair is a tie; points: (wins + "
        "ties / 2) / pairs. ± one standard error.",
        f"- Reliability: both orders agree in {as_percentage(judge['agreement'])} of the judged pairs; the first "
        f"answer wins {as_percentage(judge['first_place_share'])} of the decided requests (50% without position bias).",
    ]
    return lines


# ---- markdown --------------------------------------------------------------------------------------------------------
def _table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
