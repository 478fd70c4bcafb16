"""Banned words of the project's prose, each with the field's term to write instead.

Docstrings, comments, messages, --help, documentation and the names of functions, classes and files are checked. Of the
strings in tests only messages are checked, because the others are chats and expected output. The texts of the demo
world and the prompts of the report are data and not prose.
Read next: prose.py.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.structure.prose import STRING, documentation, parts, python_files, settings_files

# What to write instead -> pattern. Patterns ignore case; a space in a pattern matches any white space.
_WEIGHTS = r"(?:weights?|parameters?|matri(?:x|ces)|embeddings?|layers?|ones|numbers|W|router)"
BANNED = {
    "project": r"\bhouses?\b",
    "space, capacity, package": r"\brooms?\b",
    "API, socket, module": r"\bdoors?\b",
    "module docstring": r"\bplates?\b",
    "graceful": r"\b(?:im)?polite(?:ly|ness)?\b",
    "frozen": rf"\b(?:rests|rested|resting)\b|\b{_WEIGHTS} (?:themselves )?rest\b",
    "trainable, trained, updated": (
        rf"\b{_WEIGHTS} (?:that |which )?mov(?:e|es|ed)\b(?! (?:to|onto|from|between|into)\b)"
        r"|\bmov(?:e|es|ed|ing) (?:the |all )?weights\b(?! (?:to|onto|from|between|into)\b)"
        r"|\b(?:what|nothing|how many parameters) moves?\b"
    ),
    "low-rank, small": r"\bthin(?:ner|nest)?\b",
    "no process, no user, nothing": r"\bnobody(?:'s)?\b",
    "a user, a process": r"\bsomebody(?:'s)?\b",
    "the name of the actor": r"\bwhoever\b",
    "any, all": r"\bwhatever\b",
    "the name of the thing": r"\bwho (?:is|holds|comes)\b|\bwhat is (?:told|said)\b",
    "resumes, continues": r"\b(?:go|goes|going|gone|went) on\b",
    "stops": r"\bno more of it\b",
    "is a no-op for": r"\b(?:do|does|did)(?: not|n't) mind\b",
    "request": r"\btickets?\b",
    "mixture, specification": r"\bwish(?:es|ed)?\b",
    "max_num_seqs, sequences": r"(?<!--)\bseat(?:s|ed)?\b",
    "log, metric logger": r"\blog(?: )?books?\b",
    "as text": r"\bin words\b",
    "submit": r"\bhand(?:s|ed|ing)? in\b",
    "clean stop": r"\bgood order\b",
    "fix, edit": r"\bmend(?:s|ed|ing)?\b",
    "shifted by one": r"\bmov(?:e|es|ed) on by\b",
    "ok": r"\bas it should be\b",
    "unexpected": r"\bsuspicious\b",
    "随机基线": "机会线",
    "低秩矩阵": "瘦矩阵",
    "按时正常结束": "体面收尾",
}
_PATTERNS = {instead: re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE) for instead, pattern in BANNED.items()}
_ANY = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in _PATTERNS.values()), re.IGNORECASE)

# SKIPPED lists the words themselves. In DATA, strings are data; docstrings and comments are checked.
SKIPPED = ("tests/structure/banned_words.py", "tests/test_structure_checks.py")
DATA = ("demo_world/", "evaluation/prompts.py", "tests/", "corpus/demo_", "corpus/prompts.py")


def phrases(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line offset, "phrase -> what to write instead") for the banned phrases of a text, in order."""
    if not _ANY.search(text):
        return
    found = [(match.start(), f"{' '.join(match[0].split())} -> {instead}")
             for instead, pattern in _PATTERNS.items() for match in pattern.finditer(text)]  # fmt: skip
    for start, phrase in sorted(found):
        yield text.count("\n", 0, start), phrase


def banned(root: Path, paths: Sequence[Path] | None = None) -> list[tuple[str, int, str]]:
    """Every (file, line, phrase) in the project or in `paths`. A file named in `paths` is always read."""
    files = [*documentation(root), *settings_files(root), *python_files(root)]
    if paths is not None:
        files = [file for file in files if any(file.is_relative_to(path) for path in paths)]
        files += [path for path in paths if path.is_file() and path not in files]
    return [found for file in files for found in _banned_in(root, file)]


def _banned_in(root: Path, file: Path) -> list[tuple[str, int, str]]:
    found = set()
    for part in parts(root, file):
        data = part.kind == STRING and part.path.startswith(DATA)
        if not data and part.path not in SKIPPED:
            found |= {(part.path, part.line + before, phrase) for before, phrase in phrases(part.text)}
    return sorted(found)
