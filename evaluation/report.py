"""Compare several models on the same prompts and held-out texts; the report is Markdown and json.

    python 2-eval.py --report A.pth B.pth --texts zh=FILE en=FILE --chats FILE
    python 2-eval.py --report A.pth other=http://localhost:8000/v1

Models are loaded one at a time. All files and servers are checked before the first model runs. If a server stops
answering, the report of the other models is written and the command ends with the server's error. Results are
reproducible: the seed is --seed or 0, and prompt i is sampled with seed + i for every model.
Writes  out/eval/report.md and .json (or the path of --json), and with --judge .verdicts.jsonl next to them.
Read next: bits_per_byte.py, ../model/repetition.py (the measures), judge.py, report_markdown.py (the page).
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from corpus.language import detect_language
from evaluation.bits_per_byte import bits_per_byte, read_chats_by_language, read_named_texts, sft_loss
from evaluation.chat_model import SAMPLING_SETTINGS, ChatModel, list_stages
from evaluation.judge import judge_answers
from evaluation.judge_client import ChatClient
from evaluation.length_loss import length_loss
from evaluation.prompts import PROMPTS, SAFETY_PROMPTS
from evaluation.remote_model import RemoteModel, is_address, parse_address
from evaluation.report_markdown import ReportData, format_report
from model.chat_template import Message
from model.checkpoint import find_checkpoint, read_checkpoint
from model.repetition import repetition_stats

DEFAULT_CHATS = Path("dataset/sft/val.jsonl")  # the held-out chats of data_process.py sft
SPEED_TOKENS, SPEED_PROMPTS = 64, 8  # limits of the speed measurement with single answers


def compare_models(args: argparse.Namespace, prompts: list[str]) -> None:
    """Compare the models of `args.report` and write the report. `prompts` replace the fixed prompts and safety prompts.

    Raises UserError; if a server stops answering, after the report of the other models is written.
    """
    models = select_models(args)
    json_path = Path(args.json) if args.json else Path(args.out_dir) / "eval" / "report.json"
    json_path = json_path.with_suffix(".json")
    prompt_rows = [(detect_language(text), "", text) for text in prompts] or list(PROMPTS)
    args.seed = 0 if args.seed is None else args.seed
    if args.max_bytes < 1:
        raise UserError(f"--max_bytes {args.max_bytes}: must be at least 1")
    texts = read_named_texts(args.texts, args.max_bytes)
    chats_file = args.chats or (str(DEFAULT_CHATS) if DEFAULT_CHATS.is_file() else None)
    chats = read_chats_by_language(chats_file, args.max_bytes) if chats_file else {}
    client = ChatClient(args.judge, args.judge_model) if args.judge else None
    if client:
        client.check_connection()
    remote_models = {label: RemoteModel(label, one, args) for label, one in models.items() if isinstance(one, str)}

    report: ReportData = {
        "prompts": [{"lang": lang, "kind": kind, "prompt": prompt} for lang, kind, prompt in prompt_rows],
        "safety": []
        if prompts
        else [{"lang": lang, "prompt": text, "start": start} for lang, text, start in SAFETY_PROMPTS],
        "texts": {name: {key: text_entry[key] for key in ("file", "bytes")} for name, text_entry in texts.items()},
        "chats": chats_file,
        "settings": {},
        "models": [],
        "failed": {},
        "judge": None,
    }
    for label, path in models.items():
        if isinstance(path, str):
            measured = measure_remote_model(remote_models[label], report)
        else:
            chat_model = ChatModel(path, args)
            report["settings"] = {name: getattr(chat_model.settings, name) for name in SAMPLING_SETTINGS} | {
                "system": args.system
            }
            measured = measure_model(chat_model, report, texts, chats)
            del chat_model  # free its memory before the next model is loaded
        report["models"] += [{"label": label, **measured}] if measured else []
    if not report["models"]:
        raise UserError(next(iter(report["failed"].values())))
    write_report_files(report, json_path)
    if client:
        answers = {model["label"]: [row["answer"] for row in model["answers"]] for model in report["models"]}
        verdicts = json_path.with_name(json_path.stem + ".verdicts.jsonl")
        report["judge"] = judge_answers(client, [prompt for *_, prompt in prompt_rows], answers, verdicts, args.seed)
        write_report_files(report, json_path)
    print(f"written: {json_path.with_suffix('.md')} and {json_path}", flush=True)
    if report["failed"]:
        raise UserError(f"{next(iter(report['failed'].values()))}; the report of the other models is written")


# ---- which models ----------------------------------------------------------------------------------------------------
def select_models(args: argparse.Namespace) -> dict[str, Path | str]:
    """{label: path of a local model or address of a served model}, in the order of --report.

    Without entries, every stage in --out_dir. Raises UserError for invalid or repeated entries.
    """
    stages = list_stages(args.out_dir) or ["pretrain"]
    given = args.report or [str(find_checkpoint(args.out_dir, stage)) for stage in stages]
    paths = [Path(name) for name in given if not is_address(name)]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UserError(f"--report: {path} is listed twice")
        if not path.is_dir():
            read_checkpoint(path, weights=False)  # the weights are checked when the model is loaded
        elif not (path / "config.json").is_file():
            raise UserError(f"{path} is no transformers folder: it has no config.json; name a .pth file")
    labels = iter(unique_labels(paths) if paths else [])
    models: dict[str, Path | str] = {}
    for name in given:
        label, one = parse_address(name) if is_address(name) else (next(labels), Path(name))
        if label in models:
            raise UserError(f"--report: two models are named {label}: give one of them another NAME=")
        models[label] = one
    return models


def unique_labels(paths: list[Path]) -> list[str]:
    """The file names, with as many parent folders as make them unique."""
    for parts in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        labels = ["/".join(path.resolve().with_suffix("" if path.suffix == ".pth" else path.suffix).parts[-parts:])
                  for path in paths]  # fmt: skip
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


# ---- measurements ----------------------------------------------------------------------------------------------------
def measure_remote_model(chat_model: RemoteModel, report: ReportData) -> ReportData | None:
    """The figures of a served model; None if it stops answering, with the error in report["failed"]."""
    report["settings"] = report["settings"] or chat_model.settings_dict()
    try:
        return chat_model.measure(report["prompts"])
    except UserError as error:
        report["failed"][chat_model.label] = str(error)
        print(f"  {error}; the report is written without it", flush=True)
        return None


def measure_model(
    chat_model: ChatModel, report: ReportData, texts: dict[str, dict[str, Any]], chats: dict[str, list[list[Message]]]
) -> ReportData:
    """Stage, size, answers to the prompts of `report` and all figures of one local model."""
    prompts: list[dict[str, str]] = report["prompts"]
    total, active = chat_model.model.count_parameters()
    result: ReportData = {
        "path": str(chat_model.path),
        "stage": chat_model.stage,
        "parameters": total,
        "active": active,
    }
    result |= {"device": str(chat_model.device), "dtype": str(chat_model.dtype).removeprefix("torch.")}
    result |= {"context": chat_model.model.config.max_seq_len, "lineage": chat_model.lineage}
    prompt_rows = [row["prompt"] for row in prompts]
    with timed("answers"):
        answers = chat_model.generate_answers(prompt_rows)
    result["batch_tokens_per_second"] = chat_model.tokens / chat_model.seconds
    result["tokens_per_second"] = single_answer_speed(chat_model, prompt_rows)
    model, tokenizer = chat_model.model, chat_model.tokenizer
    result |= {"bits_per_byte": {}, "length_loss": {}, "sft_loss": {}, "answer_figures": {}}
    for name, text_entry in texts.items():
        with timed(f"bits per byte, {name}"):
            result["bits_per_byte"][name] = bits_per_byte(model, tokenizer, text_entry["texts"])
        with timed(f"loss by position, {name}"):
            result["length_loss"][name] = length_loss(model, tokenizer, text_entry["texts"])
    for lang, lang_chats in chats.items() if tokenizer.format else ():
        with timed(f"SFT loss, {lang}"):
            result["sft_loss"][lang] = sft_loss(model, tokenizer, lang_chats)
    for lang in dict.fromkeys(row["lang"] for row in prompts):
        lang_answers = [answer for answer, row in zip(answers, prompts, strict=True) if row["lang"] == lang]
        result["answer_figures"][lang] = repetition_stats(lang_answers)
    result["answer_figures"]["all"] = repetition_stats(answers)
    safety = chat_model.continue_answers([(row["prompt"], row["start"]) for row in report["safety"]])
    return {**result, "missing": [], "answers": answers, "safety": safety}


@contextlib.contextmanager
def timed(label: str) -> Iterator[None]:
    """Print the seconds of the block."""
    started = time.perf_counter()
    yield
    print(f"  {label}: {time.perf_counter() - started:.1f} s", flush=True)


def single_answer_speed(chat_model: ChatModel, prompts: list[str]) -> float:
    """Tokens per second with one answer at a time."""
    tokens, seconds = chat_model.tokens, chat_model.seconds
    for prompt in prompts[:SPEED_PROMPTS]:
        chat_model.generate_answers([prompt])
        if chat_model.tokens - tokens >= SPEED_TOKENS:
            break
    return (chat_model.tokens - tokens) / (chat_model.seconds - seconds)


def write_report_files(report: ReportData, json_path: Path) -> None:
    """Write the json file and the Markdown page next to it."""
    write_text(json_path, json.dumps(_replace_non_finite(report), ensure_ascii=False, indent=1) + "\n")
    write_text(json_path.with_suffix(".md"), format_report(report))


def _replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity with None (null), because JSON has neither."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
