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
from model.chat_template import FORMAT_NAMES
from trainer.config import add_length_flag, make_parser, shares
from trainer.recipes import add_recipe_flag, describe_recipe


def compute_loss(model, batch):
    """The sum of -log p(next token) over the tokens of the answers, and how many they were.

    batch["labels"] (batch, seq) holds IGNORE at every token that is not part of an answer.
    """
    from trainer.loss import cross_entropy_sum, output_weight

    hidden, balance = model(batch["input_ids"], real=batch["real"])
    loss, count = cross_entropy_sum(hidden, output_weight(model), batch["labels"])
    return loss + balance * count, count, {"balance_loss": balance * count}


def main() -> None:
    parser = make_parser(__doc__, {"muon": 5e-4, "adamw": 2e-4}, data_path="dataset/sft", batch_size=32, epochs=2)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--chat_format", choices=FORMAT_NAMES, help="how chats are written from now on; none given: as the parent does")
    add_recipe_flag(parser)
    add_length_flag(parser, "longer chats lose their last turns")
    add("--data_share", action=cli.NameList, read=shares, metavar="SHARE",
        help="train one model per share of the chats and compare them: 0.1,0.3,0.5,1.0")  # fmt: skip
    add(
        "--questions",
        type=cli.path,
        metavar="FILE",
        help="with --data_share: count right answers too (jsonl as for 2-eval.py)",
    )
    args = parser.parse_args()
    if args.questions and not args.data_share:
        raise UserError("--questions belongs to --data_share; of one model 2-eval.py counts the right answers")
    if args.max_minutes and args.data_share:
        raise UserError("--data_share compares models after the same epochs: leave out --max_minutes")
    check_writable(args.out_dir)

    from evaluation.data_scaling import run_study
    from export.hf_import import open_model
    from model.checkpoint import find_parent
    from trainer.datasets import open_chats
    from trainer.distributed import start
    from trainer.loop import train
    from trainer.stage import Stage

    model, tokenizer, parent = open_model(args.init_from or find_parent(args.out_dir, "full_sft"))
    tokenizer = tokenizer.with_format(args.chat_format)
    with start(args.device, args.dtype, args.seed, args.dist_timeout) as run:
        data, validation = open_chats(run, args, model.config, tokenizer)
        stage = Stage("full_sft", model, tokenizer, compute_loss, data, validation, parent["lineage"])
        run.say(f"chat format {tokenizer.chat_format.name}" + (f"; {describe_recipe(args)}" if args.recipe else ""))
        (run_study if args.data_share else train)(run, args, stage)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
