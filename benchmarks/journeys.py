"""Count the project files that data passes on its way: the length of five journeys.

    python -m benchmarks.journeys                  this checkout
    python -m benchmarks.journeys --root ../old    another checkout, measured with this script
    python -m benchmarks.journeys --list           also the files of each journey

    journey                    command                      counted from                     to
    text row -> shard          data_process.py pretrain     the input file is first opened   the dataset is renamed
    chat row -> shard          data_process.py sft          the input file is first opened   the dataset is renamed
    chat row -> ids and mask   data_process.py sft          the input file is first opened   the first chats are tokens
    shard -> .pth              1-pretrain.py, 20 steps      the command line is parsed       the .pth file is renamed
    HTTP request -> tokens     serve_openai_api.py, a chat  the server has started           the answer is received

The real commands run on a small demo world in child processes, on the CPU, with a profile hook in every thread
(call_recorder.py). Between the two events it counts:

    files        project files of which a function is called, the script included. Functions that wait for the first
                 event count as called. Module and class bodies do not count, nor do calls during an import.
    per item     files that every item passes: their functions are called at least as often as there are rows (for
                 training: steps; for the server: one request)
    functions    distinct functions called
    generators   the largest number of the project's generators on one stack, each waiting for the next item of the
                 one below it; generator expressions included

Takes a minute. Read next: call_recorder.py (the hook), bit_for_bit.py (the outputs of two commits are equal).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import Config, flag
from common.errors import UserError, fail_in_one_line
from common.flag_types import path_string

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS, NUM_STEPS = 200, 20
WORLD = "-m demo_world.generator --seed 1 --statement_rounds 1 --chat_rounds 1 --questions 2 --out_dir {out}/world"
TOKENIZER = "train_tokenizer.py {out}/world/words.jsonl --vocab_size 600 --out_dir {out}/tokenizer"
PRETRAIN_DATA = "data_process.py pretrain {out}/text.jsonl --tokenizer {out}/tokenizer --out_dir {out}/text"
SFT_DATA = "data_process.py sft {out}/chats.jsonl --max_seq_len 128 --tokenizer {out}/tokenizer --out_dir {out}/"
PRETRAIN = (
    "1-pretrain.py --data_path {out}/text --tokenizer {out}/tokenizer --out_dir {out} --dim 32 --n_layers 1 --n_heads 2"
    " --n_kv_heads 1 --max_seq_len 128 --device cpu --dtype float32 --batch_size 2 --eval_tokens 256 --max_steps "
)
FULL_SFT = "3-full_sft.py --data_path {out}/chats --out_dir {out} --device cpu --dtype float32 --max_steps 1"
SERVER = "serve_openai_api.py --checkpoint {out}/full_sft_32.pth --port 0 --device cpu"
REQUEST = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}


@dataclass(frozen=True)
class JourneysConfig(Config):
    """The command line."""

    root: str = flag(str(ROOT), "checkout to measure", type=path_string)
    list: bool = flag(False, "print the files of each journey; * marks those that every item passes")


@dataclass(frozen=True)
class Journey:
    """One journey: the events of call_recorder.py between which calls count, the command, and the number of items."""

    name: str
    start: str
    end: str
    command: str
    items: int = NUM_ROWS


JOURNEYS = (
    Journey("text row -> shard", "open:{out}/text.jsonl", "rename:{out}/text*", PRETRAIN_DATA),
    Journey("chat row -> shard", "open:{out}/chats.jsonl", "rename:{out}/chats*", SFT_DATA + "chats"),
    Journey("chat row -> ids and mask", "open:{out}/chats.jsonl", "encode", SFT_DATA + "mask"),
    Journey("shard -> .pth", "parsed", "rename:*.pth", f"{PRETRAIN}{NUM_STEPS}", NUM_STEPS),
    Journey("HTTP request -> tokens", "signal", "signal", SERVER, 1),
)


@dataclass(frozen=True)
class Count:
    """The result of one journey: files and those that every item passes, functions, nested generators."""

    files: list[str]
    per_item: list[str]
    functions: int
    generators: int


def start_python(root: Path, words: list[str]) -> "subprocess.Popen[str]":
    """Start Python in the checkout `root`, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(  # fixed commands, no shell
        [sys.executable, *words], cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip  # nosec B603


def run_python(root: Path, words: list[str]) -> None:
    """Run a command to its end. Raises UserError with its last lines if it fails."""
    process = start_python(root, words)
    output, _ = process.communicate()
    if process.returncode:
        last = " | ".join(output.splitlines()[-5:])
        raise UserError(f"{root}: exit code {process.returncode} of: python {' '.join(words)}: {last}")


def send_request(root: Path, words: list[str], result: Path) -> None:
    """Start the server, send one chat request between the two signals, and stop the server."""
    process = start_python(root, words)
    try:
        lines: list[str] = []
        while not lines or not lines[-1].startswith("listening on "):
            lines.append(process.stdout.readline() if process.stdout else "")
            if not lines[-1]:
                raise UserError(f"{root}: the server did not start: {' '.join(''.join(lines).split())[-500:]}")
        url = lines[-1].split()[2]
        urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=60).read()  # nosec B310
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        body = json.dumps(REQUEST).encode()
        request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()  # nosec B310
        process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + 30
        while not result.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        process.terminate()
        process.communicate()


