"""Several models side by side: the same prompts, the same held-out text, one page for people and one for programs.

    python 2-eval.py --report A.pth B.pth --texts zh=FILE en=FILE --chats FILE
    python 2-eval.py --report A.pth other=http://localhost:8000/v1

Models are opened one after the other, so that memory holds one. Every file and server that is named is checked before
the first model computes. A server that stops answering is left out: the report of the others is written, and the
command ends with the server's error. Equal arguments give equal answers: the seed is 0 unless --seed says otherwise,
and prompt i is drawn with seed + i for every model.
Writes  out/eval/report.md and .json (or what --json names), with --judge also .verdicts.jsonl beside them.
Read next: bits_per_byte.py, ../model/repetition.py (the measures), judge.py, report_markdown.py (how the page is
written).
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
from corpus.language import language_of
from evaluation.bits_per_byte import bits_per_byte, read_chats, read_named_texts, sft_loss
from evaluation.chat_model import SAMPLING, Speaker, stages_in
from evaluation.judge import judge
from evaluation.judge_client import ChatServer
from evaluation.length_loss import length_loss
from evaluation.prompts import PROMPTS, SAFETY
from evaluation.remote_model import HttpSpeaker, is_address, split_address
from evaluation.report_markdown import page
from model.chat_template import Message
from model.checkpoint import find_checkpoint, read_checkpoint
from model.repetition import describe

SFT_CHATS = Path("dataset/sft/val.jsonl")  # what data_process.py sft holds out
SPEED_TOKENS, SPEED_PROMPTS = 64, 8  # the speed of a conversation is that of so many tokens, from so many prompts

Report = dict[str, Any]


def make_report(args: argparse.Namespace, prompts: list[str]) -> None:
    """Compare the models of `args.report` and write the pages. `prompts` replace the fixed ones and those about safety.

    Raises UserError; where a server stopped answering, after the report of the other models is written.
    """
    speakers = speakers_of(args)
    place = Path(args.json) if args.json else Path(args.out_dir) / "eval" / "report.json"
    place = place.with_suffix(".json")
    asked = [(language_of(text), "", text) for text in prompts] or list(PROMPTS)
    args.seed = 0 if args.seed is None else args.seed
    if args.max_bytes < 1:
        raise UserError(f"--max_bytes {args.max_bytes}: at least 1 is needed")
    texts = read_named_texts(args.texts, args.max_bytes)
    chats_file = args.chats or (str(SFT_CHATS) if SFT_CHATS.is_file() else None)
    chats = read_chats(chats_file, args.max_bytes) if chats_file else {}
    server = ChatServer(args.judge, args.judge_model) if args.judge else None
    if server:
        server.check()
    served = {label: HttpSpeaker(label, one, args) for label, one in speakers.items() if isinstance(one, str)}

    report: Report = {
        "prompts": [{"lang": lang, "kind": kind, "prompt": prompt} for lang, kind, prompt in asked],
        "safety": [] if prompts else [{"lang": lang, "prompt": text, "start": start} for lang, text, start in SAFETY],
        "texts": {name: {key: found[key] for key in ("file", "bytes")} for name, found in texts.items()},
        "chats": chats_file,
        "settings": {},
        "models": [],
        "failed": {},
        "judge": None,
    }
    for label, path in speakers.items():
        if isinstance(path, str):
            measured = measure_served(served[label], report)
        else:
            speaker = Speaker(path, args)
            report["settings"] = {name: getattr(speaker.settings, name) for name in SAMPLING} | {"system": args.system}
            measured = measure(speaker, report, texts, chats)
            del speaker  # before the next one is opened
        report["models"] += [{"label": label, **measured}] if measured else []
    if not report["models"]:
        raise UserError(next(iter(report["failed"].values())))
    write_pages(report, place)
    if server:
        answers = {model["label"]: [row["answer"] for row in model["answers"]] for model in report["models"]}
        verdicts = place.with_name(place.stem + ".verdicts.jsonl")
        report["judge"] = judge(server, [prompt for *_, prompt in asked], answers, verdicts, args.seed)
        write_pages(report, place)
    print(f"written: {place.with_suffix('.md')} and {place}", flush=True)
    if report["failed"]:
        raise UserError(f"{next(iter(report['failed'].values()))}; the report of the other models is written")


# ---- which models ----------------------------------------------------------------------------------------------------
def speakers_of(args: argparse.Namespace) -> dict[str, Path | str]:
    """The models to compare by label: files that can be opened, addresses as text, in the order of --report.

    Without names, every stage in --out_dir. Raises UserError.
    """
    stages = stages_in(args.out_dir) or ["pretrain"]
    given = args.report or [str(find_checkpoint(args.out_dir, stage)) for stage in stages]
    paths = [Path(name) for name in given if not is_address(name)]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UserError(f"--report: {path} is named twice")
        if not path.is_dir():
            read_checkpoint(path, weights=False)  # the whole file is checked when it is opened
        elif not (path / "config.json").is_file():
            raise UserError(f"{path} is no model: a transformers folder has a config.json; name a .pth file in it")
    labels = iter(labels_of(paths) if paths else [])
    found: dict[str, Path | str] = {}
    for name in given:
        label, one = split_address(name) if is_address(name) else (next(labels), Path(name))
        if label in found:
            raise UserError(f"--report: two models are called {label}: give one of them another NAME=")
        found[label] = one
    return found


def labels_of(paths: list[Path]) -> list[str]:
    """A short name for each: its last part, with as many folders in front as it takes to tell them apart."""
    for parts in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        labels = ["/".join(path.resolve().with_suffix("" if path.suffix == ".pth" else path.suffix).parts[-parts:])
                  for path in paths]  # fmt: skip
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


# ---- what is measured ------------------------------------------------------------------------------------------------
def measure_served(speaker: HttpSpeaker, report: Report) -> Report | None:
    """The figures of a served model; None where it stops answering, which is noted in the report."""
    report["settings"] = report["settings"] or speaker.settings_shown()
    try:
        return speaker.measure(report["prompts"])
    except UserError as error:
        report["failed"][speaker.label] = str(error)
        print(f"  {error}; the report is made without it", flush=True)
        return None


def measure(
    speaker: Speaker, report: Report, texts: dict[str, dict[str, Any]], chats: dict[str, list[list[Message]]]
) -> Report:
    """Everything about one model: stage and size, its answers to the prompts of the report, and the figures."""
    prompts: list[dict[str, str]] = report["prompts"]
    total, active = speaker.model.count_parameters()
    result: Report = {"path": str(speaker.path), "stage": speaker.stage, "parameters": total, "active": active}
    result |= {"device": str(speaker.device), "dtype": str(speaker.dtype).removeprefix("torch.")}
    result |= {"context": speaker.model.config.max_seq_len, "lineage": speaker.lineage}
    asked = [row["prompt"] for row in prompts]
    with telling("answers"):
        answers = speaker.answer_all(asked)
    result["batch_tokens_per_second"] = speaker.tokens / speaker.seconds
    result["tokens_per_second"] = talking_speed(speaker, asked)
    model, tokenizer = speaker.model, speaker.tokenizer
    result |= {"bits_per_byte": {}, "length_loss": {}, "sft_loss": {}, "answer_figures": {}}
    for name, found in texts.items():
        with telling(f"bits per byte, {name}"):
            result["bits_per_byte"][name] = bits_per_byte(model, tokenizer, found["texts"])
        with telling(f"loss by position, {name}"):
            result["length_loss"][name] = length_loss(model, tokenizer, found["texts"])
    for lang, talks in chats.items() if tokenizer.format else ():
        with telling(f"SFT loss, {lang}"):
            result["sft_loss"][lang] = sft_loss(model, tokenizer, talks)
    for lang in dict.fromkeys(row["lang"] for row in prompts):
        said = [answer for answer, row in zip(answers, prompts, strict=True) if row["lang"] == lang]
        result["answer_figures"][lang] = describe(said)
    result["answer_figures"]["all"] = describe(answers)
    safety = speaker.continue_all([(row["prompt"], row["start"]) for row in report["safety"]])
    return {**result, "missing": [], "answers": answers, "safety": safety}


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Say how long it took."""
    started = time.perf_counter()
    yield
    print(f"  {what}: {time.perf_counter() - started:.1f} s", flush=True)


def talking_speed(speaker: Speaker, prompts: list[str]) -> float:
    """Tokens a second of one answer at a time, as in a conversation."""
    tokens, seconds = speaker.tokens, speaker.seconds
    for prompt in prompts[:SPEED_PROMPTS]:
        speaker.answer_all([prompt])
        if speaker.tokens - tokens >= SPEED_TOKENS:
            break
    return (speaker.tokens - tokens) / (speaker.seconds - seconds)


def write_pages(report: Report, place: Path) -> None:
    """The json page, and the markdown page beside it."""
    write_text(place, json.dumps(_finite(report), ensure_ascii=False, indent=1) + "\n")
    write_text(place.with_suffix(".md"), page(report))


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a model with broken weights has null where its figures would be."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
