"""What the edits of `sample` read and write: images and masks fitted to the model, noise, strips and animations."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_diffusion.errors import OptionError, printable

STRIP_COLUMNS, ANIMATION_PIXELS, FRAMES_PER_SECOND = 16, 128, 8


@dataclass(frozen=True, eq=False)
class Sources:
    """The images that an edit starts from.  images, masks: as edits take them.   before: uint8 (N, H, W, C)."""

    images: object
    before: object
    masks: object = None


def read_sources(edit: str, text: str, mask: str | None, checkpoint) -> Sources:
    """The images of --init, --inpaint or --invert, fitted to the model's.  Says in one line what fitting changed."""
    from tiny_diffusion.data.catalog import background_colour
    from tiny_diffusion.data.files.decode import ImageSpec
    from tiny_diffusion.data.files.fit import fitted_images, fitted_masks, image_paths
    from tiny_diffusion.data.pixels import to_float

    channels, *size = checkpoint.shape
    background, _ = background_colour(checkpoint.config.background or "white")
    paths = image_paths(edit, text)
    masks = None
    if edit == "inpaint":
        mask_paths = image_paths("mask", mask)
        if Path(mask).is_dir():
            mask_paths = _matching(paths, mask_paths, mask)
        masks = fitted_masks("mask", mask_paths, tuple(size))
    images, change = fitted_images(edit, paths, ImageSpec(tuple(size), channels, background))
    if change:
        print(f"--{edit}: {change}", file=sys.stderr)
    return Sources(to_float(images), images.permute(0, 2, 3, 1).numpy(), masks)


def _matching(paths: Sequence[Path], masks: Sequence[Path], text: str) -> list[Path]:
    """The mask of each image: the one of its name, whatever the ending.  Raises OptionError."""
    by_name = {path.stem: path for path in masks}
    for path in paths:
        if path.stem not in by_name:
            raise OptionError(
                f"--mask {text} has no mask named {printable(path.stem)}, as an image of --inpaint is. Add it, or give "
                "one mask for all."
            )
    return [by_name[path.stem] for path in paths]


def beside(output: Path, name: str) -> Path:
    """A file beside the output, named after it: samples.png -> samples_name, out/ -> out_name."""
    output = output if output.name not in ("", "..") else output.resolve()
    return output.parent / f"{output.stem if output.suffix else output.name}_{name}"


class Measured:
    """An edit that also measures how far its images are from others: the mean absolute error of each, in `errors`."""

    def __init__(self, edit, images):
        self.edit, self.images, self.errors = edit, images, []

    def __call__(self, batch):
        for step in self.edit(batch):
            yield step
        wanted = self.images[[index % len(self.images) for index in batch.request.indices]]
        self.errors.extend((step.x.cpu() - wanted).abs().flatten(1).mean(1).tolist())

    def report(self, steps: int) -> None:
        mean, largest = sum(self.errors) / len(self.errors), max(self.errors)
        print(
            f"there and back in {steps} steps: mean absolute error {mean:.5f} on [-1, 1], of one image at most "
            f"{largest:.5f}",
            file=sys.stderr,
        )


def invert_images(sources: Sources, model, diffusion, request, shape, world, output: Path):
    """Writes the noise of the images beside the output.  (the noise, the edit that samples them again from it)"""
    import numpy as np

    from tiny_diffusion.diffusion.edits import FromNoise, Invert
    from tiny_diffusion.diffusion.grids import make_levels
    from tiny_diffusion.diffusion.sampling import sample
    from tiny_diffusion.files import atomic_write

    top = sample(model, diffusion, request, shape, world, Invert(sources.images))
    noise = top / make_levels(diffusion.schedule, request.grid, request.steps)[0].sigma
    if world.is_main:
        path = beside(output, "noise.npz")
        with atomic_write(path) as file:
            np.savez(file, noise=noise.numpy())
        print(f"the noise, float32 {tuple(noise.shape)}: {path}", file=sys.stderr)
    return noise, Measured(FromNoise(noise), sources.images)


def interpolate(count: int, model, diffusion, request, shape, output: Path, ending: str) -> None:
    """Writes the frames of --interpolate: a strip and an animation, and an array or a folder if that was asked for."""
    from tiny_diffusion.data.pixels import to_pictures
    from tiny_diffusion.diffusion.edits import Interpolate
    from tiny_diffusion.diffusion.sampling import sample
    from tiny_diffusion.visuals.animations import FILMS, save_film
    from tiny_diffusion.visuals.images import grid, save_folder, save_npz, save_png

    edit = Interpolate(count)
    frames = to_pictures(sample(model, diffusion, replace(request, batch_size=2), shape, edit=edit))
    pictures = output.with_suffix("") if ending in (".png", *FILMS) else beside(output, "strip")
    if ending == ".npz":
        save_npz(output, frames)
    elif not ending:
        save_folder(output, frames)
    save_png(pictures.with_name(f"{pictures.name}.png"), grid(frames, columns=min(len(frames), STRIP_COLUMNS)))
    animation = [grid(frame[None], scale=max(1, ANIMATION_PIXELS // max(frame.shape))) for frame in frames]
    film = ending if ending in FILMS else ".gif"
    path = pictures.with_name(pictures.name + film)
    save_film(path, animation, seconds=len(frames) / FRAMES_PER_SECOND, hold_seconds=0.5)
    print(f"{len(frames)} frames: {output}; the strip and the animation: {pictures}.png and {film}", file=sys.stderr)
