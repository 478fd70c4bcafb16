"""Useful tokens per second of a training step: tokens that are not padding, with our batches and with padded ones.

    python -m benchmarks.loaders                          the data that README.md prepares (dataset/, model/tokenizer)
    python -m benchmarks.loaders --sft out/demo/sft --pretrain out/demo/pretrain --tokenizer out/demo/tokenizer

    pretraining   windows: PackedDataset                   padded: one document per row, cut or padded to --max_seq_len
    SFT           buckets: ChatDataset and BatchSampler    padded: random rows, each padded to --max_seq_len

All loaders train the same model with the same engine; a round runs some steps of every loader. Documents and chats
longer than --max_seq_len lose their end in a padded pretraining row and their last turns in both SFT loaders
(data_process.py). CPU seconds depend less on the load of the machine than seconds do.
Read next: harness.py, ../trainer/datasets.py, ../trainer/sampler.py.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from benchmarks.harness import Results, markdown_table
from common.cli import flag, parse
from common.errors import fail_in_one_line, require
from common.flag_groups import DeviceFlags
from common.flag_types import path_string, positive_int
from corpus.shard_reader import open_split
from corpus.token_folder import token_folder_name
from model.config import PRESETS, ModelConfig
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from trainer.config import TrainConfig
from trainer.datasets import (
    Batch,
    ChatDataset,
    MicroBatches,
    PackedDataset,
    TokenDataset,
    check_data,
    prefetch_batches,
)
from trainer.distributed import init_distributed
from trainer.engine import Engine
from trainer.loop import train_step
from trainer.loss import IGNORE_INDEX, cross_entropy_sum
from trainer.stage import Stage
from trainer.startup import make_engine

Loaders = dict[str, TokenDataset]


@dataclass(frozen=True)
class LoadersConfig(DeviceFlags):
    """Flags of this benchmark."""

    pretrain: str = flag("dataset/pretrain", "folder of texts written by data_process.py", type=path_string)
    sft: str = flag("dataset/sft", "folder of chats written by data_process.py", type=path_string)
    tokenizer: str = flag("model/tokenizer", "folder written by train_tokenizer.py", type=path_string)
    preset: str = flag("demo", "named model size", choices=tuple(PRESETS))
    max_seq_len: int = flag(512, "tokens per row", type=positive_int)
    batch_size: int = flag(32, "rows per step", type=positive_int)
    steps: int = flag(8, "steps per round", type=positive_int)
    rounds: int = flag(5, "rounds", type=positive_int)


@dataclass
class PaddedRows(TokenDataset):
    """The rows of another dataset, each padded to `width` tokens; `lengths` is None, so steps have random rows."""

    rows: TokenDataset
    width: int
    padding: dict[str, int] = field(default_factory=lambda: {"input_ids": 0, "labels": IGNORE_INDEX, "token_mask": 0})  # nosec B105

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, row_ids: np.ndarray) -> Batch:
        batch = self.rows.batch(row_ids)
        missing = self.width - batch["labels"].shape[1]
        return batch | {name: F.pad(batch[name], (0, missing), value=value) for name, value in self.padding.items()}


class CutDocuments(TokenDataset):
    """One document of a text split per row, cut or padded to `width` tokens."""

    def __init__(self, folder: str, width: int) -> None:
        self.tokens, self.width = open_split(folder, "train"), width

    def __len__(self) -> int:
        return self.tokens.documents

    def batch(self, row_ids: np.ndarray) -> Batch:
        documents = [self.tokens.read_document(int(row))[0][: self.width + 1] for row in row_ids]
        return PackedDataset.collate(documents, self.width, row_ids)


def open_loaders(config: LoadersConfig) -> dict[str, Loaders]:
    """Return {stage: {name: loader}}; the first loader of a stage is the padded one. Raises UserError."""
    tokenizer, width = load_tokenizer(config.tokenizer), config.max_seq_len
    check_data(config.pretrain, "pretrain", tokenizer)
    folder = str(Path(config.sft) / token_folder_name(tokenizer))
    check_data(folder, "chats", tokenizer)
    chats = ChatDataset(folder, "train", tokenizer.pad_id)
    require(chats.max_width <= width, f"{config.sft} has rows of {chats.max_width} tokens: give --max_seq_len")
    return {
        "pretraining": {
            "padded": CutDocuments(config.pretrain, width),
            "windows": PackedDataset(config.pretrain, "train", width),
        },
        "SFT": {"padded": PaddedRows(chats, width), "buckets": chats},
    }


def compute_loss(model, batch):
    hidden, _ = model(batch["input_ids"], token_mask=batch["token_mask"])
    return cross_entropy_sum(hidden, model.lm_head.weight, batch["labels"]), {}


def run_steps(engine: Engine, data: TokenDataset, config: LoadersConfig, steps: range) -> dict[str, float]:
    """Train on the rows of these steps. Returns useful tokens per second and per CPU second, and their fraction."""
    batches = MicroBatches(data, data.batch_sampler(config.batch_size, seed=0), config.batch_size, 0, 1)
    tokens, positions, start = 0.0, 0.0, (time.perf_counter(), time.process_time())
    for micro_batches in prefetch_batches(batches, steps):
        sums = train_step(engine, micro_batches).read()
        tokens, positions = tokens + sums["num_tokens"], positions + sums["num_positions"]
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "useful_tokens_per_second": tokens / seconds,
        "useful_tokens_per_CPU_second": tokens / cpu_seconds,
        "useful_fraction": tokens / positions,
    }


def compare(engine: Engine, loaders: Loaders, config: LoadersConfig) -> Results:
    """Run every loader `rounds` times, interleaved; the steps of a round follow those of the round before."""
    results: Results = {name: {} for name in loaders}
    for data in loaders.values():
        run_steps(engine, data, config, range(1))  # allocates the buffers and the optimizer state
    for i in range(config.rounds):
        for name, data in loaders.items():
            steps = range(i * config.steps, (i + 1) * config.steps)
            for metric, value in run_steps(engine, data, config, steps).items():
                results[name].setdefault(metric, []).append(value)
    return results


def main() -> None:
    config = parse(LoadersConfig, __doc__)
    with init_distributed(config.device, config.dtype) as dist:
        tokenizer = load_tokenizer(config.tokenizer)
        shape = PRESETS[config.preset] | {"vocab_size": tokenizer.vocab_size, "max_seq_len": config.max_seq_len}
        model = Transformer(ModelConfig(**shape))
        stages = open_loaders(config)
        stage = Stage("loaders", model, tokenizer, compute_loss, stages["SFT"]["buckets"])
        engine = make_engine(TrainConfig(), stage, dist)
        for name, loaders in stages.items():
            results = compare(engine, loaders, config)
            for metric in ("useful_tokens_per_second", "useful_tokens_per_CPU_second"):
                print(f"\n{name}, {config.preset}, {config.batch_size} rows per step")
                print(markdown_table(results, metric, reference="padded"))
            for loader, metrics in results.items():
                print(f"{loader}: {statistics.mean(metrics['useful_fraction']):.1%} of the positions are useful")
        lengths = open_split(config.pretrain, "train").lengths()
        kept = np.minimum(lengths, config.max_seq_len + 1).sum() / lengths.sum()
        print(f"padded pretraining reads {kept:.1%} of the text")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
