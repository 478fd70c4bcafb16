"""The source files of a checkout, and facts from their syntax trees: names, sizes, use of argparse.

Files are named by their path from the root, as trainer/loop.py. Read next: imports.py.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CORE = ("common", "model", "corpus", "trainer")  # from the lowest layer up
APPLICATIONS = ("evaluation", "export", "serving", "curation", "demo_world", "experiments")  # the layer above the core
# Application -> the other applications that it may import. An unused entry is a fault too.
SIDEWAYS = {
    "serving": {"evaluation", "export"},
    "demo_world": {"evaluation"},
    "experiments": {"evaluation"},
    "curation": {"evaluation", "export"},
    "evaluation": {"export"},
}
LESSONS = ("1-pretrain.py", "2-eval.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py", "6-grpo_train.py")
CORE_SCRIPTS = ("train_tokenizer.py", "data_process.py", *LESSONS)
SCRIPTS = "scripts"  # name of the layer that holds the files at the root
OUTSIDE = ("tests", "benchmarks", "docs")  # folders with Python files outside all layers


@dataclass(frozen=True)
class Source:
    """A parsed file: its path from the root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.path.split("/")[0] if "/" in self.path else SCRIPTS

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def classes(self) -> int:
        return sum(isinstance(node, ast.ClassDef) for node in ast.walk(self.tree))


@cache
def sources(root: Path) -> Mapping[str, Source]:
    """path -> Source of the scripts at the root and the files of all packages, without the folders in OUTSIDE."""
    names = {init.parent.name for init in root.glob("*/__init__.py")} | {*CORE, *APPLICATIONS}
    packages = [root / name for name in sorted(names - {*OUTSIDE}) if not name.startswith(".")]
    files = [*sorted(root.glob("*.py")), *(file for package in packages for file in sorted(package.rglob("*.py")))]
    return {file.relative_to(root).as_posix(): _read(root, file) for file in files}


def _read(root: Path, file: Path) -> Source:
    text = file.read_text(encoding="utf-8")
    return Source(file.relative_to(root).as_posix(), text, ast.parse(text, str(file)))


def files_of_tests(root: Path) -> list[Path]:
    return sorted((root / "tests").rglob("*.py"))


def public_names(source: Source) -> list[str]:
    """Classes, functions and constants at module level without a leading underscore, without repetition."""
    return list(dict.fromkeys(name for name in _defined(source.tree.body) if not name.startswith("_")))


def _defined(body: Iterable[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name)
                            and isinstance(part.ctx, ast.Store))  # fmt: skip
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _defined(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
            for handler in getattr(node, "handlers", ()):
                yield from _defined(handler.body)


def repeated_names(root: Path) -> dict[str, list[str]]:
    """name -> files, for public names that several files define. Tests do not count."""
    where: dict[str, list[str]] = {}
    for source in sources(root).values():
        for name in public_names(source):
            where.setdefault(name, []).append(source.path)
    return {name: paths for name, paths in sorted(where.items()) if len(paths) > 1}


def argparse_importers(root: Path) -> set[str]:
    """Files that import argparse, at module level or in a function."""
    return {source.path for source in sources(root).values() if _imports_argparse(source)}


def _imports_argparse(source: Source) -> bool:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import) and any(alias.name == "argparse" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "argparse":
            return True
    return False


def namespace_users(root: Path) -> set[str]:
    """Files that use argparse.Namespace, also in a quoted annotation."""
    return {source.path for source in sources(root).values() if _names_namespace(source)}


def _names_namespace(source: Source) -> bool:
    prose = {id(node) for node in docstrings(source.tree)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr == "Namespace" and getattr(node.value, "id", "") == "argparse":
            return True
        names = node.names if isinstance(node, ast.ImportFrom) and node.module == "argparse" else []
        if any(alias.name == "Namespace" for alias in names):
            return True
        quoted = isinstance(node, ast.Constant) and isinstance(node.value, str) and "argparse.Namespace" in node.value
        if quoted and id(node) not in prose:
            return True
    return False


def docstrings(tree: ast.Module) -> list[ast.Constant]:
    """The docstrings of a module, its classes, functions and fields."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]  # fmt: skip


def part_lines(root: Path) -> dict[str, int]:
    """Lines of the core and of the applications, each with its scripts. Data files do not count."""
    lines = {"core": 0, "applications": 0}
    for source in sources(root).values():
        is_core = source.package in CORE or source.path in CORE_SCRIPTS
        lines["core" if is_core else "applications"] += source.lines
    return lines


def long_files(root: Path, limit: int) -> dict[str, int]:
    """path -> number of lines, for files with more than `limit` lines."""
    return {source.path: source.lines for source in sources(root).values() if source.lines > limit}


def long_functions(root: Path, limit: int) -> dict[str, int]:
    """file:function -> number of lines from `def` to the end, for functions with more than `limit` lines."""
    found: dict[str, int] = {}
    for source in sources(root).values():
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > limit:
                    key = f"{source.path}:{node.name}"
                    found[key] = max(length, found.get(key, 0))
    return found
