"""Non-finite and diverged runs: when they end, which states may be saved, and what the next start says.

    a step is skipped      its loss or the norm of its gradient is not finite: no weight has changed
    the run diverges       the mean loss of its last 10 steps is above --max_loss_ratio x its first loss
    the run ends by it     when 5 steps in a row are skipped (25 with an fp16 scaler), when it diverges, and when its
                           last step leaves a state that is not good

A state is saved only if it is good: the last step was not skipped, the weights and the optimizer's state are finite,
and the loss of a micro-batch of that step, computed again with the new weights, is finite and within the limit. A save
that is due in another state is made after the next step that leaves a good one. An overflow of scaled fp16 gradients at
a finite loss, which a scaler makes now and then, is no bad step once this process has trained one.

A run that ends by it leaves the last saved step as it was, and a note beside it that the next start shows. All numbers
are those of all processes together, so that all decide alike.
Read next: loop.py (who asks), checkpoint_writer.py.
"""

import argparse
import math
from collections import deque

import torch

from common.errors import UserError
from common.files import remove, write_text
from trainer.datasets import Batch, to_device
from trainer.distributed import Run
from trainer.engine import Engine
from trainer.metrics import Logbook
from trainer.sampler import StepPlan
from trainer.stage import Stage
from trainer.train_state import Progress, resume_path

WINDOW = 10  # steps of the mean loss
PAIR_LOSS = 2.0  # the least first loss of a stage that learns from pairs; ln 2 is DPO's
SHOWN = 8  # data rows in a message
LOWER_RATE = "lower --learning_rate"
ADVICE = f"{LOWER_RATE}, look at these data rows, or use --dtype float32"


