"""Stage: the model, loss function, data and lineage that a training script passes to `train`.

Read next: loop.py (`train`), datasets.py (batches), loss.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import find_parent
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.config import TrainConfig
from trainer.datasets import Batch, TokenDataset
from trainer.loss import IGNORE_INDEX
from trainer.metrics import MetricRow

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]  # sum of the losses of a batch, {name: sum to log}, all on the device
ComputeLoss = Callable[[nn.Module, Batch], LossAndMetrics]


def find_source(config: TrainConfig, stage: str) -> str:
    """The model that a stage starts from: --init_from, else its parent stage's of this run, else that in --out_dir.

    Raises UserError if there is none, or more than one.
    """
    return config.init_from or str(find_parent(stage, config.out_dir, config.out_root))


@dataclass
class Stage:
    """One training stage. `train` (loop.py) runs it."""

    name: str  # "pretrain", "full_sft", …: the prefix of the file names
    model: Transformer
    tokenizer: ChatTokenizer
    compute_loss: ComputeLoss
    data: TokenDataset
    validation: Mapping[str, TokenDataset] = field(default_factory=dict)  # split ("zh", "en") -> rows
    lineage: list[dict[str, Any]] = field(default_factory=list)  # of the parent; empty when training from scratch
    loss_unit: str = "token"  # the loss is averaged over tokens, or over pairs ("pair", DPO)
    early_stop: Callable[[MetricRow], str] = lambda row: ""  # called after every step: the reason to stop, or ""
    plan: Mapping[str, Any] = field(default_factory=dict)  # what --minutes chose; saved with the run (timed_run.py)
    final_metrics: Callable[[], MetricRow] = dict  # further metrics of the final validation
    source: str = ""  # the model that training starts from: a .pth or a folder

    def checkpoint_path(self, out_dir: str) -> Path:
        return Path(out_dir) / f"{self.name}_{self.model.config.name}.pth"

    @cached_property
    def byte_lengths(self) -> Tensor:
        return torch.from_numpy(self.tokenizer.byte_lengths())

    def utf8_bytes(self, labels: Tensor) -> int:
        """Return the number of UTF-8 bytes of the trained tokens. labels: of a batch, on the CPU."""
        return int(self.byte_lengths[labels[labels != IGNORE_INDEX]].sum())
