"""The parts of GRPO other than its loss: rollouts of a step as batches, metrics, held-out reward, early stop.

    step         --prompts_per_step x --group_size answers, then --inner_steps optimizer steps on them
    reference    the frozen parent, a second copy of the model in memory: the KL is measured against it
    early stop   the answers of a group no longer differ (entropy), or the held-out reward falls

The state is saved between steps, and the rollouts of a step depend only on the weights and the step number, so a killed
run samples the same answers again.
Read next: ../6-grpo_train.py (the loss and the loop), rollout.py (sampling), rewards.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from corpus.chats import chat_text
from model.sampling import SamplingParams
from model.transformer import Transformer
from trainer.datasets import Batch, ChatDataset, to_device
from trainer.distributed import DistContext
from trainer.engine import Engine
from trainer.grpo_config import GRPOConfig
from trainer.loss import IGNORE_INDEX, token_log_probs
from trainer.metrics import MetricLogger, MetricRow
from trainer.rewards import Score, WeightedReward, load_rewards, score
from trainer.rollout import Answer, Group, PromptDataset, Tools, answer_seed, sample_answers
from trainer.stage import Stage
from trainer.train_state import TrainState, micro_batch_size

MAX_ERRORS = 3  # standard errors of the best held-out reward; a smaller drop may be chance
SHOWN_CHARACTERS = 300  # of a prompt or an answer on the screen
Metrics = dict[str, float]


# ---- a step ----------------------------------------------------------------------------------------------------------
class Rollouts:
    """Samples and scores the answers of a step and makes its batches; measures the reward of held-out prompts.

    reference: the frozen parent, on any device.
    """

    def __init__(
        self, config: GRPOConfig, stage: Stage, dist: DistContext, reference: Transformer, tools: Tools
    ) -> None:  # fmt: skip
        self.config, self.stage, self.dist, self.tools = config, stage, dist, tools
        self.reference = reference.to(dist.device).eval().requires_grad_(False)
        dropped = sum(data.num_dropped for data in (stage.data, *stage.validation.values()))  # type: ignore[attr-defined]
        if dropped:
            dist.print0(
                f"{dropped} prompts are left out: with --max_new_tokens {config.max_new_tokens} they are too long"
            )
        self.rewards = load_rewards(config.reward)
        self.val_rewards = load_rewards(config.val_reward) if config.val_reward else self.rewards

    def sample(self, engine: Engine, step: int, prompts: np.ndarray) -> list[Group]:
        """Sample --group_size answers to each prompt of this process. step: from 0; prompts: of all processes."""
        if len(prompts) % self.dist.world_size:
            raise UserError(
                f"{self.dist.world_size} processes cannot share {len(prompts)} prompts per step evenly: choose another "
                "number of processes or another --prompts_per_step"
            )
        mine, seed = prompts[self.dist.rank :: self.dist.world_size].tolist(), self.config.seed
        seeds = [[answer_seed(seed, step, row, index) for index in range(self.config.group_size)] for row in mine]
        data: Any = self.stage.data
        return self.answer(engine, data, mine, seeds, self.config.sampling, self.rewards)

    def answer(
        self, engine: Engine, data: PromptDataset, rows: Sequence[int], seeds: list[list[int]],
        settings: SamplingParams, rewards: list[WeightedReward],
    ) -> list[Group]:  # fmt: skip
        """Answer the prompts `rows` of a split, once for each of their seeds, and score the answers."""
        engine.gather_weights(everywhere=True)
        groups = []
        for row, numbers in zip(rows, seeds, strict=True):
            answers = [Answer(data.rows[row].messages, data.prompts[row], number) for number in numbers]
            groups.append(Group(data.rows[row], answers, []))
        with self.dist.autocast():
            every = [answer for group in groups for answer in group.answers]
            sample_answers(self.stage.model, self.stage.tokenizer, every, settings, self.tools)
        for group in groups:
            for answer in group.answers:
                result = score(rewards, group.row, answer.text)
                if answer.is_truncated and self.config.truncated == "zero":
                    result = Score(0.0, dict.fromkeys(result.parts, 0.0))
                group.scores.append(result)
        return groups

    def trained_lengths(self, groups: list[Group]) -> Tensor:
        """Return the number of trained tokens of every answer, (answers,): 0 for truncated ones that are masked."""
        is_masked = self.config.truncated == "mask"
        answers = [answer for group in groups for answer in group.answers]
        return torch.tensor([0 if answer.is_truncated and is_masked else answer.length for answer in answers])

    def mean_length(self, lengths: Tensor) -> float:
        """Return the mean number of trained tokens of the answers of all processes, at least one token in all."""
        tokens, answers = self.dist.all_reduce_sum([float(lengths.sum()), float(len(lengths))])
        return max(tokens, 1.0) / answers

    def batches(
        self, groups: list[Group], advantages: Tensor, lengths: Tensor, weights: Tensor
    ) -> list[Batch]:  # fmt: skip
        """Return the micro-batches of this process. advantages, lengths, weights: of every answer, (answers,).

        A batch also holds advantages (rows, 1), weights, 0 where nothing is trained, log p of its tokens under the
        parent ("reference") and, if there are several inner steps, under the model that sampled them ("old"), each
        (rows, seq).
        """
        answers = [answer for group in groups for answer in group.answers]
        rows = [np.array(answer.prompt + answer.ids) for answer in answers]
        masks = [
            np.array([0] * len(answer.prompt) + [bit * trained for bit in answer.mask])
            for answer, trained in zip(answers, (lengths > 0).tolist(), strict=True)
        ]
        world_size = self.dist.world_size
        size = micro_batch_size(self.config, len(rows) * world_size, world_size)
        order = np.argsort([len(row) for row in rows], kind="stable")  # similar lengths need less padding
        mean_length, batches = torch.tensor(self.mean_length(lengths)), []
        for start in range(0, len(order), size):
            part = order[start : start + size]
            chats = [(rows[i], masks[i]) for i in part]
            index = torch.from_numpy(part)
            max_len = self.stage.model.config.max_seq_len
            batch = ChatDataset.collate(chats, self.stage.tokenizer.pad_id, max_len, part)
            batch |= {"advantages": advantages[index, None].float(), "weights": weights[index, None].float()}
            batch |= {"num_targets": len(part), "mean_length": mean_length}
            batch["weights"] = batch["weights"] * (batch["labels"] != IGNORE_INDEX)
            batch["reference"] = self.log_probs(self.reference, batch)
            if self.config.inner_steps > 1:
                batch["old"] = self.log_probs(self.stage.model, batch)
            batches.append(batch)
        return batches

    def log_probs(self, model: Transformer, batch: Batch) -> Tensor:
        """Return log p of the trained tokens at the sampling temperature, (rows, seq), computed as in training.

        The decoding step rounds differently, and so do the kernels of a CPU without gradients: with their values the
        ratio of the first inner step would not be exactly 1.
        """
        batch = to_device(batch, self.dist.device)
        with self.dist.autocast():
            hidden, _ = model(batch["input_ids"], token_mask=batch["token_mask"])
            return token_log_probs(hidden / self.config.temperature, model.lm_head.weight, batch["labels"]).detach()

    # ---- the log -----------------------------------------------------------------------------------------------------
    def metrics(self, groups: list[Group]) -> Metrics:
        """Return the means over the groups of all processes."""
        found = [group_metrics(group, [reward.name for reward in self.rewards]) for group in groups]
        names = list(found[0])
        sums = self.dist.all_reduce_sum([float(len(found)), *(sum(each[name] for each in found) for name in names)])
        return {name: value / sums[0] for name, value in zip(names, sums[1:], strict=True)}

    def log_samples(self, logger: MetricLogger, step: int, groups: list[Group]) -> None:
        """Log and print the first two answers of the first group every --sample_interval steps (0: never)."""
        interval = self.config.sample_interval
        if not interval or (step != 1 and step % interval):
            return
        group = groups[0]
        samples = [
            {"prompt": chat_text(group.row.messages), "answer": answer.text, "reference": group.row.reference,
             "reward": result.total}
            for answer, result in list(zip(group.answers, group.scores, strict=True))[:2]
        ]  # fmt: skip
        if self.dist.is_rank0:
            logger.write_row({"step": step, "samples": samples})
        for sample in samples:
            prompt, answer = (str(sample[name]).strip()[-SHOWN_CHARACTERS:] for name in ("prompt", "answer"))
            logger.print(f"step {step}, reward {sample['reward']:.2f}: {prompt} -> {answer}")

    # ---- held-out prompts --------------------------------------------------------------------------------------------
    def validate(self, engine: Engine, state: TrainState, max_tokens: int) -> MetricRow:
        """Return reward and pass@1 of greedy answers to held-out prompts by language, and the best mean reward so far.

        The prompts of a language are a fixed sample: with their length limits they hold about `max_tokens` tokens.
        state.validation keeps the row, for the early stop.
        """
        row: MetricRow = {"step": state.step, "answers": state.tokens, "val_reward": {}, "val_pass@1": {}}
        settings, total = SamplingParams(max_new_tokens=self.config.max_new_tokens), np.zeros(3)
        for split, held_out in self.stage.validation.items():
            data: Any = held_out
            order = np.random.default_rng(0).permutation(len(data))
            order = order[: 1 + int(np.searchsorted(data.lengths()[order].cumsum(), max_tokens))]
            mine = order[self.dist.rank :: self.dist.world_size].tolist()
            groups = self.answer(engine, data, mine, [[0]] * len(mine), settings, self.val_rewards)
            first = self.val_rewards[0].name
            rewards = [group.scores[0].total for group in groups]
            passed = [group.scores[0].parts[first] > 0.5 for group in groups]
            squares = math.fsum(reward**2 for reward in rewards)
            sums = self.dist.all_reduce_sum([float(len(mine)), math.fsum(rewards), squares, float(sum(passed))])
            row["val_reward"][split], row["val_pass@1"][split] = sums[1] / sums[0], sums[3] / sums[0]
            total += sums[:3]
        if total[0]:
            mean, before = float(total[1] / total[0]), state.validation.get("val_best_reward", -math.inf)
            error = math.sqrt(max(float(total[2] / total[0]) - mean**2, 0.0) / float(total[0]))
            row |= {"val_mean_reward": mean, "val_best_reward": max(mean, before)}
            row["val_best_error"] = error if mean > before else state.validation["val_best_error"]
        state.validation = row
        return row


def group_metrics(group: Group, names: list[str]) -> Metrics:
    """Return the metrics of one group. names: of the rewards, the first of which decides whether an answer passes."""
    count, scores = len(group.answers), group.scores
    passed = [result.parts[names[0]] > 0.5 for result in scores]
    totals = [result.total for result in scores]
    parts = {f"reward_{name}": sum(result.parts[name] for result in scores) / count for name in names}
    return {
        "reward": sum(totals) / count,
        **(parts if len(names) > 1 else {}),
        "pass@1": sum(passed) / count,
        f"pass@{count}": float(any(passed)),
        "no_signal": float(min(totals) == max(totals)),  # of groups: all rewards are equal
        "answer_length": sum(answer.length for answer in group.answers) / count,
        "truncated": sum(answer.is_truncated for answer in group.answers) / count,
        "tool_calls": sum(answer.num_calls for answer in group.answers) / count,
    }


def mean_sums(inner_steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of the sums of the inner steps of a step, and whether one of them was skipped."""
    sums = {name: sum(step[name] for step in inner_steps) / len(inner_steps) for name in inner_steps[0]}
    return sums | {"skipped": not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"]))}


def policy_metrics(log_probs: Tensor, batch: Batch, kl: Tensor, is_clipped: Tensor) -> dict[str, Tensor]:
    """Return sums that become means per token when they are divided by the answers of all processes.

    log_probs, kl, is_clipped: (rows, seq). Sampled tokens have the mean -log p of the entropy, at temperature 1 and
    without filters.
    """
    mask = batch["labels"] != IGNORE_INDEX
    values = {"entropy": -log_probs, "kl": kl, "clip_fraction": is_clipped.float()}
    return {name: (value.detach() * mask).sum() / batch["mean_length"] for name, value in values.items()}


def collapse_stop(config: GRPOConfig) -> Callable[[MetricRow], str]:
    """Return the function that Run calls after every step: row, with the last validation -> reason to stop, or ""."""

    def early_stop(row: MetricRow) -> str:
        if config.min_entropy and row["entropy"] < config.min_entropy:
            return (
                f"the entropy of the answers fell to {row['entropy']:.4f} nats per token (--min_entropy "
                f"{config.min_entropy:g}), {row['no_signal']:.0%} of the groups agree: nothing is left to learn from "
                "them; if the reward is low, try a lower --learning_rate or a higher --kl_coef or --temperature"
            )
        best, now = row.get("val_best_reward", 0.0), row.get("val_mean_reward", 0.0)
        noise = MAX_ERRORS * row.get("val_best_error", 0.0)
        if config.max_reward_drop and best - now > max(config.max_reward_drop * abs(best), noise):
            return (
                f"the held-out reward fell from {best:.3f} to {now:.3f} (--max_reward_drop "
                f"{config.max_reward_drop:g}), that of training is {row['reward']:.3f}: look at the samples in the log "
                "for a loophole in --reward; try a lower --learning_rate or a higher --kl_coef"
            )
        return ""

    return early_stop
