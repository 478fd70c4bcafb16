"""The time dial: which size of model and how many steps give the lowest bits per byte within some minutes.

    1. tokens of each size that fit into the time, which includes validation
    2. its bits per byte by the scaling law (scaling_law.py), where repeated text counts less; the lowest is chosen

Pure functions: the speed of the machine is an argument. timed_run.py measures it for 1-pretrain.py --minutes.
Read next: timed_run.py, scaling_law.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.errors import UserError
from corpus.dataset_meta import read_meta
from model.config import ModelConfig
from model.parameters import count_parameters
from trainer.config import SIZE_FIELDS, PlanConfig
from trainer.mixing import MAX_USEFUL_PASSES, MixSchedule
from trainer.scaling_law import LADDER, ScalingLaw, effective_tokens, ladder_fields
from trainer.throughput import flops_per_token

STEP_TOKENS = 4096  # tokens per step and process of a size from the ladder, unless --batch_size is given
FORWARD_COST = 0.4  # seconds of validation per token, as a fraction of those of training
VALIDATION_FRACTION = 0.04  # of the run, for the final validation, at most
SAVE_SECONDS = 1e-7  # of the last save, per parameter
SPARE_FRACTION = 0.03  # of the training time: small delays then do not shorten the run
MIN_EVAL_TOKENS = 2048  # eight times as many in the final validation

Texts = Mapping[str, tuple[float, int]]  # name -> (fraction of the run's tokens, tokens there are)
StepSeconds = Callable[[ModelConfig], float]  # seconds of a training step of a size


@dataclass(frozen=True)
class Budget:
    """What a run has: `seconds` for training and validation, its texts, its number of validation splits, its flags."""

    seconds: float
    texts: Texts
    splits: int
    config: PlanConfig
    processes: int = 1

    def step_tokens(self, size: ModelConfig) -> int:
        """Return the tokens of a step of all processes."""
        rows = batch_size_for(self.config, size) * self.processes * self.config.accumulation_steps
        return (self.config.global_batch_size or rows) * size.max_seq_len


@dataclass(frozen=True)
class Choice:
    """A size and the run that fits. eval_tokens: as the flag. train_seconds: until the end of the last step.

    bits_per_byte: predicted; 0 for MoE, because the law is one of dense models.
    """

    size: ModelConfig
    steps: int
    tokens: int
    eval_tokens: int
    train_seconds: float
    bits_per_byte: float


def longest_run(size: ModelConfig, step_seconds: float, budget: Budget, law: ScalingLaw) -> Choice:
    """Return the longest run of this size within the budget, of at least one step.

    step_seconds: of a training step. The final validation, of 8 times eval_tokens per split, is made smaller where it
    would take more than VALIDATION_FRACTION.
    """
    step_tokens = budget.step_tokens(size)
    seconds_per_token = FORWARD_COST * step_seconds / step_tokens  # of validation
    affordable = VALIDATION_FRACTION * budget.seconds / seconds_per_token / (8 * max(budget.splits, 1))
    eval_tokens = min(budget.config.eval_tokens, max(MIN_EVAL_TOKENS, int(affordable)))
    validation = budget.splits * eval_tokens * seconds_per_token
    train_seconds = budget.seconds - 8 * validation - SAVE_SECONDS * count_parameters(size).total
    steps = (1 - SPARE_FRACTION) * train_seconds / (step_seconds + validation / budget.config.eval_interval)
    whole = max(1, int(steps))
    tokens = step_tokens * (whole if steps > 1 else max(steps, 1e-6))  # not even one step: no choice
    expected = 0.0 if size.use_moe else law.bits_per_byte(size, effective_tokens(tokens, budget.texts.values()))
    return Choice(size, whole, whole * step_tokens, eval_tokens, max(train_seconds, step_seconds), expected)


def choose(sizes: Sequence[ModelConfig], step_seconds: StepSeconds, budget: Budget, law: ScalingLaw) -> Choice:
    """Return the run of the size with the lowest predicted bits per byte."""
    runs = [longest_run(size, step_seconds(size), budget, law) for size in sizes]
    return min(runs, key=lambda run: run.bits_per_byte)


def interpolate_seconds(measured: Mapping[ModelConfig, float], budget: Budget) -> StepSeconds:
    """Return a function from a size to the seconds of its step, given those of some sizes.

    Seconds per FLOP are interpolated over the logarithm of the FLOPs, and constant beyond the measured sizes: small
    matrices take longer per FLOP.
    """

    def step_flops(size: ModelConfig) -> float:
        return budget.step_tokens(size) * flops_per_token(size, size.max_seq_len)

    points = sorted((step_flops(size), seconds) for size, seconds in measured.items())

    def step_seconds(size: ModelConfig) -> float:
        if size in measured:
            return measured[size]
        flops = step_flops(size)
        low = max((point for point in points if point[0] <= flops), default=points[0])
        high = min((point for point in points if point[0] >= flops), default=points[-1])
        span = math.log(high[0] / low[0])
        weight = math.log(flops / low[0]) / span if span else 0.0
        return flops * ((1 - weight) * low[1] / low[0] + weight * high[1] / high[0])

    return step_seconds


# ---- the sizes -------------------------------------------------------------------------------------------------------
def has_given_size(config: PlanConfig) -> bool:
    return config.preset not in (None, "auto") or bool(config.model.keys() & SIZE_FIELDS)


def candidate_sizes(config: PlanConfig, vocab_size: int) -> list[ModelConfig]:
    """Return the size that the flags give, else all of the ladder, with the flags that leave the size open."""
    if has_given_size(config):
        return [config.model_config(vocab_size)]
    try:
        return [ModelConfig(**{**ladder_fields(rung), **config.model, "vocab_size": vocab_size}) for rung in LADDER]
    except ValueError as error:
        raise UserError(str(error)) from None


def batch_size_for(config: PlanConfig, size: ModelConfig) -> int:
    """Return --batch_size, or, where neither it nor the size is given, the rows of STEP_TOKENS."""
    if has_given_size(config) or config.batch_size != PlanConfig.batch_size:
        return config.batch_size
    return max(1, STEP_TOKENS // size.max_seq_len)


def size_text(size: ModelConfig) -> str:
    return f"{count_parameters(size).total / 1e6:.1f} M parameters"


def choice_text(choice: Choice) -> str:
    """Return the choice in a few words, as "6.1 M parameters, 9.0 M tokens, expect 1.90 bits per byte"."""
    expected = f"expect {choice.bits_per_byte:.2f} bits per byte" if choice.bits_per_byte else "no prediction for MoE"
    return f"{size_text(choice.size)}, {choice.tokens / 1e6:.1f} M tokens, {expected}"


def law_text(choice: Choice, law: ScalingLaw) -> str:
    """Return which text the prediction is for, and how far the run is from the measured ones."""
    ratio = choice.tokens * flops_per_token(choice.size, choice.size.max_seq_len) / law.flops
    far = f", fitted to runs of at most 1/{ratio:,.0f} of its FLOPs" if ratio > 2 else ""
    return f"the prediction is for text as in docs/size_sweep.csv ({law.text}){far}"


# ---- the texts -------------------------------------------------------------------------------------------------------
def texts_of_run(data_path: str, mixture: MixSchedule | None) -> Texts:
    """Return the texts of a run. Without a mixture all training data is one text."""
    if mixture is None:
        return {"the data": (1.0, read_meta(data_path)["splits"]["train"]["tokens"])}
    second = 1 - mixture.stage2_at if mixture.stage2_at < 1 else 0.5  # the fraction of stage 2, if there is one
    fractions = [1.0] if len(mixture.stages) == 1 else [1 - second, second]
    texts: dict[str, tuple[float, int]] = {}
    for fraction, components in zip(fractions, mixture.stages, strict=True):
        for component in components:
            before = texts.get(component.name, (0.0, 0))[0]
            texts[component.name] = (before + fraction * component.weight, component.tokens)
    return texts


def describe_repeats(tokens: int, texts: Texts) -> str:
    """Return a line about the text that is read most often, or "" if that is at most MAX_USEFUL_PASSES times."""
    passes, name = max((fraction * tokens / unique, name) for name, (fraction, unique) in texts.items())
    if passes <= MAX_USEFUL_PASSES:
        return ""
    return f"{name} is read {passes:.1f} times: beyond {MAX_USEFUL_PASSES} passes repeated text helps little"
