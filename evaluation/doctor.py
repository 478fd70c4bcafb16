"""Checks the machine, the libraries, the data folders and the checkpoints; every finding has its fix. Changes nothing.

    make doctor                               this project's folder
    python -m evaluation.doctor --out_dir out/demo

    ok     machine      2 cores, 15.6 GB of memory, 9.1 GB free; Python 3.11.7
    note   libraries    gguf, peft are not installed (export): pip install .[export]
    error  libraries    torch 2.7.0 is outside torch>=2.9,<=2.13.0: pip install "torch>=2.9,<=2.13.0"

error: `make demo` cannot run, the exit code is 2. note: something else is missing, damaged or slow.
The checks of machine and libraries need the standard library only.
Read next: ../common/packages.py (the optional packages), ../model/checkpoint.py, ../corpus/dataset_meta.py.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import Config, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from common.flag_types import path_string
from common.packages import OPTIONAL, OTHERS

ROOT = Path(__file__).resolve().parent.parent
DEMO_MEMORY, DEMO_DISK = 1.5e9, 0.5e9  # bytes that `make demo` needs, with a reserve: it writes 0.13 GB
EXTRAS = {  # extra of pyproject.toml -> import names
    "data": ("pyarrow", "ftfy", "opencc", "lingua", "rensa", "datatrove"),
    "export": ("gguf", "peft"),
    "serve": ("fastapi", "uvicorn", "openai"),
    "web": ("streamlit",),
}
DATA_FOLDERS = {  # folder -> (kind in its meta.json, command that writes it)
    "pretrain": ("pretrain", "python data_process.py pretrain FILES…"),
    "sft": ("messages", "python data_process.py sft FILES…"),
    "dpo": ("messages", "python data_process.py dpo FILES…"),
    "rl": ("prompts", "python data_process.py rl FILES…"),
}
GPU_ADVICE = "choose the command for your driver at https://pytorch.org/get-started/locally"
AGAIN = "copy it again or train it again"


@dataclass(frozen=True)
class DoctorConfig(Config):
    """What is checked besides the machine and the libraries."""

    out_dir: str = flag("out", "folder whose checkpoints are checked", type=path_string)
    data_dir: str = flag("dataset", "folder with pretrain/, sft/, dpo/ and rl/", type=path_string)
    tokenizer: str = flag("model/tokenizer", "folder of the tokenizer", type=path_string)


@dataclass(frozen=True)
class Finding:
    """level: ok, note or error, as in the module docstring. fix: what to do; "" for ok."""

    level: str
    part: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:5}  {self.part:11}  {self.text}{f': {self.fix}' if self.fix else ''}"


def diagnose(config: DoctorConfig) -> Iterator[Finding]:
    """Yield the findings in the order in which they should be fixed."""
    yield from check_machine(config.out_dir)
    yield from check_core_packages()
    yield from check_optional_packages()
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("numpy") is None:
        return  # the other checks read tensors and tokens
    yield from check_device()
    yield from check_data_folders(config)
    out_dir = Path(config.out_dir)
    folders = [out_dir, *sorted({path.parent for path in out_dir.glob("*/*.pth")})]
    for folder in folders:
        if folder != out_dir or len(folders) == 1 or any(out_dir.glob("*.pth")):
            yield from check_checkpoints(folder)


# ---- machine ---------------------------------------------------------------------------------------------------------
def memory_bytes() -> tuple[float, float]:
    """Return (all, available) bytes of main memory; infinity where the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, LookupError):
        return float("inf"), float("inf")


