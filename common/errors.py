"""Errors that a user can act on: one line, exit code 2, no traceback.

Raise `UserError("what: where: what to do")` for anything that the person at the keyboard can mend. Bugs stay ordinary
exceptions and keep their traceback. Every script runs its main() inside `fail_in_one_line()`, which also turns what the
operating system refuses (OSError, no memory) and signals that end the process into one line.
Read next: signals.py.
"""

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from common.signals import Terminated, handle_signals, print_error, raise_terminated

CHAT_FORMAT_ADVICE = "name another format: --chat_format of data_process.py and 3-full_sft.py"


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


# C0 and C1 controls (terminal escapes begin with them), overrides of the direction of writing, lone surrogates.
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    """`text` with its control characters but those in `keep` spelled out, as \\x1b: for names and texts out of files.

    A terminal then shows them instead of obeying them.
    """
    return CONTROL_CHARACTERS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a CPU or a GPU, had no memory left. Imports no torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


@contextlib.contextmanager
def fail_in_one_line() -> Iterator[None]:
    """Turn `UserError`, OSError, a lack of memory, Ctrl-C, SIGTERM and SIGHUP into one line on stderr and an exit code.

    A reader of stdout that ends first, as `| head` does, ends the script with code 141, as SIGPIPE would. A console in
    another encoding shows "?" instead of failing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # Streamlit runs a script in another thread, where Python allows no signal handler.
        is_main_thread = threading.current_thread() is threading.main_thread()
        with handle_signals(raise_terminated) if is_main_thread else contextlib.nullcontext():
            yield
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush when Python exits
        sys.exit(141)
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "the system refuses"
        _fail(f"{name}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("Symlink loop"):  # pathlib before Python 3.13
            _fail(f"{error}: choose another place")
        if not is_out_of_memory(error):
            raise
        _fail("out of memory: choose smaller numbers (--batch_size, --max_seq_len, the model) or a larger machine")
    except Terminated as signal_received:
        print_error(f"terminated by {signal_received}", is_primary=False)
        sys.exit(128 + signal_received.number)
    except KeyboardInterrupt:
        print_error("interrupted", is_primary=False)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print_error(f"error: {escape_controls(message)}")
    sys.exit(2)
