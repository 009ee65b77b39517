"""What a training run writes: log lines, sample pictures, the loss plot, checkpoints.

The session decides when.  Every rank calls it, and rank 0 writes.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from tiny_diffusion.config.student import Student
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_pictures
from tiny_diffusion.diffusion.request import Request, default_sampling, labels_in_shares, request_from
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.errors import FileError
from tiny_diffusion.files import copy_whole
from tiny_diffusion.runs.checkpoint import save_checkpoint
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.trackers import Trackers
from tiny_diffusion.runtime.machine import versions_on
from tiny_diffusion.training.trainer import StepReport, Trainer

HISTORY_POINTS = 1000  # of the loss curve that a checkpoint holds


@dataclass(frozen=True)
class Callbacks:
    """What a run shows and measures.  runs/ knows neither pictures nor evaluation: a command passes these functions.

    save_samples: (path, images uint8 (N, H, W, C), labels, names): of N labels, or None, and the names of all.
    save_loss_curve: (path, steps, losses, held-out steps, held-out losses, title=..., scores={name: pairs}).
    make_evaluator: (data set's name, images, world, splits) -> evaluator(model, diffusion, request) -> {name: value}.
    """

    save_samples: Callable[..., None] = lambda *args, **options: None
    save_loss_curve: Callable[..., None] = lambda *args, **options: None
    make_evaluator: Callable[..., Callable[..., dict[str, float]]] | None = None


class RunWriter:
    """Writes one run's folder.   heldout_history: [step, loss] pairs.   loss, speed: moving averages for display."""

    def __init__(
        self, config: Config, folder: RunFolder, trainer: Trainer, data: ImageSet, callbacks: Callbacks,
        student: Student | None = None,
    ):  # fmt: skip
        self.config, self.folder, self.trainer, self.world = config, folder, trainer, trainer.world
        self.callbacks, self.student = callbacks, student
        self.class_names, self.channels = data.class_names, data.channels
        self.class_counts = data.class_counts
        self.images = {"count": len(data), **data.fingerprint}
        if self.class_names:
            self.images["class_counts"] = self.class_counts
        self.sampling = default_sampling_of(config, student)
        self.heldout_history: list[list[float]] = []
        self.best_score: dict | None = None
        self.trackers: Trackers | None = None  # of rank 0
        self.last_save = time.monotonic()
        self.loss = self.speed = math.nan

    def begin(self, overwrite: bool = False) -> None:
        """Opens the folder and the trackers; the log continues at the trainer's step.

        overwrite: deletes the run that the folder holds, once the trackers have begun.
        """
        if self.world.is_main:
            step, logged = self.trainer.step, self.folder.last_logged_step() if self.trainer.step else 0
            self.trackers = Trackers(self.config.log, self.folder.path, self.config.to_dict(), step, logged)
            if overwrite:
                self.folder.clear()
            self.folder.open(step)

    def close(self) -> None:
        """Closes the log and the trackers."""
        self.folder.close()
        if self.trackers:
            self.trackers.close()

    def track(self, values: Mapping[str, float]) -> None:
        """Hands numbers of the current step to the trackers."""
        if self.trackers:
            self.trackers.numbers(self.trainer.step, values)

    def write_report(self, report: StepReport, speed: float, scores: dict[str, float]) -> int:
        """Writes one line of the log, which waits for the device.  Returns how many steps in a row were not finite.

        speed: images per second.   scores: what was measured after this step, by its full name.
        """
        loss, norm = float(report.loss), float(report.grad_norm)
        if self.world.is_main:
            self.folder.log(
                step=report.step,
                epoch=round(report.epoch, 4),
                loss=loss,
                grad_norm=norm,
                lr=report.lr,
                images_per_second=round(speed, 1),
                **scores,
            )
            numbers = {"loss": loss, "gradient_norm": norm, "learning_rate": report.lr, "images_per_second": speed}
            self.trackers.numbers(report.step, numbers | scores)
        self.loss = _moving_average(self.loss, loss, 0.02)
        self.speed = _moving_average(self.speed, speed, 0.1)
        return int(report.skipped)

    def add_heldout_loss(self, loss: float) -> None:
        """Adds a point to the held-out curve."""
        self.heldout_history.append([self.trainer.step, loss])
        self.track({"heldout_loss": loss})

    def add_score(self, name: str, value: float, elapsed: float) -> None:
        """Remembers the lowest score of one name, and with --keep_best saves its checkpoint."""
        best = self.best_score
        if best is None or best["name"] != name or value < best["value"]:
            self.best_score = {"name": name, "value": value, "step": self.trainer.step}
            if self.config.keep_best:
                self.save(self.folder.best, elapsed)

    def save_samples(self, epoch: int) -> Path:
        """Samples from the averaged weights, always from the same noise, so that the pictures show the progress."""
        path, request = self.folder.sample_picture(epoch), self.request(range(self.config.num_samples))
        shape = (self.channels, *self.config.size)
        images = sample(self.trainer.ema.model, self.trainer.diffusion, request, shape, self.world)
        if not self.world.is_main:
            return path
        if torch.isfinite(images).all():
            labels, names = request.labels(), self.class_names
            self._show(path, lambda: self.callbacks.save_samples(path, to_pictures(images), labels, names))
            if path.is_file():
                self._show(self.folder.newest_picture, lambda: copy_whole(path, self.folder.newest_picture))
                if self.trackers:
                    self.trackers.picture(self.trainer.step, "samples", path)
        else:
            tqdm.write(f"epoch {epoch}: the samples hold NaN; {path} is not written", file=sys.stderr)
        return path

    def request(self, indices: Sequence[int]) -> Request:
        """How this run samples, which is also what its checkpoints say."""
        labels = range(len(self.class_names)) if self.config.class_cond else ()
        classes = tuple(label for label in labels if self.class_counts[label])
        return request_from(self.sampling, self.config.timesteps, indices, seed=self.config.seed, classes=classes)

    def evaluation_request(self) -> Request:
        """The samples of --eval_interval: the classes of a class-conditional model in the training set's shares."""
        num_images, classes = self.config.eval_images, ()
        if self.config.class_cond:
            classes = labels_in_shares(self.class_counts, num_images, self.config.seed)
        return replace(self.request(range(num_images)), classes=classes)

    def plot_losses(self) -> None:
        """Draws the loss curve of the run so far."""
        if not self.world.is_main:
            return
        steps, losses = self.folder.losses()
        heldout = list(zip(*self.heldout_history, strict=True)) or [(), ()]
        title = f"{self.config.dataset}: {self.config.prediction}-prediction, {self.config.schedule} schedule"
        title += f", distilled to {self.student.steps} evaluations" if self.student else ""
        scores = {}
        for step, name, value in self.folder.scores():
            scores.setdefault(name, []).append((step, value))
        plot, path = self.callbacks.save_loss_curve, self.folder.loss_plot
        self._show(path, lambda: plot(path, steps, losses, *heldout, title=title, scores=scores))

    def _show(self, path: Path, draw: Callable[[], None]) -> None:
        """Draws a picture.  It only shows the run, so one that cannot be drawn is reported and never ends the run."""
        try:
            draw()
        except Exception as error:  # a missing home or temporary folder, a full disk, an odd font, ...
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            tqdm.write(f"{path} is not drawn: {reason}", file=sys.stderr)

    def save(self, path: Path, elapsed: float, finished: bool = False) -> bool:
        """Writes a checkpoint.  Returns False, with a message, if the weights are not finite; earlier files then stay.

        elapsed: seconds on the run's clock.
        """
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
            # On a full disk torch's zip writer raises once more while it closes, which hides the first error.
            raise FileError(f"{path} cannot be written: {error.__context__.strerror}.") from error
        return True

    def save_epoch(self, epoch: int, elapsed: float) -> None:
        """Writes a numbered checkpoint; with --keep_last the oldest one is deleted."""
        path = self.folder.epoch_checkpoint(epoch)
        if self.save(path, elapsed) and self.world.is_main:
            self.folder.prune(self.config.keep_last, path)

    def save_final(self, elapsed: float, finished: bool) -> bool:
        """Writes the last checkpoint, after which the rolling one is not needed.  Returns False as `save` does."""
        saved = self.save(self.folder.final, elapsed, finished)
        if saved and self.world.is_main:
            self.folder.latest.unlink(missing_ok=True)
        return saved

    def _about(self, elapsed: float, finished: bool) -> dict:
        steps, losses = self.folder.losses()
        every = max(1, len(steps) // HISTORY_POINTS)
        pairs = zip(steps[::every], losses[::every], strict=True)
        return {
            "config": self.config.to_dict(),
            "step": self.trainer.step,
            "elapsed_seconds": elapsed,
            "stretch": [self.trainer.length.from_step, self.trainer.length.from_seconds],  # where the segment began
            "finished": finished,
            "loss_history": [[step, None if math.isnan(loss) else loss] for step, loss in pairs],
            "heldout_history": self.heldout_history,
            "best_score": self.best_score,
            "class_names": list(self.class_names),
            "image_size": list(self.config.size),
            "channels": self.channels,
            "images": self.images,
            "background": self.config.background,
            "sampling": self.sampling,
            **({"student": asdict(self.student)} if self.student else {}),
            "versions": versions_on(self.trainer.device),
        }


def _moving_average(before: float, value: float, weight: float) -> float:
    """The exponential moving average after one more value; it starts at the first and ignores what is not finite."""
    if not math.isfinite(value):
        return before
    return value if math.isnan(before) else before + weight * (value - before)


def default_sampling_of(config: Config, student: Student | None = None) -> dict[str, object]:
    """How the models of this configuration sample by default.

    Guidance needs a model that is also trained without classes; that of a student is part of its weights.
    """
    row = DATASETS[config.dataset]
    if student:
        return default_sampling(row.sampler, config.timesteps) | student.sampling()
    guided = config.class_cond and config.label_dropout > 0
    guidance = (row.guidance, row.guidance_interval) if guided else ()
    return default_sampling(row.sampler, config.timesteps, *guidance)
