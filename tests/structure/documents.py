"""Checks names in prose: the reading path of README.md, and the files, functions and modules that prose mentions.

    <!-- reading-path -->  a list or table that names files, as `trainer/loop.py`  <!-- /reading-path -->

Prose is README*.md, dataset/README*.md, SECURITY.md, docs/, every docstring, comment and message of the project, and
the docstrings and comments of its tests. LOG.md and CHANGELOG.md are history: they use the file names of their time.

Read next: ../test_structure.py.
"""

import ast
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from tests.structure.prose import STRING, Part, documentation, parts, python_files
from tests.structure.sources import sources

START, END = "<!-- reading-path -->", "<!-- /reading-path -->"
_FILE = re.compile(r"(?<![\w./*{}<>-])((?:\.\./)*(?:[\w-]+/)*[\w-]+\.py)(?:::?([A-Za-z_][\w.]*))?(?![\w/])")
_MODULE = re.compile(r"\bpython3? -m ([\w.]+)")

# Files of other projects that prose mentions.
FOREIGN = {
    "src/categories.py": "CMMLU's subjects",
    "preprocess.py": "the cleaning of another corpus",
    "conversion_mapping.py": "transformers' names of weights",
    "launch.py": "deepspeed's launcher",
}


def reading_path(root: Path, readme: str = "README.md") -> list[str]:
    """The files between the two marks of a README, without repetition, in order. ValueError if a mark is missing."""
    text = (root / readme).read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{readme}: {START} and {END} must occur once each, in this order")
    part = text[text.index(START) : text.index(END)]
    return list(dict.fromkeys(match[1] for match in _FILE.finditer(part)))


def path_lines(root: Path, paths: list[str]) -> int:
    """The total number of lines of these files."""
    return sum(len((root / path).read_text(encoding="utf-8").splitlines()) for path in paths)


def missing(root: Path, foreign: Collection[str] = FOREIGN.keys()) -> list[str]:
    """Files, functions and modules named in prose that do not exist, as file:line: name.

    `foreign` lists files of other projects, which need not exist; unused entries of it are returned as well.
    """
    found, unused = [], set(foreign)
    for part in _prose(root):
        unused -= {match[1] for match in _FILE.finditer(part.text)}
        for name, offset in _missing_names(root, part, foreign):
            found.append(f"{part.path}:{part.line + part.text[:offset].count(chr(10))}: {name}")
    return found + [
        f"{name}: listed as a file of another project, but not mentioned in prose" for name in sorted(unused)
    ]


def _prose(root: Path) -> Iterator[Part]:
    for file in [*documentation(root), *python_files(root)]:
        for part in parts(root, file):
            expected_output = part.kind == STRING and part.path.startswith("tests/")
            if not expected_output and (".py" in part.text or "python" in part.text):
                yield part


def _missing_names(root: Path, part: Part, foreign: Collection[str]) -> Iterator[tuple[str, int]]:
    for match in _FILE.finditer(part.text):
        file = _find(root, part.path, match[1])
        name = (match[2] or "").rstrip(".")
        if match[1] not in foreign and (file is None or (name and not _defines(file, name))):
            yield match[0], match.start()
    for match in _MODULE.finditer(part.text):
        module = match[1].rstrip(".")
        ours = module.split(".")[0] == "tests" or module.split(".")[0] in _packages(root)
        file = root / Path(*module.split("."))
        if ours and not (file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()):
            yield match[0], match.start()


def _find(root: Path, path: str, name: str) -> Path | None:
    """The file `name`, relative to the root or to the folder of `path`; None if it does not exist."""
    for file in (root / name, (root / path).parent / name):
        if file.is_file():
            return file
    return None


def _packages(root: Path) -> set[str]:
    return {source.split("/")[0] for source in sources(root) if "/" in source}


@cache
def _names(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree)
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}  # fmt: skip
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return frozenset(defined | stored)


def _defines(file: Path, name: str) -> bool:
    return all(part in _names(file) for part in name.split("."))
