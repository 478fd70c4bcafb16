"""Imports between the files of a checkout: layers, cycles, and the import closures of scripts.

Read next: table.py, ../test_structure.py.
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.structure.sources import APPLICATIONS, CORE, SCRIPTS, SIDEWAYS, Source, sources


@dataclass(frozen=True)
class Import:
    """An import of one project file by another. `lazy`: inside a function."""

    source: str
    target: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Size:
    files: int
    lines: int
    classes: int


@cache
def imports(root: Path) -> tuple[Import, ...]:
    """Every import between project files, including lazy ones, TYPE_CHECKING blocks and import_module("a.b").

    The __init__.py of a package counts if it contains code, because Python runs it first.
    """
    found = []
    for source in sources(root).values():
        for node, lazy in _walk(source.tree, False):
            for module in _imported_modules(node, source.path):
                for target in _files_of(root, module):
                    if target != source.path:
                        found.append(Import(source.path, target, getattr(node, "lineno", 0), lazy))
    return tuple(dict.fromkeys(found))


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node of a tree, and whether it is inside a function."""
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from _walk(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def _imported_modules(node: ast.AST, path: str) -> Iterator[str]:
    """The dotted names that a statement may import: `from a import b` gives a.b, which is a module or a name in a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = path.split("/")[: -node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{module}.{alias.name}" if module else alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def _files_of(root: Path, module: str) -> list[str]:
    """The project files that an import of `module` runs; [] for a foreign package."""
    files = sources(root)
    parts = module.split(".")
    found: list[str] = []
    for length in range(1, len(parts) + 1):
        stem = "/".join(parts[:length])
        if f"{stem}.py" in files:
            return [*found, f"{stem}.py"]
        if _has_code(files.get(f"{stem}/__init__.py")):
            found.append(f"{stem}/__init__.py")
    return found


def _has_code(source: Source | None) -> bool:
    return source is not None and any(not isinstance(node, ast.Expr) for node in source.tree.body)


def layer_violations(root: Path, sideways: Mapping[str, Iterable[str]] = SIDEWAYS) -> list[str]:
    """Imports that go up, sideways between applications (except `sideways`), or to a script."""
    allowed = {name: set(CORE[: i + 1]) for i, name in enumerate(CORE)}
    allowed |= {name: {*CORE, name, *sideways.get(name, ())} for name in APPLICATIONS}
    allowed[SCRIPTS] = {*CORE, *APPLICATIONS}
    files = sources(root)
    unknown = sorted({source.package for source in files.values()} - allowed.keys())
    found = [f"{package}/ is not a package of the layout" for package in unknown]
    for one in imports(root):
        source, target = files[one.source].package, files[one.target].package
        if source in allowed and target not in allowed[source]:
            found.append(f"{one.source}:{one.line} imports {one.target}")
    return found


def unused_sideways(root: Path, sideways: Mapping[str, Iterable[str]] = SIDEWAYS) -> list[str]:
    """Entries of `sideways` that no file uses."""
    files = sources(root)
    used = {(files[one.source].package, files[one.target].package) for one in imports(root)}
    return [f"{name} -> {other}" for name in sideways for other in sorted(sideways[name]) if (name, other) not in used]


def cycles(root: Path) -> list[list[str]]:
    """The strongly connected components of the import graph with at least two files."""
    reached = {path: _reached([path], lambda path: targets(root, path)) for path in sources(root)}
    components = {tuple(sorted(other for other in reached[path] if path in reached[other])) for path in reached}
    return [list(component) for component in sorted(components) if len(component) > 1]


@cache
def targets(root: Path, path: str, lazy: bool = True) -> frozenset[str]:
    """The project files that a file imports; with `lazy`, also inside functions."""
    return frozenset(one.target for one in imports(root) if one.source == path and (lazy or not one.lazy))


def _reached(start: Iterable[str], follow: Callable[[str], Iterable[str]]) -> set[str]:
    reached, todo = set(start), list(start)
    while todo:
        new = set(follow(todo.pop())) - reached
        reached |= new
        todo.extend(new)
    return reached


def closure(root: Path, script: str, lazy: bool = False) -> set[str]:
    """The files that a script imports directly or indirectly, and the script itself.

    Imports at module level and in TYPE_CHECKING blocks count; with `lazy`, imports inside functions (optional branches)
    count too.
    """
    return _reached([script], lambda path: targets(root, path, lazy))


def lazy_imports(root: Path) -> set[str]:
    """The imports of project files inside functions, as "importing file: imported file"."""
    return {f"{one.source}: {one.target}" for one in imports(root) if one.lazy}


def size(root: Path, paths: Iterable[str]) -> Size:
    chosen = [sources(root)[path] for path in paths]
    return Size(len(chosen), sum(one.lines for one in chosen), sum(one.classes for one in chosen))
