"""Atomic writes, replacement and removal of files and folders. Only this module renames files.

    with atomic_write("out/model.pth") as file:     a temporary file, renamed if the block ends without an exception
        torch.save(content, file)
    write_text, write_json                          atomic_write of a text or a JSON value
    replace_file, replace_folder                    rename a finished file or folder over an older one
    remove(path)                                    renames a folder first, so a kill leaves no partial folder

Temporary names: `.NAME.PID.tmp` (being written), `.NAME.PID.old` (replaced) and `.NAME.PID.gone` (being removed). A
killed process may leave one. The next `atomic_write` of a file removes the `.tmp` files of processes that have ended.
`remove_leftovers` removes all temporary files of a name and restores a folder if the process was killed between the two
renames of `replace_folder`. Call it only while holding the lock of the name.

Read next: locks.py (one writer at a time), errors.py (how a failed write is reported).
"""

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

PathLike = str | os.PathLike[str]
WRITE_ADVICE = "free some space or choose another path"


@contextlib.contextmanager
def atomic_write(path: PathLike, advice: str = WRITE_ADVICE) -> Iterator[BinaryIO]:
    """A binary file that is renamed to `path` after the block; after an exception `path` is unchanged.

    Creates the folder if needed and syncs the file to disk. Raises UserError, ending in `advice`, if writing fails.
    """
    path = Path(path)
    temporary = temporary_path(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(path)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise write_error(path, error, advice) from error
        raise


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8 text atomically. Raises UserError if writing fails.

    Lone surrogates, which Python uses for file names that are not UTF-8, are written as \\udc80, a valid JSON escape.
    """
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: PathLike, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file atomically, with a final newline. Raises UserError if writing fails."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


def replace_file(finished_path: PathLike, target: PathLike) -> None:
    """Rename `finished_path`, on the same file system, to `target`. Raises OSError."""
    Path(finished_path).replace(target)


def replace_folder(finished_path: PathLike, target: PathLike) -> None:
    """Rename the folder `finished_path` to `target`. An older `target` is renamed first and removed afterwards."""
    finished_path, target = Path(finished_path), Path(target)
    replaced_path = temporary_path(target, "old")
    remove(replaced_path)
    if target.exists():
        target.rename(replaced_path)
    finished_path.rename(target)
    remove(replaced_path)


def remove(path: PathLike) -> None:
    """Remove a file or folder if it exists. A folder is renamed first, so `path` never names a partial folder."""
    path = Path(path)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        removed_path = path if is_temporary(path) else temporary_path(path, "gone")
        if removed_path != path:
            shutil.rmtree(removed_path, ignore_errors=True)
            path.rename(removed_path)
        shutil.rmtree(removed_path, ignore_errors=True)


def remove_leftovers(path: PathLike) -> None:
    """Remove the temporary files and folders of `path` that a killed process left; `path` may contain `*`.

    A replaced folder (`.old`) is renamed back if `path` does not exist: the process was killed between two renames.
    """
    path = Path(path)
    if not path.parent.is_dir():
        return
    for entry in sorted(path.parent.glob(f".{path.name}.*")):
        if not is_temporary(entry):
            continue
        name = entry.with_name(re.sub(r"\.\d+\.\w+$", "", entry.name[1:]))
        if entry.suffix == ".old" and not name.exists():
            entry.rename(name)
        else:
            remove(entry)


def _remove_stale_temporaries(path: Path) -> None:
    """Remove the `.tmp` files of `path` whose process on this machine has ended."""
    if os.name == "nt":  # os.kill(pid, 0) would end the process
        return
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_temporary(entry) and not _is_running(int(entry.name.split(".")[-2])):
            with contextlib.suppress(OSError):
                entry.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        pass
    return True


def find_replaced_folder(path: PathLike) -> Path | None:
    """The replaced folder of `path` if a process was killed between the two renames of `replace_folder`, else None."""
    path = Path(path)
    candidates = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old")) if not path.exists() else []
    return next((entry for entry in candidates if is_temporary(entry)), None)


def check_writable(folder: PathLike) -> None:
    """Raises UserError if an output folder cannot be created or written to. Creates nothing; meant for early checks."""
    existing_folder = Path(folder)
    try:
        while not existing_folder.is_dir():
            if existing_folder.is_symlink() or existing_folder.exists():
                kind = "a broken link" if existing_folder.is_symlink() else "a file"
                raise UserError(f"cannot write {folder}: {existing_folder} is {kind}: choose another folder")
            existing_folder = existing_folder.parent
        with tempfile.TemporaryFile(dir=existing_folder) as file:
            file.write(b"1")
    except OSError as error:
        error.filename = str(folder)  # instead of the temporary file
        raise write_error(folder, error) from None


def temporary_path(path: Path, suffix: str) -> Path:
    """`.NAME.PID.suffix` in the folder of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def is_temporary(path: Path) -> bool:
    return re.fullmatch(r"\..+\.\d+\.(tmp|old|gone)", path.name) is not None


def write_error(path: PathLike, error: OSError, advice: str = WRITE_ADVICE) -> UserError:
    """The UserError for a failed write."""
    return UserError(f"cannot write {error.filename or path}: {error.strerror or error}: {advice}")


@contextlib.contextmanager
def report_write_errors(path: PathLike) -> Iterator[None]:
    """Context manager that turns an OSError (disk full, no permission) into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error