def check_machine(out_dir: str) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, available = memory_bytes()
    memory = f", {total / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB free" if total < float("inf") else ""
    yield Finding("ok", "machine", f"{cores} cores{memory}; Python {version}")
    if available < DEMO_MEMORY:
        text = f"{available / 1e9:.1f} GB of memory are free, make demo needs {DEMO_MEMORY / 1e9:.1f}"
        yield Finding("error", "machine", text, "end other programs")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 1.5 * cores:
        text = f"other programs use the cores (load average {load:.1f}), so training takes longer"
        yield Finding("note", "machine", text, "end them, or wait")
    if sys.prefix == sys.base_prefix:
        yield Finding("note", "machine", "no virtual environment is active", "python -m venv .venv (make demo has one)")
    yield from check_disk(Path(out_dir))


def check_disk(folder: Path) -> Iterator[Finding]:
    try:
        check_writable(folder)
    except (UserError, OSError) as error:
        reason = str(error) if isinstance(error, UserError) else f"cannot write {folder}: {error.strerror}"
        yield Finding("error", "disk", reason, "give another --out_dir")
        return
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.1f} GB are free in {folder}"
    if free < DEMO_DISK:
        yield Finding("error", "disk", f"{text}, make demo needs {DEMO_DISK / 1e9:.1f}", "free some space")
    else:
        yield Finding("ok", "disk", text)


def check_device() -> Iterator[Finding]:
    """Yield the device that training takes, its dtype, and why a GPU is not used."""
    import torch

    from common.device import pick_device, pick_dtype

    device = pick_device()
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    yield Finding("ok", "device", f"{device} ({name}), matrix products in {dtype}")
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch does not see it"
        yield Finding("note", "device", f"an NVIDIA driver is installed, but {reason}", GPU_ADVICE)
    if limit := os.environ.get("OMP_NUM_THREADS") if device.type == "cpu" else None:
        text = f"OMP_NUM_THREADS={limit} limits the threads"
        yield Finding("note", "device", text, "unset OMP_NUM_THREADS to use all cores")


# ---- libraries -------------------------------------------------------------------------------------------------------
def core_requirements() -> list[str]:
    """Return the lines of requirements.txt, or those of the installed package where the file is missing."""
    if (ROOT / "requirements.txt").is_file():
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if re.match(r"\w", line)]
    return [line for line in importlib.metadata.requires("mengya") or [] if "extra ==" not in line]


def installed_version(requirement: str) -> str | None:
    name = re.match(r"[\w.-]+", requirement)
    try:
        return importlib.metadata.version(name[0]) if name else None
    except importlib.metadata.PackageNotFoundError:
        return None


def is_in_range(version: str, requirement: str) -> bool:
    """Whether a version is within the range of a requirement; True without the package `packaging`."""
    if importlib.util.find_spec("packaging") is None:
        return True
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def check_core_packages() -> Iterator[Finding]:
    versions = {line: installed_version(line) for line in core_requirements()}
    if lacking := [line for line, version in versions.items() if version is None]:
        names = ", ".join(re.split("[<>=]", line)[0] for line in lacking)
        yield Finding("error", "libraries", f"not installed: {names}", "python -m pip install -r requirements.txt")
    wrong = [line for line, version in versions.items() if version and not is_in_range(version, line)]
    for line in wrong:
        text = f"{re.split('[<>=]', line)[0]} {versions[line]} is outside the tested range"
        yield Finding("note", "libraries", text, f'python -m pip install "{line}"')
    good = len(versions) - len(lacking) - len(wrong)
    yield Finding("ok", "libraries", f"{good} of {len(versions)} core packages are installed in their tested ranges")


def check_optional_packages() -> Iterator[Finding]:
    for extra, names in EXTRAS.items():
        if lacking := [name for name in names if importlib.util.find_spec(name) is None]:
            text = f"for {extra} not installed: {', '.join(lacking)}"
            yield Finding("note", "libraries", text, f'python -m pip install ".[{extra}]"')
    for name, requirement in (OPTIONAL | OTHERS).items():
        version = installed_version(requirement)
        if version and not is_in_range(version, requirement):
            text = f"{name} {version} is outside the tested range"
            yield Finding("note", "libraries", text, f'python -m pip install "{requirement}"')


