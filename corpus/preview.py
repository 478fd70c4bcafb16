"""Samples of tokenized examples for `data_process.py --check` and --explain, which write nothing.

    trained tokens of a chat: coloured, or [[in brackets]] if stdout is not a terminal
    text: split into tokens by |
    prompts: their messages, and their references

Read next: prepare_text.py and prepare_chats.py (the same steps, with a writer).
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from corpus.data_config import ChatDataConfig, DataConfig, PromptDataConfig
from corpus.examples import PromptExample, next_batch
from corpus.prepare_chats import ChatFilter
from corpus.prepare_text import tokenize_texts
from corpus.stats import DataStats
from corpus.tokenize_chats import render_examples
from model.tokenizer import ChatTokenizer

MAX_TEXT_TOKENS = 120  # of a document that are shown


Sample = tuple[int, int, str, list[Any]]  # -hash, number, title, documents: (ids, mask or [] for text, answer bytes)


def sample_examples(
    config: DataConfig,
    tokenizer: ChatTokenizer,
    stats: DataStats,
    on_batch: Callable[[], None],
    chat_filter: ChatFilter | None = None,
) -> list[Sample]:
    """Tokenize all examples of `config.files`; returns `config.samples` of them: those with the lowest hashes."""
    examples, samples = config.read_examples(stats), list[Sample]()
    if chat_filter:
        examples = chat_filter.filter_examples(examples, config.val_fraction, stats)
    while batch := next_batch(examples):
        documents: list[list[Any]]
        if isinstance(config, ChatDataConfig):
            documents = render_examples(batch, tokenizer, config.max_seq_len, stats)
        else:
            documents = [[(ids[:MAX_TEXT_TOKENS].tolist(), [], 0)] for ids in tokenize_texts(batch, tokenizer, stats)]
        found = [
            (-example.split_hash, stats.kept, f"{example.file}:{example.line} ({example.language})", rendered)
            for example, rendered in zip(batch, documents, strict=True)
            if rendered
        ]
        samples = heapq.nlargest(config.samples, samples + found)
        on_batch()
    return samples


def sample_prompts(
    config: PromptDataConfig, stats: DataStats, on_batch: Callable[[], None] = lambda: None
) -> list[PromptExample]:
    """`config.samples` of the prompts of `config.files`: those with the lowest hashes."""
    samples: list[PromptExample] = []
    examples = config.read_examples(stats)
    while batch := next_batch(examples):
        samples = heapq.nsmallest(config.samples, samples + batch, key=lambda example: example.split_hash)
        on_batch()
    return samples


def print_prompts(samples: list[PromptExample]) -> None:
    """Print the messages and the references of prompts."""
    for example in samples:
        print(f"\n--- prompt, {example.file}:{example.line} ({example.language})")
        for message in example.messages:
            print(f"{message['role']}: {message['content']}")
        print(f"reference: {example.reference}")


def print_samples(samples: list[Sample], tokenizer: ChatTokenizer, names: Sequence[str] = ()) -> None:
    """Print all documents of the samples. `names`: of the documents of each sample."""
    for *_, title, documents in samples:
        for number, (ids, mask, _) in enumerate(documents):
            print_document(tokenizer, f"{names[number]}, {title}" if names else title, ids, mask)


def print_document(tokenizer: ChatTokenizer, title: str, ids: list[int], mask: list[int]) -> None:
    """Print a document with its trained tokens marked; without a mask its tokens are separated by |."""
    console = Console(highlight=False)
    console.print(f"\n--- {title}, {len(ids):,} tokens" + (", trained ones marked" if mask else " shown"), markup=False)
    line = Text()
    if not mask:
        line.append("|".join(token_texts(tokenizer, ids)))
    start = 0
    for i in range(1, len(mask) + 1):
        if i == len(mask) or mask[i] != mask[start]:
            text, trained = tokenizer.decode(ids[start:i]), mask[start]
            brackets = trained and not console.is_terminal
            line.append(f"[[{text}]]" if brackets else text, style="bold green" if trained else "dim")
            start = i
    console.print(line, soft_wrap=True)


def token_texts(tokenizer: ChatTokenizer, ids: list[int]) -> list[str]:
    """The text of each token; tokens that are parts of one character are joined."""
    result, start = [], 0
    for i in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:i])
        if not text.endswith("\ufffd") or i - start >= 4:
            result.append(text)
            start = i
    return result
