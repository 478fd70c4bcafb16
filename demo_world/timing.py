"""The time that the demo needs on this machine: the seconds of a reference machine, times the slowdown of this one.

The reference machine has two cores with AVX-512, computes in fp32 and does nothing else.
Read next: speed.py (measures the slowdown), ../demo.py (prints the estimates).
"""

import math
from collections.abc import Iterable, Mapping

from demo_world.report import TRAINING
from demo_world.texts import DemoTexts

REFERENCE_SECONDS = {
    "world": 3.3, "tokenizer": 5.3, "pretrain_data": 1.4, "sft_data": 1.9, "identity_data": 0.7, "dpo_data": 0.8,
    "pretrain": 177.4, "score_pretrain": 3.5, "full_sft": 79.9, "score_full_sft": 2.9, "identity_before": 1.8,
    "lora_sft": 29.4, "identity_after": 1.9, "score_lora_sft": 3.0, "dpo": 18.9, "score_dpo": 3.1,
    "exam": 0.4, "score_exam": 3.2,
}  # fmt: skip
RL_REFERENCE_SECONDS = {  # of the further steps of demo.py --rl
    "tool_world": 0.6, "tools_data": 2.3, "rl_data": 0.6, "dpo_arithmetic": 2.6, "tools": 149.0,
    "tools_arithmetic": 3.1, "tools_calculator": 7.8, "tools_world": 3.2, "grpo": 100.2, "grpo_arithmetic": 3.0,
    "grpo_calculator": 7.9, "grpo_world": 3.3,
}  # fmt: skip
ALL_SECONDS = REFERENCE_SECONDS | RL_REFERENCE_SECONDS
TRAININGS = (*TRAINING, "tools", "grpo")
SLOW = 1.5  # a slowdown from which on the estimate says that the machine is slow
SLOW_WHOLE = (
    "A training step takes {slowdown} times as long as on two quiet cores: the models will be as good, only later. "
    "(--fast ends each training after a fixed time.)"
)
SLOW_FAST = (
    "A training step takes {slowdown} times as long as on two quiet cores: with --fast each training sees less text "
    "and the models are worse."
)


class Estimate:
    """The time that the remaining steps take. A finished training corrects the measured slowdown."""

    def __init__(self, slowdown: float, names: Iterable[str], limits: Mapping[str, float]) -> None:
        """names: the steps to run. limits: training -> seconds after which it ends by itself."""
        self.slowdown, self.names, self.limits = slowdown, list(names), limits

    def seconds_left(self) -> float:
        return sum(self._seconds(name) for name in self.names)

    def _seconds(self, name: str) -> float:
        # Other steps mostly start Python and load models: a GPU does not shorten them.
        slowdown = self.slowdown if name in TRAININGS else max(self.slowdown, 1.0)
        return min(slowdown * ALL_SECONDS[name], self.limits.get(name, math.inf))

    def finish(self, name: str, seconds: float) -> None:
        """A step has taken this many seconds."""
        self.names.remove(name)
        if name in TRAININGS and name not in self.limits:
            self.slowdown = seconds / ALL_SECONDS[name]

    def describe(self, say: DemoTexts) -> str:
        """The first line of the demo."""
        text = say("This will take {time}.", time=minutes_text(self.seconds_left(), say))
        if self.slowdown < SLOW:
            return text
        return f"{text} {say(SLOW_FAST if self.limits else SLOW_WHOLE, slowdown=f'{self.slowdown:.1f}')}"


def minutes_text(seconds: float, say: DemoTexts) -> str:
    """`about 6 minutes`; below two minutes in seconds."""
    if seconds >= 120:
        return say("about {minutes} minutes", minutes=f"{seconds / 60:.0f}")
    return say("about {seconds} seconds", seconds=math.ceil(seconds)) if seconds > 1 else say("about 1 second")
