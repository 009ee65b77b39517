"""What a training run leaves behind: log lines, sample pictures, the loss plot, checkpoints.

It is told when; `cli.session` decides when.  Of several processes all are told, and the first one writes.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_pictures
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.sampling import Request, sample
from tiny_diffusion.errors import FileError
from tiny_diffusion.models.build import make_diffusion
from tiny_diffusion.runs.checkpoint import save_checkpoint
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.training.trainer import StepReport, Trainer

STEPS = 20


@dataclass(frozen=True)
class Shows:
    """What a run shows beside its checkpoints and its log.  runs/ knows neither pictures nor evaluation: the command
    that starts a run gives it these functions, and without them it shows nothing.

    save_samples: (path, images uint8 (N, H, W, C), captions=None or N texts).
    save_loss_curve: (path, steps, losses, held-out steps, held-out losses, title=..., scores={name: pairs}).
    make_measure: (data set's name, images, world, splits) -> measure(model, diffusion, request) -> {name: value}.
    """

    save_samples: Callable[..., None] = lambda *args, **more: None
    save_loss_curve: Callable[..., None] = lambda *args, **more: None
    make_measure: Callable[..., Callable[..., dict[str, float]]] | None = None


class RunWriter:
    """Writes one run's folder.  heldout_history: [step, loss] pairs, the plot's second curve."""

    def __init__(self, config: Config, folder: RunFolder, trainer: Trainer, data: ImageSet, shows: Shows):
        self.shows = shows
        self.config, self.folder, self.trainer, self.world = config, folder, trainer, trainer.world
        self.class_names, self.channels = data.class_names, data.channels
        self.heldout_history: list[list[float]] = []
        self.best_score: dict | None = None
        self.last_save = time.monotonic()
        self.loss = self.speed = math.nan  # averages over about the last 50 and 10 steps

    def begin(self) -> None:
        """Opens the folder, from the trainer's step on."""
        if self.world.is_main:
            self.folder.open(self.trainer.step)

    def write_report(self, report: StepReport, measured: dict[str, float]) -> int:
        """One line of the log; here the device is waited for.  Returns how many steps in a row were not finite.

        measured: what was measured after this step, by its full name.
        """
        loss, norm = float(report.loss), float(report.grad_norm)
        if self.world.is_main:
            self.folder.log(
                step=report.step,
                epoch=round(report.epoch, 4),
                loss=loss,
                grad_norm=norm,
                lr=report.lr,
                images_per_second=round(report.images_per_second, 1),
                **measured,
            )
        self.loss = _average(self.loss, loss, 0.02)
        self.speed = _average(self.speed, report.images_per_second, 0.1)
        return int(report.skipped)

    def add_heldout(self, loss: float) -> None:
        self.heldout_history.append([self.trainer.step, loss])

    def add_score(self, name: str, value: float, elapsed: float) -> None:
        """Remembers the lowest of one name; with --keep_best its checkpoint stays."""
        best = self.best_score
        if best is None or best["name"] != name or value < best["value"]:
            self.best_score = {"name": name, "value": value, "step": self.trainer.step}
            if self.config.keep_best:
                self.save(self.folder.best, elapsed)

    def draw_samples(self, epoch: int) -> Path:
        """samples/epoch_XXX.png from the averaged weights: the same noise each time, so that progress shows."""
        path = self.folder.sample_picture(epoch)
        request = self.request(range(self.config.num_samples))
        shape = (self.channels, *self.config.size)
        images = sample(self.trainer.ema.model, make_diffusion(self.config), request, shape, self.world)
        if not self.world.is_main:
            return path
        if torch.isfinite(images).all():
            captions = [self.class_names[label] for label in request.labels()] if self.config.class_cond else None
            self.shows.save_samples(path, to_pictures(images), captions=captions)
        else:
            tqdm.write(f"epoch {epoch}: the samples hold NaN; {path} is not written", file=sys.stderr)
        return path

    def request(self, indices) -> Request:
        """How this run draws: what its checkpoints say, too."""
        classes = tuple(range(len(self.class_names))) if self.config.class_cond else ()
        steps = min(STEPS, self.config.timesteps)
        sampler = DATASETS[self.config.dataset].sampler
        row = SAMPLERS[sampler]
        return Request(indices, sampler, steps, row.grid, self.config.seed, classes, eta=row.eta)

    def plot_losses(self) -> None:
        if not self.world.is_main:
            return
        steps, losses = self.folder.losses()
        heldout = list(zip(*self.heldout_history, strict=True)) or [(), ()]
        title = f"{self.config.dataset}: {self.config.prediction}-prediction, {self.config.schedule} schedule"
        scores = {}
        for step, name, value in self.folder.scores():
            scores.setdefault(name, []).append((step, value))
        self.shows.save_loss_curve(self.folder.loss_plot, steps, losses, *heldout, title=title, scores=scores)

    def save(self, path: Path, elapsed: float, finished: bool = False) -> bool:
        """Writes a checkpoint.  False, with a line, if the weights are not finite; every earlier one is left alone."""
        self.last_save = time.monotonic()
        if not self.world.is_main:
            return True
        self.folder.flush()
        try:
            save_checkpoint(path, self._about(elapsed, finished), self.trainer.tensors())
        except FloatingPointError as error:
            tqdm.write(f"not saved: {error}", file=sys.stderr)
            return False
        except RuntimeError as error:
            if not isinstance(error.__context__, OSError):
                raise
            # torch's zip writer stumbles over a full disk once more while closing, and hides it behind that.
            raise FileError(f"{path} cannot be written: {error.__context__.strerror}.") from error
        return True

    def save_epoch(self, epoch: int, elapsed: float) -> None:
        """A numbered checkpoint; with --keep_last the oldest goes."""
        path = self.folder.epoch_checkpoint(epoch)
        if self.save(path, elapsed) and self.world.is_main:
            self.folder.prune(self.config.keep_last, path)

    def save_final(self, elapsed: float, finished: bool) -> bool:
        """The last checkpoint, after which the rolling one is of no use.  False as in `save`."""
        saved = self.save(self.folder.final, elapsed, finished)
        if saved and self.world.is_main:
            self.folder.latest.unlink(missing_ok=True)
        return saved

    def _about(self, elapsed: float, finished: bool) -> dict:
        steps, losses = self.folder.losses()
        thin = max(1, len(steps) // 1000)
        pairs = zip(steps[::thin], losses[::thin], strict=True)
        request = self.request(())
        return {
            "config": self.config.to_dict(),
            "step": self.trainer.step,
            "elapsed_seconds": elapsed,
            "stretch": [self.trainer.length.from_step, self.trainer.length.from_seconds],
            "finished": finished,
            "loss_history": [[step, None if math.isnan(loss) else loss] for step, loss in pairs],
            "heldout_history": self.heldout_history,
            "best_score": self.best_score,
            "class_names": list(self.class_names),
            "image_size": list(self.config.size),
            "channels": self.channels,
            "background": self.config.background,
            "sampling": {
                name: getattr(request, name) for name in ("sampler", "steps", "grid", "guidance", "eta", "clip")
            },
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        }


def _average(before: float, value: float, share: float) -> float:
    """An exponential average that starts at its first value and passes over what is not finite."""
    if not math.isfinite(value):
        return before
    return value if math.isnan(before) else before + share * (value - before)
