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
from trainer.datasets import Batch, Rows
from trainer.loss import IGNORE
from trainer.metrics import Row

ComputeLoss = Callable[[nn.Module, Batch], tuple[Any, ...]]  # -> (sum of losses, how many[, {name: sum to be logged}])


@dataclass
class Stage:
    """What a script hands to `train`: the WHAT."""

    name: str  # "pretrain", "full_sft": the first part of the file names
    model: Transformer
    tokenizer: ChatTokenizer
    compute_loss: ComputeLoss
    data: Rows
    validation: dict[str, Rows] = field(default_factory=dict)  # split ("zh", "en") -> rows
    lineage: list[dict[str, Any]] = field(default_factory=list)  # of the parent
    unit: str = "token"  # what losses are summed over and divided by: "pair" for DPO
    guard: Callable[[Row], str] | None = None  # asked after every step: why the stage should end here, or ""
    examine: Callable[[], Row] | None = None  # what else is measured with the final validation
    mix: dict[str, Any] = field(default_factory=dict)  # the shares of a mixture, for the lineage

    def path(self, out_dir: str) -> Path:
        return Path(out_dir) / f"{self.name}_{self.model.config.name}.pth"

    def count(self, batch: Batch) -> int:
        """How many tokens (or pairs) of a batch are trained: what compute_loss will say, known before it runs."""
        trained = batch["labels"] != IGNORE
        return int(trained.sum() if self.unit == "token" else trained.any(1).chunk(2)[0].sum())
