"""Data mixtures: a dataset and a batch sampler that draw rows from several components by weight, in one or two stages.

    of every 10,000 rows each component gets its fraction, spread evenly
    the rows of a component come in its own shuffled order, epoch after epoch

    python 1-pretrain.py --mix zh=0.25,en=0.75
    python 1-pretrain.py --mix zh=0.25,en=0.75 --stage2_mix zh=0.6,en=0.4 --stage2_at 0.7

The rows of a step depend only on the step number: it gives the number of rows of each component before the step, and
with it the epoch and the position in the component's order. So a killed run resumes exactly, also across the switch of
stages, and memory does not grow with the data. A component of both stages continues in stage 2 where stage 1 ended.

Reads   training shards that are labelled with language and source.
Read next: ../corpus/mixing.py (the weights), sampler.py (without a mixture).
"""

import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from corpus.dataset_meta import read_meta
from corpus.mixing import MixComponent, MixSpec, mix_components, unused_tokens
from trainer.config import MixFlags
from trainer.datasets import Batch, PackedDataset, TokenDataset
from trainer.sampler import BatchSampler, EpochOrder

ROUND_ROWS = 10_000  # rows in which every component gets exactly its fraction
MIN_LANGUAGE_FRACTION = 0.1  # a smaller language would be repeated too often
LANGUAGE_EXPONENT = 0.3  # 0: equal weights, 1: by tokens
MAX_USEFUL_PASSES = 4  # more epochs over the same text help little: Muennighoff et al. 2023, arXiv:2305.16264


@dataclass
class MixSchedule:
    """The components of one or two stages. `stage2_at`: first step of stage 2, or below 1 the fraction of steps.

    The length of the run is `max_steps`, or, if it is 0, `epochs`. unused: tokens of the labels in no component.
    """

    stages: list[list[MixComponent]]
    stage2_at: float = 0.0
    max_steps: int = 0
    epochs: float = 1.0
    unused: dict[str, int] = field(default_factory=dict)

    def switch_step(self, total_steps: int) -> int:
        """Return the first step of stage 2, counted from 0; total_steps + 1 if there is no stage 2."""
        if len(self.stages) == 1:
            return total_steps + 1
        return round(self.stage2_at * total_steps) if self.stage2_at < 1 else int(self.stage2_at)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries for the lineage; a resumed run must have the same ones."""
        stages = {
            "mix" if i == 0 else "stage2_mix": {component.name: round(component.weight, 6) for component in components}
            for i, components in enumerate(self.stages)
        }
        if len(self.stages) == 1:
            return stages
        length = f"{self.max_steps} steps" if self.max_steps else f"{self.epochs} epochs"  # sets the step of the switch
        return stages | {"stage2_at": self.stage2_at, "length": length}


def balanced_languages(data_path: str) -> MixSpec | None:
    """Return the mixture of --minutes without --mix: the large languages by tokens ** 0.3; None for one language.

    So a language with a quarter of the other's tokens gets 40 % of the rows. The exponent is that of mT5: Xue et al.
    2021, arXiv:2010.11934, section 3.2. A language is large if it has at least MIN_LANGUAGE_FRACTION of the tokens.
    """
    tokens: Counter[str] = Counter()
    for shard in read_meta(data_path)["splits"]["train"]["shards"]:
        tokens[shard.get("language", "")] += shard["tokens"]
    large = [name for name in tokens if name and tokens[name] >= MIN_LANGUAGE_FRACTION * tokens.total()]
    return MixSpec({name: tokens[name] ** LANGUAGE_EXPONENT for name in sorted(large)}) if len(large) > 1 else None


def read_mix_schedule(data_path: str, flags: MixFlags, max_steps: int = 0, epochs: float = 1) -> MixSchedule:
    """Return the mixture of the flags for the shards in `data_path`. Raises UserError if flags or data do not fit."""
    if bool(flags.stage2_mix) != bool(flags.stage2_at):
        raise UserError(
            "--stage2_mix sets the mixture of stage 2, --stage2_at its first step (0.7: after 70 % of the steps): "
            "give both"
        )
    if not flags.mix:
        raise UserError("--stage2_mix, --stage2_at and --mix_temperature need --mix: the mixture of stage 1")
    shards = read_meta(data_path)["splits"]["train"]["shards"]
    specs = [flags.mix, *([flags.stage2_mix] if flags.stage2_mix else [])]
    stages = [mix_components(shards, spec, flags.mix_temperature) for spec in specs]
    return MixSchedule(stages, flags.stage2_at, max_steps, epochs, unused_tokens(shards, *stages))


class MixedDataset(TokenDataset):
    """The concatenated rows of all components of a mixture."""

    def __init__(self, folder: str, schedule: MixSchedule, seq_len: int) -> None:
        self.schedule, self.seq_len, self.folder, self.mixture = schedule, seq_len, Path(folder), schedule.to_dict()
        components = {component.name: component for stage in schedule.stages for component in stage}
        self.components = {
            name: PackedDataset(folder, "train", seq_len, component.contains) for name, component in components.items()
        }
        for name, part in self.components.items():
            if part.tokens.tokens < 2:
                raise UserError(f"--mix: {name} has no training tokens: leave it out")
        self.sizes = {name: len(part) for name, part in self.components.items()}
        self.offsets = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()])[:-1].tolist(), strict=True))

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def batch_sampler(self, global_batch_size: int, seed: int) -> BatchSampler:
        return MixSampler(self, global_batch_size, seed)

    def batch(self, rows: np.ndarray) -> Batch:
        rows = np.asarray(rows)
        names, offsets = list(self.offsets), np.array(list(self.offsets.values()))
        component_ids = np.searchsorted(offsets, rows, side="right") - 1
        windows = [
            self.components[names[k]].window(int(row - offsets[k])) for k, row in zip(component_ids, rows, strict=True)
        ]
        return PackedDataset.collate(windows, self.seq_len, rows)

    @property
    def epoch_rows(self) -> int:
        """Rows of --epochs 1: every row of the first mixture's components once, or its given number of passes."""
        return max(
            1, round(sum((component.passes or 1) * self.sizes[component.name] for component in self.schedule.stages[0]))
        )


