"""Compare several models on the same prompts and held-out texts; the report is Markdown and json.

    python 2-eval.py --report A.pth B.pth --texts zh=FILE en=FILE --chats FILE
    python 2-eval.py --report A.pth other=http://localhost:8000/v1

Models are loaded one at a time. All files and servers are checked before the first model runs. If a server stops
answering, the report of the other models is written and the command ends with the server's error. Results are
reproducible: the seed is --seed or 0, and prompt i is sampled with seed + i for every model.
Writes  out/eval/report.md and .json (or the path of --json), and with --judge .verdicts.jsonl next to them; the answers
        also stand on the page of the runs, out/report.html (trainer/report_page.py).
Read next: bits_per_byte.py, ../model/repetition.py (the measures), judge.py, report_markdown.py (the page).
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from corpus.language import detect_language
from evaluation.bits_per_byte import bits_per_byte, read_chats_by_language, read_named_texts, sft_loss
from evaluation.chat_model import ChatModel, models_folder, open_chat_model
from evaluation.eval_config import EvalConfig
from evaluation.judge import judge_answers
from evaluation.judge_client import ChatClient
from evaluation.length_loss import length_loss
from evaluation.prompts import PROMPTS, SAFETY_PROMPTS
from evaluation.qa_data import system_messages
from evaluation.remote_model import RemoteModel, is_address, parse_address
from evaluation.report_markdown import ReportData, format_report
from model.chat_template import Message
from model.checkpoint import find_checkpoint, read_checkpoint, trained_stages
from model.completion import Completion
from model.repetition import repetition_stats
from model.sampling import SamplingParams
from model.sampling_presets import SAMPLING_SETTINGS

DEFAULT_CHATS = Path("dataset/sft/val.jsonl")  # the held-out chats of data_process.py sft
SPEED_TOKENS, SPEED_PROMPTS = 64, 8  # limits of the speed measurement with single answers


def compare_models(config: EvalConfig, prompts: list[str]) -> None:
    """Compare the models of --report and write the report. `prompts` replace the fixed prompts and safety prompts.

    Raises UserError; if a server stops answering, after the report of the other models is written.
    """
    models = select_models(config.report or (), config.out_dir)
    json_path = Path(config.json or Path(config.out_dir) / "eval" / "report.json").with_suffix(".json")
    prompt_rows = [(detect_language(text), "", text) for text in prompts] or list(PROMPTS)
    settings = dataclasses.replace(config.settings(), seed=config.seed or 0)
    system_messages(config.system)  # raises UserError for white space
    texts = read_named_texts(config.texts, config.max_bytes)
    chats_file = config.chats or (str(DEFAULT_CHATS) if DEFAULT_CHATS.is_file() else None)
    chats = read_chats_by_language(chats_file, config.max_bytes) if chats_file else {}
    client = ChatClient(config.judge, config.judge_model) if config.judge else None
    if client:
        client.list_model_names()  # raises UserError where the server does not answer or rejects the key
    remote_models = {
        label: RemoteModel(label, address, settings, config.system, config.report_api_key)
        for label, address in models.items()
        if isinstance(address, str)
    }

    report: ReportData = {
        "prompts": [dict(zip(("lang", "kind", "prompt"), row, strict=True)) for row in prompt_rows],
        "safety": [dict(zip(("lang", "prompt", "start"), row, strict=True)) for row in SAFETY_PROMPTS if not prompts],
        "texts": {name: {key: text_entry[key] for key in ("file", "bytes")} for name, text_entry in texts.items()},
        "chats": chats_file,
        "settings": {name: getattr(settings, name) for name in SAMPLING_SETTINGS} | {"system": config.system or None},
        "models": [],
        "failed": {},
        "judge": None,
    }
    for label, path in models.items():
        if isinstance(path, str):
            measured = measure_remote_model(remote_models[label], report)
        else:
            chat_model = open_chat_model(path, config.device, config.dtype, config.rope, config.quantize)
            print(chat_model.summary(), flush=True)
            measured = measure_model(chat_model, settings, report, texts, chats)
            del chat_model  # free its memory before the next model is loaded
        report["models"] += [{"label": label, **measured}] if measured else []
    if not report["models"]:
        raise UserError(next(iter(report["failed"].values())))
    write_report_files(report, json_path)
    if client:
        answers = {model["label"]: [row["answer"] for row in model["answers"]] for model in report["models"]}
        verdicts = json_path.with_name(json_path.stem + ".verdicts.jsonl")
        texts_of_prompts = [prompt for *_, prompt in prompt_rows]
        report["judge"] = judge_answers(client, texts_of_prompts, answers, verdicts, seed=config.seed or 0)
        write_report_files(report, json_path)
    from trainer.report_page import write_page  # matplotlib takes a second to import

    page = write_page(config.out_dir, json_path)
    print(f"written: {json_path.with_suffix('.md')}, {json_path} and {page}", flush=True)
    if report["failed"]:
        raise UserError(f"{next(iter(report['failed'].values()))}; the report of the other models is written")


# ---- which models ----------------------------------------------------------------------------------------------------
def select_models(given: Sequence[str], out_dir: str) -> dict[str, Path | str]:
    """{label: path of a local model or address of a served model}, in the order of --report.

    Without entries, every stage in `out_dir`. Raises UserError for invalid or repeated entries.
    """
    folder = "" if given else models_folder(out_dir)
    given = given or [str(find_checkpoint(folder, stage)) for stage in trained_stages(folder) or ["pretrain"]]
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
def measure_remote_model(served: RemoteModel, report: ReportData) -> ReportData | None:
    """The figures that a server can provide; None if it stops answering, with the error in report["failed"]."""
    print(f"{served.label}: {served.client.model} at {served.client.url}, served", flush=True)
    try:
        answers, seconds = served.answer_prompts([row["prompt"] for row in report["prompts"]])
    except UserError as error:
        report["failed"][served.label] = str(error)
        print(f"  {error}; the report is written without it", flush=True)
        return None
    print(f"  answers: {seconds:.1f} s", flush=True)
    counts = [answer["tokens"] for answer in answers]
    is_counted = None not in counts
    unknown = ("parameters", "active", "context", "device", "dtype", "batch_tokens_per_second", "safety")
    return {
        **{"path": f"{served.client.url}#{served.client.model}", "stage": "served", "lineage": []},
        **dict.fromkeys(unknown),
        **{"bits_per_byte": {}, "sft_loss": {}, "missing": served.missing_figures(is_counted)},
        "tokens_per_second": sum(counts) / max(seconds, 1e-9) if is_counted else None,
        "answer_figures": answer_figures(answers, report["prompts"]),
        "answers": answers,
    }


def measure_model(
    chat_model: ChatModel,
    settings: SamplingParams,
    report: ReportData,
    texts: dict[str, dict[str, Any]],
    chats: dict[str, list[list[Message]]],
) -> ReportData:
    """Stage, size, answers to the prompts of `report` and all figures of one local model."""
    model, tokenizer, system = chat_model.model, chat_model.tokenizer, report["settings"]["system"] or ""
    settings = dataclasses.replace(settings, stop=chat_model.stop_strings)
    prompts = [row["prompt"] for row in report["prompts"]]
    total, active = model.count_parameters()
    result: ReportData = {
        **{"path": str(chat_model.path), "stage": chat_model.stage, "parameters": total, "active": active},
        **{"device": str(chat_model.device), "dtype": chat_model.number_format},
        **{"context": model.config.max_seq_len, "lineage": chat_model.lineage},
    }
    with timed("answers"):
        answers, seconds = answer_prompts(chat_model, prompts, settings, system)
    result["batch_tokens_per_second"] = sum(answer["tokens"] for answer in answers) / seconds
    result["tokens_per_second"] = single_answer_speed(chat_model, prompts, settings, system)
    result |= {"bits_per_byte": {}, "length_loss": {}, "sft_loss": {}}
    for name, text_entry in texts.items():
        with timed(f"bits per byte, {name}"):
            result["bits_per_byte"][name] = bits_per_byte(model, tokenizer, text_entry["texts"])
        with timed(f"loss by position, {name}"):
            result["length_loss"][name] = length_loss(model, tokenizer, text_entry["texts"])
    for lang, lang_chats in chats.items() if tokenizer.format else ():
        with timed(f"SFT loss, {lang}"):
            result["sft_loss"][lang] = sft_loss(model, tokenizer, lang_chats)
    result["answer_figures"] = answer_figures(answers, report["prompts"])
    prefixes = [(row["prompt"], row["start"]) for row in report["safety"]]
    safety = continue_answers(chat_model, prefixes, settings, system)
    return {**result, "missing": [], "answers": answers, "safety": safety}


def answer_figures(answers: list[dict[str, Any]], prompts: list[dict[str, str]]) -> dict[str, Any]:
    """The repetition of the answers in each language, and of all answers. `prompts`: rows with "lang"."""
    pairs = list(zip(answers, prompts, strict=True))
    languages = dict.fromkeys(row["lang"] for row in prompts)
    figures = {lang: repetition_stats([answer for answer, row in pairs if row["lang"] == lang]) for lang in languages}
    return figures | {"all": repetition_stats(answers)}


def answer_prompts(
    chat_model: ChatModel, prompts: list[str], settings: SamplingParams, system: str
) -> tuple[list[dict[str, Any]], float]:
    """({"answer", "finish_reason", "tokens"} for each prompt, seconds): separate conversations in one batch.

    Raises UserError that names the first prompt longer than the context.
    """
    ids = []
    for prompt in prompts:
        messages = [*system_messages(system), {"role": "user", "content": prompt}]
        ids.append(chat_model.prompt_ids(messages, settings.max_new_tokens))
        if len(ids[-1]) >= (limit := chat_model.model.config.max_seq_len):
            raise UserError(
                f"{chat_model.path}: the prompt “{prompt[:40]}” has {len(ids[-1])} tokens, the model reads at most "
                f"{limit} (max_seq_len): shorten it"
            )
    started = time.perf_counter()
    answers = chat_model.generate(ids, settings)
    seconds = time.perf_counter() - started
    return [_answer_row(answer, answer.text.strip()) for answer in answers], seconds


def single_answer_speed(chat_model: ChatModel, prompts: list[str], settings: SamplingParams, system: str) -> float:
    """Tokens per second with one answer at a time."""
    tokens, seconds = 0, 0.0
    for prompt in prompts[:SPEED_PROMPTS]:
        (answer,), more_seconds = answer_prompts(chat_model, [prompt], settings, system)
        tokens, seconds = tokens + answer["tokens"], seconds + more_seconds
        if tokens >= SPEED_TOKENS:
            break
    return tokens / seconds


def continue_answers(
    chat_model: ChatModel, prefixes: list[tuple[str, str]], settings: SamplingParams, system: str
) -> list[dict[str, Any]]:
    """{"answer", "finish_reason", "tokens"} for each (prompt, answer prefix): the continuation of the prefix.

    A pretrained model gets prompt and prefix as two lines of text. finish_reason "too_long": prompt and prefix exceed
    the context.
    """
    ids = []
    for prompt, start in prefixes:
        if chat_model.is_chat_model:
            messages = [*system_messages(system), {"role": "user", "content": prompt}]
            ids.append(chat_model.prompt_ids(messages, settings.max_new_tokens) + chat_model.tokenizer.encode(start))
        else:
            ids.append(chat_model.tokenizer.encode_document(f"{prompt}\n{start}"))
    limit = chat_model.model.config.max_seq_len
    generated = iter(chat_model.generate([prompt for prompt in ids if len(prompt) < limit], settings))
    answers = [next(generated) if len(prompt) < limit else Completion(finish_reason="too_long") for prompt in ids]
    return [_answer_row(answer, answer.text.rstrip()) for answer in answers]


def _answer_row(answer: Completion, text: str) -> dict[str, Any]:
    return {"answer": text, "finish_reason": answer.finish_reason, "tokens": len(answer.ids)}


@contextlib.contextmanager
def timed(label: str) -> Iterator[None]:
    """Print the seconds of the block."""
    started = time.perf_counter()
    yield
    print(f"  {label}: {time.perf_counter() - started:.1f} s", flush=True)


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
