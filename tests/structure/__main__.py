"""The command line of this package; __init__.py lists the commands."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tests.structure
from tests.structure.banned_words import banned
from tests.structure.documents import missing
from tests.structure.imports import cycles, layer_violations
from tests.structure.sources import repeated_names
from tests.structure.table import limits, table

HERE = Path(__file__).resolve().parents[2]
FAULTS: dict[str, Callable[[Path], list[str]]] = {
    "layers": layer_violations,
    "cycles": lambda root: [", ".join(files) for files in cycles(root)],
    "names": lambda root: [f"{name}: {', '.join(paths)}" for name, paths in repeated_names(root).items()],
    "paths": missing,
}


def main(arguments: Sequence[str]) -> int:
    """Run a command; return 1 if it lists faults, 2 if the command is unknown, else 0."""
    command, paths = (arguments[0], [Path(path).resolve() for path in arguments[1:]]) if arguments else ("", [])
    root = paths[0] if paths else HERE
    if command in ("table", "limits"):
        print(table(root) if command == "table" else limits(root), end="")
        return 0
    if command == "words":
        faults = [f"{file}:{line}: {phrase}" for file, line, phrase in banned(HERE, paths or None)]
    elif command in FAULTS:
        faults = FAULTS[command](root)
    else:
        print(tests.structure.__doc__)
        return 2
    print("\n".join([*faults, f"{len(faults)} found"]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
