"""Writing a file whole or not at all: a temporary name first, the real one when everything is there.

    write_text("out/eval/report.md", page)        the folder is made if it is missing

Used wherever a result is one small text. Read next: errors.py (what the user sees when it fails).
"""

import contextlib
import os
from pathlib import Path

from corpus.errors import UserError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text under its name once it is complete. Raises UserError where that cannot be done."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({error.strerror}): free some space or name another file") from None
