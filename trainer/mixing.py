"""From shares to rows: which row of which part of the data is trained when. Two stages, if there are two mixtures.

    of every 10,000 rows each part gets its share, spread evenly;   row = the part's own shuffled order, pass after pass

    python 1-pretrain.py --mix zh=0.25,en=0.75
    python 1-pretrain.py --mix zh=0.25,en=0.75 --stage2_mix zh=0.6,en=0.4 --stage2_at 0.7

Everything follows from the number of the step: how many rows of each part came before, so which pass over it this is
and where in it. A killed run goes on exactly, also across the switch, and memory does not grow with the data. A part
that both stages name goes on in stage 2 where stage 1 left it.

Reads   labelled training shards.
Read next: ../corpus/mixing.py (the shares), shuffle.py, sampler.py (without a mixture).
"""

import argparse
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from corpus.dataset_meta import read_meta
from corpus.mixing import Group, groups_of, left_out
from trainer.datasets import Batch, Rows, Windows
from trainer.sampler import StepPlan
from trainer.shuffle import Passes

ROUND = 10_000  # rows in which the shares come out exactly
MANY_PASSES = 4  # beyond them repeated text teaches little: Muennighoff et al., arXiv:2305.16264


@dataclass
class Recipe:
    """Both stages' groups and where the second begins: a share of the steps (below 1) or a step number (0: nowhere)."""

    stages: list[list[Group]]
    stage2_at: float = 0.0
    left_out: dict[str, int] = field(default_factory=dict)

    def switch_step(self, total_steps: int) -> int:
        """The first step of stage 2, counted from 0; beyond the end when there is none."""
        if len(self.stages) == 1:
            return total_steps + 1
        return round(self.stage2_at * total_steps) if self.stage2_at < 1 else int(self.stage2_at)

    def to_dict(self, args: argparse.Namespace) -> dict[str, Any]:
        """What the lineage tells, and what must not change between the parts of a run."""
        stages = {
            "mix" if i == 0 else "stage2_mix": {group.name: round(group.share, 6) for group in groups}
            for i, groups in enumerate(self.stages)
        }
        if len(self.stages) == 1:
            return stages
        length = f"{args.max_steps} steps" if args.max_steps else f"{args.epochs} epochs"  # of which 70 % are stage 1
        return stages | {"stage2_at": self.stage2_at, "length": length}


def read_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags ask for, of the data in --data_path. Raises UserError for what does not fit."""
    if bool(args.stage2_mix) != bool(args.stage2_at):
        raise UserError("--stage2_mix says what comes, --stage2_at when (0.7: after 70 % of the steps): give both")
    if not args.mix:
        raise UserError("--stage2_mix, --stage2_at and --mix_temperature need --mix: the mixture to begin with")
    shards = read_meta(args.data_path)["splits"]["train"]["shards"]
    wishes = [args.mix, *([args.stage2_mix] if args.stage2_mix else [])]
    stages = [groups_of(shards, wish, args.mix_temperature) for wish in wishes]
    return Recipe(stages, args.stage2_at, left_out(shards, *stages))


class Mixture:
    """The rows of all groups of a recipe, one group's after the other's."""

    def __init__(self, folder: str, recipe: Recipe, seq_len: int) -> None:
        self.recipe, self.seq_len, self.folder = recipe, seq_len, Path(folder)
        groups = {group.name: group for stage in recipe.stages for group in stage}
        self.parts = {name: Windows(folder, "train", seq_len, group.holds) for name, group in groups.items()}
        for name, part in self.parts.items():
            if part.tokens.tokens < 2:
                raise UserError(f"--mix: {name} has no training tokens: leave it out")
        self.sizes = {name: len(part) for name, part in self.parts.items()}
        self.starts = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()])[:-1].tolist(), strict=True))

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def row_lengths(self) -> None:
        return None  # all alike

    def batch(self, rows: np.ndarray) -> Batch:
        rows = np.asarray(rows)
        names, starts = list(self.starts), np.array(list(self.starts.values()))
        which = np.searchsorted(starts, rows, side="right") - 1
        windows = [self.parts[names[k]].window(int(row - starts[k])) for k, row in zip(which, rows, strict=True)]
        return Windows.together(windows, self.seq_len, rows)

    @property
    def epoch_rows(self) -> int:
        """Rows of --epochs 1: all that the first mixture names once, or as many passes as it asks for."""
        return max(1, round(sum((group.passes or 1) * self.sizes[group.name] for group in self.recipe.stages[0])))


class Interleave:
    """Row number -> group, so that every group has its share of any stretch of rows, to a row or two."""

    def __init__(self, shares: list[float], *keys: int) -> None:
        self.quotas, self.keys = apportion(shares, ROUND), keys
        self._number, self._groups = -1, np.zeros(0, np.int64)

    def groups(self, first: int, count: int) -> np.ndarray:
        """The groups of rows first ... first + count - 1, shape (count,)."""
        numbers = range(first // ROUND, (first + count - 1) // ROUND + 1)
        groups = np.concatenate([self._round(number) for number in numbers])
        return groups[first - numbers[0] * ROUND :][:count]

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n rows each group has, shape (groups,)."""
        rounds, rest = divmod(n, ROUND)
        return rounds * self.quotas + np.bincount(self._round(rounds)[:rest], minlength=len(self.quotas))

    def _round(self, number: int) -> np.ndarray:
        if number != self._number:
            random = np.random.default_rng((*self.keys, number))
            places = np.concatenate([(np.arange(quota) + random.random(quota)) / quota for quota in self.quotas])
            groups = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._number, self._groups = number, groups[places.argsort(kind="stable")]
        return self._groups


