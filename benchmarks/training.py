"""Training speed and peak memory of this project and of its peers: one table in markdown, one picture.

    python -m benchmarks.training                          26.9 M dense, 8 x 512 tokens; under ten minutes on two cores
    python -m benchmarks.training --what 108m              the preset base
    python -m benchmarks.training --what moe               small-moe against the dense model of equal active size
    python -m benchmarks.training --dtype float32,bfloat16 --peers transformers,compile,trainer,litgpt
    python -m benchmarks.training --ours "compiled=--compile" --peer "other=./train_other {tokens} {batch_size}"

Every row is a process of its own. All have the same model, tokens, batch and dtype (fp32 weights, autocast), and read
their batches within the timed steps. Ours run 1-pretrain.py's steps: Muon, its default, and AdamW as the peers. These
are installed from PyPI (peers.py). A peer given as a command prints a JSON object as its last line: tokens_per_second
(of the median step, after warm-up), parameters, and peak_memory_mb where it is not the largest resident set of the
process. The command may contain {batch_size}, {seq_len}, {steps}, {dtype}, {device}, {vocab_size} and {tokens}, a file
of little-endian uint16 token ids. A command without {dtype} gives one row, also with several dtypes.
Writes out/benchmarks/training-{what}.md, .json (the numbers of all rounds) and .png.
Read next: train_spec.py, train_case.py, harness.py.
"""

import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.harness import Case, Results, bar_chart, describe_machine, markdown_table, run_case, run_rounds
from benchmarks.peers import DEFAULT_FOLDER, peer_python
from benchmarks.train_spec import TrainSpec
from common.cli import Config, NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import device_name, non_negative_int, path_string, pathlib_path, positive_int
from corpus.dataset_meta import write_meta
from corpus.shard_writer import ShardWriter
from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters

