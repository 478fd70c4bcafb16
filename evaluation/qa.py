"""Questions to a model, and the share that it answers right: what 2-eval.py prints and the data study plots.

    answer = greedy continuation of the rendered question;  right = it contains a key (evaluation/qa_data.py)

Read next: ../model/generate.py (how an answer is drawn), qa_data.py (the rule), chat_model.py (who is asked).
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from common.errors import UserError
from evaluation.chat_model import Speaker
from evaluation.qa_data import MAX_NEW_TOKENS, Question, is_right
from model.generate import chat_prompt, generate
from model.sampling import Sampling
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

BATCH = 128  # questions answered at once


def answer_questions(
    model: Transformer,
    tokenizer: ChatTokenizer,
    questions: list[Question],
    settings: Sampling,
    number_format: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Fill "answer" and "correct" of every question, whose prompt is in "ids"; returns the number of tokens drawn.

    Batches are of similar length. Raises UserError naming the question that is too long for the model.
    """
    from rich.console import Console
    from rich.progress import track

    limit, tokens = model.config.max_seq_len, 0
    for row in questions:
        if len(row["ids"]) >= limit:
            raise UserError(f"{row['where']}: the question has {len(row['ids'])} tokens, the model's limit is {limit}")
    order = sorted(questions, key=lambda row: len(row["ids"]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    console = Console(stderr=True)
    for batch in track(batches, "questions", console=console, disable=not console.is_terminal, transient=True):
        with number_format():
            answers = generate(model, [row["ids"] for row in batch], settings, tokenizer)
        for row, answer in zip(batch, answers, strict=True):
            row |= {"answer": answer.text.strip(), "correct": is_right(answer.text, row["keys"])}
            tokens += len(answer.ids)
    return tokens


def count_right(questions: list[Question], kind: str | None = None) -> dict[str, dict[str, float]]:
    """Of one kind (None: of all), by language, zh before en: questions, correct ones, accuracy."""
    languages = sorted({row["lang"] for row in questions}, reverse=True)
    marks = {
        lang: [row["correct"] for row in questions if row["lang"] == lang and kind in (None, row["kind"])]
        for lang in languages
    }
    return {k: {"questions": len(m), "correct": sum(m), "accuracy": sum(m) / len(m)} for k, m in marks.items() if m}


def chat_accuracy(
    model: Transformer,
    tokenizer: ChatTokenizer,
    questions: list[Question],
    number_format: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """The share that a chat model answers right, by language, exactly as `2-eval.py --questions` counts it."""
    settings = Sampling(max_new_tokens=MAX_NEW_TOKENS, stop=tokenizer.stop_strings)
    rows = [dict(row) for row in questions]
    for row in rows:
        row["ids"] = chat_prompt(model, tokenizer, [{"role": "user", "content": row["question"]}], MAX_NEW_TOKENS)
    answer_questions(model, tokenizer, rows, settings, number_format)
    return {lang: counts["accuracy"] for lang, counts in count_right(rows).items()}


def put_questions(speaker: Speaker, questions: list[Question]) -> dict[str, Any]:
    """Answer all questions in batches of similar length; prints the table and returns its numbers."""
    from rich.console import Console
    from rich.table import Table

    started = time.perf_counter()
    for row in questions:
        text = row["question"] + ("" if speaker.chats else "\n")
        row["ids"] = speaker.prompt_ids([{"role": "user", "content": text}])
    speaker.tokens = answer_questions(
        speaker.model, speaker.tokenizer, questions, speaker.settings, speaker.number_format
    )
    speaker.seconds = time.perf_counter() - started
    fields = ("question", "answer", "keys", "correct", "lang", "kind")
    speaker.answers = [{name: row[name] for name in fields} for row in questions]
    kinds = {kind: count_right(questions, kind) for kind in sorted({row["kind"] for row in questions} - {""})}
    total = count_right(questions)
    table = Table("answered right", *total)
    for name, counts in {**kinds, "all": total}.items():
        cells = (counts.get(lang) for lang in total)
        table.add_row(name, *(f"{c['accuracy']:.1%} ({c['correct']} of {c['questions']})" if c else "" for c in cells))
    Console().print(table)
    return {"accuracy": {lang: counts["accuracy"] for lang, counts in total.items()}, "counts": total, "kinds": kinds}
