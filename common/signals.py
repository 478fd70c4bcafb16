"""Graceful termination by signals, and output to a terminal that may be closed.

    SIGTERM      exit code 143, with the same cleanup as Ctrl-C
    SIGHUP       exit code 129, with the same cleanup (terminal closed); remains ignored under nohup
    Ctrl-C       exit code 130

Read next: errors.py (fail_in_one_line sets these exit codes), ../trainer/distributed.py (training saves first).
"""

import contextlib
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM and SIGHUP. A KeyboardInterrupt, so that cleanup code for Ctrl-C runs too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


SignalHandler = Callable[[int, Any], None]
_installed_handlers: set[Any] = set()  # handlers of handle_signals


@contextlib.contextmanager
def handle_signals(handler: SignalHandler, *extra_signals: signal.Signals) -> Iterator[None]:
    """Inside the block SIGTERM, SIGHUP (not on Windows) and the signals in `extra_signals` call `handler`.

    Signals that are ignored at the start, such as SIGHUP under nohup, remain ignored. Forked child processes use the
    default action. If a library installs its own SIGTERM handler (uvicorn), SIGHUP is forwarded to it as SIGTERM.
    """
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == getattr(signal, "SIGHUP", None) and _is_library_handler(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)
        else:
            handler(number, frame)

    _installed_handlers.add(handle)
    previous_handlers = {number: signal.signal(number, handle) for number in (*numbers, *extra_signals)}
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def _is_library_handler(handler: Any) -> bool:
    return callable(handler) and not isinstance(handler, signal.Handlers) and handler not in _installed_handlers


def raise_terminated(number: int, frame: Any) -> None:
    """Signal handler: raise `Terminated` and ignore further signals, so that they do not interrupt the cleanup."""
    ignore_termination()
    ignore_output_errors()
    raise Terminated(number)


def ignore_termination() -> None:
    """Ignore SIGTERM and SIGHUP until the enclosing `handle_signals` block ends, which restores the handlers.

    Outside such a block it does nothing.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) in _installed_handlers:
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class BestEffortStream:
    """A text stream that drops output after a write error: a closed terminal or pipe, a full disk.

    Other attributes are those of the wrapped stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._ignoring_write_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignoring_write_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _ignoring_write_errors(self) -> Iterator[None]:
        """After an OSError, redirect the file descriptor to the null device, so that buffered text can be flushed."""
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_output_errors() -> None:
    """Make print to a closed terminal or pipe drop the text instead of raising, from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, BestEffortStream):
            setattr(sys, name, BestEffortStream(stream))


def print_error(text: str, is_primary: bool = True) -> None:
    """Print a line to stderr and flush both streams.

    The processes of torchrun on one machine print the same line once; with is_primary=False only if no line was printed
    before. The line is also written to torchrun's error file, so that its failure summary shows it.
    """
    ignore_output_errors()
    sys.stdout.flush()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if error_file and not _is_first_report(Path(error_file).parents[1], text, is_primary):
        return
    print(text, file=sys.stderr, flush=True)
    if error_file:
        content = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps({"message": content}), encoding="utf-8")


def _is_first_report(folder: Path, text: str, is_primary: bool) -> bool:
    """Whether this process is the first to report the line in the folder that torchrun's processes share."""
    try:
        if not is_primary and any(folder.glob("*.said")):
            return False
        (folder / f"{zlib.crc32(text.encode()):08x}.said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder does not exist: print
        pass
    return True
