"""Lesson 4: LoRA fine-tuning (Hu et al. 2021, arXiv:2106.09685). Only low-rank matrices are trained.

    loss = - 1/N * sum over the N answer tokens of a step of log p(token | the tokens before it)
    h    = W x + (alpha / r) B A x        W (out, in) is frozen; A (r, in) and B (out, r) are trained; B starts at 0

The loss is that of lesson 3. The checkpoint holds only A and B and names its parent; opening it loads the parent and
merges them into W + (alpha / r) B A.

    python 4-lora_sft.py                                            starts from the only out/full_sft_*.pth
    python 4-lora_sft.py --data_path dataset/identity --epochs 20   a small dataset, many epochs
    python 4-lora_sft.py --rank 16 --alpha 32 --targets attention   higher rank, attention matrices only
    python 4-lora_sft.py --peft_dir out/peft                        also write the adapter in peft's format
    torchrun --nproc_per_node 2 4-lora_sft.py                       two processes; or deepspeed --num_gpus 2

Reads   dataset/sft (or another folder written by data_process.py sft) and the parent checkpoint.
Writes  out/lora_sft_512.pth, its log (.jsonl), its curves (.png) and, until the run is complete, its .resume folder.
Next:   2-eval.py (chat with it); code: model/lora.py (the formula), model/checkpoint.py (finding the parent).
"""

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from trainer.legacy_config import add_length_flag, make_training_parser

LORA_FLAGS = ("rank", "alpha", "lora_dropout", "targets")


def compute_loss(model, batch):
    """Return (sum of -log p(label) over the answer tokens, number of answer tokens, sums to log).

    batch["input_ids"], ["labels"] and ["token_mask"] are (batch, seq). Labels are the token ids shifted by one, and
    IGNORE_INDEX where the next token is not part of an answer.
    """
    from trainer.loss import cross_entropy_sum, output_weight

    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    loss, count = cross_entropy_sum(hidden, output_weight(model), batch["labels"])
    return loss + aux_loss * count, count, {"aux_loss": aux_loss * count}


def add_lora_flags(parser):
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=flag_types.int_between(1, 65536), default=8, help="r: rows of A and columns of B")
    add("--alpha", type=flag_types.NumberType(float, "a number above 0 and at most 1e6", lambda a: 0 < a <= 1e6), default=16.0,
        help="B A is scaled by alpha / r")  # fmt: skip
    add("--lora_dropout", type=flag_types.fraction_below_one, default=0.0, help="dropout on the input of A")
    add("--targets", action=cli.NameList, default=["all"], metavar="NAME",
        help="matrices to adapt: all (or all-linear), attention, mlp, experts, shared_experts, q_proj, … "
        "separated by commas or spaces")  # fmt: skip
    add(
        "--init_adapter",
        type=flag_types.path_string,
        metavar="DIR",
        help="start from the adapter in a peft folder, with its rank, alpha, dropout and targets",
    )
    add(
        "--peft_dir",
        type=flag_types.path_string,
        metavar="DIR",
        help="also write the adapter there in peft's format: adapter_config.json, adapter_model.safetensors",
    )


def main() -> None:
    rates = {"muon": 4e-3, "adamw": 2e-3}  # about ten times those of full SFT worked best in our measurements
    parser = make_training_parser(__doc__, rates, data_path="dataset/sft", batch_size=32, epochs=2)
    # No weight decay: it would pull A and B to zero, which pulls the model back to its parent.
    parser.set_defaults(optimizer="adamw", weight_decay=0.0)
    add_lora_flags(parser)
    add_length_flag(parser, "longer chats keep only the first turns that fit")
    args = parser.parse_args()
    given = [f"--{name}" for name in LORA_FLAGS if getattr(args, name) != parser.get_default(name)]
    if args.init_adapter and given:
        raise UserError(f"--init_adapter brings its own rank, alpha, dropout and targets: leave out {' '.join(given)}")
    for folder in filter(None, (args.out_dir, args.peft_dir)):
        check_writable(folder)

    from export.hf_import import open_folder, open_model
    from export.peft_adapter import peft_settings, read_peft, write_peft
    from model.checkpoint import find_parent, record_parent
    from model.lora import LoRAConfig, adapter_summary, attach
    from trainer.chat_data import open_chat_data
    from trainer.distributed import init_distributed
    from trainer.loop import train
    from trainer.stage import Stage

    source = args.init_from or find_parent(args.out_dir, "lora_sft")
    model, tokenizer, parent = open_model(source)
    if args.init_adapter:
        read_peft(args.init_adapter, model)
    else:
        attach(model, LoRAConfig(args.rank, args.alpha, args.lora_dropout, tuple(args.targets)), args.seed)
    if args.peft_dir:
        peft_settings(model)  # raises before training if peft's format cannot hold this adapter
    with init_distributed(args.device, args.dtype, args.seed, args.dist_timeout) as dist:
        data, validation = open_chat_data(dist, args, model.config, tokenizer)
        stage = Stage("lora_sft", model, tokenizer, compute_loss, data, validation, parent["lineage"])
        record_parent(model, source, stage.checkpoint_path(args.out_dir), open_folder)
        dist.print0(adapter_summary(model))
        path = train(dist, args, stage)
        if dist.is_rank0:
            size = f"{path.stat().st_size / 2**20:.2f} MB"
            print(f"{path} holds the adapter alone, {size}; loading it also needs {source}")
            if args.peft_dir:
                write_peft(args.peft_dir, model)
                print(f"saved {args.peft_dir} in peft's format")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
