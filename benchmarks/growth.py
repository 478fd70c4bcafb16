"""How training speed and peak memory of this project grow with length, batch, layers, experts and processes.

    python -m benchmarks.growth                            the preset demo, 8 x 128 tokens; minutes on two cores
    python -m benchmarks.growth --preset small --seq_len 128,512,1024 --processes none

Each panel changes one number of the base: the first value of every other flag. Dense models, but for those of the
panel of experts: there each token passes 2 shared and 2 of the routed experts, however many there are. Several
processes (torchrun, DDP) share the rows of a step and the cores; their memory is that of one process.
Writes out/benchmarks/growth.md, .json (the numbers of all rounds) and .png.
Read next: training.py, train_case.py.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.harness import Case, Results, describe_machine, run_rounds, save_figure, with_spread
from benchmarks.train_spec import TrainSpec
from benchmarks.training import METRICS, our_case, resolve, write_tokens
from common.cli import Config, NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import write_json, write_text
from common.flag_types import device_name, path_string, positive_int
from model.config import PRESETS, ModelConfig

AXES = {
    "seq_len": "tokens per row",
    "batch_size": "rows per step",
    "layers": "layers",
    "experts": "routed experts",
    "processes": "processes",
}


def _axis(values: str, help: str) -> tuple[str, ...]:
    default = tuple(values.split(","))
    numbers: tuple[str, ...] = flag(default, f"{help}; none: no such panel", action=NameList)
    return numbers


@dataclass(frozen=True)
class GrowthConfig(Config):
    """The command line."""

    preset: str = flag("demo", "the model of the base", choices=tuple(PRESETS))
    seq_len: tuple[str, ...] = _axis("128,256,512,1024", "tokens per row")
    batch_size: tuple[str, ...] = _axis("8,1,2,4,16", "rows per step")
    layers: tuple[str, ...] = _axis("4,2,8", "layers")
    experts: tuple[str, ...] = _axis("4,8,16", "routed experts")
    processes: tuple[str, ...] = _axis("1,2", "processes")
    rounds: int = flag(2, "rounds of every point", type=positive_int)
    steps: int = flag(5, "timed steps of a round, after 2 untimed ones", type=positive_int)
    dtype: str = flag("auto", "dtype of matrix products", choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "auto, cpu or cuda", type=device_name)
    out_dir: str = flag("out/benchmarks", "folder for the table, the numbers and the picture", type=path_string)

    def check(self) -> None:
        for axis in AXES:
            for text in getattr(self, axis):
                if text != "none" and not (text.isdecimal() and 0 < int(text) <= 10**6):
                    raise UserError(f"--{axis} {text}: give whole numbers of at least 1, or none")

    def values(self, axis: str) -> list[int]:
        """Return the values of a panel, sorted; [] without one."""
        return sorted({int(text) for text in getattr(self, axis) if text != "none"})

    @property
    def base(self) -> dict[str, int]:
        """The first value of every axis; dense, one process."""
        preset = ModelConfig(**PRESETS[self.preset])
        defaults = {"seq_len": preset.max_seq_len, "batch_size": 8, "layers": preset.n_layers}
        first = {axis: getattr(self, axis)[0] for axis in defaults}
        return {axis: defaults[axis] if text == "none" else int(text) for axis, text in first.items()} | {
            "experts": 0,
            "processes": 1,
        }


def point_case(config: GrowthConfig, name: str, point: Mapping[str, int], spec: TrainSpec) -> Case:
    """Return the case of one point: `point` has a value for every axis; experts 0: dense."""
    if point["processes"] > point["batch_size"]:
        raise UserError(f"{name}: {point['batch_size']} rows per step are too few: raise the first of --batch_size")
    model = ModelConfig(**{
        **PRESETS[config.preset], "vocab_size": 6400, "max_seq_len": point["seq_len"], "n_layers": point["layers"],
        "use_moe": point["experts"] > 0, "n_routed_experts": max(point["experts"], 2), "n_active_experts": 2,
    })  # fmt: skip
    case = our_case(name, replace(spec, model=model.to_dict(), **{n: point[n] for n in ("seq_len", "batch_size")}))
    if point["processes"] == 1:
        return case
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(point["processes"]), "-m"]
    return replace(case, command=[sys.executable, "-m", *launch, *case.command[2:]])


def make_points(config: GrowthConfig) -> dict[str, dict[str, int]]:
    """Return name of a case -> its point. `axis value` is the name."""
    return {
        f"{axis} {value}": {**config.base, axis: value}
        for axis in AXES
        for value in config.values(axis)
    }  # fmt: skip


def panel_table(results: Results, axis: str, values: Sequence[int]) -> str:
    """Return the markdown table of a panel: value, tokens per second, peak memory, both with their range."""
    lines = [f"| {AXES[axis]} | tokens per second | peak memory, MB |", "|---:|---:|---:|"]
    for value in values:
        found = [with_spread(results[f"{axis} {value}"][metric], 0) for metric in METRICS]
        lines.append(f"| {value} | {' | '.join(found)} |")
    return "\n".join(lines)


def draw_panels(results: Results, panels: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draw one panel per axis: tokens per second as a line, peak memory as a dashed one with its own scale."""
    from matplotlib.figure import Figure  # after the measurements: see harness.run_case

    figure = Figure(figsize=(4 * len(panels), 3.2))
    for axes, (axis, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        memory_axes = axes.twinx()
        for i, (metric, place) in enumerate(zip(METRICS, (axes, memory_axes), strict=True)):
            medians = [median(results[f"{axis} {value}"][metric]) for value in values]
            place.plot(values, medians, marker="o", color=f"C{i}", linestyle="-" if i == 0 else "--")
            place.set_ylim(0, 1.1 * max(medians))
            place.tick_params(axis="y", colors=f"C{i}")
            place.set_ylabel(metric.replace("_", " "), color=f"C{i}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xlabel(AXES[axis])
    save_figure(figure, path)


def main() -> None:
    config = parse(GrowthConfig, __doc__)
    device, (dtype,) = resolve(config.device, [config.dtype])
    points = make_points(config)
    if not points:
        raise UserError("every panel is none: give the values of one")
    rows, length = (max(point[axis] for point in points.values()) for axis in ("batch_size", "seq_len"))
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        spec = TrainSpec({}, "", rows, length, config.steps, dtype, device)
        spec = replace(spec, tokens=write_tokens(Path(folder), ModelConfig(), spec.num_tokens))
        cases = [point_case(config, name, point, spec) for name, point in points.items()]
        results = run_rounds(cases, config.rounds)
    panels = {axis: config.values(axis) for axis in AXES if config.values(axis)}
    base = ", ".join(f"{config.base[axis]} {AXES[axis]}" for axis in ("layers", "batch_size", "seq_len"))
    text = "\n\n".join([
        *(panel_table(results, axis, values) for axis, values in panels.items()),
        f"{describe_machine()}. Preset {config.preset}, {base}, {dtype}; median of {config.rounds} (range).",
    ])  # fmt: skip
    print(text)
    out = Path(config.out_dir)
    write_text(out / "growth.md", text + "\n")
    write_json(out / "growth.json", results)
    draw_panels(results, panels, out / "growth.png")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
