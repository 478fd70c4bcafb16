"""Escape untrusted text for Markdown: it is shown verbatim and creates no image, link, HTML or layout."""

import re

WHITESPACE = re.compile(r"[\s\x85\u2028\u2029]+")
MARKDOWN_SPECIAL_CHARACTERS = re.compile(r"([\\`*_|<>\[\]#~])")


def escape_inline(text: str) -> str:
    """Escape text for use inside a line; newlines become spaces."""
    return MARKDOWN_SPECIAL_CHARACTERS.sub(r"\\\1", WHITESPACE.sub(" ", text).strip())


def code_span(text: str) -> str:
    """Text as inline code; newlines become spaces."""
    text = WHITESPACE.sub(" ", text)
    fence = "`" * (1 + longest_backtick_run(text))
    padding = " " if text[:1] in "` " or text[-1:] == "`" else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def code_block(text: str, language: str = "text") -> str:
    """Text as a code block; the fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + longest_backtick_run(text))
    return f"{fence}{language}\n{text}\n{fence}"


def longest_backtick_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
