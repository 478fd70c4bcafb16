"""Signals that end a process in order, and output to a terminal that may be gone.

    SIGTERM      exit code 143, after the same clean-up as at Ctrl-C
    SIGHUP       exit code 129, likewise: the terminal was closed; under nohup it stays ignored
    Ctrl-C       exit code 130

Read next: errors.py (fail_in_one_line turns these into one line), ../trainer/distributed.py (training saves first).
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
    """SIGTERM or SIGHUP asked the process to end. Code that cleans up after Ctrl-C does so here too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


SignalHandler = Callable[[int, Any], None]
_installed_handlers: set[Any] = set()  # those that are installed here


@contextlib.contextmanager
def handle_signals(handler: SignalHandler, *extra_signals: signal.Signals) -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP (where the system has it) and the signals in `extra_signals` call `handler`.

    A signal that is ignored when the process starts, as SIGHUP is under nohup, stays ignored. Processes that are forked
    inside keep the system's own reaction. Where a library handles SIGTERM itself (uvicorn), SIGHUP becomes a SIGTERM.
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
    """A handler: raise `Terminated`, and from then on ignore these signals, so that nothing interrupts the clean-up."""
    ignore_termination()
    ignore_output_errors()
    raise Terminated(number)


def ignore_termination() -> None:
    """Ignore SIGTERM and SIGHUP until the surrounding `handle_signals` ends: one of them has been obeyed already.

    Without a surrounding one nothing changes: nothing would ever restore the handlers.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) in _installed_handlers:
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class BestEffortStream:
    """A text stream whose output is dropped once it cannot be written any more: a closed terminal or pipe, a full disk.

    Everything but `write` and `flush` is the stream's own.
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
        """After an OSError the stream's file descriptor leads to the null device: what is buffered can be flushed."""
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
    """From now on a print to a closed terminal or pipe is dropped and raises nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, BestEffortStream):
            setattr(sys, name, BestEffortStream(stream))


def print_error(text: str, is_primary: bool = True) -> None:
    """Print a line to stderr and flush both streams.

    torchrun's processes on one machine print the same line once, and one that is no news only if none was printed
    before. The process that prints also hands the line to torchrun, whose table of failures shows it.
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
    """Whether no other process has noted this line in the folder that torchrun's processes of one start share."""
    try:
        if not is_primary and any(folder.glob("*.said")):
            return False
        (folder / f"{zlib.crc32(text.encode()):08x}.said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no such folder: print
        pass
    return True
