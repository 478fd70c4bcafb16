"""Experiment trackers beside the jsonl log: --tracker wandb, tensorboard or swanlab.

    wandb          WANDB_MODE, else offline: in online mode it waits for a network
    tensorboard    out/tensorboard/{stage}_{size}; tensorboard --logdir out/tensorboard shows it
    swanlab        SWANLAB_MODE, else offline; its files lie in ./swanlog

A package is imported when its tracker is used. A tracker that fails does not stop the training.
Read next: metrics.py (the caller).
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from trainer.config import TrainConfig


@dataclass
class Tracker:
    """Sends the rows of a log to a tracker. `log` and `close` may raise anything."""

    name: str
    log: Callable[[dict[str, Any]], object]
    close: Callable[[], object] = lambda: None


def open_tracker(config: TrainConfig, path: Path, last_step: int) -> Tracker | None:
    """Open the tracker of --tracker for the log at `path`. Returns None without one, and if it fails to start.

    last_step: the step from which the run resumes. Raises UserError if the package is not installed.
    """
    name = "wandb" if config.use_wandb else config.tracker
    if name == "none":
        return None
    open_function = {"wandb": open_wandb, "tensorboard": open_tensorboard, "swanlab": open_swanlab}[name]
    try:
        return open_function(config, path, last_step)
    except ImportError:
        raise UserError(f"--tracker {name} needs {name}: pip install {name}") from None
    except Exception as error:  # no network, no login, no disk space: the jsonl log has everything
        reason = " ".join(str(error).split())[:200]
        print(f"{name} failed ({type(error).__name__}: {reason}); training continues without it", file=sys.stderr)
        return None


def open_wandb(config: TrainConfig, path: Path, last_step: int) -> Tracker:
    os.environ.setdefault("WANDB_MODE", "offline")
    import wandb

    run = wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=dataclasses.asdict(config))
    return Tracker("wandb", lambda row: run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"]))


def open_tensorboard(config: TrainConfig, path: Path, last_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    folder = path.parent / "tensorboard" / path.stem
    writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else None)

    def log(row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            writer.add_scalar(key, value, row["step"])
        for i, sample in enumerate(row.get("samples", ())):
            writer.add_text(f"sample {i + 1}", f"{sample['prompt']}\n\n{sample['answer']}", row["step"])
        writer.flush()

    return Tracker("tensorboard", log, writer.close)


def open_swanlab(config: TrainConfig, path: Path, last_step: int) -> Tracker:
    import swanlab

    mode: Any = os.environ.get("SWANLAB_MODE", "offline")
    settings = {key: value if isinstance(value, (int, float, str)) else str(value)
                for key, value in dataclasses.asdict(config).items()}  # fmt: skip
    run: Any = swanlab.init(
        project=config.wandb_project, experiment_name=config.wandb_run_name or path.stem, config=settings, mode=mode
    )

    def log(row: dict[str, Any]) -> None:
        if found := numbers(row):  # it reports an error for an empty row
            run.log(found, step=row["step"])

    return Tracker("swanlab", log, swanlab.finish)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by name: {"val_loss": {"zh": 1.5}} becomes {"val_loss/zh": 1.5}."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": number for name, number in numbers(value).items()}
        elif isinstance(value, (int, float)) and key != "step":
            found[key] = value
    return found
