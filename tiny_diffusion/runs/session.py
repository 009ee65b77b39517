"""One call of train: from the data and the network, through the trainer's reports, to the last line it prints.

Of several ranks each has a session and all do the same; rank 0 writes and prints.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.student import Student
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.errors import DivergenceError, FileError, OptionError
from tiny_diffusion.models.build import make_diffusion, make_model, to_device
from tiny_diffusion.randomness import seed_torch
from tiny_diffusion.runs.checkpoint import Checkpoint
from tiny_diffusion.runs.epoch_end import EpochEnd
from tiny_diffusion.runs.folder import RunFolder, run_of
from tiny_diffusion.runs.images import check_device, open_run_data
from tiny_diffusion.runs.messages import describe_length, describe_run, duration, faster_options, progress_bar
from tiny_diffusion.runs.restore import restore, take_weights
from tiny_diffusion.runs.sync import Sync
from tiny_diffusion.runs.trackers import check_trackers
from tiny_diffusion.runs.writer import Callbacks, RunWriter
from tiny_diffusion.runtime.program import typed
from tiny_diffusion.runtime.torchrun_store import mark_begun
from tiny_diffusion.runtime.world import check_batch_size, make_deterministic, make_world
from tiny_diffusion.training.distill import distillation
from tiny_diffusion.training.precision import decide_precision
from tiny_diffusion.training.run_length import RunLength
from tiny_diffusion.training.step_time import estimate_step_seconds, images_per_second
from tiny_diffusion.training.trainer import StepReport, Trainer

SAVE_EVERY_S = 120.0  # the maximum that a kill can cost
MAX_SKIPPED = 20  # non-finite steps in a row
REPORTS_AT_ONCE = 20  # on a GPU: reading one waits for the device
SAVE_SECONDS = 2.5  # kept back from --minutes for the last plot and checkpoint
SAMPLING_MARGIN = 1.3  # on the estimate of the last picture


class Session:
    """Trains one run to its end, or to a stop that saves.

    started: time.monotonic() when the process began.   student: what the run distills; None for ordinary training.
    """

    def __init__(
        self, config: Config, folder: RunFolder, started: float, callbacks: Callbacks, student: Student | None = None
    ):
        self.folder, self.started = folder, started
        self.elapsed_before = 0.0
        check_trackers(config.log)
        self.world = world = make_world(config.device, os.environ)
        self.device = device = world.device
        check_batch_size(config.batch_size, config.accumulate, world.size)
        check_device(config, self.device)
        if config.deterministic:
            make_deterministic(self.device)
        with world.main_process_first():
            self.run_data = open_run_data(config, folder, self.device)
        self.data = data = self.run_data.images
        config, classes = self.run_data.config, len(data.class_names)
        seed_torch(config.seed, "weights")
        model = to_device(make_model(config, data.channels, classes), self.device)
        config, self.decision = decide_precision(config, model, data.channels, world)
        self.config = config
        self.batches = Batches(data, config.batch_size, config.seed, device=device, hflip=config.hflip, world=world)
        self.sync = sync = Sync(world, self.elapsed)
        objective = {} if student is None else distillation(student, make_diffusion(config), model)
        self.trainer = Trainer(model, config, self.batches, self._length(), lambda: sync.seconds, classes, **objective)
        self.writer = RunWriter(config, folder, self.trainer, self.data, callbacks, student)
        asked = config.eval_interval is not None
        evaluator = callbacks.make_evaluator(config.dataset, self.data, world, config.splits) if asked else None
        self.epoch_end = EpochEnd(config, self.trainer, self.writer, self.run_data, evaluator, self.elapsed)
        self.pending: list[StepReport] = []

    def elapsed(self) -> float:
        """Seconds that the run has spent since its processes started, earlier sessions included."""
        return self.elapsed_before + time.monotonic() - self.started

    def _length(self, from_step: int = 0, from_seconds: float = 0.0, reserve: float = 0.0) -> RunLength:
        if self.config.minutes is not None:
            return RunLength(seconds=self.config.minutes * 60 - reserve, from_step=from_step, from_seconds=from_seconds)
        steps = math.ceil(self.config.epochs * len(self.batches) / self.config.batch_size)
        return RunLength(steps=steps, from_step=from_step, from_seconds=from_seconds)

    def take_weights(self, source: Checkpoint, path: str, option: str) -> None:
        """Starts from the averaged weights of another run, which this option names, and takes nothing else from it."""
        take_weights(self.trainer, self.data, source, path, option)

    def resume(self, path: Path, checkpoint: Checkpoint, extend: bool) -> None:
        """Continues from the checkpoint.   extend: in a new segment, with a warm-up and a decay of its own."""
        restore(self.trainer, self.data, checkpoint, path)
        about = checkpoint.about
        step, seconds = about["step"], about["elapsed_seconds"]
        self.elapsed_before = seconds
        self.writer.heldout_history = about["heldout_history"]
        self.writer.best_score = about["best_score"]
        self.folder.adopt_log(RunFolder(run_of(path)), about["loss_history"])
        segment = (step, seconds) if extend else tuple(about["stretch"])
        self.trainer.length = length = self._length(*segment)
        over = step >= length.steps if length.seconds is None else seconds >= length.seconds
        if extend and over:
            raise OptionError(
                f"--extend: this run has trained for {self.trainer.epoch:.1f} epochs and {seconds / 60:.1f} minutes. "
                "Give --epochs or --minutes a larger number: the new total length."
            )
        print(f"resuming from {path}, step {step}", file=sys.stderr)

    def train(self, overwrite: bool = False) -> int:
        """Trains to the end, or to a stop that saves.  Returns the exit code.

        overwrite: deletes the run that the folder holds, once nothing is left to refuse.
        """
        try:
            self._check_ranks_agree()
            step_seconds = estimate_step_seconds(self.trainer)
            self._reserve_time(step_seconds)
            self.writer.begin(overwrite)
            self._announce(step_seconds)
            if self.world.is_main:
                mark_begun(os.environ)
            with self.sync, contextlib.closing(self.writer):
                with progress_bar(self.config, self.trainer) as bar:
                    self._loop(bar)
                return self._finish() if self.sync.stop_signal is None else self._stopped(self.sync.stop_signal)
        except FileError:
            raise
        except OSError as error:
            raise FileError(
                f"--output_dir {self.folder.path} cannot be written: {error.strerror or error}. "
                "What was saved before is untouched; --resume continues from it."
            ) from error

    def _loop(self, bar: tqdm) -> None:
        trainer = self.trainer
        self.sync.update()
        epochs_done, parts = int(trainer.epoch), self.config.accumulate
        for report in trainer.run():
            self.pending.append(report)
            if trainer.parts > parts:
                parts = trainer.parts
                bar.write(f"memory ran out: continuing with batches in {parts} parts", file=sys.stderr)
            if (epoch := int(trainer.epoch)) > epochs_done:
                self._write_reports(bar, partial(self.epoch_end.evaluate_samples, epochs_done, epoch, bar))
                self.epoch_end.run(epochs_done, epoch, bar)
                epochs_done = epoch
            elif self.device.type == "cpu" or len(self.pending) == REPORTS_AT_ONCE:
                self._write_reports(bar)
            self.sync.update()
            if self.sync.stop_signal is not None or trainer.step == self.config.max_steps:
                break
            if time.monotonic() - self.writer.last_save > SAVE_EVERY_S:
                self._write_reports(bar)
                self.writer.save(self.folder.latest, self.elapsed())
        self._write_reports(bar)

    def _check_ranks_agree(self) -> None:
        """Raises OptionError if the ranks would train different things because their files or options differ."""
        config = self.config
        options = [getattr(config, name) for name, spec in specs(Config).items() if not spec.free]
        if not self.world.all_equal((self.trainer.step, self.trainer.length, len(self.data), options)):
            raise OptionError(
                "the ranks of this run have different options, images, or contents of --output_dir "
                f"{config.output_dir}. Give every rank the same command, and folders that all of them can read."
            )

    def _reserve_time(self, step_seconds: float) -> None:
        """Keeps time for the last picture and save back from --minutes.  Raises OptionError if no time is left."""
        trainer, minutes = self.trainer, self.config.minutes
        if minutes is not None:
            reserve = self._reserve_seconds(step_seconds)
            trainer.length = length = self._length(trainer.length.from_step, trainer.length.from_seconds, reserve)
            self.sync.update()  # rank 0's clock decides
            if not trainer.step and self.sync.seconds >= length.seconds:
                raise OptionError(f"--minutes {minutes:g} leaves no time for a single step. Give more minutes.")

    def _announce(self, step_seconds: float) -> None:
        """Prints what trains and for how long."""
        trainer, config = self.trainer, self.config
        lines = (
            describe_run(config, trainer, self.run_data.heldout_count, self.folder.path),
            describe_length(config, trainer, step_seconds, self.elapsed()),
            *self.decision,
            *faster_options(config, self.device),
        )
        print("\n".join(lines), file=sys.stderr)

    def _reserve_seconds(self, step_seconds: float) -> float:
        """What the last picture and the last save take, to keep back from --minutes: at most half of them.

        A training step costs three forward passes of a batch: one forward, and a backward pass worth two.
        """
        evaluations = self.writer.request(()).evaluations(self.trainer.diffusion.schedule)
        batches = evaluations * self.config.num_samples / self.config.batch_size
        return min(SAVE_SECONDS + SAMPLING_MARGIN * batches * step_seconds / 3, self.config.minutes * 60 / 2)

    def _write_reports(self, bar: tqdm, measure: Callable[[], dict[str, float]] = dict) -> None:
        """Writes the pending reports to the log and the bar.

        measure: returns the scores after the last of them.  It is called when the device is done with their steps.
        """
        if not self.pending:
            return
        speed, scores = images_per_second(self.pending, self.config.batch_size), measure()
        for report in self.pending:
            if self.writer.write_report(report, speed, scores if report is self.pending[-1] else {}) >= MAX_SKIPPED:
                raise DivergenceError(
                    f"the loss was not finite for {MAX_SKIPPED} steps in a row, up to step {report.step}. "
                    "What was saved before is untouched. "
                    f"Lower --lr (now {self.config.lr:g}), or use --precision fp32."
                )
        bar.set_postfix_str(f"loss {self.writer.loss:.4f}, {self.writer.speed:.0f} images/s", refresh=False)
        bar.update((round(self.elapsed()) if self.config.minutes is not None else self.trainer.step) - bar.n)
        self.pending.clear()

    def _stopped(self, number: int) -> int:
        """Saves after a signal and returns its exit code."""
        saved = self.writer.save(self.folder.latest, self.elapsed())
        self.world.barrier()  # torchrun ends all ranks when the first has ended
        print(
            f"stopped by {signal.Signals(number).name} at step {self.trainer.step}"
            + (f"; saved {self.folder.latest}" if saved else "")
            + ". Continue with the same command and --resume.",
            file=sys.stderr,
        )
        return 128 + number

    def _finish(self) -> int:
        """Saves before the last pictures, and once more, as the final model, after them."""
        finished, epoch = self.trainer.finished(), self.trainer.current_epoch
        if lost := self.data.images.unreadable:
            print(f"{len(lost)} images could not be read while training, others took their place", file=sys.stderr)
        history = self.writer.heldout_history
        is_measured = history and history[-1][0] == self.trainer.step
        loss = history[-1][1] if is_measured else self.epoch_end.validation_loss()
        self.writer.save(self.folder.latest, self.elapsed())  # what a crash or a kill in a picture leaves behind
        picture = self.writer.save_samples(epoch)
        self.epoch_end.track_noise_levels()
        self.writer.plot_losses()
        if not self.writer.save_final(self.elapsed(), finished):
            raise DivergenceError(f"the weights are not finite at the end. Lower --lr (now {self.config.lr:g}).")
        done = "finished" if finished else f"stopped at --max_steps {self.config.max_steps}, --resume continues;"
        print(
            f"{done} after {duration(self.elapsed())}, step {self.trainer.step}, "
            f"{'held-out loss' if self.run_data.heldout_count else 'loss of the averaged weights'} {loss:.4f}\n"
            f"samples    {picture}\nlosses     {self.folder.loss_plot}\nmodel      {self.folder.final}\n"
            f"sample     {typed('sample')} --checkpoint {self.folder.final}",
            file=sys.stderr,
        )
        return 0
