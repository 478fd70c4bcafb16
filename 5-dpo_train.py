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
Next:   2-eval.py (chat with it); code: trainer/dpo.py (reference, early stop), corpus/preferences.py (the data).
"""

import argparse
import functools
from pathlib import Path

from common import flag_types
from common.errors import fail_in_one_line
from common.files import check_writable
from trainer.legacy_config import add_length_flag, make_training_parser

BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0}


def preference_loss(policy, reference, lengths, args):
    """Return (loss, margin) of every pair, each (pairs,).

    policy, reference: log pi(answer) and log pi_ref(answer), each (2 * pairs,): chosen answers, then rejected ones.
    lengths: number of tokens of every answer, (2 * pairs,).
    """
    from torch.nn.functional import logsigmoid

    if args.loss == "dpo":  # Rafailov et al. 2023, arXiv:2305.18290, eq. 7
        chosen, rejected = (policy - reference).chunk(2)
        margin = args.beta * (chosen - rejected)
        return -logsigmoid(margin), margin
    if args.loss == "ipo":  # Azar et al. 2023, arXiv:2310.12036, eq. 17; log-ratios are averaged over tokens
        chosen, rejected = ((policy - reference) / lengths).chunk(2)
        margin = chosen - rejected
        return (margin - 1 / (2 * args.beta)) ** 2, margin
    chosen, rejected = (policy / lengths).chunk(2)  # simpo: Meng et al. 2024, arXiv:2405.14734, eq. 6; no reference
    margin = args.beta * (chosen - rejected)
    return -logsigmoid(margin - args.simpo_gamma), margin


def compute_loss(model, batch, args):
    """Return (sum of the losses of the pairs, number of pairs, sums to log).

    A batch holds the chosen rows, then the rejected rows, so one forward pass serves both. `log_probs` and
    batch["reference"] are (2 * pairs, seq): log p of every answer token under pi and pi_ref, 0 at all other positions.
    """
    from trainer.dpo import preference_metrics
    from trainer.loss import IGNORE_INDEX, output_weight, token_log_probs

    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    log_probs = token_log_probs(hidden, output_weight(model), batch["labels"])
    lengths = (batch["labels"] != IGNORE_INDEX).sum(1)
    pairs = (lengths > 0).chunk(2)[0]  # (pairs,); False only in the empty batch of a process without rows
    policy, lengths = log_probs.sum(1), lengths.clamp(min=1)
    loss, margin = preference_loss(policy, batch["reference"].sum(1), lengths, args)

    likelihood = (policy / lengths).chunk(2)[0]  # mean log p per token of the chosen answer: the SFT objective
    total = ((loss - args.sft_weight * likelihood) * pairs).sum()
    count = int(pairs.sum())
    extras = {"preference_loss": (loss.detach() * pairs).sum(), "aux_loss": aux_loss.detach() * count}
    return total + aux_loss * count, count, extras | preference_metrics(log_probs, batch, margin, pairs)


def main() -> None:
    rates = {"muon": 5e-5, "adamw": 2e-5}
    numbers = {"batch_size": 16, "eval_tokens": 65_536, "weight_decay": 0.0}
    parser = make_training_parser(__doc__, rates, data_path="dataset/dpo", **numbers)
    add = parser.add_argument_group("preferences").add_argument
    add("--loss", choices=tuple(BETA), default="dpo", help="preference loss")
    betas = ", ".join(f"{beta:g} with {loss}" for loss, beta in BETA.items())
    add("--beta", type=flag_types.positive_float, default=argparse.SUPPRESS,
        help=f"scale of the KL penalty against the parent; simpo: scale of the reward (default: {betas})")  # fmt: skip
    add("--simpo_gamma", type=flag_types.non_negative_float, default=1.0, help="simpo: target margin")
    add("--sft_weight", type=flag_types.non_negative_float, default=0.0,
        help="weight of an added SFT loss on the chosen answers (arXiv:2404.19733)")  # fmt: skip
    add("--max_chosen_drop", type=flag_types.non_negative_float, default=0.2,
        help="stop when log p of the chosen answers has fallen by more than this per token (0: never)")  # fmt: skip
    add_length_flag(parser, "longer pairs lose the oldest turns of their prompt")
    args = parser.parse_args()
    args.beta = getattr(args, "beta", BETA[args.loss])
    check_writable(args.out_dir)

    from corpus.examples import PairExample
    from export.hf_import import open_model
    from model.checkpoint import find_parent
    from trainer import dpo
    from trainer.chat_data import tokenized_folder
    from trainer.datasets import PreferenceDataset, check_data
    from trainer.distributed import init_distributed
    from trainer.loop import train
    from trainer.stage import Stage

    model, tokenizer, parent = open_model(args.init_from or find_parent(args.out_dir, "dpo"))
    model = dpo.without_dropout(model)
    with init_distributed(args.device, args.dtype, args.seed, args.dist_timeout) as dist:
        folder = tokenized_folder(dist, args, model.config, tokenizer, PairExample)
        splits = check_data(folder, "pairs", tokenizer)
        dpo.warn_language_mismatch(dist, folder, parent["lineage"])
        file = Path(args.out_dir) / f"dpo_{model.config.name}.reference"
        reference = dpo.load_or_compute_reference(dist, model, folder, tokenizer.pad_id, file, 2 * args.batch_size)
        pairs = {s.removeprefix("val_"): PreferenceDataset(folder, s, tokenizer.pad_id, reference[s]) for s in splits}
        data, loss = pairs.pop("train"), functools.partial(compute_loss, args=args)
        stage = Stage("dpo", model, tokenizer, loss, data, pairs, parent["lineage"], loss_unit="pair")
        stage.early_stop = dpo.chosen_drop_stop(dist, args, file)
        stage.final_metrics = dpo.measure_repetition(dist, model, tokenizer, pairs)
        train(dist, args, stage)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
