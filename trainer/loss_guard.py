"""NonFiniteGuard: ends runs with non-finite or diverging loss and prevents saving their state.

    skipped step     its loss or gradient norm is not finite; the weights did not change
    divergence       the mean loss of the last 10 steps is above --max_loss_ratio x the first loss
    the run ends     after 5 skipped steps in a row (25 with an fp16 gradient scaler), on divergence, or if the state
                     after its last step is not valid

A state is valid if the last step was not skipped, the weights and the optimizer state are finite, and the loss of a
micro-batch of that step, evaluated again after the update, is finite and within the limit. Only valid states are saved:
a save that is due in another state is postponed to the next valid one. A gradient scaler causes fp16 overflows at a
finite loss now and then; such a step counts as valid once this process has trained a step.

When the guard ends the run, the last saved step is kept, with a note that the next start prints. All decisions use
sums over all processes, so that all processes decide alike.
Read next: loop.py (the caller), checkpoint_writer.py.
"""

import math
from collections import deque

import torch

from common.errors import UserError
from common.files import remove, write_text
from trainer.config import TrainConfig
from trainer.datasets import Batch, to_device
from trainer.distributed import DistContext, MetricSums
from trainer.engine import Engine
from trainer.metrics import MetricLogger
from trainer.sampler import BatchSampler
from trainer.stage import Stage
from trainer.train_state import TrainState, resume_path

MEAN_WINDOW = 10  # steps in the mean loss
MIN_PAIR_LOSS = 2.0  # lower bound of the first loss of a stage with pairs; DPO starts at ln 2
MAX_ROWS_SHOWN = 8  # data rows in a message
LOWER_RATE_ADVICE = "lower --learning_rate"
NON_FINITE_ADVICE = f"{LOWER_RATE_ADVICE}, check these data rows, or use --dtype float32"


