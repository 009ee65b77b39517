"""Fits single image files and masks to the images of a model, as training images are fitted.

Scaled to cover the size, cropped from the centre, in grey or colour as the model's.  Knows no models.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.files.decode import Header, ImageSpec, UnreadableImage, decode, read_header
from tiny_diffusion.data.files.folders import list_images, readable
from tiny_diffusion.data.files.scaling import scale_to_cover
from tiny_diffusion.errors import FileError, OptionError, printable

MAX_PATH = 1000  # letters of a path in a message
WHITE = 128  # grey levels of a mask from which a pixel counts as white


def image_paths(option: str, text: str) -> list[Path]:
    """The image file, or those of the folder in their order.  option: the option that named it.  Raises FileError."""
    path = Path(text)
    if path.is_dir():
        try:
            files = list_images(path)
        except FileError as error:
            raise FileError(str(error).replace("--data_dir", f"--{option}")) from error
        return [files.path(index) for index in range(len(files))]
    if not path.is_file():
        raise FileError(f"--{option} {text} does not exist. Name an image file, or a folder of images.")
    return [path]


def fitted_images(option: str, paths: list[Path], spec: ImageSpec) -> tuple[Tensor, str]:
    """The images as uint8 (N, C, H, W), and what was changed to fit them, in one line, or "" if nothing was.

    Raises FileError for a file that cannot be read.
    """
    images, changed = [], []
    for path in paths:
        header = _readable(option, path, lambda path=path: read_header(path))
        images.append(_readable(option, path, lambda path=path: decode(path, spec)))
        if change := _change(header, spec):
            changed.append(f"{printable(readable(path.name))}: {change}")
    more = f", and {len(changed) - 1:,} others alike" if len(changed) > 1 else ""
    return torch.from_numpy(np.stack(images)), f"{changed[0]}{more}" if changed else ""


def fitted_masks(option: str, paths: list[Path], size: tuple[int, int]) -> Tensor:
    """The masks as float (N, 1, H, W), 1 where they are white, by the nearest pixel.

    Raises FileError for a file that cannot be read, OptionError for a mask that is all black or all white.
    """
    masks = []
    for path in paths:
        header = _readable(option, path, lambda path=path: read_header(path))
        spec = ImageSpec(header.size, 1, (0, 0, 0))
        mask = nearest(_readable(option, path, lambda path=path, spec=spec: decode(path, spec))[0], size) >= WHITE
        if mask.all() or not mask.any():
            colour, why = ("white", "nothing is known") if mask.all() else ("black", "there is nothing to repaint")
            raise OptionError(
                f"--{option} {printable(str(path), MAX_PATH)} is all {colour} at {size[0]}x{size[1]}, so {why}. "
                "Paint white what is to be repainted, and the rest black."
            )
        masks.append(mask)
    return torch.from_numpy(np.stack(masks)).float()[:, None]


def nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W) scaled to cover the size and cropped from the centre, each the nearest of the original."""
    scale = scale_to_cover(pixels.shape, size)
    rows, columns = (
        np.floor(
            (side - min(side, wanted / scale)) / 2 + (np.arange(wanted) + 0.5) * min(side, wanted / scale) / wanted
        )
        .astype(int)
        .clip(0, side - 1)
        for side, wanted in zip(pixels.shape, size, strict=True)
    )
    return pixels[rows][:, columns]


def _change(header: Header, spec: ImageSpec) -> str:
    """What fitting changes of an image, in words."""
    colours = ("grey" if spec.channels == 1 else "colour") if header.grey != (spec.channels == 1) else ""
    if header.size == spec.size and not colours:
        return ""
    before, after = (f"{height}x{width}" for height, width in (header.size, spec.size))
    same_shape = header.size[0] * spec.size[1] == header.size[1] * spec.size[0]
    how = "" if header.size == spec.size else " scaled" if same_shape else " scaled and cropped from the centre"
    made = " and ".join(filter(None, [how.strip(), f"made {colours}" if colours else ""]))
    return f"{before} {made} to the model's {after}"


def _readable(option: str, path: Path, work):
    try:
        return work()
    except UnreadableImage as error:
        raise FileError(
            f"--{option} {printable(str(path), MAX_PATH)} cannot be read: {error}. Name another image."
        ) from error
    except OSError as error:
        raise FileError(
            f"--{option} {printable(str(path), MAX_PATH)} cannot be read: {error.strerror or error}."
        ) from error
