"""UserError: errors that a user can fix, shown as one line with exit code 2 and no traceback.

Raise `UserError("what: where: what to do")` for invalid input, files or settings. Bugs remain ordinary exceptions with
a traceback. Every script runs main() inside `fail_in_one_line()`, which also reports OSError, out of memory and
termination signals in one line.
Read next: signals.py.
"""

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from common.signals import Terminated, handle_signals, print_error, raise_terminated

CHAT_FORMAT_ADVICE = "choose another format: --chat_format of data_process.py and 3-full_sft.py"


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and what to do."""


def import_package(name: str, advice: str) -> Any:
    """Import an optional package. Raises UserError(advice), which names the pip command, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(advice) from None


def choose_from(word: str, known: Iterable[str], limit: int = 12) -> str:
    """Return the advice for an unknown name: the nearest known one, and up to `limit` (0: no others) to choose from.

    "muom" of (muon, adamw): "did you mean muon? choose from muon, adamw".
    """
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, names, n=1)
    guess = [f"did you mean {near[0]}?"] if near else []
    if limit and (len(names) <= limit or not near):
        guess.append(f"choose from {', '.join(names)}")
    return " ".join(guess)


def require(condition: object, message: str, error: type[Exception] = UserError) -> None:
    """Raise `error(message)` unless the condition is true."""
    if not condition:
        raise error(message)


# C0 and C1 controls (terminal escapes begin with them), bidirectional overrides, lone surrogates.
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def require_nonempty_text(text: str, where: str) -> str:
    """`text` with "?" for surrogates (input in another encoding). Raises UserError where it is empty."""
    if not text.strip():
        raise UserError(f"{where} is empty: give a text")
    return text.encode("utf-8", "replace").decode()


def escape_controls(text: str, keep: str = "") -> str:
    """Make untrusted text safe to print: replace control characters, except those in `keep`, by escapes like \\x1b."""
    return CONTROL_CHARACTERS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means out of memory, in Python or in torch on a CPU or GPU. Imports no torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


@contextlib.contextmanager
def fail_in_one_line() -> Iterator[None]:
    """Report UserError, OSError, out of memory, Ctrl-C, SIGTERM and SIGHUP as one line on stderr, with an exit code.

    Exit codes: 2 for errors, 130 for Ctrl-C, 128 + number for signals, 141 (as for SIGPIPE) if the reader of stdout has
    exited, as with `| head`. Characters that the console's encoding cannot represent are printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # Streamlit runs scripts in another thread, where Python does not allow signal handlers.
        is_main_thread = threading.current_thread() is threading.main_thread()
        with handle_signals(raise_terminated) if is_main_thread else contextlib.nullcontext():
            yield
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's flush at exit would fail again
        sys.exit(141)
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "operating system"
        _fail(f"{name}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("Symlink loop"):  # pathlib before Python 3.13
            _fail(f"{error}: choose another path")
        if not is_out_of_memory(error):
            raise
        _fail("out of memory: reduce --batch_size, --max_seq_len or the model size, or use a larger machine")
    except Terminated as signal_received:
        print_error(f"terminated by {signal_received}", is_primary=False)
        sys.exit(128 + signal_received.number)
    except KeyboardInterrupt:
        print_error("interrupted", is_primary=False)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print_error(f"error: {escape_controls(message)}")
    sys.exit(2)
