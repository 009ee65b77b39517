"""One training session: from the data and the network, through the trainer's reports, to the last line it prints."""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.errors import DivergenceError, FileError, OptionError
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.randomness import seed_torch
from tiny_diffusion.runs.checkpoint import Checkpoint, load_model
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.images import check_device, open_run_data
from tiny_diffusion.runs.messages import duration, what_is_coming, what_is_faster, who_trains
from tiny_diffusion.runs.sync import Sync
from tiny_diffusion.runs.writer import RunWriter, Shows
from tiny_diffusion.runtime.torchrun_store import mark_begun
from tiny_diffusion.runtime.world import check_batch_size, make_deterministic, make_world
from tiny_diffusion.training.trainer import RunLength, StepReport, Trainer

SAVE_EVERY_S = 120.0  # what a kill can cost at most
MAX_SKIPPED = 20  # non-finite steps in a row
STEPS_BETWEEN = 200  # pictures and numbered checkpoints, where --sample_interval and --save_interval leave it open
REPORTS_AT_ONCE = 20  # on a GPU, so that it is not waited for after each step


class Session:
    """Everything that one call of train does, once it is known what to do.

    Of several processes each has one, and all do the same; what is written and printed is the first one's.
    """

    def __init__(self, config: Config, folder: RunFolder, started: float, shows: Shows):
        self.config, self.folder, self.started = config, folder, started
        self.elapsed_before = 0.0
        self.world = world = make_world(config.device, os.environ)
        self.device = world.device
        check_batch_size(config.batch_size, config.accumulate, world.size)
        check_device(config, self.device)
        if config.deterministic:
            make_deterministic(self.device)
        with world.main_process_first():
            run_data = open_run_data(config, folder, self.device)
        self.data, self.measured, self.heldout_count = run_data.images, run_data.measured, run_data.heldout_count
        seed_torch(config.seed, "weights")
        model = to_device(make_model(config, self.data.channels, len(self.data.class_names)), self.device)
        self.batches = Batches(
            self.data, config.batch_size, config.seed, device=self.device, hflip=config.hflip, world=world
        )
        self.agreed = agreed = Sync(world, self.elapsed)
        classes = len(self.data.class_names)
        self.trainer = Trainer(model, config, self.batches, self._length(), lambda: agreed.seconds, classes)
        self.writer = RunWriter(config, folder, self.trainer, self.data, shows)
        self.sample_every, self.save_every = map(self._epochs_between, (config.sample_interval, config.save_interval))
        self.measure = None
        if config.eval_interval:
            self.measure = shows.make_measure(config.dataset, self.data, world, config.splits)
        self.pending: list[StepReport] = []

    def _epochs_between(self, asked: int | None) -> int:
        """As asked; otherwise as many epochs as make STEPS_BETWEEN steps, so that a handful of images is not drawn
        again after each of them."""
        return asked or math.ceil(STEPS_BETWEEN * self.config.batch_size / len(self.data))

    def elapsed(self) -> float:
        """Seconds that the run has spent, from the start of the process, earlier sessions included."""
        return self.elapsed_before + time.monotonic() - self.started

    def _length(self, from_step: int = 0, from_seconds: float = 0.0, reserve: float = 0.0) -> RunLength:
        if self.config.minutes is not None:
            return RunLength(seconds=self.config.minutes * 60 - reserve, from_step=from_step, from_seconds=from_seconds)
        steps = math.ceil(self.config.epochs * len(self.batches) / self.config.batch_size)
        return RunLength(steps=steps, from_step=from_step, from_seconds=from_seconds)

    def take_weights(self, source: Checkpoint, path: str) -> None:
        """--init_from: the averaged weights of another run, and nothing else of it."""
        state, model = load_model(source).state_dict(), self.trainer.model
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        about, classes = source.about, len(self.data.class_names)
        if self.data.channels != about["channels"] or self.config.class_cond and classes != len(about["class_names"]):
            raise OptionError(
                f"--init_from {path} draws images of {about['channels']} channels and {len(about['class_names'])} "
                f"classes, and those of --dataset {self.config.dataset} have {self.data.channels} and {classes}. "
                "Name images of the same kind, or leave out --init_from."
            )
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise OptionError(
                f"--init_from {path} is a network of other sizes than the options ask for. "
                "Leave out the options of the network, and it keeps its own."
            )
        model.load_state_dict(state)
        self.trainer.ema.model.load_state_dict(state)

    def resume(self, path: Path, checkpoint: Checkpoint, extend: bool) -> None:
        """Continue where the checkpoint stands; extend: as a new stretch with a warm-up and a decay of its own."""
        about = checkpoint.about
        if self.data.channels != about["channels"] or list(self.data.class_names) != about["class_names"]:
            raise OptionError(
                f"--data_dir {self.config.data_dir} holds other classes or channels than the images of this run. "
                "Name the folder that it began with."
            )
        try:
            self.trainer.load(checkpoint.tensors, about["step"])
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise FileError(
                f"{path} cannot be resumed: its tensors do not fit its configuration ({reason})."
            ) from error
        step, seconds = about["step"], about["elapsed_seconds"]
        self.elapsed_before = seconds
        self.writer.heldout_history = about["heldout_history"]
        self.writer.best_score = about["best_score"]
        stretch = (step, seconds) if extend else tuple(about["stretch"])
        self.trainer.length = self._length(*stretch)
        length = self.trainer.length
        behind = step >= length.steps if length.seconds is None else seconds >= length.seconds
        if extend and behind:
            raise OptionError(
                f"--extend: {self.trainer.epoch:.1f} epochs and {seconds / 60:.1f} minutes are behind this run. "
                "Give --epochs or --minutes a larger number: the new length in all."
            )
        print(f"going on from {path}, step {step}", file=sys.stderr)

    def train(self) -> int:
        """Runs to the end, or to a stop that saves.  Returns the exit code."""
        try:
            return self._train()
        except FileError:
            raise
        except OSError as error:
            raise FileError(
                f"--output_dir {self.folder.path} cannot be written: {error.strerror or error}. "
                "What was saved before is untouched; --resume goes on from it."
            ) from error

    def _train(self) -> int:
        self._check_agreement()
        self.writer.begin()
        if self.world.is_main:
            mark_begun(os.environ)
        self._settle_length()
        with self.agreed, contextlib.closing(self.folder):
            with self._progress_bar() as bar:
                self._loop(bar)
            return self._finish() if self.agreed.stop_signal is None else self._stopped(self.agreed.stop_signal)

    def _loop(self, bar: tqdm) -> None:
        trainer = self.trainer
        self.agreed.update()
        epochs_done, parts = int(trainer.epoch), self.config.accumulate
        for report in trainer.run():
            self.pending.append(report)
            if trainer.parts > parts:
                parts = trainer.parts
                bar.write(f"memory ran out: going on with batches in {parts} parts", file=sys.stderr)
            if (epoch := int(trainer.epoch)) > epochs_done:
                self._write_reports(bar, self._measure_quality(epochs_done, epoch, bar))
                self._after_epoch(epochs_done, epoch, bar)
                epochs_done = epoch
            elif self.device.type == "cpu" or len(self.pending) == REPORTS_AT_ONCE:
                self._write_reports(bar)
            self.agreed.update()
            if self.agreed.stop_signal is not None or trainer.step == self.config.max_steps:
                break
            if time.monotonic() - self.writer.last_save > SAVE_EVERY_S:
                self.writer.save(self.folder.latest, self.elapsed())
        self._write_reports(bar)

    def _check_agreement(self) -> None:
        """Raises OptionError if the processes would train different things, for want of the same files or options."""
        config = self.config
        options = [getattr(config, name) for name, spec in specs(Config).items() if not spec.free]
        if not self.world.all_equal((self.trainer.step, self.trainer.length, len(self.data), options)):
            raise OptionError(
                "the processes of this run do not start from the same: options, images, or what --output_dir "
                f"{config.output_dir} holds. Give all the same command, and folders that all of them see."
            )

    def _settle_length(self) -> None:
        """Says what is coming, and keeps back from --minutes what the last picture and the last save will take."""
        trainer, config = self.trainer, self.config
        seconds = trainer.seconds_per_step()
        if config.minutes is not None:
            forwards = self.writer.request(()).evaluations() * config.num_samples / config.batch_size
            reserve = min(2.5 + 1.3 * forwards * seconds / 3, config.minutes * 30)
            trainer.length = self._length(trainer.length.from_step, trainer.length.from_seconds, reserve)
        about_it = (
            who_trains(config, trainer, self.heldout_count, self.folder.path),
            what_is_coming(config, trainer, seconds, self.elapsed()),
            *what_is_faster(config, self.device),
        )
        print("\n".join(about_it), file=sys.stderr)

    def _progress_bar(self) -> tqdm:
        budget, length = self.config.minutes is not None, self.trainer.length
        return tqdm(
            total=round(length.seconds) if budget else length.steps,
            initial=0 if budget else self.trainer.step,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def _write_reports(self, bar: tqdm, measured: dict[str, float] | None = None) -> None:
        """What has been reported since the last time goes to the log and the bar; measured: after the last of them."""
        for report in self.pending:
            last = report is self.pending[-1]
            if self.writer.write_report(report, measured or {} if last else {}) >= MAX_SKIPPED:
                raise DivergenceError(
                    f"the loss was not finite for {MAX_SKIPPED} steps in a row, up to step {report.step}. "
                    "What was saved before is untouched. "
                    f"Lower --lr (now {self.config.lr:g}), or use --precision fp32."
                )
        if self.pending:
            bar.set_postfix_str(f"loss {self.writer.loss:.4f}, {self.writer.speed:.0f} images/s", refresh=False)
            bar.update((round(self.elapsed()) if self.config.minutes is not None else self.trainer.step) - bar.n)
            self.pending.clear()

    def _measure_quality(self, before: int, epoch: int, bar: tqdm) -> dict[str, float]:
        """Every --eval_interval epochs: how near drawn images come to real ones; --keep_best keeps the nearest."""
        config = self.config
        if not config.eval_interval or epoch // config.eval_interval == before // config.eval_interval:
            return {}
        request = self.writer.request(range(config.eval_images))
        found = self.measure(self.trainer.ema.model, self.trainer.diffusion, request)
        for name, value in found.items():
            bar.write(f"epoch {epoch}: {name} {value:.4f}", file=sys.stderr)
            self.writer.add_score(name, value, self.elapsed())
        return found

    def _after_epoch(self, before: int, epoch: int, bar: tqdm) -> None:
        """What is due at the end of an epoch, or of several that ended in one step."""
        loss = self._measure()
        if epoch // self.sample_every > before // self.sample_every:
            self.writer.draw_samples(epoch)
            self.writer.plot_losses()
            spent = duration(self.elapsed())
            what = f"held-out {loss:.4f}" if self.heldout_count else f"averaged weights {loss:.4f}"
            bar.write(f"epoch {epoch}: loss {self.writer.loss:.4f}, {what}, {spent} so far", file=sys.stderr)
        if epoch // self.save_every > before // self.save_every:
            self.writer.save_epoch(epoch, self.elapsed())

    def _measure(self) -> float:
        """The held-out loss, kept; without held-out images, that of images that train.

        Raises DivergenceError where it is not finite: such weights are not worth saving.
        """
        loss = self.trainer.heldout_loss(*self.measured)
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the averaged weights' loss is not finite after step {self.trainer.step}. "
                f"What was saved before is untouched. Lower --lr (now {self.config.lr:g})."
            )
        if self.heldout_count:
            self.writer.add_heldout(loss)
        return loss

    def _stopped(self, number: int) -> int:
        saved = self.writer.save(self.folder.latest, self.elapsed())
        self.world.barrier()  # torchrun ends all of them when the first has ended
        print(
            f"stopped by {signal.Signals(number).name} at step {self.trainer.step}"
            + (f"; saved {self.folder.latest}" if saved else "")
            + ". Go on with the same command and --resume.",
            file=sys.stderr,
        )
        return 128 + number

    def _finish(self) -> int:
        finished, epoch = self.trainer.finished(), self.trainer.current_epoch
        if lost := getattr(self.data.images, "bad", {}):
            print(f"{len(lost)} images could not be read while training, others took their place", file=sys.stderr)
        history = self.writer.heldout_history
        measured = history[-1][1] if history and history[-1][0] == self.trainer.step else self._measure()
        picture = self.writer.draw_samples(epoch)
        self.writer.plot_losses()
        if not self.writer.save_final(self.elapsed(), finished):
            raise DivergenceError(f"the weights are not finite at the end. Lower --lr (now {self.config.lr:g}).")
        done = "finished" if finished else f"stopped at --max_steps {self.config.max_steps}, --resume goes on;"
        print(
            f"{done} after {duration(self.elapsed())}, step {self.trainer.step}, "
            f"{'held-out loss' if self.heldout_count else 'loss of the averaged weights'} {measured:.4f}\n"
            f"samples    {picture}\nlosses     {self.folder.loss_plot}\nmodel      {self.folder.final}\n"
            f"draw more  python sample.py --checkpoint {self.folder.final}",
            file=sys.stderr,
        )
        return 0
