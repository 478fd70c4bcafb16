"""Run the project's scripts as child processes, and record which commands are complete.

    run_command(["3-full_sft.py", "--epochs", "2"])     prints `$ python 3-full_sft.py --epochs 2`, runs it
    out/demo/steps.json                                 {step: {"command", "seconds"}} of the completed commands

Imports only the standard library. Read next: ../demo.py and ../train_on.py (their steps).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.signals import Terminated

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
# Threads of GNU OpenMP then wait actively for microseconds instead of milliseconds: beside other work trainings are two
# to three times as fast, on quiet cores as fast as before (LOG.md). A variable that the user has set is kept.
ENVIRONMENT = {"GOMP_SPINCOUNT": "5000"}


def read_step_record(path: Path) -> dict[str, Any]:
    """step -> {"command", "seconds"} of the completed steps. Damaged entries are dropped."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    entries = record.items() if isinstance(record, dict) else ()
    return {name: e for name, e in entries if isinstance(e, dict) and type(e.get("seconds")) in (int, float)}


def run_command(command: list[str], results: Sequence[Path] = (), quiet: bool = False) -> float:
    """Print and run `python command…` in the project's folder; return the seconds. Exits with its code if it fails.

    quiet: what it writes to stdout is not shown. Models among `results` are removed first: a training does not replace
    a finished one. An interrupted one continues.
    """
    print("$ " + subprocess.list2cmdline(["python", *command]), flush=True)
    for path in results:
        if path.suffix == ".pth":
            path.unlink(missing_ok=True)
    started, interrupted = time.perf_counter(), None
    variables = ENVIRONMENT | dict(os.environ)
    shown = subprocess.DEVNULL if quiet else None
    child = subprocess.Popen(  # our scripts  # nosec B603
        [sys.executable, *command], cwd=PROJECT_FOLDER, env=variables, stdout=shown
    )
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt as stop:  # the child got Ctrl-C too: wait until it has saved
            interrupted = stop
            if isinstance(stop, Terminated):
                child.terminate()
    if interrupted:
        raise interrupted
    if code:  # the script has printed the reason
        sys.exit(code if code > 0 else 128 - code)
    return time.perf_counter() - started


def python_command() -> str:
    """The command that starts this Python from the project's folder: `make demo` uses one in .venv."""
    here = Path(sys.executable)
    return str(here.relative_to(PROJECT_FOLDER)) if here.is_relative_to(PROJECT_FOLDER) else "python"