class NonFiniteGuard:
    """Checks every step: prints skipped ones, ends the run (UserError), and decides whether a state may be saved."""

    def __init__(
        self, config: TrainConfig, stage: Stage, sampler: BatchSampler, logger: MetricLogger, dist: DistContext
    ) -> None:
        self.dist, self.sampler, self.logger, self.max_loss_ratio = dist, sampler, logger, config.max_loss_ratio
        self.note_path = resume_path(stage.checkpoint_path(config.out_dir)) / "note.txt"
        self.vocabulary_loss = math.log(stage.model.config.vocab_size)
        self.min_first_loss = MIN_PAIR_LOSS if stage.loss_unit == "pair" else self.vocabulary_loss / 2
        self.is_untrained = not stage.lineage
        self.has_grad_scaler = dist.dtype == torch.float16
        self.losses: deque[float] = deque(maxlen=MEAN_WINDOW)  # of the last steps that were not skipped
        # Steps of this process: all, not skipped, skipped in a row up to now.
        self.num_steps = self.num_trained = self.num_skipped = 0
        self.saved_step = 0  # the step of the newest step folder
        self.train_state = TrainState()
        self.step_problem = ""  # why the state after the last step is not valid, or ""
        self.micro_batches: list[Batch] = []  # of the last step

    def start_from(self, train_state: TrainState, is_resumed: bool) -> None:
        """Start after the steps of `train_state`. If the guard ended the earlier run, print its note."""
        self.train_state = train_state
        if is_resumed:
            self.saved_step = train_state.step
            if self.note_path.is_file():
                self.logger.print(
                    "before: " + self.note_path.read_text(encoding="utf-8", errors="replace").strip()[:500]
                )

    @property
    def max_mean_loss(self) -> float:
        """The mean loss above which the run counts as diverged."""
        return (
            self.max_loss_ratio * max(self.train_state.first_loss, self.min_first_loss)
            if self.max_loss_ratio
            else math.inf
        )

    # ---- every step --------------------------------------------------------------------------------------------------
    def check_step(self, metrics: dict[str, float], micro_batches: list[Batch]) -> None:
        """Check the step that `train_state` has just counted. Raises UserError if the run must end."""
        self.num_steps, self.micro_batches = self.num_steps + 1, micro_batches
        if metrics["skipped"]:
            self.record_skip("loss" if not math.isfinite(metrics["loss"]) else "gradient")
            return
        loss = self.train_state.loss
        self.num_trained, self.num_skipped, self.step_problem = self.num_trained + 1, 0, ""
        if not self.train_state.first_loss:
            self.train_state.first_loss = self.vocabulary_loss if self.is_untrained else loss
        self.losses.append(loss)
        if self.mean_loss() > self.max_mean_loss:
            raise self.make_error(self.divergence_message(self.mean_loss()))

    def record_skip(self, what: str) -> None:
        self.num_skipped += 1
        self.logger.print(
            f"step {self.train_state.step} skipped: the {what} is not finite (data rows {self.format_row_ids()})"
        )
        in_a_row = f" {self.num_skipped} steps in a row" if self.num_skipped > 1 else ""
        self.step_problem = f"the {what} is not finite{in_a_row}; the last batch held data rows {self.format_row_ids()}"
        if self.num_skipped >= (25 if self.has_grad_scaler else 5):  # a scaler finds its scale by skipping steps
            raise self.make_error(self.step_problem)
        if self.has_grad_scaler and what == "gradient" and self.num_trained and self.num_skipped < 5:
            self.step_problem = ""

    def format_row_ids(self) -> str:
        """Return the row ids of the last step as text, at most MAX_ROWS_SHOWN of them."""
        rows = self.sampler.row_ids(self.train_state.step - 1).tolist()
        return str(rows) if len(rows) <= MAX_ROWS_SHOWN else f"{str(rows[:MAX_ROWS_SHOWN])[:-1]}, …]"

    def mean_loss(self, *more: float) -> float:
        losses = [*self.losses, *more][-MEAN_WINDOW:]
        return sum(losses) / max(len(losses), 1)

    def divergence_message(self, loss: float) -> str:
        limit = f"{self.max_mean_loss:.4g} (--max_loss_ratio {self.max_loss_ratio:g}; 0: off)"
        return f"the loss has risen to {loss:.4g}, above {limit}"

    # ---- saves -------------------------------------------------------------------------------------------------------
    def save_problem(self, engine: Engine, final: bool) -> str:
        """Return why the state after the last step is not valid, or "". All processes must call it.

        Compares the new loss with the divergence limit; for the final save, which cannot be postponed, the mean loss.
        """
        if self.step_problem:
            return self.step_problem
        if self.num_steps and not self.num_trained:
            return "all steps were skipped"
        largest, loss = max_abs_value(engine), micro_batch_loss(self.dist, engine, self.micro_batches)
        if self.dist.all_reduce_sum([float(not math.isfinite(largest))])[0]:
            return "a weight or a number of the optimizer's state is not finite"
        if loss is None:
            return ""
        if not math.isfinite(loss):
            return "the loss after the step is not finite"
        loss = self.mean_loss(loss) if final else loss
        return self.divergence_message(loss) if loss > self.max_mean_loss else ""

    def mark_saved(self) -> None:
        """The last step is being saved."""
        self.saved_step = self.train_state.step
        if self.dist.is_rank0:
            remove(self.note_path)

    # ---- the end -----------------------------------------------------------------------------------------------------
    def make_error(self, step_problem: str, advice: str = "") -> UserError:
        """Return the error that ends the run, and write its text to a note that the next start prints."""
        advice = advice or (LOWER_RATE_ADVICE if "--max_loss_ratio" in step_problem else NON_FINITE_ADVICE)
        text = f"step {self.train_state.step}: {step_problem}: {advice}"
        if not self.saved_step:
            return UserError(f"{text}; no step is saved: the same command starts anew")
        if self.dist.is_rank0:
            write_text(self.note_path, text + "\n")
        return UserError(f"{text}; the same command resumes from step {self.saved_step}")

    def check_validation(self, losses: dict[str, float]) -> None:
        """Raise UserError if a final validation loss is not finite. The checkpoint and the resume folder are kept."""
        if bad := [split for split, loss in losses.items() if not math.isfinite(loss)]:
            raise self.make_error(f"the validation loss of {', '.join(bad)} is not finite", "use --dtype float32")


def max_abs_value(engine: Engine) -> float:
    """Return the largest absolute value of the trainable weights (on rank 0) and of this process's optimizer state.

    May be nan or inf.
    """
    tensors = [p.detach() for p in engine.stage.model.parameters() if p.requires_grad] if engine.dist.is_rank0 else []
    for optimizer in engine.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value) and value.is_floating_point()]
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return 0.0
    return float(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf))


def micro_batch_loss(dist: DistContext, engine: Engine, batches: list[Batch]) -> float | None:
    """Return the loss per token or pair of a micro-batch of the last step, over all processes; None before a step."""
    if not batches:
        return None
    with engine.eval_mode():
        loss, _ = engine.evaluate(to_device(batches[0], dist.device))
    sums = MetricSums(dist)
    sums.add(loss=loss, num_targets=batches[0]["num_targets"])
    total = sums.reduce().read()
    return total["loss"] / max(total["num_targets"], 1)
