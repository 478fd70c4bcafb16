"""Virtual environments of the peers, installed from PyPI on first use and used again by later runs.

    python = peer_python(["litgpt"])          ~/.cache/mengya-benchmarks/litgpt/bin/python
    Case("litgpt", [python, "-m", "benchmarks.peer_cases.litgpt_gpt", …])

Peers run on our torch: a .pth file names a folder of links to it and to the packages that it requires. So pip does not
download another one, which on a CPU would bring gigabytes of CUDA libraries. The folder lies outside the environment,
because pip never writes there. All other packages are the environment's own. One without complete.json is installed
anew.
Read next: training.py.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_json, write_text
from common.locks import lock_output

# Name of an environment -> its packages.
REQUIREMENTS = {
    "transformers": ("transformers>=4.50,<6", "accelerate>=1.1,<2"),
    "litgpt": ("litgpt>=0.5.8,<0.6",),
}
DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mengya-benchmarks"
MARKER = "complete.json"


def peer_python(names: Sequence[str], folder: Path = DEFAULT_FOLDER) -> str:
    """Return the Python of an environment with these peers, installed if needed. Prints a line before installing.

    Raises UserError for an unknown name, and if the packages cannot be installed, as without a network.
    """
    if unknown := [name for name in names if name not in REQUIREMENTS]:
        raise UserError(f"unknown peer {unknown[0]!r}: choose from {', '.join(REQUIREMENTS)}")
    packages = [package for name in sorted(names) for package in REQUIREMENTS[name]]
    target = folder / "-".join(sorted(names))
    python = target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    content = {"packages": packages, "python": sys.version, "linked": [str(path) for path in torch_files()]}
    with lock_output(target, wait=True):
        if not _is_complete(target / MARKER, content):
            print(f"installing {', '.join(packages)} into {target}", file=sys.stderr, flush=True)
            _install(target, python, packages)
            write_json(target / MARKER, content)
    return str(python)


def torch_files() -> list[Path]:
    """Return the files and folders of torch and of the packages that it requires, in our folder of packages."""
    found: dict[str, set[Path]] = {}
    names = ["torch"]
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
        found[name] = {Path(str(package.locate_file(top))) for top in tops}
        required = [line for line in package.requires or () if "extra ==" not in line]
        names += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required]
    if not found.get("torch"):
        raise UserError("torch is not installed: pip install -r requirements.txt")
    return sorted(set().union(*found.values()))


def _is_complete(marker: Path, content: Mapping[str, object]) -> bool:
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8")) == content)
    except (OSError, ValueError):
        return False


def _install(target: Path, python: Path, packages: list[str]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(target)], "python -m venv")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    links = target.with_name(f"{target.name}-torch")
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir()
    for path in torch_files():
        (links / path.name).symlink_to(path)
    write_text(Path(_run([str(python), "-c", query], str(python)).strip()) / "torch.pth", f"{links}\n")
    constraints = target / "constraints.txt"
    write_text(constraints, f"torch=={importlib.metadata.version('torch')}\n")
    options = ["--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20", "--no-compile", "-q"]
    _run([str(python), "-m", "pip", "install", *options, "-c", str(constraints), *packages],
         f"pip install {' '.join(packages)}")  # fmt: skip


def _run(command: list[str], name: str) -> str:
    """Run a command and return its stdout. Raises UserError with the last line that reports an error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")  # nosec B603: fixed commands
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no message"]
        message = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(f"{name}: {message[:300]}: peers need PyPI; without it, leave them out (--peers none)")
    return done.stdout