def measure(root: Path, out: Path, journey: Journey) -> Count:
    """Run the command of a journey in the checkout `root`. Raises UserError if its two events do not occur."""
    result = out / "calls.json"
    result.unlink(missing_ok=True)
    events = [journey.start.format(out=out), journey.end.format(out=out)]
    recorder = [str(Path(__file__).with_name("call_recorder.py")), str(root), str(result), *events]
    words = [*recorder, *journey.command.format(out=out).split()]
    if journey.start == "signal":
        run_python(root, FULL_SFT.format(out=out).split())
        send_request(root, words, result)
    else:
        run_python(root, words)
    if not result.is_file():
        raise UserError(f"{journey.name}: the events {' and '.join(events)} did not occur in {root}")
    return count_calls(result, journey.items)


def count_calls(result: Path, items: int) -> Count:
    """Read the result of call_recorder.py."""
    record = json.loads(result.read_text(encoding="utf-8"))
    calls: dict[str, int] = {}
    for file, _, number in record["calls"]:
        calls[file] = calls.get(file, 0) + number
    per_item = [file for file, number in calls.items() if number >= items]
    return Count(list(calls), per_item, len(record["calls"]), record["generators"])


def measure_all(root: Path) -> dict[str, Count]:
    """Write the demo world and measure every journey of the checkout `root`."""
    with tempfile.TemporaryDirectory(prefix="journeys_") as folder:
        out = Path(folder).resolve()
        for command in (WORLD, TOKENIZER):
            run_python(root, command.format(out=out).split())
        for source, name in (("pretrain", "text"), ("chats", "chats")):
            lines = (out / f"world/{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (out / f"{name}.jsonl").write_text("".join(lines[:NUM_ROWS]), encoding="utf-8")
        return {journey.name: measure(root, out, journey) for journey in JOURNEYS}


def print_counts(counts: dict[str, Count], with_files: bool) -> None:
    print("| journey | files | per item | functions | generators |\n|---|---:|---:|---:|---:|")
    for name, count in counts.items():
        print(f"| {name} | {len(count.files)} | {len(count.per_item)} | {count.functions} | {count.generators} |")
    for name, count in counts.items() if with_files else ():
        print(f"\n{name}\n    " + "\n    ".join(f"{'*' * (file in count.per_item):1} {file}" for file in count.files))


def main() -> None:
    config = cli.parse(JourneysConfig, __doc__)
    print_counts(measure_all(Path(config.root).resolve()), config.list)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
