"""Speed and memory of rollouts beside transformers' generate: groups of sampled answers to the same prompts.

    python -m benchmarks.rollouts                        the model and prompts of `make demo-rl`; a few minutes
    python -m benchmarks.rollouts --checkpoint out/full_sft_512.pth --data_path dataset/rl
    python -m benchmarks.rollouts --tools calculator     the schema of the tool stands in every prompt
    python -m benchmarks.rollouts --no-stop              every answer has --max_new_tokens tokens

Both programs sample at temperature 1 from the same weights in fp32, a batch of prompts x group_size answers. Tokens are
counted up to the stop token of each answer. transformers reads the exported folder and pads prompts on the left; this
project's side is `sample_answers` of ../trainer/rollout.py, without running tools. Every row is a process of its own.
Writes out/benchmarks/rollouts.md and .json.
Read next: rollout_case.py and peer_cases/transformers_rollouts.py (the two programs), harness.py.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Case, describe_machine, markdown_table, run_case, run_rounds
from benchmarks.peers import peer_python
from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import path_string, positive_int

METRICS = ("tokens_per_second", "mean_length", "peak_memory_mb")


@dataclass(frozen=True)
class RolloutsConfig(Config):
    """The command line."""

    checkpoint: str = flag("out/demo/tools/full_sft_256.pth", "model", type=path_string)
    data_path: str = flag("out/demo/rl", "prompts, written by `data_process.py rl`", type=path_string)
    tools: str = flag("", "tools whose schemas stand in the prompts, as calculator,clock")
    prompts: int = flag(8, "prompts of a batch", type=positive_int)
    group_size: int = flag(8, "answers to each prompt", type=positive_int)
    max_new_tokens: int = flag(64, "longest answer", type=positive_int)
    stop: bool = flag(True, "answers end at a stop token")
    rounds: int = flag(5, "rounds of both rows", type=positive_int)
    threads: int = flag(1, "threads", type=positive_int)
    out_dir: str = flag("out/benchmarks", "folder for the table and the numbers", type=path_string)


def main() -> None:
    config = parse(RolloutsConfig, __doc__)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        case = ["benchmarks.rollout_case", folder, "--checkpoint", config.checkpoint]
        prepare = ["--data_path", config.data_path, "--prompts", str(config.prompts), "--tools", config.tools]
        run_case(Case("inputs", [sys.executable, "-m", *case, "--prepare", *prepare]))
        options = [
            "--group_size", str(config.group_size), "--max_new_tokens", str(config.max_new_tokens),
            "--stop" if config.stop else "--no-stop",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
        peer = [peer_python(["transformers"]), "-m", "benchmarks.peer_cases.transformers_rollouts", folder]
        cases = [
            Case("transformers", [*peer, *options], environment=environment, metrics=METRICS),
            Case("Mengya", [sys.executable, "-m", *case, *options], environment=environment, metrics=METRICS),
        ]
        results = run_rounds(cases, config.rounds)
    lines = [
        markdown_table(results, METRICS, "transformers"),
        "",
        f"{config.prompts} prompts x {config.group_size} answers of at most {config.max_new_tokens} tokens, fp32, "
        f"{config.threads} threads of {describe_machine()}; {config.checkpoint}",
    ]
    print("\n".join(lines))
    write_text(Path(config.out_dir) / "rollouts.md", "\n".join(lines) + "\n")
    write_json(Path(config.out_dir) / "rollouts.json", results)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
