"""A film of sampling: some steps of every batch are kept, and saved as frames or as an animation at the end."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiny_diffusion.visuals.animations import save_film
from tiny_diffusion.visuals.class_grid import class_grid
from tiny_diffusion.visuals.images import denoising_frame, grid, save_png, strip

MAX_FRAMES = 21  # the noise and 20 steps
STRIP_ROWS, STRIP_COLUMNS = 8, 9


class Frame(NamedTuple):
    """One step of sampling.  noisy, clean: x_t and the estimate of x_0, uint8 (N, H, W, C)."""

    step: int
    time: float
    noisy: np.ndarray
    clean: np.ndarray


class Film:
    """The noise, the last step, and evenly spread steps between them, MAX_FRAMES in all.

    steps: of the sampler; the noise is step 0.   max_images: how many images are kept, of all batches together.
    labels, names: as `save_grid` takes them.
    """

    def __init__(self, steps: int, max_images: int, labels: Sequence[int] | None = None, names: Sequence[str] = ()):
        self.arrange = grid if labels is None else partial(class_grid, labels=labels[:max_images], names=names)
        chosen = np.linspace(0, steps, min(MAX_FRAMES, steps + 1)).round().astype(int).tolist()
        self.batches: dict[int, list[Frame]] = {step: [] for step in chosen}
        self.max_images = max_images
        self.room = dict.fromkeys(chosen, max_images)

    def wants(self, step: int) -> bool:
        """Whether the film needs this step of the next batch."""
        return self.room.get(step, 0) > 0

    def add(self, frame: Frame) -> None:
        """Keeps a step of the next batch, with as many of its images as there is room for."""
        kept = frame._replace(noisy=frame.noisy[: self.room[frame.step]], clean=frame.clean[: self.room[frame.step]])
        self.batches[frame.step].append(kept)
        self.room[frame.step] -= len(kept.noisy)

    def frames(self) -> Iterator[Frame]:
        """The kept steps in order, each of all batches together; an edit may have fewer than were expected."""
        for step, batches in self.batches.items():
            if not batches:
                continue
            noisy, clean = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("noisy", "clean"))
            yield Frame(step, batches[0].time, noisy, clean)

    def save(self, path: str | os.PathLike) -> None:
        """The film as an animation, x_t at left and the estimate of x_0 at right."""
        save_film(path, [denoising_frame(frame.noisy, frame.clean, self.arrange) for frame in self.frames()])

    def save_frames(self, folder: Path) -> int:
        """step_XXXX.png for each frame, and strip.png of the first images; returns the number of frames.

        Frames of an earlier film in the same folder are removed.
        """
        for stale in folder.glob("step_*.png"):
            stale.unlink()
        frames = list(self.frames())
        for frame in frames:
            save_png(folder / f"step_{frame.step:04d}.png", denoising_frame(frame.noisy, frame.clean, self.arrange))
        chosen = frames[: -1 : max(1, len(frames) // (STRIP_COLUMNS - 1))]
        headings = [*(f"t = {frame.time:.0f}" for frame in chosen), "sample"]
        save_png(folder / "strip.png", strip([frame.noisy[:STRIP_ROWS] for frame in [*chosen, frames[-1]]], headings))
        return len(frames)
