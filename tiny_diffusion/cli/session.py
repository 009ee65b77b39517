"""One training session: consumes the trainer's reports and writes the log, pictures, checkpoints and the progress bar."""

import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tiny_diffusion.checkpoint import Checkpoint, load_model, make_model, save_checkpoint
from tiny_diffusion.config import Config
from tiny_diffusion.core.samplers import SAMPLERS
from tiny_diffusion.data.batches import Batches, to_float
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.diffusion import Diffusion
from tiny_diffusion.distributed import make_world
from tiny_diffusion.errors import DivergenceError, FileError, OptionError
from tiny_diffusion.randomness import seed_torch
from tiny_diffusion.run_folder import RunFolder
from tiny_diffusion.sampling import Request, sample
from tiny_diffusion.training.trainer import Length, StepReport, Trainer

SAVE_EVERY_S = 120.0
MOST_SKIPPED = 20
HELDOUT_IMAGES = 256
SAMPLER, STEPS = "dpmpp_2m", 20


class Session:
    """Everything that one call of train does, from the data to the last picture."""

    def __init__(self, config: Config, folder: RunFolder, started: float):
        self.config, self.folder, self.started = config, folder, started
        self.device = make_world(config.device, dict(os.environ)).device
        if config.precision == "fp16" and self.device.type != "cuda":
            raise OptionError(f"--precision fp16 needs a CUDA device, and this run is on {self.device.type}. Use bf16 or fp32.")
        self.dataset = DATASETS[config.dataset]
        seed_torch(config.seed, "weights")
        model = make_model(config, self.dataset.channels, len(self.dataset.classes)).to(self.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        data = open_dataset(config.dataset, data_dir=config.data_dir, size=config.image_size)
        heldout = open_dataset(config.dataset, heldout=True, data_dir=config.data_dir, size=config.image_size)
        self.heldout = to_float(heldout.images[:HELDOUT_IMAGES].to(self.device)), heldout.labels[:HELDOUT_IMAGES].to(self.device)
        self.batches = Batches(data, config.batch_size, config.seed, device=self.device, hflip=config.hflip)
        self.trainer = Trainer(model, config, self.batches, self._length(), self.elapsed, len(self.dataset.classes))
        self.elapsed_before = 0.0
        self.heldout_history: list[list[float]] = []
        self.stop_signal: int | None = None
        self.last_save = time.monotonic()
        self.pending: list[StepReport] = []

    def elapsed(self) -> float:
        """Seconds that the run has spent, from the start of the process, earlier sessions included."""
        return self.elapsed_before + time.monotonic() - self.started

    def _length(self, from_step: int = 0, from_seconds: float = 0.0, reserve: float = 0.0) -> Length:
        if self.config.minutes is not None:
            return Length(seconds=self.config.minutes * 60 - reserve, from_step=from_step, from_seconds=from_seconds)
        steps = math.ceil(self.config.epochs * len(self.batches) / self.config.batch_size)
        return Length(steps=steps, from_step=from_step, from_seconds=from_seconds)

    def take_weights(self, source: Checkpoint, path: str) -> None:
        """--init_from: the averaged weights of another run, and nothing else of it."""
        state, model = load_model(source).state_dict(), self.trainer.model
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise OptionError(f"--init_from {path} is a network of other sizes than the options ask for. Leave the network's options out.")
        model.load_state_dict(state)
        self.trainer.ema.model.load_state_dict(state)

    def resume(self, path: Path, checkpoint: Checkpoint, extend: bool) -> None:
        """Continue where the checkpoint stands; extend: as a new stretch with a warm-up and decay of its own."""
        about = checkpoint.about
        try:
            self.trainer.load(checkpoint.tensors, about["step"])
        except (KeyError, RuntimeError) as error:
            raise FileError(f"{path} cannot be resumed: its tensors do not fit its configuration ({str(error).splitlines()[0]}).") from error
        self.elapsed_before = about["elapsed_seconds"]
        self.heldout_history = about["heldout_history"]
        stretch = (about["step"], about["elapsed_seconds"]) if extend else tuple(about["stretch"])
        self.trainer.length = self._length(*stretch)
        if extend and self.trainer.finished():
            raise OptionError(f"--extend: this run already has {self.trainer.epoch:.0f} epochs and {self.elapsed() / 60:.1f} minutes; give more in all.")
        print(f"going on from {path}, step {about['step']}", file=sys.stderr)

    def train(self) -> int:
        """Runs to the end, or to a stop that saves.  Returns the exit code."""
        trainer, folder = self.trainer, self.folder
        folder.open(trainer.step)
        self._settle_length()
        first = trainer.step
        epochs_done = int(trainer.epoch)
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._progress_bar() as bar:
                for report in trainer.run():
                    self.pending.append(report)
                    if self.device.type == "cpu" or len(self.pending) >= 20:
                        self._read_reports(bar)
                    if int(trainer.epoch) > epochs_done:
                        epochs_done = int(trainer.epoch)
                        self._read_reports(bar)
                        self._after_epoch(epochs_done, bar)
                    if self.stop_signal is not None or trainer.step == self.config.max_steps:
                        break
                    if time.monotonic() - self.last_save > SAVE_EVERY_S:
                        self._save(folder.latest)
                self._read_reports(bar)
            if self.stop_signal is not None:
                return self._stopped(first)
            return self._finish()
        finally:
            folder.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: object) -> None:
        """The first request is granted after the step in progress; the second Ctrl-C at once."""
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number

    def _settle_length(self) -> None:
        """Says what is coming, and keeps back from --minutes what the last picture and the last save will take."""
        trainer, config = self.trainer, self.config
        seconds = trainer.seconds_per_step()
        size = "x".join(map(str, (self.dataset.channels, config.image_size, config.image_size)))
        tqdm.write(
            f"{config.dataset}: {len(self.batches):,} images of {size} ({self.dataset.train}); "
            f"network of {self.parameters / 1e6:.2f} M parameters on {self.device}; writes {self.folder.path}",
            file=sys.stderr,
        )
        if config.minutes is None:
            left = (trainer.length.steps - trainer.step) * seconds
            about = f"{trainer.length.steps:,} steps ({config.epochs} epochs), about {_duration(left)}"
            hint = "; --minutes 10 for a quick one" if left > 900 else ""
        else:
            share = config.num_samples / config.batch_size
            reserve = 2.5 + 1.3 * seconds / 3 * share * SAMPLERS[SAMPLER].evaluations(STEPS)
            trainer.length = self._length(trainer.length.from_step, trainer.length.from_seconds, min(reserve, config.minutes * 30))
            left = max(0.0, trainer.length.seconds - self.elapsed())
            about, hint = f"{config.minutes:g} minutes, about {left / seconds:,.0f} steps ({left / seconds * config.batch_size / len(self.batches):.1f} epochs)", ""
        tqdm.write(about + hint, file=sys.stderr)

    def _progress_bar(self) -> tqdm:
        budget = self.config.minutes is not None
        length = self.trainer.length
        return tqdm(
            total=round(length.seconds) if budget else length.steps,
            initial=0 if budget else self.trainer.step,
            unit="s" if budget else "step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def _read_reports(self, bar: tqdm) -> None:
        """Logs what has been reported since the last time; here the device is waited for."""
        for report in self.pending:
            loss, norm, skipped = float(report.loss), float(report.grad_norm), int(report.skipped)
            self.folder.log(
                step=report.step, epoch=round(report.epoch, 4), loss=loss, grad_norm=norm, lr=report.lr,
                images_per_second=round(report.images_per_second, 1),
            )  # fmt: skip
            if skipped >= MOST_SKIPPED:
                self.folder.flush()
                raise DivergenceError(
                    f"the loss was not finite for {skipped} steps in a row, up to step {report.step}. Nothing was overwritten. "
                    f"Lower --lr (now {self.config.lr:g}), or use --precision fp32."
                )
            self.smooth_loss = 0.98 * getattr(self, "smooth_loss", loss) + 0.02 * loss if math.isfinite(loss) else getattr(self, "smooth_loss", loss)
            self.speed = 0.9 * getattr(self, "speed", report.images_per_second) + 0.1 * report.images_per_second
        if self.pending:
            bar.set_postfix_str(f"loss {self.smooth_loss:.4f}, {self.speed:.0f} images/s", refresh=False)
            bar.update((round(self.elapsed()) if self.config.minutes is not None else self.trainer.step) - bar.n)
            self.pending.clear()

    def _after_epoch(self, epoch: int, bar: tqdm) -> None:
        heldout = self._measure_heldout()
        if epoch % self.config.sample_interval == 0:
            self._draw_samples(epoch)
            self._plot_losses()
        if epoch % self.config.save_interval == 0 and self._save(self.folder.epoch_checkpoint(epoch)):
            self.folder.prune(self.config.keep_last)
        if not sys.stderr.isatty() or epoch % self.config.sample_interval == 0:
            bar.write(f"epoch {epoch}: loss {self.smooth_loss:.4f}, held-out {heldout:.4f}, {_duration(self.elapsed())} so far", file=sys.stderr)

    def _measure_heldout(self) -> float:
        loss = self.trainer.heldout_loss(*self.heldout)
        self.heldout_history.append([self.trainer.step, loss])
        return loss

    def _draw_samples(self, epoch: int) -> None:
        from tiny_diffusion.visuals.images import grid, save_png, to_uint8

        config = self.config
        request = self._request(range(config.num_samples))
        images = sample(self.trainer.ema.model, Diffusion.of(config), request, self._shape())
        if not torch.isfinite(images).all():
            tqdm.write(f"epoch {epoch}: the samples hold NaN; no picture is written", file=sys.stderr)
            return
        captions = [self.dataset.classes[label] for label in request.labels()] if config.class_cond else None
        save_png(self.folder.sample_picture(epoch), grid(to_uint8(images.numpy()), captions=captions))

    def _request(self, indices) -> Request:
        classes = tuple(range(len(self.dataset.classes))) if self.config.class_cond else ()
        steps = min(STEPS, self.config.timesteps)
        return Request(indices, SAMPLER, steps, SAMPLERS[SAMPLER].grid, self.config.seed, classes)

    def _shape(self) -> tuple[int, int, int]:
        return self.dataset.channels, self.config.image_size, self.config.image_size

    def _plot_losses(self) -> None:
        from tiny_diffusion.visuals.figures import save_loss_curve

        steps, losses = self.folder.losses()
        heldout = list(zip(*self.heldout_history, strict=True)) or [(), ()]
        title = f"{self.config.dataset}: {self.config.prediction}-prediction, {self.config.schedule} schedule"
        save_loss_curve(self.folder.loss_plot, steps, losses, *heldout, title=title)

    def _save(self, path: Path, finished: bool = False) -> bool:
        """Writes a checkpoint; False, with a line, if the weights are not finite, which leaves every earlier one alone."""
        self.last_save = time.monotonic()
        self.folder.flush()
        steps, losses = self.folder.losses()
        thin = max(1, len(steps) // 1000)
        history = [[step, None if math.isnan(loss) else loss] for step, loss in zip(steps[::thin], losses[::thin], strict=True)]
        request = self._request(())
        about = {
            "config": self.config.to_dict(),
            "step": self.trainer.step,
            "elapsed_seconds": self.elapsed(),
            "stretch": [self.trainer.length.from_step, self.trainer.length.from_seconds],
            "finished": finished,
            "loss_history": history,
            "heldout_history": self.heldout_history,
            "best_score": None,
            "class_names": list(self.dataset.classes),
            "image_size": [self.config.image_size, self.config.image_size],
            "channels": self.dataset.channels,
            "background": None,
            "sampling": {"sampler": request.sampler, "steps": request.steps, "grid": request.grid, "guidance": 1.0, "clip": True},
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        }
        try:
            save_checkpoint(path, about, self.trainer.tensors())
        except FloatingPointError as error:
            tqdm.write(f"not saved: {error}", file=sys.stderr)
            return False
        return True

    def _stopped(self, first: int) -> int:
        self._save(self.folder.latest)
        name = signal.Signals(self.stop_signal).name
        print(f"stopped by {name} at step {self.trainer.step}; saved {self.folder.latest}. Go on with the same command and --resume.", file=sys.stderr)
        return 128 + self.stop_signal

    def _finish(self) -> int:
        finished = self.trainer.finished()
        epoch = math.ceil(self.trainer.epoch)
        if not self.heldout_history or self.heldout_history[-1][0] != self.trainer.step:
            self._measure_heldout()
        self._draw_samples(epoch)
        self._plot_losses()
        if not self._save(self.folder.final, finished):
            raise DivergenceError(f"the weights are not finite at step {self.trainer.step}. Lower --lr (now {self.config.lr:g}).")
        self.folder.latest.unlink(missing_ok=True)
        done = "finished" if finished else f"stopped at --max_steps {self.config.max_steps}, --resume goes on"
        print(
            f"{done} after {_duration(self.elapsed())}, step {self.trainer.step}, held-out loss {self.heldout_history[-1][1]:.4f}\n"
            f"samples   {self.folder.sample_picture(epoch)}\nlosses    {self.folder.loss_plot}\nmodel     {self.folder.final}\n"
            f"draw more: python sample.py --checkpoint {self.folder.final}",
            file=sys.stderr,
        )
        return 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
