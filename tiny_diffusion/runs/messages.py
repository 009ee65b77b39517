"""What a run says of itself before it trains: what trains on what, how long it will take, what would be faster."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.training.trainer import Trainer

FEW_STEPS = 300  # too few to learn much from
MANY_MINUTES = 15


def who_trains(config: Config, trainer: Trainer, heldout_count: int, folder: Path) -> str:
    """The images and the network."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    size = "x".join(map(str, (trainer.batches.data.channels, *config.size)))
    return (
        f"{config.dataset}: {len(trainer.batches):,} images of {size} train{splits_in_words(config, heldout_count)}; "
        f"network of {parameters:.2f} M parameters on {trainer.device}; writes {folder}"
    )


def splits_in_words(config: Config, heldout: int) -> str:
    """Which parts of the set train and which are held out, in words."""
    having = DATASETS[config.dataset].splits
    parts = f" ({', '.join(config.splits)})" if config.splits else ""
    rest = ", ".join(split for split in having if split not in config.splits)
    return f"{parts}, {heldout:,} are held out{f' ({rest})' if rest else ''}" if heldout else f"{parts}, none held out"


def what_is_coming(config: Config, trainer: Trainer, seconds_a_step: float, elapsed: float) -> str:
    """How many steps, and how long they will take.  elapsed: seconds of the run's clock."""
    length, images = trainer.length, len(trainer.batches)
    if config.minutes is not None:
        steps = max(0.0, length.seconds - elapsed) / seconds_a_step
        return f"{config.minutes:g} minutes, about {steps:,.0f} steps ({steps * config.batch_size / images:.1f} epochs)"
    minutes_left = (length.steps - trainer.step) * seconds_a_step / 60
    coming = f"{length.steps:,} steps ({config.epochs} epochs), about {duration(minutes_left * 60)}"
    coming += "; --minutes 10 for a quick one" if minutes_left > MANY_MINUTES else ""
    if length.steps < FEW_STEPS and config.max_steps is None:
        enough = math.ceil(1000 * config.batch_size / images)
        coming += f". Few to learn from: --epochs {enough} makes a thousand, --minutes 10 what fits"
    return coming


def what_is_faster(config: Config, device: torch.device) -> list[str]:
    """On a CPU a line for a preset that is slow there."""
    if not config.preset or not PRESETS[config.preset].faster or device.type != "cpu":
        return []
    faster = PRESETS[config.preset].faster_on(config.dataset, config.data_dir)
    return [f"--preset {config.preset} is made for a GPU and slow here; faster to something to look at: {faster}"]


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def show_progress(items: Iterable, count: int, doing: str) -> Iterable:
    """Passes the items on, with a progress bar on a terminal.  count: how many.  doing: what is done with them."""
    from tqdm import tqdm

    return tqdm(items, doing, count, unit="image", leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
