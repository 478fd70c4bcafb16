"""Lesson 1: pretraining. A randomly initialised model learns to predict the next token of text.

    loss = - 1/N * sum over the N tokens of a step of log p(token | the tokens before it)

    python 1-pretrain.py                                        defaults: 26.9 M parameters, dataset/pretrain
    python 1-pretrain.py --minutes 20                           the size and the tokens that suit 20 minutes here
    python 1-pretrain.py --max_minutes 20                       the default size for at most 20 minutes
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

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from common.cli import parse
from common.errors import UserError, fail_in_one_line
from common.files import check_writable
from export.hf_import import open_model
from model.tokenizer import ChatTokenizer, load_tokenizer
from model.transformer import Transformer
from trainer.config import MixFlags, PlanConfig
from trainer.datasets import PackedDataset, check_data
from trainer.distributed import init_distributed
from trainer.loop import train
from trainer.loss import cross_entropy_sum
from trainer.memory import check_memory
from trainer.mixing import MixedDataset, balanced_languages, read_mix_schedule
from trainer.stage import Stage
from trainer.train_state import resolve_global_batch_size


@dataclass(frozen=True)
class PretrainConfig(PlanConfig, MixFlags):
    """Settings of lesson 1."""

    main_flags = (
        "data_path", "tokenizer", "out_dir", "preset", "minutes", "epochs", "max_minutes", "batch_size",
        "learning_rate", "mix", "device", "resume", "plan", "run_name", "explain",
    )  # fmt: skip
    learning_rates: ClassVar = {"muon": 8e-3, "adamw": 1e-3}
    default_warmup_iters = 20
    data_path: str = "dataset/pretrain"


def compute_loss(model, batch):
    """Return (sum of -log p(label) over all trained tokens, {name: sum to log}).

    batch["input_ids"], ["labels"] and ["token_mask"] are (batch, seq); labels are the token ids shifted by one. The
    model returns hidden states (batch, seq, dim) and `aux_loss`, the load-balancing loss of MoE routers per token (0
    for a dense model and in eval mode).
    """
    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    loss = cross_entropy_sum(hidden, model.lm_head.weight, batch["labels"])
    aux_loss = aux_loss * batch["num_targets"]
    return loss + aux_loss, {"aux_loss": aux_loss}


def make_model(config: PretrainConfig, tokenizer: ChatTokenizer) -> tuple[Transformer, list[dict[str, Any]]]:
    """Return the model and its lineage: new and [], or those of --init_from (continued pretraining)."""
    if not config.init_from:
        model_config = config.model_config(tokenizer.vocab_size)
        check_memory(model_config)
        return Transformer(model_config), []
    if config.preset or config.model:
        raise UserError("--init_from brings its own config: leave out --preset and the model flags")
    model, saved_tokenizer, parent = open_model(config.init_from)
    if saved_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{config.init_from} has tokenizer {saved_tokenizer.fingerprint}, "
            f"{config.tokenizer} is {tokenizer.fingerprint}: give the tokenizer of the checkpoint"
        )
    return model, parent["lineage"]


def main() -> None:
    start = time.monotonic() - time.process_time()  # the imports took about as long as they kept the CPU busy
    config = parse(PretrainConfig, __doc__)
    if config.plan:
        from trainer.plan import print_plan

        return print_plan(config)
    check_writable(config.out_dir)
    tokenizer = load_tokenizer(config.tokenizer)
    splits = check_data(config.data_path, "pretrain", tokenizer)
    if config.minutes and not config.is_mixed:
        config = dataclasses.replace(config, mix=balanced_languages(config.data_path))
    mixture = read_mix_schedule(config.data_path, config) if config.is_mixed else None
    with init_distributed(config.device, config.dtype, config.seed, config.dist_timeout) as dist:
        plan = {}
        if config.minutes:
            from trainer.timed_run import TimedRun, describe_result

            config, plan = TimedRun(config, tokenizer, compute_loss, mixture, dist, start).choose()
        model, lineage = make_model(config, tokenizer)
        seq_len = model.config.max_seq_len
        data = {split.removeprefix("val_"): PackedDataset(config.data_path, split, seq_len) for split in splits}
        stage = Stage("pretrain", model, tokenizer, compute_loss, data.pop("train"), data, lineage, plan=plan)
        stage.source = config.init_from
        if config.tokens_per_param:
            rows = resolve_global_batch_size(config, stage.checkpoint_path(config.out_dir), dist)
            max_steps = config.steps_for_tokens(model.config, rows)
            config = dataclasses.replace(config, max_steps=max_steps, tokens_per_param=0.0)
        if mixture:
            mixture = dataclasses.replace(mixture, max_steps=config.max_steps, epochs=config.epochs)
            stage.data = MixedDataset(config.data_path, mixture, seq_len)
        path = train(config, stage, dist)
        if plan and (result := describe_result(plan, path, start)):
            dist.print0(result)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