# ---- data and checkpoints --------------------------------------------------------------------------------------------
def check_data_folders(config: DoctorConfig) -> Iterator[Finding]:
    """Yield what the data folders hold. make demo makes its own data, so nothing here is an error."""
    from model.tokenizer import load_tokenizer

    tokenizer = ""
    try:
        tokenizer = load_tokenizer(config.tokenizer).fingerprint
        yield Finding("ok", "data", f"{config.tokenizer} is a tokenizer")
    except UserError as error:
        yield Finding("note", "data", str(error))
    for name, (kind, command) in DATA_FOLDERS.items():
        yield examine_data_folder(Path(config.data_dir) / name, kind, command, tokenizer)


def examine_data_folder(folder: Path, kind: str, command: str, tokenizer: str) -> Finding:
    from corpus.dataset_meta import read_checked_meta
    from corpus.shard_reader import open_split

    try:
        meta = read_checked_meta(folder)
        if meta is None:
            return Finding("note", "data", f"{folder} is not there yet", command)
        if meta.get("kind") != kind:
            return Finding("note", "data", f"{folder} holds {meta.get('kind')} data, not {kind}", command)
        if kind == "pretrain":
            tokens = sum(open_split(folder, split).tokens for split in meta["splits"])
            if tokenizer and meta["tokenizer"] != tokenizer:
                return Finding("note", "data", f"{folder} was made with another tokenizer", command)
            return Finding("ok", "data", f"{folder}: {tokens:,} tokens")
        for name, (size, _) in meta.get("checksums", {}).items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                return Finding("note", "data", f"{folder / name} is missing or incomplete", command)
        return Finding("ok", "data", f"{folder}: {sum(meta['rows'].values()):,} rows")
    except (UserError, OSError, LookupError, TypeError, ValueError) as error:
        return Finding("note", "data", f"{folder} cannot be read ({error})", command)


def check_checkpoints(out_dir: Path) -> Iterator[Finding]:
    """Yield the state of every .pth in a folder: its checksums, its stage, and whether an adapter has its parent."""
    from model.checkpoint import STAGE_SCRIPTS, trained_stages

    paths = sorted(out_dir.glob("*.pth"))
    for path in paths:
        yield check_checkpoint_file(path)
    for resume in sorted(out_dir.glob("*.resume")):
        script = STAGE_SCRIPTS.get(resume.name.rsplit("_", 1)[0], "the same script")
        yield Finding("note", "checkpoints", f"{resume} is an interrupted run", f"python {script} resumes it")
    if stages := trained_stages(out_dir):
        yield Finding("ok", "checkpoints", f"stages in {out_dir}: {' → '.join(stages)}")
    elif not paths:
        yield Finding("note", "checkpoints", f"no model in {out_dir} yet", "make demo, or python 1-pretrain.py")


def check_checkpoint_file(path: Path) -> Finding:
    from export.hf_import import open_folder
    from model.checkpoint import open_adapter, read_checkpoint

    try:
        checkpoint = read_checkpoint(path)
        adapter = checkpoint.get("adapter")
        if adapter:
            open_adapter(path, adapter, checkpoint["model"], open_folder=open_folder)
    except UserError as error:
        return Finding("note", "checkpoints", str(error))
    history = [str(entry.get("stage", "?")) for entry in checkpoint["lineage"]]
    parent = f", an adapter for {Path(adapter['parent']).name}" if adapter else ""
    return Finding("ok", "checkpoints", f"{path}: {checkpoint['stage']}{parent}, trained by {' → '.join(history)}")


def main() -> None:
    findings = []
    for finding in diagnose(parse(DoctorConfig, __doc__)):
        print(finding, flush=True)
        findings.append(finding.level)
    if errors := findings.count("error"):
        raise UserError(f"make demo cannot run: fix what begins with error above ({errors})")
    print(f"make demo can run (notes: {findings.count('note')})")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
