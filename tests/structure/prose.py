"""The prose of a checkout: documentation files, and docstrings, comments, messages and names of Python files.

Read next: banned_words.py, documents.py.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.structure.sources import files_of_tests, sources

# LOG.md and CHANGELOG.md are history.
DOCUMENTATION = (
    *("README*.md", "SECURITY.md", "dataset/README*.md"),
    *("docs/**/*.md", "benchmarks/**/*.md", "recipes/**/*.md"),
)
SETTINGS = ("Makefile", ".ci/run", "pyproject.toml", "requirements*.txt", "launch/*", "recipes/**/*", "serving/*.json")

# Kinds of parts. MESSAGE is a string of help=, raise, print() or assert; NAME is a file's, function's or class's.
DOCUMENT, DOCSTRING, COMMENT, MESSAGE, STRING, NAME = "document", "docstring", "comment", "message", "string", "name"
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*', re.DOTALL
)


@dataclass(frozen=True)
class Part:
    """A text of a file: its path from the root, its first line and its kind."""

    path: str
    line: int
    text: str
    kind: str


def documentation(root: Path) -> list[Path]:
    """The Markdown files that describe the current project."""
    return [file for pattern in DOCUMENTATION for file in sorted(root.glob(pattern))]


def settings_files(root: Path) -> list[Path]:
    """Files other than Python and Markdown that contain comments or messages."""
    found = [file for pattern in SETTINGS for file in sorted(root.glob(pattern)) if file.is_file()]
    return [file for file in found if file.suffix not in (".py", ".md")]


def python_files(root: Path) -> list[Path]:
    """Scripts, packages, benchmarks, exercises of the course and tests."""
    beside = [*sorted(root.glob("benchmarks/**/*.py")), *sorted(root.glob("docs/**/*.py"))]
    return [*(root / path for path in sources(root)), *beside, *files_of_tests(root)]


@cache
def parts(root: Path, file: Path) -> tuple[Part, ...]:
    """The prose of a file: docstrings, comments, strings and names of a Python file, else the whole text.

    Strings without a space are keys and not prose, unless they are Chinese. Values in an f-string become {}.
    """
    path = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return (Part(path, 1, text, DOCUMENT),)
    tree = sources(root)[path].tree if path in sources(root) else ast.parse(text)
    nodes = list(ast.walk(tree))
    found = [*_strings(nodes), *_comments(text), (1, _words(file.stem), NAME)]
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append((node.lineno, _words(node.name), NAME))
    return tuple(Part(path, *one) for one in found)


def _strings(nodes: list[ast.AST]) -> Iterator[tuple[int, str, str]]:
    documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    messages = {id(part) for node in nodes for start in _messages(node) for part in ast.walk(start)}
    joined = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in joined:
            text = node.value
        else:
            continue
        if id(node) in documented:
            yield node.lineno, text, DOCSTRING
        elif " " in text or any(character > "\u2e80" for character in text):
            yield node.lineno, text, MESSAGE if id(node) in messages else STRING


def _messages(node: ast.AST) -> list[ast.expr]:
    """The expressions of a statement or call whose text a user reads."""
    if isinstance(node, ast.keyword) and node.arg == "help":
        return [node.value]
    if isinstance(node, ast.Raise) and node.exc is not None:
        return [node.exc]
    if isinstance(node, ast.Assert) and node.msg is not None:
        return [node.msg]
    return node.args if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" else []


def _comments(text: str) -> Iterator[tuple[int, str, str]]:
    """Every comment; full-line comments on consecutive lines are joined into one text."""
    lines: list[str] = []
    start = last = at = 0
    number = 1
    for match in _STRING_OR_COMMENT.finditer(text):
        if not match[0].startswith("#"):
            continue
        number, at = number + text.count("\n", at, match.start()), match.start()
        alone = not text[text.rfind("\n", 0, at) + 1 : at].strip()
        if lines and not (alone and number == last + 1):
            yield start, "\n".join(lines), COMMENT
            lines = []
        start = start if lines else number
        lines.append(match[0].lstrip("#").strip())
        last = number
    if lines:
        yield start, "\n".join(lines), COMMENT


def _words(name: str) -> str:
    """Split a name into words: TrainState becomes "Train State"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").strip()
