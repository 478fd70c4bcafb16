"""Run a Python script and record which functions of the project it calls. journeys.py starts it in a child process.

    python benchmarks/call_recorder.py ROOT RESULT.json START END SCRIPT [flags of the script]

    START   open:PATTERN     a file whose path matches is opened for the first time; its callers count as called
            parsed           the command line is parsed
            signal           the process receives SIGUSR1
    END     rename:PATTERN   a file or folder is renamed to a path that matches, for the last time
            encode           the first call of the tokenizers library that encodes text returns
            signal           the process receives SIGUSR2

RESULT.json: {"calls": [["corpus/readers.py", "read_files", 17], ...], "generators": deepest nesting of generators}
Imports only the standard library, so that modules of ROOT are not mixed with modules of this checkout.
Read next: journeys.py (the journeys, and what is counted).
"""

import fnmatch
import inspect
import json
import os
import runpy
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PARSERS = ("parse_args", "parse_known_args", "parse", "parse_command")
PARSER_FILES = ("argparse.py", f"common{os.sep}cli.py")


class CallRecorder:
    """Counts the calls of the project's functions between START and END. `profile` is a hook for sys.setprofile."""

    def __init__(self, root: Path, result: Path, start: str, end: str) -> None:
        self.prefix, self.result, self.start, self.end = f"{root}{os.sep}", result, start, end
        self.is_recording = False
        self.calls: Counter[CodeType] = Counter()
        self.generators = 0

    def stack(self, frame: FrameType | None) -> list[CodeType]:
        """The functions of the project that are running or waiting in `frame`; [] while a module is imported."""
        functions = []
        while frame:
            code = frame.f_code
            if code.co_filename.startswith("<frozen importlib"):
                return []
            is_function = code.co_flags & inspect.CO_OPTIMIZED  # neither a module nor a class body
            is_ours = code.co_filename.startswith(self.prefix) and "site-packages" not in code.co_filename
            if is_function and is_ours and code.co_filename != __file__:
                functions.append(code)
            frame = frame.f_back
        return functions

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "return" and self.start == "parsed":
            if code.co_name in PARSERS and code.co_filename.endswith(PARSER_FILES):
                self.begin(frame.f_back)
        elif event == "c_return" and self.end == "encode" and self.is_recording:
            if type(argument.__self__).__name__ == "Tokenizer" and argument.__name__.startswith("encode"):
                self.save()
                self.is_recording = False
        elif event == "call" and self.is_recording and code.co_filename.startswith(self.prefix):
            is_generator = code.co_flags & inspect.CO_GENERATOR
            if code in self.calls and not is_generator:
                self.calls[code] += 1
            elif code in (functions := self.stack(frame)):
                self.calls[code] += 1
                nested = sum(bool(function.co_flags & inspect.CO_GENERATOR) for function in functions)
                self.generators = max(self.generators, nested)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook for sys.addaudithook: sees opened and renamed files."""
        kind, _, pattern = (self.start if event == "open" else self.end).partition(":")
        if event == "open" and kind == "open" and not self.calls and fnmatch.fnmatch(str(arguments[0]), pattern):
            self.begin(sys._getframe(1))
        elif event == "os.rename" and kind == "rename" and fnmatch.fnmatch(str(arguments[1]), pattern):
            self.save()

    def begin(self, frame: FrameType | None) -> None:
        self.calls, self.generators, self.is_recording = Counter(self.stack(frame)), 0, True

    def save(self) -> None:
        items = list(self.calls.items())  # other threads may add calls
        calls = [(code.co_filename.removeprefix(self.prefix), code.co_name, n) for code, n in items]
        self.result.write_text(json.dumps({"calls": sorted(calls), "generators": self.generators}), encoding="utf-8")


def main() -> None:
    root, result, start, end, script, *flags = sys.argv[1:]
    recorder = CallRecorder(Path(root), Path(result), start, end)
    if start == "signal":
        signal.signal(signal.SIGUSR1, lambda *_: recorder.begin(None))
        signal.signal(signal.SIGUSR2, lambda *_: recorder.save())
    sys.path[0] = root
    sys.argv = [script, *flags]
    sys.addaudithook(recorder.audit)
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)
    runpy.run_path(str(Path(root) / script), run_name="__main__")


if __name__ == "__main__":
    main()
