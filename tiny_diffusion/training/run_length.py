"""How long a run is, in steps or in seconds, and the learning-rate scale that follows from its progress."""

import math
from dataclasses import dataclass

WARM_UP_STEPS = 100


@dataclass(frozen=True)
class RunLength:
    """A run ends at step `steps`, or when its clock shows `seconds`.

    from_step, from_seconds: where its current segment began; --extend starts a new one, with a warm-up of its own.
    """

    steps: int | None = None
    seconds: float | None = None
    from_step: int = 0
    from_seconds: float = 0.0

    def progress(self, step: int, seconds: float) -> float:
        """The share of the segment that is done, from 0 to 1; 1 if its end lies before its start."""
        if self.steps is not None:
            done, whole = step - self.from_step, self.steps - self.from_step
        else:
            done, whole = seconds - self.from_seconds, self.seconds - self.from_seconds
        return done / whole if whole > 0 else 1.0

    def lr_scale(self, step: int, progress: float) -> float:
        """The learning rate over its peak: a warm-up of at most a tenth of the segment, then sqrt(1 - progress)."""
        done = step - self.from_step + 1
        if self.steps is not None:
            warm_up = done / min(WARM_UP_STEPS, max(1, (self.steps - self.from_step) // 10))
        else:
            warm_up = max(done / WARM_UP_STEPS, progress / 0.1)
        return min(1.0, warm_up) * math.sqrt(max(0.0, 1 - progress))
