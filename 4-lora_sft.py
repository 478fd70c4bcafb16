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

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from common.cli import NameList, flag, parse
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from common.flag_types import NumberType, fraction_below_one, int_between, path_string
from export.hf_import import open_folder, open_model
from export.peft_adapter import peft_settings, read_peft, write_peft
from model.checkpoint import record_parent
from model.lora import LoRAConfig, adapter_summary, attach
from trainer.chat_data import open_chat_data
from trainer.config import TrainConfig, length_flag
from trainer.distributed import init_distributed
from trainer.loop import train
from trainer.loss import cross_entropy_sum
from trainer.stage import Stage, find_source

ALPHA = NumberType(float, "a number above 0 and at most 1e6", lambda alpha: 0 < alpha <= 1e6)


@dataclass(frozen=True)
class LoRASFTConfig(TrainConfig):
    """Settings of lesson 4."""

    main_flags = (
        "data_path", "init_from", "out_dir", "rank", "alpha", "targets", "epochs", "max_minutes", "batch_size",
        "learning_rate", "max_seq_len", "peft_dir", "device", "run_name", "explain",
    )  # fmt: skip
    learning_rates: ClassVar = {"muon": 4e-3, "adamw": 2e-3}  # best in our measurements (LOG.md)
    data_path: str = "dataset/sft"
    batch_size: int = 32
    epochs: float = 2
    optimizer: str = "adamw"
    weight_decay: float = 0.0  # a decay would pull A and B to zero, and the model back to its parent
    max_seq_len: int | None = length_flag("longer chats keep only the first turns that fit")
    rank: int = flag(8, "r: rows of A and columns of B", type=int_between(1, 65536), group="LoRA")
    alpha: float = flag(16.0, "B A is scaled by alpha / r", type=ALPHA, group="LoRA")
    lora_dropout: float = flag(0.0, "dropout on the input of A", type=fraction_below_one, group="LoRA")
    targets: tuple[str, ...] = flag(
        ("all",), "matrices to adapt: all (or all-linear), attention, mlp, experts, shared_experts, q_proj, … "
        "separated by commas or spaces", action=NameList, metavar="NAME", group="LoRA",
    )  # fmt: skip
    init_adapter: str = flag(
        "", "start from the adapter in a peft folder, with its rank, alpha, dropout and targets",
        type=path_string, metavar="DIR", group="LoRA",
    )  # fmt: skip
    peft_dir: str = flag(
        "", "also write the adapter there in peft's format: adapter_config.json, adapter_model.safetensors",
        type=path_string, metavar="DIR", group="LoRA",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [
            f"--{name}"
            for name in ("rank", "alpha", "lora_dropout", "targets")
            if getattr(self, name) != defaults[name]
        ]
        if self.init_adapter and given:
            raise UserError(
                f"--init_adapter brings its own rank, alpha, dropout and targets: leave out {' '.join(given)}"
            )


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
    config = parse(LoRASFTConfig, __doc__)
    for folder in filter(None, (config.out_dir, config.peft_dir)):
        check_writable(folder)
    source = find_source(config, "lora_sft")
    model, tokenizer, parent = open_model(source)
    if config.init_adapter:
        read_peft(config.init_adapter, model)
    else:
        attach(model, LoRAConfig(config.rank, config.alpha, config.lora_dropout, config.targets), config.seed)
    if config.peft_dir:
        peft_settings(model)  # raises before training if peft's format cannot hold this adapter
    max_seq_len = min(config.max_seq_len or model.config.max_seq_len, model.config.max_seq_len)
    with init_distributed(config.device, config.dtype, config.seed, config.dist_timeout) as dist:
        data, validation = open_chat_data(config.data_path, max_seq_len, tokenizer, dist)
        stage = Stage("lora_sft", model, tokenizer, compute_loss, data, validation, parent["lineage"], source=source)
        record_parent(model, source, stage.checkpoint_path(config.out_dir), open_folder)
        dist.print0(adapter_summary(model))
        path = train(config, stage, dist)
        if not dist.is_rank0:
            return
        size = f"{path.stat().st_size / 2**20:.2f} MB"
        print(f"{path} holds the adapter alone, {size}; loading it also needs {source}")
        if config.peft_dir:
            write_peft(config.peft_dir, model)
            print(f"saved {config.peft_dir} in peft's format")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
