"""Reads the Markdown files of the project: their links and anchors, commands, and names of functions.

Read next: test_links.py, test_course.py, commands.py.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.helpers import ROOT

COURSE = ROOT / "docs" / "course"
LANGUAGES = ("en", "zh")
_FENCE = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)!?\[[^\]]*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_REFERENCE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py):([A-Za-z_][\w.]*)`")
_INLINE_COMMAND = re.compile(r"`(python [^`\n]+)`")


def markdown_files() -> list[Path]:
    """The Markdown files of the project, without those of data, results and environments."""
    skipped = {"out", "dataset", "node_modules"}
    files = [
        path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts[len(ROOT.parts) :])
    ]
    return sorted(
        path for path in files if path.relative_to(ROOT).parts[0] not in skipped or path.parent.name == "dataset"
    )


def chapters(language: str) -> list[Path]:
    return sorted((COURSE / language).glob("*.md"))


def prose(text: str) -> str:
    """Return the text without code blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Return the targets of links and pictures outside code."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text)))


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes from the headings of a file."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(path.read_text(encoding="utf-8"))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = base = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while slug in found:
            number += 1
            slug = f"{base}-{number}"
        found.add(slug)
    return found


def references(text: str) -> list[tuple[str, str]]:
    """Return (file, function or Class.method) of every name after a file and a colon, without repetition, sorted."""
    return sorted(set(_REFERENCE.findall(text)))


def defines(file: Path, name: str) -> bool:
    """Return whether a Python file defines a function, a class, or a method as Class.method."""
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def blocks(text: str) -> list[str]:
    """Return the contents of the code blocks."""
    return _FENCE.findall(text)


def commands(text: str) -> list[list[str]]:
    """Return the words of each command `python …` in the code blocks: lines end with \\ where they continue."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python "):
                found.append(shlex.split(line, comments=True))
    return found


def inline_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command between backquotes."""
    for command in _INLINE_COMMAND.findall(prose(text)):
        yield shlex.split(command)
