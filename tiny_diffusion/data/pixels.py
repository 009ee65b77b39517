"""Converts pixels between uint8, as images are stored, and float32 in [-1, 1], as the network sees them."""

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.errors import DivergenceError


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images (N, C, H, W) as uint8 of the same shape.  Values outside [-1, 1] are clamped.

    Raises DivergenceError if any value is NaN, which no grey level can show.
    """
    bad = torch.isnan(images).flatten(1).any(1)
    if bad.any():
        raise DivergenceError(
            f"{int(bad.sum())} of {len(images)} images contain NaN (the first is image {int(bad.int().argmax())}): "
            "the model has probably diverged. Try an earlier checkpoint."
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pictures(images: Tensor) -> np.ndarray:
    """Float images (N, C, H, W) as numpy uint8 (N, H, W, C), as files are written.  Raises DivergenceError."""
    return to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy()
