"""Accuracy on questions with keys, for 2-eval.py --questions and data_scaling.py.

    answer = greedy continuation of the rendered question;  correct = it contains a key (qa_data.py)

Read next: qa_data.py (the rule), tool_loop.py (calls of tools), chat_model.py (the model).
"""

import time
from typing import Any

from common.errors import UserError
from evaluation.chat_model import ChatModel
from evaluation.qa_data import MAX_ANSWER_TOKENS, KeyedQuestion, is_correct, system_messages
from evaluation.tables import with_progress
from evaluation.tool_loop import NO_TOOLS, Reply, ToolOptions, complete_replies
from model.chat_template import Message
from model.sampling import SamplingParams

QUESTIONS_PER_BATCH = 128


def answer_questions(
    chat_model: ChatModel,
    questions: list[KeyedQuestion],
    system: str = "",
    max_new_tokens: int | None = None,
    options: ToolOptions = NO_TOOLS,
) -> int:
    """Set "answer", "correct" and "calls" of every question; returns the number of generated tokens.

    Greedy; a pretrained model gets the question as a line, and a newline ends its answer. The answer is the content of
    the last answer, without thoughts; "calls": calls of tools that were run. Batches have questions of similar length.
    Raises UserError with the location of a question longer than the context.
    """
    options.check(chat_model)
    is_chat, limit, tokens = chat_model.is_chat_model, chat_model.model.config.max_seq_len, 0
    settings = SamplingParams(
        max_new_tokens=max_new_tokens or (MAX_ANSWER_TOKENS if is_chat else 24),
        stop=chat_model.stop_strings if is_chat else ("\n",),
    )
    prompts: list[tuple[int, list[Message], KeyedQuestion]] = []
    for row in questions:
        text = row["question"] + ("" if is_chat else "\n")
        messages = [*system_messages(system), {"role": "user", "content": text}]
        size = len(Reply(options).next_prompt(chat_model, options.add_tools(messages), settings.max_new_tokens))
        if size >= limit:
            raise UserError(f"{row['where']}: the question has {size} tokens, the model's limit is {limit}")
        prompts.append((size, messages, row))
    prompts.sort(key=lambda prompt: prompt[0])
    batches = [prompts[i : i + QUESTIONS_PER_BATCH] for i in range(0, len(prompts), QUESTIONS_PER_BATCH)]
    for batch in with_progress(batches, "questions"):
        replies = complete_replies(chat_model, [messages for _, messages, _ in batch], settings, options)
        for (_, _, row), reply in zip(batch, replies, strict=True):
            row |= {"answer": reply.text.strip(), "correct": is_correct(reply.text, row["keys"])}
            row["calls"] = reply.num_calls
            tokens += reply.num_tokens
    return tokens


def accuracy_by_language(questions: list[KeyedQuestion], kind: str | None = None) -> dict[str, dict[str, float]]:
    """{language: {"questions", "correct", "accuracy"}} of one kind (None: all), zh before en."""
    languages = sorted({row["lang"] for row in questions}, reverse=True)
    outcomes = {
        lang: [row["correct"] for row in questions if row["lang"] == lang and kind in (None, row["kind"])]
        for lang in languages
    }
    return {k: {"questions": len(m), "correct": sum(m), "accuracy": sum(m) / len(m)} for k, m in outcomes.items() if m}


def chat_accuracy(chat_model: ChatModel, questions: list[KeyedQuestion]) -> dict[str, float]:
    """Accuracy by language, equal to that of `2-eval.py --questions`."""
    rows = [dict(row) for row in questions]
    answer_questions(chat_model, rows)
    return {lang: counts["accuracy"] for lang, counts in accuracy_by_language(rows).items()}


def evaluate_questions(
    chat_model: ChatModel,
    questions: list[KeyedQuestion],
    system: str = "",
    max_new_tokens: int | None = None,
    options: ToolOptions = NO_TOOLS,
) -> tuple[dict[str, Any], int, float]:
    """Answer all questions and print the table of accuracies; returns (scores and answers, tokens, seconds)."""
    from rich.console import Console
    from rich.table import Table

    started = time.perf_counter()
    tokens = answer_questions(chat_model, questions, system, max_new_tokens, options)
    seconds = time.perf_counter() - started
    fields = ("question", "answer", "keys", "correct", "lang", "kind", *(["calls"] if options.tools else []))
    answers = [{name: row[name] for name in fields} for row in questions]
    kinds = {kind: accuracy_by_language(questions, kind) for kind in sorted({row["kind"] for row in questions} - {""})}
    total = accuracy_by_language(questions)
    table = Table("accuracy", *total)
    for name, counts in {**kinds, "all": total}.items():
        cells = (counts.get(lang) for lang in total)
        table.add_row(name, *(f"{c['accuracy']:.1%} ({c['correct']} of {c['questions']})" if c else "" for c in cells))
    Console().print(table)
    accuracy = {lang: counts["accuracy"] for lang, counts in total.items()}
    return {"accuracy": accuracy, "counts": total, "kinds": kinds, "answers": answers}, tokens, seconds
