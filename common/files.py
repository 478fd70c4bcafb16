"""Writing files and folders whole or not at all. No other file of this project renames anything.

    with atomic_write("out/model.pth") as file:     a temporary file, renamed when the block ends without an error
        torch.save(content, file)
    write_text, write_json                          the same for one small text
    replace_file, replace_folder                    a finished file or folder takes the place of an older one
    remove(path)                                    renamed first: after a kill nothing half removed has the name

Temporary names are `.NAME.PID.tmp` (being written), `.NAME.PID.old` (replaced) and `.NAME.PID.gone` (being removed). A
kill may leave one. The next `atomic_write` of a file removes the `.tmp` of processes that have ended.
`remove_leftovers` removes all leftovers of a name and gives back a folder that was set aside when the kill came between
two renames: call it only while the name is locked.

Read next: locks.py (one writer at a time), errors.py (what the user sees when writing fails).
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
WRITE_ADVICE = "free some space or choose another place"


@contextlib.contextmanager
def atomic_write(path: PathLike, advice: str = WRITE_ADVICE) -> Iterator[BinaryIO]:
    """A binary file that is on the disk under the name `path` after the block, or, after an error, not at all.

    The folder is made if it is missing. Raises UserError, ending in `advice`, where the file cannot be written.
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
    """Write UTF-8 text with line feeds. Raises UserError where that cannot be done.

    A file name that is not UTF-8 holds lone surrogates in Python; they are written as \\udc80, which JSON reads back.
    """
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: PathLike, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file that ends with a line feed. Raises UserError where that cannot be done."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


def replace_file(finished_path: PathLike, target: PathLike) -> None:
    """Rename the finished file `new`, which is on the same disk, to `target`. Raises OSError."""
    Path(finished_path).replace(target)


def replace_folder(finished_path: PathLike, target: PathLike) -> None:
    """Rename the finished folder `new` to `target`; an older `target` is set aside first and removed afterwards."""
    finished_path, target = Path(finished_path), Path(target)
    replaced_path = temporary_path(target, "old")
    remove(replaced_path)
    if target.exists():
        target.rename(replaced_path)
    finished_path.rename(target)
    remove(replaced_path)


def remove(path: PathLike) -> None:
    """Remove a file or a folder if it is there. A folder is renamed first, so that its name never holds half of it."""
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
    """Remove what a killed process left beside `path` under temporary names; `path` may hold `*`.

    A folder that was set aside is given its name back if nothing has that name: the kill came between two renames.
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
    """Remove what killed processes of this machine left of `path` in `atomic_write`."""
    if os.name == "nt":  # os.kill would end the process there
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
    """The older folder of this name when a kill came between the two renames of `replace_folder`, else None."""
    path = Path(path)
    candidates = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old")) if not path.exists() else []
    return next((entry for entry in candidates if is_temporary(entry)), None)


def check_writable(folder: PathLike) -> None:
    """Raise UserError, before hours of work, where an output folder cannot be made or written to. Makes nothing."""
    existing_folder = Path(folder)
    try:
        while not existing_folder.is_dir():
            if existing_folder.is_symlink() or existing_folder.exists():
                kind = "a link to nothing" if existing_folder.is_symlink() else "a file"
                raise UserError(f"cannot write {folder}: {existing_folder} is {kind}: choose another folder")
            existing_folder = existing_folder.parent
        with tempfile.TemporaryFile(dir=existing_folder) as file:
            file.write(b"1")
    except OSError as error:
        error.filename = str(folder)  # not the temporary one
        raise write_error(folder, error) from None


def temporary_path(path: Path, suffix: str) -> Path:
    """`.NAME.PID.end` beside `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def is_temporary(path: Path) -> bool:
    return re.fullmatch(r"\..+\.\d+\.(tmp|old|gone)", path.name) is not None


def write_error(path: PathLike, error: OSError, advice: str = WRITE_ADVICE) -> UserError:
    """The one line of a failed write."""
    return UserError(f"cannot write {error.filename or path}: {error.strerror or error}: {advice}")
