"""What is recorded for the page: samples by epoch, real images, and one sampling from noise to image."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.page.pictures import address_of, evenly_chosen, images_text
from tiny_diffusion.runs.checkpoint import Checkpoint

MAX_EPOCHS, EPOCH_BYTES = 12, 360_000  # pictures by epoch, and what they take together
REAL_BYTES, MAX_REAL = 60_000, 8
MAX_FRAMES = 21


def epochs_of(folder: Path) -> list[list]:
    """[epoch, address of the picture], of at most MAX_EPOCHS epochs."""
    paths = sorted(folder.glob("samples/epoch_*.png"), key=lambda path: (len(path.name), path.name))
    chosen = evenly_chosen(paths, MAX_EPOCHS) if paths else []
    pictures = [[_epoch(path), address_of(path, EPOCH_BYTES // len(chosen))] for path in chosen]
    return [picture for picture in pictures if picture[1]]


def _epoch(path: Path) -> int | str:
    digits = path.stem.removeprefix("epoch_")
    return int(digits) if digits.isdecimal() else digits


def real_images(config: Config, folder: Path, data_dir: str | None) -> dict[str, str]:
    """Some images of the run's data set: "bytes" and "text"; or only "missing", which says why there are none."""
    from tiny_diffusion.data.files.cache import Cache, cache_folder
    from tiny_diffusion.data.image_set import evenly_spaced
    from tiny_diffusion.data.pixels import to_float
    from tiny_diffusion.runs.images import open_images

    config = dataclasses.replace(config, data_dir=data_dir or config.data_dir)
    try:
        images, part = open_images(config, heldout=True), "held-out"
        if not len(images):
            images, part = open_images(config, cache=Cache(cache_folder(folder))), "training"
    except (FileError, OptionError) as error:
        return {"missing": f"The images of {config.dataset} were not there when this page was made: {error}"}
    count = int(np.clip(REAL_BYTES // np.prod(images.images.shape[1:]), 3, MAX_REAL))
    chosen = images.take(evenly_spaced(len(images), count).numpy())
    text = f"{len(chosen)} {part} images of {config.dataset}, evenly spaced over the set, each under noise of its own"
    return {"bytes": images_text(to_float(chosen)), "text": text}


def film_of(checkpoint: Checkpoint, model, max_bytes: int) -> dict[str, object]:
    """The first images of seed 0 as they are sampled by default, in at most MAX_FRAMES frames.

    "count", "levels" ([time, alpha, sigma] of each frame), "noisy" and "clean" (all frames one after another), "text".
    """
    import torch

    frame_bytes = 2 * int(np.prod(checkpoint.shape))
    count = next((n for n in (16, 9, 4) if n * MAX_FRAMES * frame_bytes <= max_bytes), 4)
    frames = MAX_FRAMES if count * MAX_FRAMES * frame_bytes <= max_bytes else MAX_FRAMES // 2
    request = checkpoint.request(range(count))
    wanted = set(np.linspace(0, request.steps, min(frames, request.steps + 1)).round().astype(int).tolist())
    steps = [step for number, step in enumerate(_steps(checkpoint, model, request)) if number in wanted]
    return {
        "count": count,
        "levels": [[step.level.time, step.level.alpha, step.level.sigma] for step in steps],
        "noisy": images_text(torch.cat([step.x for step in steps])),
        "clean": images_text(torch.cat([step.clean for step in steps])),
        "text": f"The first {count} images of seed 0, by {request.describe()}. None was chosen.",
    }


def _steps(checkpoint: Checkpoint, model, request) -> Iterator:
    from tiny_diffusion.diffusion.sampling import denoising
    from tiny_diffusion.models.build import make_diffusion

    return denoising(model, make_diffusion(checkpoint.config), request, checkpoint.shape)
