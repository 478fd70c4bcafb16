"""Lesson 3: supervised fine-tuning (SFT). A pretrained model learns to answer; all weights are trained.

    loss = - 1/N * sum over the N answer tokens of a step of log p(token | the tokens before it)

The loss function is that of lesson 1. Only the labels differ: tokens of the prompt are masked out, tokens of the
answers and their <|im_end|> are trained.

    python 3-full_sft.py                                            starts from the only out/pretrain_*.pth
    python 3-full_sft.py --init_from out/pretrain_512.pth --epochs 3
    python 3-full_sft.py --init_from ../Qwen3-0.6B --chat_format belle    a transformers folder (export/hf_config.py)
    python 3-full_sft.py --recipe belle --data_share 0.1,0.3,1.0    BELLE's hyper-parameters on 10, 30 and 100 % of data
    torchrun --nproc_per_node 2 3-full_sft.py                       two processes; or deepspeed --num_gpus 2

Reads   dataset/sft (written by data_process.py sft) and the parent checkpoint, which holds its config and tokenizer.
Writes  out/full_sft_512.pth, its log (.jsonl), its curves (.png) and, until the run is complete, its .resume folder;
        with --data_share the folder out/data_study/ instead.
Next:   2-eval.py (chat with it); code: model/tokenizer.py (the mask), model/chat_template.py (chat formats),
        trainer/sampler.py (batches of similar length), evaluation/data_scaling.py.
"""

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from model.chat_template import CHAT_FORMATS
from trainer.legacy_config import add_length_flag, make_training_parser, parse_fractions
from trainer.recipes import add_recipe_flag, describe_recipe


def compute_loss(model, batch):
    """Return (sum of -log p(label) over the answer tokens, number of answer tokens, sums to log).

    batch["input_ids"], ["labels"] and ["token_mask"] are (batch, seq). Labels are the token ids shifted by one, and
    IGNORE_INDEX where the next token is not part of an answer.
    """
    from trainer.loss import cross_entropy_sum, output_weight

    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    loss, count = cross_entropy_sum(hidden, output_weight(model), batch["labels"])
    return loss + aux_loss * count, count, {"aux_loss": aux_loss * count}


def main() -> None:
    parser = make_training_parser(
        __doc__, {"muon": 5e-4, "adamw": 2e-4}, data_path="dataset/sft", batch_size=32, epochs=2
    )
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--chat_format", choices=CHAT_FORMATS, help="chat format to train with; if omitted: the parent's")
    add_recipe_flag(parser)
    add_length_flag(parser, "longer chats keep only the first turns that fit")
    add("--data_share", action=cli.NameList, parse=parse_fractions, metavar="FRACTION",
        help="train one model on each fraction of the chats and compare them: 0.1,0.3,0.5,1.0")  # fmt: skip
    add(
        "--questions",
        type=flag_types.path_string,
        metavar="FILE",
        help="with --data_share: also count correct answers to these questions (jsonl as for 2-eval.py)",
    )
    args = parser.parse_args()
    if args.questions and not args.data_share:
        raise UserError("--questions needs --data_share; for one model run 2-eval.py --questions")
    if args.max_minutes and args.data_share:
        raise UserError("--data_share compares models after equally many epochs: leave out --max_minutes")
    check_writable(args.out_dir)

    from evaluation.data_scaling import run_data_scaling
    from export.hf_import import open_model
    from model.checkpoint import find_parent
    from trainer.chat_data import open_chat_data
    from trainer.distributed import init_distributed
    from trainer.loop import train
    from trainer.stage import Stage

    model, tokenizer, parent = open_model(args.init_from or find_parent(args.out_dir, "full_sft"))
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    with init_distributed(args.device, args.dtype, args.seed, args.dist_timeout) as dist:
        data, validation = open_chat_data(dist, args, model.config, tokenizer)
        stage = Stage("full_sft", model, tokenizer, compute_loss, data, validation, parent["lineage"])
        dist.print0(f"chat format {tokenizer.chat_format.name}" + (f"; {describe_recipe(args)}" if args.recipe else ""))
        (run_data_scaling if args.data_share else train)(dist, args, stage)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
