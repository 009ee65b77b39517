"""What a run prints: what trains on what, how long it will take, and what would be faster."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.training.trainer import Trainer

FEW_STEPS = 300  # a network learns little in fewer
MANY_MINUTES = 15


def describe_run(config: Config, trainer: Trainer, heldout_count: int, folder: Path) -> str:
    """The images, the network, the device and the output folder."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    size = "x".join(map(str, (trainer.batches.data.channels, *config.size)))
    splits = describe_splits(config, heldout_count)
    return (
        f"{config.dataset}: {len(trainer.batches):,} images of {size} train{splits}; "
        f"network of {parameters:.2f} M parameters on {trainer.device}; writes {folder}"
    )


def describe_splits(config: Config, heldout: int) -> str:
    """Which parts of the data set train, and how many images of which parts are held out."""
    parts = f" ({', '.join(config.splits)})" if config.splits else ""
    if not heldout:
        return f"{parts}, none held out"
    rest = ", ".join(split for split in DATASETS[config.dataset].splits if split not in config.splits)
    return f"{parts}, {heldout:,} are held out{f' ({rest})' if rest else ''}"


def describe_length(config: Config, trainer: Trainer, step_seconds: float, elapsed: float) -> str:
    """How many steps the run has and how long they will take.  elapsed: seconds on the run's clock."""
    length, images = trainer.length, len(trainer.batches)
    if config.minutes is not None:
        steps = max(0.0, length.seconds - elapsed) / step_seconds
        return f"{config.minutes:g} minutes, about {steps:,.0f} steps ({steps * config.batch_size / images:.1f} epochs)"
    seconds_left = (length.steps - trainer.step) * step_seconds
    text = f"{length.steps:,} steps ({config.epochs} epochs), about {duration(seconds_left)}"
    text += "; --minutes 10 makes a quick run" if seconds_left > 60 * MANY_MINUTES else ""
    if length.steps < FEW_STEPS and config.max_steps is None:
        enough = math.ceil(1000 * config.batch_size / images)
        text += f". That is few: --epochs {enough} makes a thousand, and --minutes 10 as many as fit"
    return text


def faster_options(config: Config, device: torch.device) -> list[str]:
    """A line that names faster options, where a preset is slow on a CPU; otherwise none."""
    if not config.preset or not PRESETS[config.preset].faster or device.type != "cpu":
        return []
    faster = PRESETS[config.preset].faster_on(config.dataset, config.data_dir)
    return [f"--preset {config.preset} is made for a GPU and slow here; good samples come sooner with: {faster}"]


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def progress_bar(config: Config, trainer: Trainer):
    """A bar of the run's seconds, or of its steps, on a terminal."""
    from tqdm import tqdm

    budget, length = config.minutes is not None, trainer.length
    return tqdm(
        total=round(length.seconds) if budget else length.steps,
        initial=0 if budget else trainer.step,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )


def show_progress(items: Iterable, count: int, doing: str) -> Iterable:
    """Passes the items on, with a progress bar on a terminal.  count: how many.  doing: what is done with them."""
    from tqdm import tqdm

    return tqdm(items, doing, count, unit="image", leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
