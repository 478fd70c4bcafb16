"""TrainingTimer: elapsed training time and the time budget --max_minutes.

Read next: loop.py.
"""

import time

from trainer.distributed import DistContext


class TrainingTimer:
    """Seconds of training, and the fraction of --max_minutes that is used (0 without a limit).

    The learning rate follows the larger of the fractions of steps and of time, so a run with a time limit also ends
    at a low learning rate. A resumed run with a new time limit starts at the fraction of its steps that is done.
    is_final: the run is complete at its limit, as with --minutes.
    """

    def __init__(
        self, max_minutes: float, start_fraction: float, earlier_seconds: float, dist: DistContext,
        is_final: bool = False,
    ) -> None:  # fmt: skip
        self.is_final = is_final
        self.limit_seconds, self.start_fraction, self.dist = 60 * max_minutes, start_fraction, dist
        self.earlier_seconds = earlier_seconds  # of the run before it was resumed
        self.start_time = self.step_start = time.monotonic()
        self.steps_in_flight = 0
        self.session_seconds = self.step_seconds = 0.0

    def start_step(self) -> None:
        """A step is launched. If the one before is not finished yet, its time begins when that one ends."""
        if not self.steps_in_flight:
            self.step_start = time.monotonic()
        self.steps_in_flight += 1

    def finish_step(self) -> float:
        """The oldest step is done. Returns the seconds of the run.

        With a time limit all processes get rank 0's times: they must agree on when to stop.
        """
        now = time.monotonic()
        times = [now - self.start_time, now - self.step_start]
        self.steps_in_flight, self.step_start = self.steps_in_flight - 1, now
        if self.limit_seconds:
            times = self.dist.all_reduce_sum(times if self.dist.is_rank0 else [0.0, 0.0])
        self.session_seconds, self.step_seconds = times
        return self.seconds

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

    def metrics(self, num_tokens: float, steps_left: int) -> dict[str, float]:
        """Return the speed of the last step, the seconds of the run and the seconds left."""
        left = steps_left * self.step_seconds
        if self.limit_seconds:
            left = min(left, self.limit_seconds - self.session_seconds)
        return {
            "tokens_per_second": num_tokens / max(self.step_seconds, 1e-9),
            "seconds": self.seconds,
            "seconds_left": max(0.0, left),
        }