class Watch:
    """Looks at every step: says which were skipped, ends the run (UserError), and knows whether it may be saved."""

    def __init__(self, run: Run, args: argparse.Namespace, stage: Stage, plan: StepPlan, log: Logbook) -> None:
        self.run, self.plan, self.log, self.ratio = run, plan, log, args.max_loss_ratio
        self.note = resume_path(stage.path(args.out_dir)) / "note.txt"
        self.vocabulary_loss = math.log(stage.model.config.vocab_size)
        self.least = PAIR_LOSS if stage.unit == "pair" else self.vocabulary_loss / 2
        self.untrained = not stage.lineage
        self.scaled = run.dtype == torch.float16
        self.losses: deque[float] = deque(maxlen=WINDOW)  # of the newest steps that were not skipped
        self.steps = self.trained = self.skipped = 0  # of this process: all, those not skipped, the newest in a row
        self.saved_step = 0  # that a step folder holds
        self.progress = Progress()
        self.trouble = ""  # what was wrong with the last step

    def start(self, progress: Progress, resumed: bool) -> None:
        """Begin behind the steps of `progress`; where an earlier process ended by bad steps, say what it noted."""
        self.progress = progress
        if resumed:
            self.saved_step = progress.step
            if self.note.is_file():
                self.log.say("before: " + self.note.read_text(encoding="utf-8", errors="replace").strip()[:500])

    @property
    def limit(self) -> float:
        """The highest mean loss of a run that does not diverge."""
        return self.ratio * max(self.progress.first_loss, self.least) if self.ratio else math.inf

    # ---- every step --------------------------------------------------------------------------------------------------
    def check(self, result: dict[str, float]) -> None:
        """Judge a step that has just been counted in `progress`. Raises UserError when the run is to end."""
        self.steps += 1
        if result["skipped"]:
            self.skip("loss" if not math.isfinite(result["loss"]) else "gradient")
            return
        loss = self.progress.loss
        self.trained, self.skipped, self.trouble = self.trained + 1, 0, ""
        if not self.progress.first_loss:
            self.progress.first_loss = self.vocabulary_loss if self.untrained else loss
        self.losses.append(loss)
        if self.mean() > self.limit:
            raise self.ending(self.diverged(self.mean()))

    def skip(self, what: str) -> None:
        self.skipped += 1
        self.log.say(f"step {self.progress.step} skipped: the {what} is not finite (data rows {self.rows()})")
        in_a_row = f" {self.skipped} steps in a row" if self.skipped > 1 else ""
        self.trouble = f"the {what} is not finite{in_a_row}; the last batch held data rows {self.rows()}"
        if self.skipped >= (25 if self.scaled else 5):  # an fp16 scaler finds its scale by failing
            raise self.ending(self.trouble)
        if self.scaled and what == "gradient" and self.trained and self.skipped < 5:
            self.trouble = ""

    def rows(self) -> str:
        """The numbers of the data rows of the last step, the first ones of many."""
        rows = self.plan.rows(self.progress.step - 1).tolist()
        return str(rows) if len(rows) <= SHOWN else f"{str(rows[:SHOWN])[:-1]}, …]"

    def mean(self, *more: float) -> float:
        losses = [*self.losses, *more][-WINDOW:]
        return sum(losses) / max(len(losses), 1)

    def diverged(self, loss: float) -> str:
        return f"the loss has risen to {loss:.4g}, above {self.limit:.4g} (--max_loss_ratio {self.ratio:g}; 0: off)"

    # ---- saves -------------------------------------------------------------------------------------------------------
    def problem(self, engine: Engine, batches: list[Batch], final: bool) -> str:
        """Why the state after the last step is not good, or "". All processes must ask.

        A save that may wait waits for a loss within the limit; the final one for a mean loss within it.
        """
        if self.trouble:
            return self.trouble
        if self.steps and not self.trained:
            return "all steps were skipped"
        largest, loss = largest_number(engine), measured_loss(self.run, engine, batches)
        if self.run.sum([float(not math.isfinite(largest))])[0]:
            return "a weight or a number of the optimizer's state is not finite"
        if loss is None:
            return ""
        if not math.isfinite(loss):
            return "the loss after the step is not finite"
        loss = self.mean(loss) if final else loss
        return self.diverged(loss) if loss > self.limit else ""

    def saved(self) -> None:
        """The last step is being saved."""
        self.saved_step = self.progress.step
        if self.run.is_main:
            remove(self.note)

    def postponed(self, problem: str, already: bool) -> bool:
        """Whether a due save has to wait for another step, because there is a problem; said once."""
        if problem and not already:
            self.log.say(f"step {self.progress.step} is not saved: {problem}; the next good one is")
        return bool(problem)

    # ---- the end -----------------------------------------------------------------------------------------------------
    def ending(self, trouble: str, advice: str = "") -> UserError:
        """The line with which the run ends; it is also noted for the next start."""
        advice = advice or (LOWER_RATE if "--max_loss_ratio" in trouble else ADVICE)
        text = f"step {self.progress.step}: {trouble}: {advice}"
        if not self.saved_step:
            return UserError(f"{text}; no step is saved: the same command starts anew")
        if self.run.is_main:
            write_text(self.note, text + "\n")
        return UserError(f"{text}; the same command resumes from step {self.saved_step}")

    def check_validation(self, losses: dict[str, float]) -> None:
        """Raises UserError when a final validation loss is not finite. The model is saved; its training is not over."""
        if bad := [split for split, loss in losses.items() if not math.isfinite(loss)]:
            raise self.ending(f"the validation loss of {', '.join(bad)} is not finite", "use --dtype float32")


def largest_number(engine: Engine) -> float:
    """The largest absolute value among the weights that train, and this process's optimizer state; maybe nan or inf."""
    tensors = [p.detach() for p in engine.stage.model.parameters() if p.requires_grad] if engine.run.is_main else []
    for optimizer in engine.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value) and value.is_floating_point()]
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return 0.0
    return float(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf))


def measured_loss(run: Run, engine: Engine, batches: list[Batch]) -> float | None:
    """The loss of the last micro-batches of all processes, per token or pair; None when no step was made."""
    if not batches:
        return None
    with engine.evaluating():
        loss, count, _ = engine.evaluate(to_device(batches[0], run.device))
    total, counted = run.sum([float(loss), float(count)])
    return total / max(counted, 1)
