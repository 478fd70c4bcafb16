"""Generation speed of this project, transformers and llama.cpp on the same weights, and the limit of the memory.

    python -m benchmarks.generation                     26.9 M, 5 rounds; under ten minutes on two cores
    python -m benchmarks.generation --preset base --dtypes bfloat16 --rows 1
    python -m benchmarks.generation --peers none --peer "other=python -m other {folder} {dtype}"

    limit = bytes per second of a read of memory, measured in every round / bytes of the weights

Every row is a process: it decodes greedily exactly 192 tokens after a prompt of 64 random ones, alone and in batches.
Also measured: the time to the first token after 64 and 384 tokens, peak memory, and the time of a token while an
endless loop runs on every core. The weights are random: speed does not depend on them. transformers reads the exported
folder, llama.cpp the exported GGUF. A peer given as a command prints as its last line a JSON object with the numbers of
decoding.py; {folder}, {dtype}, {rows} and {threads} are replaced, and {folder} contains hf/ and model-f32.gguf.
Writes out/benchmarks/generation-PRESET.md, .json (the numbers of all rounds) and .png.
Read next: decoding.py (what is measured), decode_mengya.py, harness.py.
"""

import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decoding import CONTEXT, num_cores, speed_metric
from benchmarks.harness import Case, Results, bar_chart, markdown_table, run_case, run_rounds
from benchmarks.peers import peer_python
from common.cli import Config, NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import non_negative_int, path_string, positive_int
from model.config import PRESETS

DTYPES = {"transformers": ("float32", "bfloat16"), "llama.cpp": ("f32", "q8_0")}
OUR_DTYPES = ("float32", "bfloat16", "int8")
PEER_MODULES = {"transformers": "transformers_generate", "llama.cpp": "llama_cpp_server"}
MEMORY = "memory"  # the case that measures the limit


@dataclass(frozen=True)
class GenerationConfig(Config):
    """The command line."""

    preset: str = flag("small", "model size", choices=tuple(PRESETS))
    rounds: int = flag(5, "rounds of every row", type=positive_int)
    dtypes: tuple[str, ...] = flag(
        OUR_DTYPES, "dtypes of this project's and transformers' weights; int8: this project's only", action=NameList
    )
    rows: tuple[str, ...] = flag(("1", "16"), "numbers of sequences decoded together", action=NameList)
    peers: tuple[str, ...] = flag(
        ("transformers", "llama.cpp"), f"none, or some of {', '.join(DTYPES)}; installed from PyPI", action=NameList
    )
    peer: tuple[str, ...] = flag((), "NAME=COMMAND: one more generator; may be repeated", action="append")
    threads: int = flag(0, "threads (0: OMP_NUM_THREADS, else one per core)", type=non_negative_int)
    busy: bool = flag(True, "also measure the time of a token beside busy loops")
    megabytes: int = flag(512, "size of the buffer that the memory is measured with", type=positive_int, hidden=True)
    out_dir: str = flag("out/benchmarks", "folder for the table, the numbers and the picture", type=path_string)

    def check(self) -> None:
        for name in self.peers:
            if name != "none" and name not in DTYPES:
                raise UserError(f"--peers {name}: choose from none, {', '.join(DTYPES)}; another generator: --peer")
        for name in self.dtypes:
            if name not in OUR_DTYPES:
                raise UserError(f"--dtypes {name}: choose from {', '.join(OUR_DTYPES)}")
        for text in self.peer:
            if not all(part.strip() for part in text.partition("=")):
                raise UserError(f"--peer {text!r}: give NAME=COMMAND")
        if not all(text.isdecimal() and 1 <= int(text) <= 1024 for text in self.rows):
            raise UserError(f"--rows {','.join(self.rows)}: give whole numbers from 1 to 1024, as 1,16")

    @property
    def num_threads(self) -> int:
        return self.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or num_cores()

    def peer_dtypes(self, peer: str) -> list[str]:
        return [dtype for dtype in DTYPES[peer] if peer == "llama.cpp" or dtype in self.dtypes]


