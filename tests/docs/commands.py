"""Runs the commands of docs/course in reading order and prints each with its seconds: `make docs-check`.

    python -m tests.docs.commands                       all chapters; about five minutes on two quiet cores
    python -m tests.docs.commands 01-tokens 06-sft      these chapters

Needs out/demo (`make demo`); deletes out/course first if all chapters run. Exits with 1 if a command fails or takes
longer than three minutes of CPU time per core.
"""

import os
import resource
import shlex
import shutil
import subprocess
import sys
import time

from tests.docs.markdown import chapters, commands
from tests.helpers import ROOT

MAX_SECONDS = 180


def run_command(command: list[str]) -> tuple[int, float, float]:
    """Run `python …` in the project's folder; return its exit code, its seconds and its seconds of CPU time."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, time.monotonic() - started, cpu_seconds


def main(names: list[str]) -> int:
    if not (ROOT / "out" / "demo" / "dpo_256.pth").exists():
        print("out/demo is missing: run `make demo` first", file=sys.stderr)
        return 2
    if not names:
        shutil.rmtree(ROOT / "out" / "course", ignore_errors=True)
    rows, failed = [], 0
    for chapter in chapters("en"):
        if names and chapter.stem not in names:
            continue
        for command in commands(chapter.read_text(encoding="utf-8")):
            print(f"\n$ {shlex.join(command)}", flush=True)
            code, seconds, cpu_seconds = run_command(command)
            # On busy cores the seconds say little, so the limit is on the CPU time, spread over the cores.
            is_slow = min(seconds, cpu_seconds / min(os.cpu_count() or 1, 2)) > MAX_SECONDS
            failed += bool(code) or is_slow
            note = f"  FAILED: exit code {code}" if code else "  FAILED: too slow" if is_slow else ""
            rows.append(f"{chapter.stem:<28} {seconds:7.1f} {cpu_seconds:7.1f}  {shlex.join(command)[:120]}{note}")
    print(f"\n{'chapter':<28} {'seconds':>7} {'CPU s':>7}  command")
    print("\n".join(rows))
    print(f"{len(rows)} commands, {failed} failed")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
