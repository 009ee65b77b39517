"""Films: frames in, a GIF, WebP or MP4 out, by imageio.  To add a format: a writer and a row in FILMS."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tiny_diffusion.errors import FileError
from tiny_diffusion.files import atomic_path

COLOURS = 256  # of a GIF
PALETTE_PIXELS = 60_000  # of all frames together, from which the palette of a film is chosen
BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 - 15 / 32  # mean 0


def save_film(
    path: str | os.PathLike, frames: Sequence[np.ndarray], *, seconds: float = 4.0, hold_seconds: float = 2.0
) -> None:
    """Saves frames (H, W, 3) as a film of `seconds` that holds its last frame for `hold_seconds`; GIF and WebP repeat.

    The ending of the path is a key of FILMS.  WebP is exact, and so is a GIF of grey frames; a coloured GIF has one
    palette for the whole film.  Browsers slow a frame shorter than 0.02 s down to 0.1 s, so where there are more frames
    than fit, evenly spread ones (both ends included) are kept.  Raises FileError if a library is missing.
    """
    if len(frames) == 0:
        raise ValueError("an animation needs at least one frame")
    count = max(1, min(len(frames), int(seconds * 50 + 1e-9)))
    kept = np.stack([frames[i] for i in np.linspace(len(frames) - 1, 0, count).round().astype(int)[::-1]])
    durations = 10 * np.diff(np.linspace(0, seconds * 100, count + 1).round())  # ms; a GIF counts whole 1/100 s
    durations[-1] += hold_seconds * 1000
    check_film(path)
    with atomic_path(path) as partial:
        FILMS[Path(path).suffix.lower()](partial, kept, durations.round().astype(int).tolist())


def check_film(path: str | os.PathLike) -> None:
    """Raises FileError if the library that writes films with this ending is missing."""
    if Path(path).suffix.lower() == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError as error:
            raise FileError(
                f"{path} needs imageio-ffmpeg. Run: pip install imageio-ffmpeg, or end the name in .webp or .gif."
            ) from error


def _save_gif(path: Path, frames: np.ndarray, durations: list[int]) -> None:
    import imageio.v3 as imageio

    options = {"plugin": "pillow", "extension": ".gif", "is_batch": True, "duration": _for_pillow(durations), "loop": 0}
    if (frames == frames[..., :1]).all():
        imageio.imwrite(path, frames[..., 0], **options)
        return
    palette = film_palette(frames)
    imageio.imwrite(path, dithered(frames, palette), mode="P", palette=palette.tobytes(), optimize=False, **options)


def _save_webp(path: Path, frames: np.ndarray, durations: list[int]) -> None:
    import imageio.v3 as imageio

    imageio.imwrite(
        path,
        frames,
        plugin="pillow",
        extension=".webp",
        is_batch=True,
        duration=_for_pillow(durations),
        loop=0,
        lossless=True,
    )


def _for_pillow(durations: list[int]) -> list[int] | int:
    """Pillow takes a number for a single frame."""
    return durations if len(durations) > 1 else durations[0]


def _save_mp4(path: Path, frames: np.ndarray, durations: list[int]) -> None:
    """H.264 of one frame rate.  Sides become even, as players want, and the held frame is repeated."""
    import imageio.v2 as imageio

    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    step = durations[0] if len(durations) > 1 else 100
    seconds = sum(durations) / 1000
    rate = len(durations) / max(seconds - (durations[-1] - step) / 1000, 1e-9)  # without the hold
    repeats = max(1, round(seconds * rate) - len(frames) + 1)
    colours = "scale=out_color_matrix=bt709:out_range=tv"
    tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    with TemporaryDirectory() as folder:  # ffmpeg wants a name that ends in .mp4
        whole = Path(folder, "film.mp4")
        with imageio.get_writer(
            whole, format="FFMPEG", fps=rate, codec="libx264", pixelformat="yuv420p", macro_block_size=1, quality=None,
            output_params=["-crf", "12", "-vf", colours, *tags, "-movflags", "+faststart"],
        ) as film:  # fmt: skip
            for frame in [*frames, *[frames[-1]] * (repeats - 1)]:
                film.append_data(frame)
        shutil.copyfile(whole, path)


def film_palette(frames: np.ndarray) -> np.ndarray:
    """COLOURS colours for all frames (T, H, W, 3): the most frequent one, exactly, and others spread by median cut."""
    from PIL import Image

    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // PALETTE_PIXELS)]
    values, counts = np.unique(_packed(pixels), return_counts=True)
    exact = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.uint8)
    if len(values) <= COLOURS:
        return np.concatenate([exact, np.zeros((COLOURS - len(values), 3), np.uint8)])
    image = Image.fromarray(pixels[None]).quantize(COLOURS - 1, method=Image.Quantize.MEDIANCUT)
    found = np.array(image.getpalette()[: 3 * (COLOURS - 1)], np.uint8).reshape(-1, 3)
    found = np.concatenate([found, np.repeat(found[:1], COLOURS - 1 - len(found), axis=0)])
    return np.concatenate([exact[[counts.argmax()]], found])


def dithered(frames: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The index of a palette's colour for each pixel: (T, H, W, 3) -> (T, H, W) uint8.

    An ordered dither: its pattern stands still, so what does not move does not flicker, as diffused errors would.  A
    pixel whose colour is in the palette keeps it.
    """
    height, width = frames.shape[1:3]
    pattern = np.tile(BAYER, (-(-height // 4), -(-width // 4)))[:height, :width, None] * _spacing(palette)
    nearest, exact = _nearest_table(palette), np.full(1 << 24, -1, np.int16)
    exact[_packed(palette)] = np.arange(len(palette))
    indices = np.empty(frames.shape[:3], np.uint8)
    for frame, row in zip(frames, indices, strict=True):
        red, green, blue = np.moveaxis(np.clip(frame + pattern, 0, 255).astype(np.uint8) >> 3, -1, 0)
        own = exact[_packed(frame)]
        row[:] = np.where(own >= 0, own, nearest[red, green, blue])
    return indices


def _nearest_table(palette: np.ndarray) -> np.ndarray:
    """The index of the nearest colour for the upper five bits of red, green and blue: (32, 32, 32) uint8."""
    cells, colours = np.indices((32, 32, 32)).reshape(3, -1).T * 8.0 + 4, palette.astype(np.float64)
    distances = (colours**2).sum(1) - 2 * cells @ colours.T  # but for what all colours share
    return distances.argmin(1).astype(np.uint8).reshape(32, 32, 32)


def _packed(colours: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> one number each."""
    red, green, blue = np.moveaxis(colours.astype(np.uint32), -1, 0)
    return red << 16 | green << 8 | blue


def _spacing(palette: np.ndarray) -> float:
    """The mean distance from a colour of the palette to its nearest neighbour, per channel."""
    colours = np.unique(palette, axis=0).astype(np.float64)
    if len(colours) < 2:
        return 0.0
    distances = np.sqrt(np.square(colours[:, None] - colours[None]).sum(-1))
    np.fill_diagonal(distances, np.inf)
    return float(distances.min(1).mean() / np.sqrt(3))


FILMS = {".gif": _save_gif, ".webp": _save_webp, ".mp4": _save_mp4}
