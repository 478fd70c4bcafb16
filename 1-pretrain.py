"""Lesson 1: pretraining. A model that has seen nothing learns to continue text.

    loss = - sum over every token of log p(token | the tokens before it)

    python 1-pretrain.py                                        all defaults: 26.9 M parameters, dataset/pretrain
    python 1-pretrain.py --max_minutes 20                       as much as fits into 20 minutes
    python 1-pretrain.py --preset base --epochs 2               a larger model, two passes
    python 1-pretrain.py --plan --preset mindllm-1.3b           trains nothing: memory, time and cost, on paper
    python 1-pretrain.py --plan --presets small,mindllm-1.3b    these sizes side by side
    python 1-pretrain.py --mix zh=0.25,en=0.75                  shares of the languages (or sources)
    python 1-pretrain.py --mix zh=0.25,en=0.75 --stage2_mix zh=0.6,en=0.4 --stage2_at 0.7     then another mixture
    torchrun --nproc_per_node 2 1-pretrain.py                   two processes; deepspeed --num_gpus 2 does as well

Reads   dataset/pretrain (made by data_process.py pretrain) and model/tokenizer.
Writes  out/pretrain_512.pth, and beside it the log (.jsonl), the curves (.png) and, until the run is complete, .resume.
Next:   2-eval.py (look at it), 3-full_sft.py (teach it to answer); inside: trainer/loop.py, model/transformer.py.
"""

from common import cli
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from trainer.config import add_mix_flags, add_model_flags, check_memory, given_model_flags, make_parser, model_config
from trainer.memory import add_plan_flags, print_plan, steps_for


def compute_loss(model, batch):
    """The sum of -log p(next token) over all real tokens, and how many they were.

    The model gives hidden states (batch, seq, dim); labels (batch, seq) are the ids moved on by one. `balance` is the
    router's loss per token while an MoE trains, else 0.
    """
    from trainer.loss import cross_entropy_sum, output_weight

    hidden, balance = model(batch["input_ids"], real=batch["real"])
    loss, count = cross_entropy_sum(hidden, output_weight(model), batch["labels"])
    return loss + balance * count, count, {"balance_loss": balance * count}


def main() -> None:
    parser = make_parser(
        __doc__, {"muon": 8e-3, "adamw": 1e-3}, data_path="dataset/pretrain", batch_size=8, warmup_iters=20
    )
    parser.add_argument(
        "--tokenizer", type=cli.path, default="model/tokenizer", help="folder written by train_tokenizer.py"
    )
    add_mix_flags(parser)
    add_model_flags(parser)
    add_plan_flags(parser)
    args = parser.parse_args()
    if args.tokens_per_param and args.max_steps:
        raise UserError("--tokens_per_param and --max_steps both say how long to train: leave one out")
    if args.presets and not args.plan:
        raise UserError("--presets belongs to --plan")
    if args.plan:
        return print_plan(args)
    check_writable(args.out_dir)

    from export.hf_import import open_model
    from model.tokenizer import load_tokenizer
    from model.transformer import Transformer
    from trainer.datasets import Windows, open_data
    from trainer.distributed import start
    from trainer.loop import train
    from trainer.mixing import Mixture, read_recipe
    from trainer.stage import Stage
    from trainer.train_state import global_batch

    tokenizer = load_tokenizer(args.tokenizer)
    splits = open_data(args.data_path, "pretrain", tokenizer)
    mixed = args.mix or args.stage2_mix or args.stage2_at or args.mix_temperature != 1
    recipe = read_recipe(args) if mixed else None
    with start(args.device, args.dtype, args.seed, args.dist_timeout) as run:
        if args.init_from:  # go on from an earlier model, for example with other data
            if args.preset or given_model_flags(args):
                raise UserError("--init_from brings its own config: leave out --preset and the model's flags")
            model, theirs, parent = open_model(args.init_from)
            lineage = parent["lineage"]
            if theirs.fingerprint != tokenizer.fingerprint:
                raise UserError(f"{args.init_from} has tokenizer {theirs.fingerprint}, {args.tokenizer} is another one")
        else:
            config = model_config(args, tokenizer.vocab_size)
            check_memory(config)
            model, lineage = Transformer(config), []
        seq_len = model.config.max_seq_len
        validation = {s.removeprefix("val_"): Windows(args.data_path, s, seq_len) for s in splits if s != "train"}
        data = Windows(args.data_path, "train", seq_len)
        stage = Stage("pretrain", model, tokenizer, compute_loss, data, validation, lineage)
        if args.tokens_per_param:
            rows = global_batch(run, args, stage.path(args.out_dir))
            args.max_steps = steps_for(args.tokens_per_param, model.config, rows)
        if recipe:
            stage.data, stage.mix = Mixture(args.data_path, recipe, seq_len), recipe.to_dict(args)
        train(run, args, stage)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
