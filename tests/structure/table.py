"""Prints the numbers of a checkout: the Markdown table for LOG.md and the limits of ../test_structure.py."""

from collections.abc import Sequence
from pathlib import Path

from tests.structure.imports import closure, cycles, lazy_imports, size
from tests.structure.sources import (
    APPLICATIONS,
    CORE,
    LESSONS,
    SCRIPTS,
    Source,
    argparse_importers,
    files_of_tests,
    long_files,
    long_functions,
    namespace_users,
    part_lines,
    public_names,
    repeated_names,
    sources,
)


def table(root: Path) -> str:
    """The Markdown table for LOG.md: packages, import closures of the lessons, cycles, repeated names."""
    return "\n\n".join([_packages(root), _closures(root), _cycles(root), _repeated(root)]) + "\n"


def _packages(root: Path) -> str:
    rows = ["| package | files | lines | public names |", "|---|---|---|---|"]
    by_package: dict[str, list[Source]] = {}
    for source in sources(root).values():
        by_package.setdefault(source.package, []).append(source)
    order = [*CORE, *APPLICATIONS, SCRIPTS]
    for package in sorted(by_package, key=lambda name: (order.index(name) if name in order else len(order), name)):
        rows.append(_package_row(f"{package}/" if package != SCRIPTS else SCRIPTS, by_package[package]))
    rows.append(_package_row("together", list(sources(root).values())))
    files = files_of_tests(root)
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return "\n".join([*rows, f"| tests/ | {len(files)} | {lines:,} | |"])


def _package_row(name: str, files: Sequence[Source]) -> str:
    names = sum(len(public_names(source)) for source in files)
    return f"| {name} | {len(files)} | {sum(source.lines for source in files):,} | {names:,} |"


def _closures(root: Path) -> str:
    rows = [
        "| import closure: files / lines / classes | optional branches left out | all imports |",
        "|---|---|---|",
    ]
    for script in LESSONS:
        if script in sources(root):
            both = [size(root, closure(root, script, lazy)) for lazy in (False, True)]
            shown = [f"{one.files} / {one.lines:,} / {one.classes}" for one in both]
            rows.append(f"| `{script}` | {' | '.join(shown)} |")
    return "\n".join(rows)


def _cycles(root: Path) -> str:
    found = cycles(root)
    return "\n".join([f"Import cycles: {len(found) or 'none'}", *(f"* {', '.join(files)}" for files in found)])


def _repeated(root: Path) -> str:
    found = repeated_names(root)
    constants = sum(name.isupper() for name in found)
    title = f"Public names defined more than once: {len(found) or 'none'}"
    title += f", {constants} of them constants" if found else ""
    return "\n".join([title, *(f"* `{name}`: {', '.join(paths)}" for name, paths in found.items())])


def limits(root: Path) -> str:
    """Today's numbers as Python tables to paste into ../test_structure.py."""
    rows = ["BUDGET = {"]
    for script in LESSONS:
        if script in sources(root):
            one = size(root, closure(root, script))
            rows.append(f'    "{script}": Size({one.files}, {one.lines}, {one.classes}),')
    rows.append("}")
    rows.append(f"PART_LINES = {part_lines(root)}".replace("'", '"'))
    for name, paths in (
        ("ARGPARSE", argparse_importers(root)),
        ("NAMESPACE", namespace_users(root)),
        ("LAZY_IMPORTS", lazy_imports(root)),
    ):
        rows += [f"{name} = {{", *(f'    "{path}",' for path in sorted(paths)), "}"]
    for name, numbers in (("LONG_FILES", long_files(root, 320)), ("LONG_FUNCTIONS", long_functions(root, 65))):
        rows += [f"{name} = {{", *(f'    "{key}": {number},' for key, number in sorted(numbers.items())), "}"]
    return "\n".join(rows) + "\n"
