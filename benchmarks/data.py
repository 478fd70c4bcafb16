"""Speed of data preparation, tokenizer training and exams beside the usual tools, on the same files and tokenizer.

    python -m benchmarks.data                                        text of the demo world; under ten minutes
    python -m benchmarks.data --what pretrain,clean --text a.jsonl.xz b.txt --megabytes 50
    python -m benchmarks.data --what exam --exam ceval.tar.xz

    pretrain    data_process.py pretrain  / datasets.map: tokenise, join, cut into blocks     MB of text per second
    sft         data_process.py sft       / datasets.map: chat template, tokenise, cut        MB of text per second
    clean       data_process.py clean                                                         MB per CPU second
    tokenizer   train_tokenizer.py        / tokenizers' BpeTrainer                            seconds, peak memory
    exam        eval_ceval.py, 5 examples / a loop over transformers' forward, same prompts   questions per second

Both sides read jsonl and write their result to disk; imports are not timed. datasets.map runs in as many processes as
--processes says, ours with as many threads (RAYON_NUM_THREADS). mb_per_second_map_only leaves out the time in which
datasets reads the jsonl file. In sft ours also writes the masks of trained tokens; neither packs rows.
Writes out/benchmarks/data-WHAT.md, .json (the numbers of all rounds) and .png.
Read next: data_inputs.py, data_case.py (our programs), peer_cases/datasets_map.py, peer_cases/plain_tools.py.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Case, Results, bar_chart, describe_machine, markdown_table, run_case, run_rounds
from benchmarks.peers import peer_python
from common.cli import Config, NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import path_string, positive_float, positive_int
from model.config import PRESETS

# --what -> its metrics; the first is drawn.
WHAT = {
    "pretrain": ("mb_per_second", "peak_memory_mb"),
    "sft": ("mb_per_second", "peak_memory_mb"),
    "clean": ("mb_per_cpu_second", "peak_memory_mb"),
    "tokenizer": ("seconds", "peak_memory_mb"),
    "exam": ("questions_per_second", "peak_memory_mb"),
}


@dataclass(frozen=True)
class DataBenchmarkConfig(Config):
    """The command line."""

    what: tuple[str, ...] = flag(tuple(WHAT), "tables", action=NameList)
    text: tuple[str, ...] = flag((), "files of text (default: the demo world)", nargs="+", type=path_string)
    chats: tuple[str, ...] = flag((), "files of chats (default: the demo world)", nargs="+", type=path_string)
    exam: str = flag("", "an exam that eval_ceval.py reads (default: that of the demo world)", type=path_string)
    megabytes: float = flag(10.0, "at most this much text, and as much of chats", type=positive_float)
    processes: tuple[str, ...] = flag(("1", "2"), "numbers of processes of pretrain and sft", action=NameList)
    preset: str = flag("small", "the model that answers the exam", choices=tuple(PRESETS))
    peers: bool = flag(True, "compare with the usual tools, installed from PyPI")
    rounds: int = flag(3, "rounds of every row", type=positive_int)
    out_dir: str = flag("out/benchmarks", "folder for the tables, the numbers and the pictures", type=path_string)

    def check(self) -> None:
        for name in self.what:
            if name not in WHAT:
                raise UserError(f"--what {name}: choose from {', '.join(WHAT)}")
        if not all(text.isdecimal() and 1 <= int(text) <= 1024 for text in self.processes):
            raise UserError(f"--processes {','.join(self.processes)}: give whole numbers from 1 to 1024, as 1,2")


def make_cases(config: DataBenchmarkConfig, what: str, folder: str, python: str) -> Iterator[Case]:
    """Yield the rows of a table, the peer first. python: that of the peers, "" without them."""
    ours = [sys.executable, "-m", "benchmarks.data_case", folder, what]
    if what in ("pretrain", "sft"):
        for number in config.processes:
            suffix = f", {number} process{'es' if number != '1' else ''}"
            if python:
                command = [python, "-m", "benchmarks.peer_cases.datasets_map", folder, what, number]
                yield Case(f"datasets.map{suffix}", command)
            yield Case(f"Mengya{suffix}", ours, environment={"RAYON_NUM_THREADS": number})
        return
    if python and what != "clean":
        name = {"tokenizer": "tokenizers", "exam": "transformers"}[what]
        yield Case(name, [python, "-m", "benchmarks.peer_cases.plain_tools", folder, what])
    yield Case("Mengya", ours)


def describe_input(config: DataBenchmarkConfig, what: str, results: Results) -> str:
    """Return the line below a table."""
    source = {"sft": config.chats, "exam": config.exam}.get(what, config.text)
    line = f"{describe_machine()}. Input: {'the files given' if source else 'the demo world'}"
    extra = [f"{case} without reading the jsonl file {max(metrics['mb_per_second_map_only']):.1f} MB/s"
             for case, metrics in results.items() if "mb_per_second_map_only" in metrics]  # fmt: skip
    return "; ".join([line, *extra]) + "."


def write_table(config: DataBenchmarkConfig, what: str, results: Results) -> None:
    """Print and write the table, the numbers and the picture."""
    table = markdown_table(results, WHAT[what], next(iter(results)), 2)
    text = f"{what}\n\n{table}\n\n{describe_input(config, what, results)}\n"
    print(text, flush=True)
    out = Path(config.out_dir)
    write_text(out / f"data-{what}.md", text)
    write_json(out / f"data-{what}.json", results)
    bar_chart(results, WHAT[what], out / f"data-{what}.png", f"data, {what}")


def main() -> None:
    config = parse(DataBenchmarkConfig, __doc__)
    python = peer_python(["datasets"]) if config.peers and config.what != ("clean",) else ""
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        command = [sys.executable, "-m", "benchmarks.data_inputs", folder, "--preset", config.preset]
        command += ["--megabytes", str(config.megabytes)]
        exam = (config.exam,) if config.exam else ()
        for name, files in (("--text", config.text), ("--chats", config.chats), ("--exam", exam)):
            command += [name, *(str(Path(file).resolve()) for file in files)] if files else []
        run_case(Case("inputs", command))
        for what in config.what:
            write_table(config, what, run_rounds(list(make_cases(config, what, folder, python)), config.rounds))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
