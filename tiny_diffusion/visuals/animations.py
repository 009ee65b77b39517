"""Animations: frames in, a GIF out."""

import os
from collections.abc import Sequence

import numpy as np

from tiny_diffusion.files import atomic_write


def save_gif(
    path: str | os.PathLike, frames: Sequence[np.ndarray], *, seconds: float = 4.0, hold_seconds: float = 2.0
) -> None:
    """Saves frames (H, W, 3) as an animation of `seconds` that holds its last frame for `hold_seconds` and repeats.

    Grey frames are exact; coloured ones get 256 colours each, without dithering.  Browsers slow a frame shorter than
    0.02 s down to 0.1 s, so where there are more frames than fit, evenly spread ones (both ends included) are kept.
    """
    from PIL import Image

    if len(frames) == 0:
        raise ValueError("an animation needs at least one frame")
    count = max(1, min(len(frames), int(seconds * 50 + 1e-9)))
    kept = [frames[i] for i in np.linspace(len(frames) - 1, 0, count).round().astype(int)[::-1]]
    durations = 10 * np.diff(np.linspace(0, seconds * 100, count + 1).round())  # a GIF counts whole 1/100 s
    durations[-1] += hold_seconds * 1000
    if all((f == f[..., :1]).all() for f in kept):
        pictures = [Image.fromarray(f[..., 0]) for f in kept]
    else:
        pictures = [Image.fromarray(f).quantize(256, dither=Image.Dither.NONE) for f in kept]
    with atomic_write(path) as file:
        pictures[0].save(
            file, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
            duration=durations.round().astype(int).tolist(),
        )  # fmt: skip
