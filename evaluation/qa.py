"""Accuracy on questions with keys, for 2-eval.py --questions and data_scaling.py.

    answer = greedy continuation of the rendered question;  correct = it contains a key (qa_data.py)

Read next: ../model/generate.py (the sampling loop), qa_data.py (the rule), chat_model.py (the model).
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from common.errors import UserError
from evaluation.chat_model import ChatModel
from evaluation.qa_data import MAX_ANSWER_TOKENS, KeyedQuestion, is_correct
from model.generate import chat_prompt, generate
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

QUESTIONS_PER_BATCH = 128


def answer_questions(
    model: Transformer,
    tokenizer: ChatTokenizer,
    questions: list[KeyedQuestion],
    settings: SamplingParams,
    autocast_context: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Set "answer" and "correct" of every question from its prompt "ids"; returns the number of generated tokens.

    Batches have questions of similar length. Raises UserError with the location of a question longer than the context.
    """
    from rich.console import Console
    from rich.progress import track

    limit, tokens = model.config.max_seq_len, 0
    for row in questions:
        if len(row["ids"]) >= limit:
            raise UserError(f"{row['where']}: the question has {len(row['ids'])} tokens, the model's limit is {limit}")
    order = sorted(questions, key=lambda row: len(row["ids"]))
    batches = [order[i : i + QUESTIONS_PER_BATCH] for i in range(0, len(order), QUESTIONS_PER_BATCH)]
    console = Console(stderr=True)
    for batch in track(batches, "questions", console=console, disable=not console.is_terminal, transient=True):
        with autocast_context():
            answers = generate(model, [row["ids"] for row in batch], settings, tokenizer)
        for row, answer in zip(batch, answers, strict=True):
            row |= {"answer": answer.text.strip(), "correct": is_correct(answer.text, row["keys"])}
            tokens += len(answer.ids)
    return tokens


def accuracy_by_language(questions: list[KeyedQuestion], kind: str | None = None) -> dict[str, dict[str, float]]:
    """{language: {"questions", "correct", "accuracy"}} of one kind (None: all), zh before en."""
    languages = sorted({row["lang"] for row in questions}, reverse=True)
    outcomes = {
        lang: [row["correct"] for row in questions if row["lang"] == lang and kind in (None, row["kind"])]
        for lang in languages
    }
    return {k: {"questions": len(m), "correct": sum(m), "accuracy": sum(m) / len(m)} for k, m in outcomes.items() if m}


def chat_accuracy(
    model: Transformer,
    tokenizer: ChatTokenizer,
    questions: list[KeyedQuestion],
    autocast_context: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Accuracy of a chat model by language, equal to that of `2-eval.py --questions`."""
    settings = SamplingParams(max_new_tokens=MAX_ANSWER_TOKENS, stop=tokenizer.stop_strings)
    rows = [dict(row) for row in questions]
    for row in rows:
        row["ids"] = chat_prompt(model, tokenizer, [{"role": "user", "content": row["question"]}], MAX_ANSWER_TOKENS)
    answer_questions(model, tokenizer, rows, settings, autocast_context)
    return {lang: counts["accuracy"] for lang, counts in accuracy_by_language(rows).items()}


def evaluate_questions(chat_model: ChatModel, questions: list[KeyedQuestion]) -> dict[str, Any]:
    """Answer all questions, print the table of accuracies and return its numbers."""
    from rich.console import Console
    from rich.table import Table

    started = time.perf_counter()
    for row in questions:
        text = row["question"] + ("" if chat_model.is_chat_model else "\n")
        row["ids"] = chat_model.prompt_ids([{"role": "user", "content": text}])
    chat_model.tokens = answer_questions(
        chat_model.model, chat_model.tokenizer, questions, chat_model.settings, chat_model.autocast_context
    )
    chat_model.seconds = time.perf_counter() - started
    fields = ("question", "answer", "keys", "correct", "lang", "kind")
    chat_model.answers = [{name: row[name] for name in fields} for row in questions]
    kinds = {kind: accuracy_by_language(questions, kind) for kind in sorted({row["kind"] for row in questions} - {""})}
    total = accuracy_by_language(questions)
    table = Table("accuracy", *total)
    for name, counts in {**kinds, "all": total}.items():
        cells = (counts.get(lang) for lang in total)
        table.add_row(name, *(f"{c['accuracy']:.1%} ({c['correct']} of {c['questions']})" if c else "" for c in cells))
    Console().print(table)
    return {"accuracy": {lang: counts["accuracy"] for lang, counts in total.items()}, "counts": total, "kinds": kinds}
