"""A network as the page carries it: its shape as plain values, and its weights as 16-bit numbers in base64.

They are whole numbers with one scale for each row of a tensor, which is each output.  At the same size their errors are
a quarter of those of 16-bit floats, whose exponents tell apart magnitudes that one row does not have.
"""

import base64

import numpy as np

from tiny_diffusion.config.network_shape import head_width, level_widths, norm_groups
from tiny_diffusion.config.training import Config
from tiny_diffusion.models.unet import UNet

MAX_PARAMETERS, MAX_SIDE = 5_000_000, 64  # beyond, an evaluation in a browser takes seconds
LARGEST = 32767  # of a 16-bit number


def too_large(parameters: int, size: tuple[int, int]) -> str | None:
    """Why the page cannot run a network of so many parameters for images of this (height, width); None if it can."""
    if parameters > MAX_PARAMETERS:
        return f"it has {parameters / 1e6:.1f} million parameters, and a page runs up to {MAX_PARAMETERS / 1e6:.0f}"
    if max(size) > MAX_SIDE:
        return f"its images have {size[0]} x {size[1]} pixels, and a page makes images of up to {MAX_SIDE} a side"
    return None


def network_of(model: UNet, config: Config, shape: tuple[int, int, int]) -> dict[str, object]:
    """What network.js needs: "shape", "tensors" (name, shape), "weights", "scales".   shape: (C, H, W) of an image."""
    tensors = model.state_dict()
    numbers, scales = zip(*(_rounded(tensor.numpy()) for tensor in tensors.values()), strict=True)
    return {
        "shape": network_shape(model, config, shape),
        "tensors": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
        "weights": _base64(np.concatenate(numbers), "<i2"),
        "scales": _base64(np.concatenate(scales), "<f4"),
    }


def _rounded(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers of a tensor, row after row, and the scale of each row; a vector is one row."""
    rows = tensor.reshape(len(tensor) if tensor.ndim > 1 else 1, -1).astype(np.float64)
    scales = np.abs(rows).max(axis=1).astype(np.float32) / LARGEST
    divisors = np.where(scales > 0, scales, 1)[:, None].astype(np.float64)
    return np.clip(np.rint(rows / divisors), -LARGEST, LARGEST).ravel(), scales


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def network_shape(model: UNet, config: Config, shape: tuple[int, int, int]) -> dict[str, object]:
    """The numbers that the weights alone do not say."""
    widths = level_widths(config.base_channels, config.channel_mult)
    with_attention = config.attention_levels
    return {
        "channels": shape[0],
        "height": shape[1],
        "width": shape[2],
        "patch_size": config.patch_size,
        "widths": widths,
        "layers_per_block": config.layers_per_block,
        "activation": config.activation,
        "groups": norm_groups(config.base_channels),
        "head_width": head_width(widths, with_attention, config.attention_heads) if with_attention else 0,
        "embedding_width": model.time_embedding.linear_2.out_features,
        "num_classes": model.num_classes,
    }
