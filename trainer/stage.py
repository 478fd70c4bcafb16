"""Stage: the model, loss function, data and lineage that a training script passes to `train`.

Read next: loop.py (`train`), datasets.py (batches), loss.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.datasets import Batch, TokenDataset
from trainer.loss import IGNORE_INDEX
from trainer.metrics import MetricRow

# (model, batch) -> (sum of losses, number of tokens or pairs[, {name: sum to log}])
ComputeLoss = Callable[[nn.Module, Batch], tuple[Any, ...]]


@dataclass
class Stage:
    """One training stage. `train` (loop.py) runs it."""

    name: str  # "pretrain", "full_sft", …: the prefix of the file names
    model: Transformer
    tokenizer: ChatTokenizer
    compute_loss: ComputeLoss
    data: TokenDataset
    validation: dict[str, TokenDataset] = field(default_factory=dict)  # split ("zh", "en") -> rows
    lineage: list[dict[str, Any]] = field(default_factory=list)  # of the parent; empty when training from scratch
    loss_unit: str = "token"  # the loss is averaged over tokens, or over pairs ("pair", DPO)
    early_stop: Callable[[MetricRow], str] | None = None  # called after every step: the reason to stop, or ""
    final_metrics: Callable[[], MetricRow] | None = None  # further metrics of the final validation
    mix: dict[str, Any] = field(default_factory=dict)  # weights of the data mixture, for the lineage

    def checkpoint_path(self, out_dir: str) -> Path:
        return Path(out_dir) / f"{self.name}_{self.model.config.name}.pth"

    def count_targets(self, batch: Batch) -> int:
        """Number of trained tokens (or pairs) in a batch. Equals the count that `compute_loss` returns for it."""
        is_target = batch["labels"] != IGNORE_INDEX
        return int(is_target.sum() if self.loss_unit == "token" else is_target.any(1).chunk(2)[0].sum())
