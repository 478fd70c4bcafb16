"""Lesson 5: direct preference optimization (DPO; Rafailov et al. 2023, arXiv:2305.18290).

    margin = beta * [ log pi(chosen)/pi_ref(chosen)  -  log pi(rejected)/pi_ref(rejected) ]
    loss   = - log sigmoid(margin), averaged over the pairs of a step

A pair is a prompt with a chosen and a rejected answer. pi is the policy, the model in training; pi_ref is the reference
model, its frozen parent. log pi(answer) is the sum over the answer's tokens. At step 1 pi equals pi_ref, so the margin
is 0 and the loss ln 2. beta scales the implicit KL penalty against the reference model.

    python 5-dpo_train.py                                           starts from the only out/lora_sft_*.pth or full_sft
    python 5-dpo_train.py --init_from out/full_sft_512.pth --beta 0.2 --sft_weight 0.1
    python 5-dpo_train.py --loss simpo                              dpo, ipo or simpo
    torchrun --nproc_per_node 2 5-dpo_train.py                      two processes; or deepspeed --num_gpus 2

Reads   dataset/dpo (written by data_process.py dpo) and the parent checkpoint, which holds its config and tokenizer.
Writes  out/dpo_512.pth, its log (.jsonl), its curves (.png), the reference log-probabilities (.reference) and, until
        the run is complete, its .resume folder.
Next:   2-eval.py (chat with it); code: trainer/dpo.py (reference, early stop), corpus/examples.py (the data).
"""

import common  # isort: skip  # noqa: F401  before torch: it sets the log level of torch
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch.nn.functional import logsigmoid

from common.cli import flag, parse
from common.errors import fail_in_one_line
from common.files import check_writable
from common.flag_types import non_negative_float, positive_float
from export.hf_import import open_model
from trainer import dpo
from trainer.chat_data import tokenized_folder
from trainer.config import TrainConfig, length_flag
from trainer.datasets import PreferenceDataset, check_data
from trainer.distributed import init_distributed
from trainer.loop import train
from trainer.loss import IGNORE_INDEX, token_log_probs
from trainer.stage import Stage, find_source

BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0}  # default of --beta


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Settings of lesson 5."""

    main_flags = (
        "data_path", "init_from", "out_dir", "loss", "beta", "max_chosen_drop", "epochs", "max_minutes", "batch_size",
        "learning_rate", "max_seq_len", "device", "run_name", "explain",
    )  # fmt: skip
    learning_rates: ClassVar = {"muon": 5e-5, "adamw": 2e-5}
    data_path: str = "dataset/dpo"
    batch_size: int = 16
    weight_decay: float = 0.0
    eval_tokens: int = 65_536
    max_seq_len: int | None = length_flag("longer pairs lose the oldest turns of their prompt")
    loss: str = flag("dpo", "preference loss", choices=tuple(BETA), group="preferences")
    beta: float = flag(
        0.0, "scale of the KL penalty against the parent; simpo: scale of the reward (default: "
        + ", ".join(f"{beta:g} with {loss}" for loss, beta in BETA.items()) + ")",
        type=positive_float, group="preferences",
    )  # fmt: skip
    simpo_gamma: float = flag(1.0, "simpo: target margin", type=non_negative_float, group="preferences")
    sft_weight: float = flag(
        0.0, "weight of an added SFT loss on the chosen answers (arXiv:2404.19733)",
        type=non_negative_float, group="preferences",
    )  # fmt: skip
    max_chosen_drop: float = flag(
        0.2, "stop when log p of the chosen answers has fallen by more than this per token (0: never)",
        type=non_negative_float, group="preferences",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not self.beta:
            object.__setattr__(self, "beta", BETA[self.loss])
        super().__post_init__()


def preference_loss(policy, reference, lengths, config):
    """Return (loss, margin) of every pair, each (pairs,).

    policy, reference: log pi(answer) and log pi_ref(answer), each (2 * pairs,): chosen answers, then rejected ones.
    lengths: number of tokens of every answer, (2 * pairs,).
    """
    if config.loss == "dpo":  # Rafailov et al. 2023, arXiv:2305.18290, eq. 7
        chosen, rejected = (policy - reference).chunk(2)
        margin = config.beta * (chosen - rejected)
        return -logsigmoid(margin), margin
    if config.loss == "ipo":  # Azar et al. 2023, arXiv:2310.12036, eq. 17; log-ratios are averaged over tokens
        chosen, rejected = ((policy - reference) / lengths).chunk(2)
        margin = chosen - rejected
        return (margin - 1 / (2 * config.beta)) ** 2, margin
    chosen, rejected = (policy / lengths).chunk(2)  # simpo: Meng et al. 2024, arXiv:2405.14734, eq. 6; no reference
    margin = config.beta * (chosen - rejected)
    return -logsigmoid(margin - config.simpo_gamma), margin


def compute_loss(model, batch, config):
    """Return (sum of the losses of the pairs, {name: sum to log}).

    A batch holds the chosen rows, then the rejected rows, so one forward pass serves both. `log_probs` and
    batch["reference"] are (2 * pairs, seq): log p of every answer token under pi and pi_ref, 0 at all other positions.
    """
    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    log_probs = token_log_probs(hidden, model.lm_head.weight, batch["labels"])
    lengths = (batch["labels"] != IGNORE_INDEX).sum(1)
    pairs = (lengths > 0).chunk(2)[0]  # (pairs,); False only in the empty batch of a process without rows
    policy, lengths = log_probs.sum(1), lengths.clamp(min=1)
    loss, margin = preference_loss(policy, batch["reference"].sum(1), lengths, config)

    likelihood = (policy / lengths).chunk(2)[0]  # mean log p per token of the chosen answer: the SFT objective
    total = ((loss - config.sft_weight * likelihood) * pairs).sum()
    aux_loss = aux_loss * batch["num_targets"]
    metrics = {"preference_loss": (loss.detach() * pairs).sum(), "aux_loss": aux_loss}
    return total + aux_loss, metrics | dpo.preference_metrics(log_probs, batch, margin, pairs)


def main() -> None:
    config = parse(DPOConfig, __doc__)
    check_writable(config.out_dir)
    source = find_source(config, "dpo")
    model, tokenizer, parent = open_model(source)
    model = dpo.without_dropout(model)
    max_seq_len = min(config.max_seq_len or model.config.max_seq_len, model.config.max_seq_len)
    with init_distributed(config.device, config.dtype, config.seed, config.dist_timeout) as dist:
        folder = tokenized_folder(config.data_path, "pairs", max_seq_len, tokenizer, dist)
        check_data(folder, "pairs", tokenizer)
        dpo.warn_language_mismatch(dist, folder, parent["lineage"])
        file = Path(config.out_dir) / f"dpo_{model.config.name}.reference"
        if config.explain:  # trainer/explain.py computes that of the first batch
            reference = dpo.no_reference(folder)
        else:
            reference = dpo.load_or_compute_reference(
                dist, model, folder, tokenizer.pad_id, file, 2 * config.batch_size
            )
        pairs = {
            split.removeprefix("val_"): PreferenceDataset(folder, split, tokenizer.pad_id, log_probs)
            for split, log_probs in reference.items()
        }
        data, loss = pairs.pop("train"), functools.partial(compute_loss, config=config)
        stage = Stage("dpo", model, tokenizer, loss, data, pairs, parent["lineage"], loss_unit="pair", source=source)
        first_loss = {"dpo": math.log(2), "ipo": 1 / (4 * config.beta**2)}.get(config.loss)
        stage.early_stop = dpo.chosen_drop_stop(config.max_chosen_drop, first_loss, file, dist)
        if not config.explain:
            stage.final_metrics = dpo.measure_repetition(dist, model, tokenizer, pairs)
        train(config, stage, dist)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
