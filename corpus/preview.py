"""Prints tokenised samples for `data_process.py --check`: chats with trained tokens marked, texts split into tokens."""

from typing import Any

from rich.console import Console
from rich.text import Text


def print_sample(tokenizer: Any, title: str, ids: list[int], mask: list[int]) -> None:
    """Print one sample; the trained tokens of a chat are coloured, or [[in brackets]] if stdout is not a terminal.

    An empty `mask` stands for plain text, which is printed with | between the tokens.
    """
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


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; tokens that are parts of one character are joined."""
    result, start = [], 0
    for i in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:i])
        if not text.endswith("\ufffd") or i - start >= 4:
            result.append(text)
            start = i
    return result
