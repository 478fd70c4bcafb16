"""Errors that a user can act on: one line, exit code 2, no traceback.

Raise `UserError("what: where: what to do")` for anything that the person at the keyboard can mend. Bugs stay ordinary
exceptions and keep their traceback. Every script runs its main() inside `fail_in_one_line()`.
"""

import contextlib
import io
import sys
from collections.abc import Iterator

ANOTHER_FORMAT = "name another format: --chat_format of data_process.py and 3-full_sft.py"


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


@contextlib.contextmanager
def fail_in_one_line() -> Iterator[None]:
    """Turn `UserError` into one line on stderr and exit code 2, and Ctrl-C into exit code 130.

    A console in another encoding shows "?" instead of failing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
