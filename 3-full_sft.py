"""Lesson 3: supervised fine-tuning. The model that continues text learns to answer: all weights move.

    loss = - sum over the tokens of the answers of log p(token | everything before it)

The same loss as in lesson 1; only the labels differ: questions are read, answers and their <|im_end|> are trained.

    python 3-full_sft.py                                            starts from the one out/pretrain_*.pth
    python 3-full_sft.py --init_from out/pretrain_512.pth --epochs 3
    python 3-full_sft.py --init_from ../Qwen3-0.6B --chat_format belle    a transformers folder (export/hf_config.py)
    python 3-full_sft.py --recipe belle --data_share 0.1,0.3,1.0    BELLE's numbers; what does more data bring?
    torchrun --nproc_per_node 2 3-full_sft.py                       two processes; deepspeed --num_gpus 2 does as well

Reads   dataset/sft (made by data_process.py sft) and the parent, which carries its config and its tokenizer.
Writes  out/full_sft_512.pth, and beside it the log (.jsonl), the curves (.png) and, until the run is complete, .resume;
        with --data_share out/data_study/ instead.
Next:   2-eval.py (talk to it); inside: model/tokenizer.py (the mask), model/chat_template.py (how turns are written),
        trainer/sampler.py (why padding is rare), evaluation/data_scaling.py.
"""

from common import cli
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from model.chat_template import CHAT_FORMATS
from trainer.config import add_length_flag, make_training_parser, parse_fractions
from trainer.recipes import add_recipe_flag, describe_recipe


def compute_loss(model, batch):
    """The sum of -log p(next token) over the tokens of the answers, and how many they were.

    batch["labels"] (batch, seq) holds IGNORE_INDEX at every token that is not part of an answer.
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
    add("--chat_format", choices=CHAT_FORMATS, help="how chats are written from now on; none given: as the parent does")
    add_recipe_flag(parser)
    add_length_flag(parser, "longer chats lose their last turns")
    add("--data_share", action=cli.NameList, read=parse_fractions, metavar="SHARE",
        help="train one model per share of the chats and compare them: 0.1,0.3,0.5,1.0")  # fmt: skip
    add(
        "--questions",
        type=cli.path_string,
        metavar="FILE",
        help="with --data_share: count right answers too (jsonl as for 2-eval.py)",
    )
    args = parser.parse_args()
    if args.questions and not args.data_share:
        raise UserError("--questions belongs to --data_share; of one model 2-eval.py counts the right answers")
    if args.max_minutes and args.data_share:
        raise UserError("--data_share compares models after the same epochs: leave out --max_minutes")
    check_writable(args.out_dir)

    from evaluation.data_scaling import run_data_scaling
    from export.hf_import import open_model
    from model.checkpoint import find_parent
    from trainer.datasets import open_chat_data
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
