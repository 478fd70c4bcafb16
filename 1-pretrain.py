"""Lesson 1: pretraining. A randomly initialised model learns to predict the next token of text.

    loss = - 1/N * sum over the N tokens of a step of log p(token | the tokens before it)

    python 1-pretrain.py                                        defaults: 26.9 M parameters, dataset/pretrain
    python 1-pretrain.py --max_minutes 20                       a time budget of 20 minutes
    python 1-pretrain.py --preset base --epochs 2               a larger model, two passes over the data
    python 1-pretrain.py --plan --preset mindllm-1.3b           print estimates of memory, time and cost; no training
    python 1-pretrain.py --plan --presets small,mindllm-1.3b    compare these sizes in one table
    python 1-pretrain.py --mix zh=0.25,en=0.75                  data mixture by language (or source)
    python 1-pretrain.py --mix zh=0.25,en=0.75 --stage2_mix zh=0.6,en=0.4 --stage2_at 0.7     two-stage mixture
    torchrun --nproc_per_node 2 1-pretrain.py                   two processes; or deepspeed --num_gpus 2

Reads   dataset/pretrain (written by data_process.py pretrain) and model/tokenizer.
Writes  out/pretrain_512.pth, its log (.jsonl), its curves (.png) and, until the run is complete, its .resume folder.
Next:   2-eval.py (evaluate it), 3-full_sft.py (fine-tune it to answer); code: trainer/loop.py, model/transformer.py.
"""

import math

from common import flag_types
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from trainer.legacy_config import (
    add_mix_flags,
    add_model_flags,
    add_plan_flags,
    check_memory,
    given_model_flags,
    make_model_config,
    make_training_parser,
    print_plan,
)


def compute_loss(model, batch):
    """Return (sum of -log p(label) over all trained tokens, number of trained tokens, sums to log).

    batch["input_ids"], ["labels"] and ["token_mask"] are (batch, seq); labels are the token ids shifted by one. The
    model returns hidden states (batch, seq, dim) and `aux_loss`, the load-balancing loss of MoE routers per token (0
    for a dense model and in eval mode).
    """
    from trainer.loss import cross_entropy_sum, output_weight

    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    loss, count = cross_entropy_sum(hidden, output_weight(model), batch["labels"])
    return loss + aux_loss * count, count, {"aux_loss": aux_loss * count}


def main() -> None:
    parser = make_training_parser(
        __doc__, {"muon": 8e-3, "adamw": 1e-3}, data_path="dataset/pretrain", batch_size=8, warmup_iters=20
    )
    parser.add_argument(
        "--tokenizer",
        type=flag_types.path_string,
        default="model/tokenizer",
        help="folder written by train_tokenizer.py",
    )
    add_mix_flags(parser)
    add_model_flags(parser)
    add_plan_flags(parser)
    args = parser.parse_args()
    if args.tokens_per_param and args.max_steps:
        raise UserError("--tokens_per_param and --max_steps both set the length of the run: leave one out")
    if args.presets and not args.plan:
        raise UserError("--presets belongs to --plan")
    if args.plan:
        return print_plan(args)
    check_writable(args.out_dir)

    from export.hf_import import open_model
    from model.tokenizer import load_tokenizer
    from model.transformer import Transformer
    from trainer.datasets import PackedDataset, check_data
    from trainer.distributed import init_distributed
    from trainer.loop import train
    from trainer.mixing import MixedDataset, read_mix_schedule
    from trainer.stage import Stage
    from trainer.train_state import resolve_global_batch_size

    tokenizer = load_tokenizer(args.tokenizer)
    splits = check_data(args.data_path, "pretrain", tokenizer)
    is_mixed = args.mix or args.stage2_mix or args.stage2_at or args.mix_temperature != 1
    schedule = read_mix_schedule(args) if is_mixed else None
    with init_distributed(args.device, args.dtype, args.seed, args.dist_timeout) as dist:
        if args.init_from:  # continued pretraining, for example on other data
            if args.preset or given_model_flags(args):
                raise UserError("--init_from brings its own config: leave out --preset and the model flags")
            model, saved_tokenizer, parent = open_model(args.init_from)
            lineage = parent["lineage"]
            if saved_tokenizer.fingerprint != tokenizer.fingerprint:
                raise UserError(
                    f"{args.init_from} has tokenizer {saved_tokenizer.fingerprint}, "
                    f"{args.tokenizer} is {tokenizer.fingerprint}: give the tokenizer of the checkpoint"
                )
        else:
            config = make_model_config(args, tokenizer.vocab_size)
            check_memory(config)
            model, lineage = Transformer(config), []
        seq_len = model.config.max_seq_len
        validation = {s.removeprefix("val_"): PackedDataset(args.data_path, s, seq_len) for s in splits if s != "train"}
        data = PackedDataset(args.data_path, "train", seq_len)
        stage = Stage("pretrain", model, tokenizer, compute_loss, data, validation, lineage)
        if args.tokens_per_param:
            rows = resolve_global_batch_size(dist, args, stage.checkpoint_path(args.out_dir))
            args.max_steps = max(
                1, math.ceil(args.tokens_per_param * sum(p.numel() for p in model.parameters()) / (rows * seq_len))
            )
        if schedule:
            stage.data, stage.mix = MixedDataset(args.data_path, schedule, seq_len), schedule.to_dict(args)
        train(dist, args, stage)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
