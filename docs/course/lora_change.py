"""Exercise of chapter 7: how much a LoRA adapter changes each matrix, and in how many directions.

    python -m docs.course.lora_change
    python -m docs.course.lora_change --adapter out/course/lora_sft_256.pth

Draws |(alpha / r) B A| / |W| of every matrix; Frobenius norms. Read next: ../../model/lora.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from common.cli import flag, parse
from common.errors import UserError, fail_in_one_line
from common.flag_types import path_string
from docs.course.exercise import ExerciseConfig, open_demo, save_picture
from model.checkpoint import load_model


@dataclass(frozen=True)
class LoRAChangeConfig(ExerciseConfig):
    adapter: str = flag("", "a checkpoint of 4-lora_sft.py (default: that of the demo)", type=path_string)


@torch.no_grad()
def main() -> None:
    config = parse(LoRAChangeConfig, __doc__)
    path = Path(config.adapter) if config.adapter else config.file("lora_sft_256.pth")
    if not path.is_file():
        raise UserError(f"{path} does not exist: train it with 4-lora_sft.py")
    parent, _ = open_demo(config, "full_sft")
    merged, _, _ = load_model(path)
    before = parent.state_dict()
    names = [name for name in before if ".layers." in name and before[name].dim() == 2]
    change = {name: merged.state_dict()[name] - before[name] for name in names}
    layers = len(parent.model.layers)
    kinds = [name.split(".", 3)[3].removesuffix(".weight") for name in names[: len(names) // layers]]
    ratios = torch.tensor([float(change[name].norm() / before[name].norm()) for name in names]).view(layers, -1)
    rank = int(torch.linalg.matrix_rank(change[names[0]], rtol=1e-3))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; its parent has {parent.count_parameters()[0]:,} weights")
    print(f"W is {tuple(before[names[0]].shape)}, the rank of its change is {rank}")
    for column, kind in enumerate(kinds):
        print(f"{kind:>20}: " + "  ".join(f"{value:.1%}" for value in ratios[:, column].tolist()))
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    image = axes.imshow((100 * ratios).numpy(), cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(kinds)), [kind.split(".")[-1] for kind in kinds])
    axes.set_yticks(range(layers), [f"layer {number}" for number in range(layers)])
    figure.colorbar(image, label="change, % of W")
    save_picture(config, figure, "07-lora")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
