"""The flags of 6-grpo_train.py.

Read next: grpo.py, config.py (the flags of every training script).
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

from common.cli import flag
from common.errors import UserError
from common.flag_types import (
    fraction_below_one,
    int_between,
    non_empty_text,
    non_negative_float,
    non_negative_int,
    path_string,
    positive_float,
    positive_fraction,
    positive_int,
)
from model.sampling import SamplingParams
from trainer.config import TrainConfig

# Defaults by --loss, those of the papers; cispo: weights up to 5 (arXiv:2510.13786).
CLIP_HIGH = {"grpo": 0.2, "dr_grpo": 0.2, "dapo": 0.28, "cispo": 4.0}
KL_COEF = {"grpo": 0.04, "dr_grpo": 0.0, "dapo": 0.0, "cispo": 0.0}


def _by_loss(defaults: dict[str, float]) -> str:
    return "(default: " + ", ".join(f"{value:g} with {loss}" for loss, value in defaults.items()) + ")"


_policy = functools.partial(flag, group="policy gradient")
_rollouts = functools.partial(flag, group="rollouts")
_rewards = functools.partial(flag, group="rewards and early stop")


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """Settings of lesson 6."""

    main_flags = (
        "data_path", "init_from", "out_dir", "reward", "loss", "max_steps", "prompts_per_step", "group_size",
        "max_new_tokens", "learning_rate", "tools", "lora_rank", "device", "run_name", "explain",
    )  # fmt: skip
    learning_rates: ClassVar = {"muon": 5e-4, "adamw": 2e-4}  # LOG.md has the rewards by learning rate
    data_path: str = "dataset/rl"
    batch_size: int = 32
    weight_decay: float = 0.0
    max_loss_ratio: float = 0.0  # the loss is near 0 and says nothing about the answers: see --min_entropy
    global_batch_size: int = flag(0, "prompts_per_step x group_size", type=non_negative_int, hidden=True)

    loss: str = _policy("grpo", "grpo, dr_grpo, dapo or cispo: see above", choices=tuple(CLIP_HIGH))
    inner_steps: int = _policy(1, "optimizer steps on the answers of one step", type=int_between(1, 100))
    kl_coef: float | None = _policy(
        None, f"weight of the KL against the parent {_by_loss(KL_COEF)}", type=non_negative_float
    )
    clip_low: float = _policy(0.2, "the ratio is clipped at 1 - this", type=fraction_below_one)
    clip_high: float | None = _policy(
        None, f"the ratio is clipped at 1 + this {_by_loss(CLIP_HIGH)}", type=positive_float
    )
    lora_rank: int = _policy(0, "train LoRA matrices of this rank instead of all weights (0: all)",
                             type=int_between(0, 65536))  # fmt: skip

    prompts_per_step: int = _rollouts(16, "prompts per step, of all processes", type=int_between(1, 65536))
    group_size: int = _rollouts(8, "G: answers to each prompt", type=int_between(2, 4096))
    max_new_tokens: int = _rollouts(128, "length limit of an answer", type=positive_int)
    temperature: float = _rollouts(
        1.0, "of sampling, and of the probabilities in the loss; above 0", type=non_negative_float
    )
    top_k: int = _rollouts(0, "sample from the k most probable tokens (0: all)", type=non_negative_int)
    top_p: float = _rollouts(1.0, "sample from the top tokens that sum to p", type=positive_fraction)
    truncated: str = _rollouts(
        "zero", "answers that reach the length limit: zero: reward 0; mask: not trained; keep: as other answers",
        choices=("zero", "mask", "keep"),
    )  # fmt: skip
    tools: str = _rollouts("", "tools that answers may call, as calculator,clock", type=non_empty_text)
    lookup_file: str = _rollouts("", "jsonl file of facts for the tool lookup", type=path_string)
    max_tool_calls: int = _rollouts(2, "rounds of tool calls per answer", type=positive_int)
    sample_interval: int = _rollouts(
        20, "steps between two answers in the log and on the screen (0: none)", type=non_negative_int
    )

    reward: str = _rewards(
        "exact", "rewards with weights, as exact,format:0.2,my_module:my_function:0.5; an answer counts as passed if "
        "the first one is above 0.5", type=non_empty_text,
    )  # fmt: skip
    val_reward: str = _rewards(
        "", "rewards of the held-out prompts; a reward that is not trained on shows loopholes (if omitted: --reward)",
        type=non_empty_text,
    )  # fmt: skip
    min_entropy: float = _rewards(
        0.005, "stop when the entropy of the answers falls below this, in nats per token (0: never)",
        type=non_negative_float,
    )  # fmt: skip
    max_reward_drop: float = _rewards(
        0.3, "stop when the held-out reward has fallen by more than this fraction of its best value, and by 3 standard "
        "errors (0: never)", type=non_negative_float,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not self.global_batch_size:
            object.__setattr__(self, "global_batch_size", self.prompts_per_step * self.group_size)
        for name, defaults in (("kl_coef", KL_COEF), ("clip_high", CLIP_HIGH)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults[self.loss])
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.global_batch_size != self.prompts_per_step * self.group_size:
            raise UserError("--prompts_per_step and --group_size set the rows per step: leave out --global_batch_size")
        if not self.temperature:
            raise UserError("--temperature 0: all answers of a group would be equal: give a number above 0")
        if self.parallel.startswith("zero"):
            raise UserError("6-grpo_train.py runs with --parallel ddp and fsdp, not with ZeRO")

    @property
    def sampling(self) -> SamplingParams:
        """The settings of rollouts: no penalties."""
        return SamplingParams(self.temperature, self.top_k, self.top_p, max_new_tokens=self.max_new_tokens)