def apportion(shares: list[float], rows: int) -> np.ndarray:
    """Whole numbers that add up to `rows`, as near to the shares as can be (largest remainders), none below 1."""
    exact = np.asarray(shares) * rows / sum(shares)
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    for k in (exact - quotas).argsort(kind="stable")[::-1][: max(0, rows - quotas.sum())]:
        quotas[k] += 1
    quotas[quotas.argmax()] -= quotas.sum() - rows  # only where several were raised to 1
    return quotas


class MixPlan(StepPlan):
    """The rows of every step of a mixture. There are no epochs of the whole: each group has its own passes."""

    def __init__(self, data: Mixture, global_batch: int, seed: int, max_steps: int, epochs: float) -> None:
        super().__init__(data.epoch_rows, None, global_batch, seed)
        self.data = data
        self.total_steps = self.run_steps(max_steps, epochs)
        self.switch = data.recipe.switch_step(self.total_steps)
        if len(data.recipe.stages) == 2 and not 0 < self.switch < self.total_steps:
            raise UserError(
                f"--stage2_at {data.recipe.stage2_at:g}: step {self.switch} is not inside the run of "
                f"{self.total_steps} steps: give a share between 0 and 1, or a step before the last"
            )
        sizes = data.sizes.items()
        self.passes = {name: Passes(size, seed, zlib.crc32(name.encode())) for name, size in sizes}
        self.names = [[group.name for group in groups] for groups in data.recipe.stages]
        self.orders = [
            Interleave([group.share for group in groups], seed, stage)
            for stage, groups in enumerate(data.recipe.stages)
        ]

    def rows(self, step: int) -> np.ndarray:
        stage, before = self._stage(step), self.rows_of(step)
        first = (step - stage * self.switch) * self.global_batch
        groups = self.orders[stage].groups(first, self.global_batch)
        rows = np.zeros(self.global_batch, np.int64)
        for k, name in enumerate(self.names[stage]):
            here = groups == k
            rows[here] = self.data.starts[name] + self.passes[name].rows(before[name], int(here.sum()))
        return rows

    def rows_of(self, step: int) -> dict[str, int]:
        """How many rows of each group come before this step."""
        counted = dict.fromkeys(self.data.sizes, 0)
        for stage, order in enumerate(self.orders):
            steps = min(step, self.switch) if stage == 0 else max(0, step - self.switch)
            counts = order.counts(steps * self.global_batch).tolist()
            for name, count in zip(self.names[stage], counts, strict=True):
                counted[name] += count
        return counted

    def _stage(self, step: int) -> int:
        return int(step >= self.switch)

    # ---- what is told ----
    def news(self, step: int) -> str:
        if len(self.orders) == 1 or step != self.switch:
            return ""
        return f"stage 2 begins at step {step + 1}: {shares_text(self.data.recipe.stages[1])}"

    def facts(self, step: int) -> dict[str, Any]:
        """For the log: the stage that step number `step` (counted from 1) belonged to, and tokens by group so far."""
        tokens = {name: rows * self.data.seq_len for name, rows in self.rows_of(step).items()}
        return {"mix": {"stage": 1 + self._stage(step - 1), "tokens": tokens}}

    def about(self) -> str:
        """A table: shares, what there is of each group, what is trained of it, how many passes that is."""
        recipe, trained, seq_len = self.data.recipe, self.rows_of(self.total_steps), self.data.seq_len
        sizes = {group.name: group.tokens for groups in recipe.stages for group in groups}
        shares = [{group.name: f"{group.share:.1%}" for group in groups} for groups in recipe.stages]
        width = max(8, *(len(name) for name in sizes))
        second = len(shares) == 2
        lines = [
            f"{'mixture':{width}}  share" + ("  stage 2" if second else "") + "   tokens there   to be trained  passes"
        ]
        for name, tokens in sizes.items():
            passes = trained[name] * seq_len / tokens
            line = f"{name:{width}} {shares[0].get(name, '-'):>6}" + (
                f"  {shares[1].get(name, '-'):>7}" if second else ""
            )
            line += f" {tokens:14,} {trained[name] * seq_len:15,} {passes:7.2f}"
            lines.append(line + ("  many: repeated text teaches little" if passes > MANY_PASSES else ""))
        if second:
            lines.append(f"stage 2 begins at step {self.switch + 1} of {self.total_steps}, whatever the clock says")
        if recipe.left_out:
            lines.append("left out: " + ", ".join(f"{name} ({n:,} tokens)" for name, n in recipe.left_out.items()))
        return "\n".join(lines)


def shares_text(groups: list[Group]) -> str:
    return ", ".join(f"{group.name} {group.share:.1%}" for group in groups)


def step_plan(data: Rows, global_batch: int, args: argparse.Namespace) -> StepPlan:
    """The plan of a mixture, or of plain data."""
    if isinstance(data, Mixture):
        return MixPlan(data, global_batch, args.seed, args.max_steps, args.epochs)
    return StepPlan(len(data), data.row_lengths(), global_batch, args.seed)