def make_cases(config: GenerationConfig, folder: Path) -> Iterator[Case]:
    """Yield the case of the memory's limit and the rows of the table, peers first."""
    threads = str(config.num_threads)
    environment = {"OMP_NUM_THREADS": threads, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    options = ["--rows", ",".join(config.rows), "--threads", threads, *(["--busy"] if config.busy else [])]
    memory = ["benchmarks.memory_read", "--threads", threads, "--megabytes", str(config.megabytes)]
    yield Case(MEMORY, [sys.executable, "-m", *memory], environment=environment)
    for peer in [name for name in config.peers if name != "none"]:
        python = peer_python([peer])
        for dtype in config.peer_dtypes(peer):
            command = [python, "-m", f"benchmarks.peer_cases.{PEER_MODULES[peer]}", str(folder), "--dtype", dtype]
            yield Case(f"{peer}, {dtype}", [*command, *options], environment=environment)
    for text in config.peer:
        name, _, line = text.partition("=")
        for dtype in config.peer_dtypes("transformers") if "{dtype}" in line else config.dtypes[:1]:
            values = {"folder": str(folder), "dtype": dtype, "rows": ",".join(config.rows), "threads": threads}
            words = shlex.split(line)
            for key, value in values.items():
                words = [word.replace(f"{{{key}}}", value) for word in words]
            title = f"{name.strip()}, {dtype}" if "{dtype}" in line else name.strip()
            yield Case(title, words, folder=Path.cwd())
    for dtype in config.dtypes:
        command = [sys.executable, "-m", "benchmarks.decode_mengya", str(folder), "--dtype", dtype]
        yield Case(f"Mengya, {dtype}", [*command, *options], environment=environment)


def add_limits(results: Results) -> list[float]:
    """Remove the measurements of the memory, GB/s, and return them; add to every row its percentage of the limit."""
    gigabytes = results.pop(MEMORY)["gb_per_second"]
    for metrics in results.values():
        if {"weight_bytes", speed_metric(1)} <= metrics.keys():
            rounds = zip(gigabytes, metrics["weight_bytes"], metrics[speed_metric(1)], strict=True)
            metrics["percent_of_limit"] = [100 * speed * size / (1e9 * read) for read, size, speed in rounds]
    return gigabytes


def medians_table(results: Results, metrics: list[str]) -> str:
    """Return a table of the medians of several metrics; "" where a row has none."""
    names = [metric.replace("_", " ") for metric in metrics]
    lines = [f"| median | {' | '.join(names)} |", "|---|" + "---:|" * len(metrics)]
    for case, values in results.items():
        cells = [f"{statistics.median(values[metric]):,.1f}" if metric in values else "" for metric in metrics]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(config: GenerationConfig, results: Results, gigabytes: list[float], size: dict[str, int]) -> None:
    """Print and write the tables, the numbers and the picture."""
    reference = next(iter(results))
    speeds = [speed_metric(int(rows)) for rows in config.rows]
    others = dict.fromkeys(name for metrics in results.values() for name in metrics if name not in speeds)
    others.pop("weight_bytes", None)
    lines = [markdown_table(results, speed, reference, 1) + "\n" for speed in speeds]
    read = f"{statistics.median(gigabytes):.1f} GB/s ({min(gigabytes):.1f} to {max(gigabytes):.1f})"
    lines += [
        medians_table(results, [*others]),
        "",
        f"{config.preset}, random weights, {size['vocab_size']:,} tokens; {config.num_threads} threads, {num_cores()} "
        f"cores; memory reads {read}. percent_of_limit is that of one row.",
    ]
    text = "\n".join(lines)
    print(text)
    out = Path(config.out_dir)
    write_text(out / f"generation-{config.preset}.md", text + "\n")
    write_json(out / f"generation-{config.preset}.json", results)
    bar_chart(results, speeds[0], out / f"generation-{config.preset}.png", f"generation, {config.preset}")


def main() -> None:
    config = parse(GenerationConfig, __doc__)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        inputs = ["benchmarks.inputs", name, "--preset", config.preset, "--max_seq_len", str(CONTEXT)]
        gguf = ["--gguf", "f32,q8_0"] if config.peer or "llama.cpp" in config.peers else []
        run_case(Case("inputs", [sys.executable, "-m", *inputs, *gguf]))
        cases = list(make_cases(config, folder))
        results = run_rounds(cases, config.rounds)
        size = json.loads((folder / "hf/config.json").read_text(encoding="utf-8"))
    write_report(config, results, add_limits(results), size)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
