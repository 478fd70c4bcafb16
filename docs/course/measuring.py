"""Exercise of chapter 11: the accuracy of the demo's DPO model by the number of questions, with its interval.

    python -m docs.course.measuring
    python -m docs.course.measuring --stage pretrain

Reads the answers that `make demo` has saved; answers nothing itself. Read next: ../../evaluation/exam_stats.py.
"""

import json
import random
from dataclasses import dataclass

from matplotlib.figure import Figure

from common.cli import flag, parse
from common.errors import fail_in_one_line
from docs.course.exercise import ExerciseConfig, save_picture
from evaluation.exam_stats import wilson_interval


@dataclass(frozen=True)
class MeasuringConfig(ExerciseConfig):
    stage: str = flag("dpo", "whose answers", choices=("pretrain", "full_sft", "lora_sft", "dpo"))


def main() -> None:
    config = parse(MeasuringConfig, __doc__)
    answers = json.loads(config.file(f"answers_{config.stage}.json").read_text(encoding="utf-8"))["answers"]
    correct = [answer["correct"] for answer in answers]
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    counts = range(1, len(correct) + 1)
    for seed in range(3):
        random.Random(seed).shuffle(order := list(correct))
        scores = [sum(order[:count]) / count for count in counts]
        line = axes.semilogx(counts, scores, linewidth=1, label=f"order {seed + 1}")[0]
        if seed == 0:
            low, high = zip(*(wilson_interval(sum(order[:count]), count) for count in counts), strict=True)
            axes.fill_between(counts, low, high, alpha=0.2, color=line.get_color(), label="95 % interval, order 1")
            for count in (10, 30, 100, 300, len(order)):
                bounds = f"{low[count - 1]:.1%} to {high[count - 1]:.1%}"
                print(f"{count:>4} questions: {scores[count - 1]:.1%} correct, 95 % interval {bounds}")
    axes.set_xlabel("questions asked")
    axes.set_ylabel("fraction answered correctly")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_picture(config, figure, "11-measuring")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
