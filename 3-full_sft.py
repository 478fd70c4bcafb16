"""Lesson 3: supervised fine-tuning (SFT). A pretrained model learns to answer; all weights are trained.

    loss = - 1/N * sum over the N answer tokens of a step of log p(token | the tokens before it)

The loss function is that of lesson 1. Only the labels differ: tokens of the prompt are masked out, tokens of the
answers and their <|im_end|> are trained.

    python 3-full_sft.py                                            starts from the only out/pretrain_*.pth
    python 3-full_sft.py --init_from out/pretrain_512.pth --epochs 3
    python 3-full_sft.py --init_from ../Qwen3-0.6B --chat_format belle    a transformers folder (export/hf_config.py)
    python 3-full_sft.py --recipe belle --data_fractions 0.1,0.3,1.0   BELLE's hyper-parameters on parts of the data
    torchrun --nproc_per_node 2 3-full_sft.py                       two processes; or deepspeed --num_gpus 2

Reads   dataset/sft (written by data_process.py sft) and the parent checkpoint, which holds its config and tokenizer.
Writes  out/full_sft_512.pth, its log (.jsonl), its curves (.png) and, until the run is complete, its .resume folder;
        with --data_fractions the folder out/data_study/ instead.
Next:   2-eval.py (chat with it); code: model/tokenizer.py (the mask), model/chat_template.py (chat formats),
        trainer/sampler.py (batches of similar length), evaluation/data_scaling.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from common.cli import NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from common.flag_types import parse_fractions, path_string
from export.hf_import import open_model
from model.chat_template import CHAT_FORMATS
from trainer.chat_data import open_chat_data
from trainer.config import RECIPES, TrainConfig, length_flag
from trainer.distributed import init_distributed
from trainer.loop import train
from trainer.loss import cross_entropy_sum
from trainer.stage import Stage, find_source


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Settings of lesson 3."""

    main_flags = (
        "data_path", "init_from", "out_dir", "epochs", "max_minutes", "batch_size", "learning_rate", "max_seq_len",
        "chat_format", "device", "resume", "run_name", "explain",
    )  # fmt: skip
    learning_rates: ClassVar = {"muon": 1e-3, "adamw": 2e-4}
    data_path: str = "dataset/sft"
    batch_size: int = 32
    epochs: float = 2
    max_seq_len: int | None = length_flag(
        "longer chats keep only the first turns that fit; more than the parent's extends the model's context"
    )
    chat_format: str | None = flag(
        None, "chat format to train with; if omitted: the parent's", choices=tuple(CHAT_FORMATS), group="fine-tuning"
    )
    data_fractions: tuple[float, ...] = flag(
        (), "train one model on each fraction of the chats and compare them: 0.1,0.3,0.5,1.0", group="fine-tuning",
        action=NameList, parse=parse_fractions, metavar="FRACTION", aliases=("data_share",),
    )  # fmt: skip
    questions: str = flag(
        "", "with --data_fractions: also count correct answers to these questions (jsonl as for 2-eval.py)",
        type=path_string, metavar="FILE", group="fine-tuning",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.questions and not self.data_fractions:
            raise UserError("--questions needs --data_fractions; for one model run 2-eval.py --questions")
        if self.max_minutes and self.data_fractions:
            raise UserError("--data_fractions compares models after equally many epochs: leave out --max_minutes")


def compute_loss(model, batch):
    """Return (sum of -log p(label) over the answer tokens, {name: sum to log}).

    batch["input_ids"], ["labels"] and ["token_mask"] are (batch, seq). Labels are the token ids shifted by one, and
    IGNORE_INDEX where the next token is not part of an answer.
    """
    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    loss = cross_entropy_sum(hidden, model.lm_head.weight, batch["labels"])
    aux_loss = aux_loss * batch["num_targets"]
    return loss + aux_loss, {"aux_loss": aux_loss}


def main() -> None:
    config = parse(SFTConfig, __doc__, flag_files={"--recipe": {"belle": str(RECIPES / "belle-sft.args")}})
    check_writable(config.out_dir)
    source = find_source(config, "full_sft")
    model, tokenizer, parent = open_model(source)
    tokenizer = tokenizer.with_chat_format(config.chat_format)
    max_seq_len = config.max_seq_len or model.config.max_seq_len
    if max_seq_len > model.config.max_seq_len:  # no weight depends on it
        model.set_rope(dataclasses.replace(model.config, max_seq_len=max_seq_len))
    with init_distributed(config.device, config.dtype, config.seed, config.dist_timeout) as dist:
        data, validation = open_chat_data(config.data_path, max_seq_len, tokenizer, dist)
        stage = Stage("full_sft", model, tokenizer, compute_loss, data, validation, parent["lineage"], source=source)
        dist.print0(f"chat format {tokenizer.chat_format.name}")
        if config.data_fractions:
            from evaluation.data_scaling import run_data_scaling

            run_data_scaling(config, stage, dist, config.data_fractions, config.questions)
        else:
            train(config, stage, dist)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