METRICS = ("tokens_per_second", "peak_memory_mb")
# Name -> its environment, the arguments of its case.
PEERS = {
    "transformers": ("transformers", ("benchmarks.peer_cases.transformers_llama", "plain")),
    "compile": ("transformers", ("benchmarks.peer_cases.transformers_llama", "compile")),
    "trainer": ("transformers", ("benchmarks.peer_cases.transformers_llama", "trainer")),
    "litgpt": ("litgpt", ("benchmarks.peer_cases.litgpt_gpt",)),
}
PEER_TITLES = {"compile": "transformers, compiled", "trainer": "transformers' Trainer"}
# --what -> (preset, rounds, timed steps, peers): each takes less than ten minutes on two quiet cores.
WHAT = {
    "dense": ("small", 5, 3, ("transformers", "trainer", "litgpt")),
    "moe": ("small-moe", 3, 3, ()),
    "108m": ("base", 3, 2, ("transformers",)),
}


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The command line."""

    what: str = flag("dense", "the model, and with moe the rows of the table", choices=tuple(WHAT))
    preset: str = flag("", "another model than that of --what dense", choices=tuple(PRESETS))
    rounds: int = flag(0, "rounds of every row (0: 5; 3 with moe and 108m)", type=non_negative_int)
    steps: int = flag(0, "timed steps of a round, after 2 untimed ones (0: 3; 2 with 108m)", type=non_negative_int)
    batch_size: int = flag(8, "rows per step", type=positive_int)
    seq_len: int = flag(512, "tokens per row", type=positive_int)
    dtype: tuple[str, ...] = flag(
        ("auto",), "dtypes of matrix products: auto, float32, bfloat16 or several; auto: bf16 where it is native",
        action=NameList,
    )  # fmt: skip
    device: str = flag("auto", "auto, cpu or cuda", type=device_name)
    peers: tuple[str, ...] = flag(
        (), f"none, or some of {', '.join(PEERS)} (default: all but compile, which compiles for minutes at first; with "
        "108m transformers; with moe none). They train the dense model", action=NameList,
    )  # fmt: skip
    peer: tuple[str, ...] = flag((), "NAME=COMMAND: one more trainer; may be repeated", action="append")
    ours: tuple[str, ...] = flag((), "NAME=FLAGS: one more row of ours with these flags of 1-pretrain.py; may be "
                                 "repeated", action="append")  # fmt: skip
    peers_folder: Path = flag(DEFAULT_FOLDER, "folder of the peers' virtual environments", type=pathlib_path)
    out_dir: str = flag("out/benchmarks", "folder for the table, the numbers and the picture", type=path_string)

    def check(self) -> None:
        for name in self.dtype:
            if name not in ("auto", "float32", "bfloat16"):
                raise UserError(f"--dtype {name}: choose from auto, float32, bfloat16")
        for name in self.peers:
            if name != "none" and name not in PEERS:
                raise UserError(f"--peers {name}: choose from none, {', '.join(PEERS)}; another trainer: --peer")
        for text in (*self.peer, *self.ours):
            if not all(part.strip() for part in text.partition("=")):
                raise UserError(f"{text!r}: give a name, = and a command or flags")

    @property
    def peer_names(self) -> list[str]:
        return [name for name in self.peers or WHAT[self.what][3] if name != "none"]

    @property
    def model(self) -> ModelConfig:
        preset = self.preset or WHAT[self.what][0]
        return ModelConfig(**{**PRESETS[preset], "vocab_size": 6400, "max_seq_len": self.seq_len})


def dense_of_equal_active_size(config: ModelConfig) -> ModelConfig:
    """Return the dense model whose feed-forward is as wide as the experts that a token of the MoE model passes."""
    if not config.use_moe:
        return config
    experts = config.n_shared_experts + config.n_active_experts
    return replace(config, use_moe=False, hidden_dim=experts * config.hidden_dim)


def write_tokens(folder: Path, config: ModelConfig, num_tokens: int) -> str:
    """Write a stream of token ids, frequent as 1 / rank, as a dataset. Returns the path of its file of uint16 ids."""
    cumulative = np.cumsum(1 / np.arange(1, config.vocab_size + 1))
    ids = np.searchsorted(cumulative / cumulative[-1], np.random.default_rng(0).random(num_tokens))
    writer = ShardWriter(folder, "train", "uint16")
    writer.add(np.minimum(ids, config.vocab_size - 1), utf8_bytes=4 * num_tokens)
    split = writer.close()
    meta = {"kind": "pretrain", "tokenizer": "random", "vocab_size": config.vocab_size, "dtype": "uint16"}
    write_meta(folder, {**meta, "splits": {"train": split}})
    return str(folder / (split["shards"][0]["file"] + ".bin"))


def resolve(device: str, dtypes: Sequence[str]) -> tuple[str, list[str]]:
    """Return the device and the dtypes that `auto` stands for, without importing torch here."""
    code = (
        "import json; from common.device import has_fast_bf16, pick_device; "
        f"device = pick_device({device!r}); "
        "print(json.dumps({'is_cuda': device.type == 'cuda', 'has_bf16': has_fast_bf16(device)}))"
    )
    found = run_case(Case("device", [sys.executable, "-c", code]))
    auto = "bfloat16" if found["has_bf16"] else "float32"
    names = [auto if name == "auto" else name for name in dtypes]
    return "cuda" if found["is_cuda"] else "cpu", list(dict.fromkeys(names))


def our_case(name: str, spec: TrainSpec, flags: Sequence[str] = ()) -> Case:
    text = replace(spec, flags=tuple(flags)).to_json()
    return Case(name, [sys.executable, "-m", "benchmarks.train_case", text], metrics=METRICS)


def command_case(text: str, spec: TrainSpec) -> Case:
    """Return the case of a --peer "NAME=COMMAND". Raises UserError for a placeholder that does not exist."""
    name, _, command = text.partition("=")
    values = {"batch_size": spec.batch_size, "seq_len": spec.seq_len, "steps": spec.steps, "dtype": spec.dtype,
              "device": spec.device, "vocab_size": spec.model["vocab_size"], "tokens": spec.tokens}  # fmt: skip
    words = shlex.split(command)
    if unknown := set(re.findall(r"\{([a-z_]+)\}", command)) - values.keys():
        raise UserError(f"--peer {name}: {{{min(unknown)}}}: choose from {{{'}, {'.join(values)}}}")
    filled = [re.sub(r"\{([a-z_]+)\}", lambda found: str(values[found[1]]), word) for word in words]
    return Case(name.strip(), filled, folder=Path.cwd(), metrics=METRICS)


def make_cases(config: TrainingConfig, spec: TrainSpec, dtypes: Sequence[str]) -> Iterator[Case]:
    """Yield the rows: peers, then ours. The first is the reference."""
    dense = dense_of_equal_active_size(config.model)
    environments = dict.fromkeys(PEERS[name][0] for name in config.peer_names)
    pythons = {environment: peer_python([environment], config.peers_folder) for environment in environments}
    for dtype in dtypes:
        typed = replace(spec, dtype=dtype)
        as_dense = replace(typed, model=dense.to_dict())
        suffix = f", {dtype}" if len(dtypes) > 1 else ""
        for name in config.peer_names:
            environment, (module, *rest) = PEERS[name]
            command = [pythons[environment], "-m", module, as_dense.to_json(), *rest]
            yield Case(PEER_TITLES.get(name, name) + suffix, command, metrics=METRICS)
        for text in config.peer:
            if dtype == dtypes[0] or "{dtype}" in text:
                case = command_case(text, as_dense)
                yield replace(case, name=case.name + (suffix if "{dtype}" in text else ""))
        if config.model.use_moe:
            yield our_case(f"Mengya, dense of equal active size{suffix}", as_dense)
            yield our_case(f"Mengya, MoE{suffix}", typed)
        else:
            yield our_case(f"Mengya, AdamW{suffix}", typed, ["--optimizer", "adamw"])
            yield our_case(f"Mengya, Muon (default){suffix}", typed)
        for text in config.ours:
            name, _, flags = text.partition("=")
            yield our_case(f"Mengya, {name}{suffix}", typed, shlex.split(flags))


def describe_run(config: TrainingConfig, dtypes: Sequence[str], results: Results) -> str:
    """Return the text below the table: machine, model, batch, and the rows with another number of parameters."""
    sizes = [count_parameters(model).total for model in (config.model, dense_of_equal_active_size(config.model))]
    size = f"{sizes[0] / 1e6:.1f} M parameters"
    if config.model.use_moe:
        active = count_parameters(config.model).active
        size = f"MoE: {size}, {active / 1e6:.1f} M active; dense: {sizes[1] / 1e6:.1f} M parameters"
    lines = [f"{describe_machine()}. {config.batch_size} x {config.seq_len} tokens per step, {' and '.join(dtypes)}; "
             f"reading the batches counts. {size}."]  # fmt: skip
    for case, metrics in results.items():
        number = median(metrics.get("parameters", [0]))
        if number not in sizes:
            lines.append(f"{case}: " + (f"{number:,.0f} parameters, not {sizes[0]:,}." if number else "its number of "
                                        "parameters is not stated."))  # fmt: skip
    return "\n".join(lines) if len(lines) > 1 else lines[0] + " The rows of a model have equally many parameters."


def main() -> None:
    config = parse(TrainingConfig, __doc__)
    _, rounds, steps, _ = WHAT[config.what]
    device, dtypes = resolve(config.device, config.dtype)
    name = config.preset or config.what
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        spec = TrainSpec(config.model.to_dict(), "", config.batch_size, config.seq_len, config.steps or steps,
                         device=device)  # fmt: skip
        spec = replace(spec, tokens=write_tokens(Path(folder), config.model, spec.num_tokens))
        cases = list(make_cases(config, spec, dtypes))
        results = run_rounds(cases, config.rounds or rounds)
    table = markdown_table(results, METRICS, cases[0].name)
    text = f"{table}\n\n{describe_run(config, dtypes, results)}"
    print(text)
    out = Path(config.out_dir)
    write_text(out / f"training-{name}.md", text + "\n")
    write_json(out / f"training-{name}.json", results)
    bar_chart(results, METRICS, out / f"training-{name}.png", f"training, {name}")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
