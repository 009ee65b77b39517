"""How long training steps take: estimated before the first one, and measured."""

import math
import time
from collections.abc import Sequence

import numpy as np

from tiny_diffusion.training.trainer import StepReport, Trainer


def estimate_step_seconds(trainer: Trainer) -> float:
    """Seconds per step, from forward and backward passes of one micro-batch that change no weights.

    The first pass warms up and the second counts.  Of several ranks the slowest, for which the others wait.
    """

    def pass_seconds(parts: int) -> float:
        """Seconds for this rank's batch, extrapolated from one of its `parts` micro-batches."""
        images = math.ceil(trainer.local_batch / parts)
        clean, label = (rows[:images] for rows in trainer.batches.at(trainer.step))
        label = label if trainer.config.class_cond else None
        t = trainer.objective.timesteps(np.full(len(clean), 0.5))

        def backward(rows: slice) -> None:
            given = None if label is None else label[rows]
            trainer.loss(trainer.model, clean[rows], clean[rows], t[rows], given).backward()

        started = time.perf_counter()
        if parts == 1:
            trainer.halves.run(backward, clean.shape)
        else:
            backward(slice(None))
        float(clean.sum())  # waits for the device
        return (time.perf_counter() - started) * trainer.local_batch / len(clean)

    for _ in range(2):
        seconds = trainer.splitter.run(pass_seconds)
    trainer.drop_gradients()
    return trainer.world.maximum(seconds)[0]


def images_per_second(reports: Sequence[StepReport], batch_size: int) -> float:
    """The speed of consecutive steps together, the last of which has just been taken.

    A GPU's step returns once its work is queued.  Reading the last loss waits until all of it is done.
    """
    float(reports[-1].loss)
    return len(reports) * batch_size / (time.perf_counter() - reports[0].started)