class ComponentOrder:
    """Maps row numbers to components. Each component gets its fraction of any range of rows, up to one or two rows."""

    def __init__(self, weights: list[float], *keys: int) -> None:
        self.quotas, self.keys = largest_remainder(weights, ROUND_ROWS), keys
        self._number, self._component_ids = -1, np.zeros(0, np.int64)

    def component_ids(self, first: int, count: int) -> np.ndarray:
        """Return the component of rows first ... first + count - 1, (count,), int64."""
        numbers = range(first // ROUND_ROWS, (first + count - 1) // ROUND_ROWS + 1)
        component_ids = np.concatenate([self._round(number) for number in numbers])
        return component_ids[first - numbers[0] * ROUND_ROWS :][:count]

    def counts(self, n: int) -> np.ndarray:
        """Return how many of the first n rows each component has, (components,)."""
        rounds, rest = divmod(n, ROUND_ROWS)
        return rounds * self.quotas + np.bincount(self._round(rounds)[:rest], minlength=len(self.quotas))

    def _round(self, number: int) -> np.ndarray:
        if number != self._number:
            random = np.random.default_rng((*self.keys, number))
            positions = np.concatenate([(np.arange(quota) + random.random(quota)) / quota for quota in self.quotas])
            component_ids = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._number, self._component_ids = number, component_ids[positions.argsort(kind="stable")]
        return self._component_ids


def largest_remainder(weights: list[float], rows: int) -> np.ndarray:
    """Split `rows` in proportion to the weights into integers of at least 1 (largest remainder method)."""
    exact = np.asarray(weights) * rows / sum(weights)
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    for k in (exact - quotas).argsort(kind="stable")[::-1][: max(0, rows - quotas.sum())]:
        quotas[k] += 1
    quotas[quotas.argmax()] -= quotas.sum() - rows  # the sum is larger if several quotas were raised to 1
    return quotas


class MixSampler(BatchSampler):
    """The rows of every step of a mixture. Each component has its own epochs; the mixture has none."""

    def __init__(self, data: MixedDataset, global_batch_size: int, seed: int) -> None:
        super().__init__(data.epoch_rows, None, global_batch_size, seed)
        self.data = data
        self.total_steps = self.num_steps(data.schedule.max_steps, data.schedule.epochs)
        self.switch_step = data.schedule.switch_step(self.total_steps)
        if len(data.schedule.stages) == 2 and not 0 < self.switch_step < self.total_steps:
            raise UserError(
                f"--stage2_at {data.schedule.stage2_at:g}: step {self.switch_step} is not inside the run of "
                f"{self.total_steps} steps: give a fraction between 0 and 1, or a step before the last"
            )
        sizes = data.sizes.items()
        self.orders = {name: EpochOrder(size, seed, zlib.crc32(name.encode())) for name, size in sizes}
        self.names = [[component.name for component in components] for components in data.schedule.stages]
        self.component_orders = [
            ComponentOrder([component.weight for component in components], seed, stage)
            for stage, components in enumerate(data.schedule.stages)
        ]

    def row_ids(self, step: int) -> np.ndarray:
        """Return the row ids of a step in the MixedDataset, (global_batch_size,), int64."""
        stage, before = self._stage(step), self.rows_consumed(step)
        first = (step - stage * self.switch_step) * self.global_batch_size
        component_ids = self.component_orders[stage].component_ids(first, self.global_batch_size)
        rows = np.zeros(self.global_batch_size, np.int64)
        for k, name in enumerate(self.names[stage]):
            here = component_ids == k
            rows[here] = self.data.offsets[name] + self.orders[name].row_ids(before[name], int(here.sum()))
        return rows

    def rows_consumed(self, step: int) -> dict[str, int]:
        """Return the number of rows of each component before this step."""
        num_rows = dict.fromkeys(self.data.sizes, 0)
        for stage, order in enumerate(self.component_orders):
            steps = min(step, self.switch_step) if stage == 0 else max(0, step - self.switch_step)
            counts = order.counts(steps * self.global_batch_size).tolist()
            for name, count in zip(self.names[stage], counts, strict=True):
                num_rows[name] += count
        return num_rows

    def _stage(self, step: int) -> int:
        return int(step >= self.switch_step)

    # ---- output ----
    def notice_before(self, step: int) -> str:
        if len(self.component_orders) == 1 or step != self.switch_step:
            return ""
        return f"stage 2 begins at step {step + 1}: {format_weights(self.data.schedule.stages[1])}"

    def step_metrics(self, step: int) -> dict[str, Any]:
        """Add the stage of the mixture, and the tokens of each component so far."""
        tokens = {name: rows * self.data.seq_len for name, rows in self.rows_consumed(step).items()}
        return super().step_metrics(step) | {"mix": {"stage": 1 + self._stage(step - 1), "tokens": tokens}}

    def summary(self) -> str:
        """Return a table of the components: weight, available tokens, tokens to train, number of epochs."""
        schedule, trained, seq_len = self.data.schedule, self.rows_consumed(self.total_steps), self.data.seq_len
        sizes = {component.name: component.tokens for components in schedule.stages for component in components}
        weights = [
            {component.name: f"{component.weight:.1%}" for component in components} for components in schedule.stages
        ]
        width = max(8, *(len(name) for name in sizes))
        second = len(weights) == 2
        lines = [
            f"{'mixture':{width}} weight" + ("  stage 2" if second else "") + "         tokens tokens to train  epochs"
        ]
        for name, tokens in sizes.items():
            passes = trained[name] * seq_len / tokens
            line = f"{name:{width}} {weights[0].get(name, '-'):>6}" + (
                f"  {weights[1].get(name, '-'):>7}" if second else ""
            )
            line += f" {tokens:14,} {trained[name] * seq_len:15,} {passes:7.2f}"
            lines.append(line + ("  many: repeated text helps little" if passes > MAX_USEFUL_PASSES else ""))
        if second:
            lines.append(
                f"stage 2 begins at step {self.switch_step + 1} of {self.total_steps}, also with --max_minutes"
            )
        if schedule.unused:
            lines.append("not used: " + ", ".join(f"{name} ({n:,} tokens)" for name, n in schedule.unused.items()))
        return "\n".join(lines)


def format_weights(components: list[MixComponent]) -> str:
    return ", ".join(f"{component.name} {component.weight:.1%}" for component in components)
