"""What is due at the end of an epoch: the held-out loss, samples, the loss plot, a numbered checkpoint, scores."""

import math
import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import DivergenceError
from tiny_diffusion.runs.images import RunData
from tiny_diffusion.runs.messages import duration
from tiny_diffusion.runs.writer import RunWriter
from tiny_diffusion.training.trainer import Trainer

DEFAULT_INTERVAL_STEPS = 200  # between pictures and checkpoints, where --sample_interval and --save_interval are unset
NOISE_LEVELS, NOISE_IMAGES = 8, 64  # for the trackers' loss by noise level
FREE_SECONDS, MAX_SHARE = 60.0, 0.5  # what epoch ends may take of a run: so many seconds, and then at most this share


def is_affordable(spent: float, elapsed: float) -> bool:
    """Whether the ends of epochs may take more time.  A handful of images has hundreds of epochs a minute.

    spent: seconds that earlier ones took.   elapsed: seconds of the whole run.
    """
    return spent <= FREE_SECONDS or spent <= MAX_SHARE * elapsed


class EpochEnd:
    """Of several ranks all call it, and rank 0 writes.

    evaluator: (model, diffusion, request) -> {name: value}, or None.   elapsed: the seconds that the run has spent.
    """

    def __init__(
        self, config: Config, trainer: Trainer, writer: RunWriter, data: RunData, evaluator: Callable | None,
        elapsed: Callable[[], float],
    ):  # fmt: skip
        self.config, self.trainer, self.writer, self.data = config, trainer, writer, data
        self.evaluator, self.elapsed = evaluator, elapsed
        self.sample_every, self.save_every = map(self._interval, (config.sample_interval, config.save_interval))
        self.spent = 0.0

    def _interval(self, asked: int | None) -> int:
        """Epochs between pictures or checkpoints: as asked, or as many as make DEFAULT_INTERVAL_STEPS steps."""
        return asked or math.ceil(DEFAULT_INTERVAL_STEPS * self.config.batch_size / len(self.trainer.batches))

    def evaluate_samples(self, before: int, epoch: int, bar: tqdm) -> dict[str, float]:
        """Every --eval_interval epochs: how close samples are to real images; --keep_best keeps the best checkpoint."""
        every = self.config.eval_interval
        if not every or epoch // every == before // every:
            return {}
        scores = self.evaluator(self.trainer.ema.model, self.trainer.diffusion, self.writer.evaluation_request())
        for name, value in scores.items():
            bar.write(f"epoch {epoch}: {name} {value:.4f}", file=sys.stderr)
            self.writer.add_score(name, value, self.elapsed())
        return scores

    def run(self, before: int, epoch: int, bar: tqdm) -> None:
        """What is due after epoch `epoch`; epochs up to `before` are done, since one step may end several."""
        spent, elapsed = self.trainer.world.maximum(self.spent, self.elapsed())  # so that all ranks decide alike
        if not is_affordable(spent, elapsed):
            return
        started = time.monotonic()
        loss = self.validation_loss()
        if epoch // self.sample_every > before // self.sample_every:
            self.writer.save_samples(epoch)
            self.track_noise_levels()
            self.writer.plot_losses()
            what = f"held-out {loss:.4f}" if self.data.heldout_count else f"averaged weights {loss:.4f}"
            spent_so_far = duration(self.elapsed())
            bar.write(f"epoch {epoch}: loss {self.writer.loss:.4f}, {what}, {spent_so_far} so far", file=sys.stderr)
        # After the pictures, so that a run that is killed in one draws it again.
        if epoch // self.save_every > before // self.save_every:
            self.writer.save_epoch(epoch, self.elapsed())
        self.spent += time.monotonic() - started

    def track_noise_levels(self) -> None:
        """The averaged weights' loss at NOISE_LEVELS evenly spaced timesteps, for the trackers."""
        if not self.writer.trackers or not self.config.log:
            return
        images, labels = (part[:NOISE_IMAGES] for part in self.data.validation)
        for t in np.linspace(0, self.config.timesteps - 1, 2 * NOISE_LEVELS + 1)[1::2]:
            loss = self.trainer.heldout_loss(images, labels, np.full(len(images), t))
            self.writer.track({f"loss_by_noise/t_{t:04.0f}": loss})

    def validation_loss(self) -> float:
        """The loss of the averaged weights on the validation images, which joins the held-out curve if they are that.

        Raises DivergenceError if it is not finite: such weights are not worth saving.
        """
        loss = self.trainer.heldout_loss(*self.data.validation)
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the averaged weights' loss is not finite after step {self.trainer.step}. "
                f"What was saved before is untouched. Lower --lr (now {self.config.lr:g})."
            )
        if self.data.heldout_count:
            self.writer.add_heldout_loss(loss)
        return loss
