"""TrainingTimer: elapsed training time and the time budget --max_minutes.

Read next: loop.py.
"""

import time

from trainer.distributed import DistContext


class TrainingTimer:
    """Seconds of training, and the fraction of --max_minutes that is used (0 without a limit).

    The learning rate follows the larger of the fractions of steps and of time, so a run with a time limit also ends
    at a low learning rate. A resumed run with a new time limit starts at the fraction of its steps that is done.
    """

    def __init__(self, max_minutes: float, start_fraction: float, earlier_seconds: float) -> None:
        self.limit_seconds, self.start_fraction, self.earlier_seconds = (
            60 * max_minutes,
            start_fraction,
            earlier_seconds,
        )
        self.start_time = self.step_start_time = time.monotonic()
        self.session_seconds = self.step_seconds = 0.0

    def start_step(self) -> None:
        self.step_start_time = time.monotonic()

    def end_step(self, dist: DistContext) -> None:
        """Distribute rank 0's times: all processes must agree on the learning rate and on when to stop."""
        now = time.monotonic()
        times = [now - self.start_time, now - self.step_start_time] if dist.is_rank0 else [0.0, 0.0]
        self.session_seconds, self.step_seconds = dist.all_reduce_sum(times)

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done by the time limit, in [0, 1]."""
        if not self.limit_seconds:
            return 0.0
        return self.start_fraction + (1 - self.start_fraction) * min(1.0, self.session_seconds / self.limit_seconds)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + self.session_seconds

    @property
    def is_expired(self) -> bool:
        """Whether another step would exceed the time limit."""
        return bool(self.limit_seconds) and self.session_seconds + self.step_seconds > self.limit_seconds

    def seconds_left(self, steps_left: int) -> float:
        by_steps = steps_left * self.step_seconds
        return max(0.0, min(by_steps, self.limit_seconds - self.session_seconds) if self.limit_seconds else by_steps)
