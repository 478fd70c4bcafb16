"""Time: how long the run has taken and may take.

Read next: loop.py.
"""

import time

from trainer.distributed import Run


class Clock:
    """Seconds of training, and the share of --max_minutes that is used up (0 when there is no limit).

    The learning rate follows the larger of steps done and time used, so a time-boxed run ends with a rate near zero
    and a settled model. A later session with a new time box begins at its share of the steps.
    """

    def __init__(self, max_minutes: float, steps_share: float, earlier_seconds: float) -> None:
        self.limit, self.steps_share, self.earlier = 60 * max_minutes, steps_share, earlier_seconds
        self.started = self.step_started = time.monotonic()
        self.session_seconds = self.step_seconds = 0.0

    def step_begins(self) -> None:
        self.step_started = time.monotonic()

    def step_ends(self, run: Run) -> None:
        """Read the first process's clock for everybody: all must agree on the learning rate and on when to stop."""
        now = time.monotonic()
        times = [now - self.started, now - self.step_started] if run.is_main else [0.0, 0.0]
        self.session_seconds, self.step_seconds = run.sum(times)

    @property
    def share(self) -> float:
        if not self.limit:
            return 0.0
        return self.steps_share + (1 - self.steps_share) * min(1.0, self.session_seconds / self.limit)

    @property
    def seconds(self) -> float:
        return self.earlier + self.session_seconds

    @property
    def is_over(self) -> bool:
        """One more step would not fit."""
        return bool(self.limit) and self.session_seconds + self.step_seconds > self.limit

    def seconds_left(self, steps_left: int) -> float:
        by_steps = steps_left * self.step_seconds
        return max(0.0, min(by_steps, self.limit - self.session_seconds) if self.limit else by_steps)
