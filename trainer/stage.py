"""What a training script passes to `train`: a model, a loss and data, with the stage's name and lineage.

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

ComputeLoss = Callable[[nn.Module, Batch], tuple[Any, ...]]  # -> (sum of losses, how many[, {name: sum to be logged}])


@dataclass
class Stage:
    """What a script hands to `train`: the WHAT."""

    name: str  # "pretrain", "full_sft": the first part of the file names
    model: Transformer
    tokenizer: ChatTokenizer
    compute_loss: ComputeLoss
    data: TokenDataset
    validation: dict[str, TokenDataset] = field(default_factory=dict)  # split ("zh", "en") -> rows
    lineage: list[dict[str, Any]] = field(default_factory=list)  # of the parent
    loss_unit: str = "token"  # what losses are summed over and divided by: "pair" for DPO
    early_stop: Callable[[MetricRow], str] | None = None  # asked after every step: why the stage should end here, or ""
    final_metrics: Callable[[], MetricRow] | None = None  # what else is measured with the final validation
    mix: dict[str, Any] = field(default_factory=dict)  # the shares of a mixture, for the lineage

    def checkpoint_path(self, out_dir: str) -> Path:
        return Path(out_dir) / f"{self.name}_{self.model.config.name}.pth"

    def count_targets(self, batch: Batch) -> int:
        """How many tokens (or pairs) of a batch are trained: what compute_loss will say, known before it runs."""
        is_target = batch["labels"] != IGNORE_INDEX
        return int(is_target.sum() if self.loss_unit == "token" else is_target.any(1).chunk(2)[0].sum())
