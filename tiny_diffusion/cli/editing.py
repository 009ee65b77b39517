"""The editing options of `sample`: --init, --inpaint, --interpolate and --invert, and what is written beside them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_diffusion.cli.edit_files import Measured, Sources, beside, invert_images, read_sources
from tiny_diffusion.cli.selection import number_list
from tiny_diffusion.config.option import Int, Number, Text, option
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.errors import OptionError, printable

EDITS = ("init", "inpaint", "interpolate", "invert")  # which exclude one another
NEEDS = {"strength": "init", "mask": "inpaint", "frames": "interpolate"}
IGNORED = {  # options that say nothing to an edit, and why
    "interpolate": {
        "num_images": "--frames says how many images there are",
        "indices": "--interpolate names the two images",
        "show_intermediate": "the frames of an interpolation are images",
        "batch_size": "all frames are sampled together",
    },
    "invert": {
        "num_images": "each image has one noise",
        "indices": "nothing is drawn at random",
        "seed": "nothing is drawn at random",
    },
}
STRENGTH, FRAMES, INVERT_STEPS = 0.5, 9, 50
STEPS = 20  # of inpainting, with a sampler of one evaluation a step; 60 evaluations with the corrections
MAX_SEARCHED = 12  # classes among which that of an inpainted image is looked for
SHOWN = 12  # images in the picture of before and after
NOISE_SHOWN = 3  # deviations that are white or black in a picture of noise


@dataclass(frozen=True)
class EditOptions:
    """What `sample` edits, instead of sampling from noise alone."""

    # fmt: off
    init: str | None = option(
        Text(), None, "start from this image, or from each of a folder, with noise (SDEdit)", group="editing")
    strength: float | None = option(
        Number(0, 1), None, f"of --init: 0 returns the image, 1 ignores it [{STRENGTH:g}]", group="editing")
    inpaint: str | None = option(
        Text(), None, "repaint a part of this image, or of each of a folder", group="editing")
    mask: str | None = option(
        Text(), None, "of --inpaint: white is repainted; or a folder of masks with the images' names",
        group="editing")
    interpolate: str | None = option(
        Text("I,J"), None, "a strip and an animation between two images of the seed", group="editing")
    frames: int | None = option(
        Int(2, 200), None, f"of --interpolate, both ends included [{FRAMES}]", group="editing")
    invert: str | None = option(
        Text(), None, "find the noise that ddim makes this image of, or each of a folder", group="editing")
    # fmt: on


def asked_edit(given: dict) -> str | None:
    """Which edit was asked for.  Raises OptionError for options that do not go together, or would be ignored."""
    edits = [name for name in EDITS if name in given]
    if len(edits) > 1:
        raise OptionError(f"--{edits[0]} and --{edits[1]} are different edits. Give one of them.")
    for name, needed in NEEDS.items():
        if name in given and needed not in edits:
            raise OptionError(f"--{name} {given[name]} would be ignored without --{needed}. Add it, or leave it out.")
    if "inpaint" in given and "mask" not in given:
        raise OptionError("--inpaint needs --mask, an image that is white where it is to be repainted. Add it.")
    edit = edits[0] if edits else None
    for name, why in IGNORED.get(edit, {}).items():
        if name in given:
            shown = "" if given[name] is True else f" {given[name]}"
            raise OptionError(f"--{name}{shown} would be ignored by --{edit}: {why}. Leave it out.")
    return edit


def pair(text: str) -> list[int]:
    """The two indices of --interpolate.  Raises OptionError."""
    numbers = number_list("interpolate", text)
    if len(numbers) != 2 or "-" in text:
        raise OptionError(f"--interpolate {text}: two images of the seed are needed, such as 3,8.")
    return numbers


class EditPlan:
    """One edit of `sample`, from its options to the files beside the output.   name: one of EDITS."""

    def __init__(self, name: str, given: dict):
        self.name, self.given = name, given
        self.options = EditOptions(**{key: given[key] for key in given if key in EditOptions.__dataclass_fields__})
        self.first: list = []  # of the edited images
        self.sources: Sources | None = None
        self.shown: dict = {}  # heading -> images, between before and after
        self.measured: Measured | None = None

    @classmethod
    def of(cls, given: dict) -> "EditPlan | None":
        """The plan for these options, None if they ask for no edit.  Raises OptionError."""
        name = asked_edit(given)
        return cls(name, given) if name else None

    def indices(self, checkpoint, asked: Sequence[int]) -> Sequence[int]:
        """Which images of the seed.  Reads the images to edit: unless asked otherwise, each is edited once."""
        if self.name == "interpolate":
            return pair(self.options.interpolate)
        self.sources = read_sources(self.name, getattr(self.options, self.name), self.options.mask, checkpoint)
        return asked if {"num_images", "indices"} & self.given.keys() else range(len(self.sources.images))

    def defaults(self, checkpoint) -> dict:
        """The options of sampling that the edit chooses where they were not given.  Raises OptionError."""
        usual, timesteps = checkpoint.about["sampling"], checkpoint.config.timesteps
        chosen = {}
        if self.name == "invert":
            _check_invertible(self.given)
            chosen = {"sampler": "ddim", "grid": "angle", "steps": min(INVERT_STEPS, timesteps), "eta": 0.0}
        if self.name == "inpaint":
            row = SAMPLERS[self.given.get("sampler", usual["sampler"])]
            chosen = {"steps": max(1, min(STEPS // row.evaluations_per_step, timesteps))}
        return {name: value for name, value in chosen.items() if name not in self.given}

    def request(self, request, checkpoint):
        """The request with the classes that the edit takes: without --classes, an edited image has none.

        Raises OptionError where that needs what the model did not learn, or leaves guidance without effect.
        """
        config = checkpoint.config
        if self.name == "invert":
            request = replace(request, clip=False)
        if self.name in ("inpaint", "invert") and "guidance" not in self.given:  # what the model's images are like
            request = replace(request, guidance=1.0, guidance_interval=None)
        if not config.class_cond or "classes" in self.given or self.name == "interpolate" or self._is_plain:
            return request
        if not config.label_dropout:
            raise OptionError(
                f"--{self.name} needs --classes with this model, which was trained with --label_dropout 0 and knows no "
                f"image without its class. Add --classes {printable(checkpoint.class_names[0])}, for example."
            )
        guidance = request.guidance
        if not self._searches(checkpoint):
            if "guidance" in self.given:
                raise OptionError(
                    f"--guidance {guidance:g} would be ignored by --{self.name} without --classes. Add --classes, or "
                    "leave it out."
                )
            guidance = 1.0
        return replace(request, classes=(), guidance=guidance)

    @property
    def _is_plain(self) -> bool:
        return self.name == "init" and self.options.strength == 1

    def _searches(self, checkpoint) -> bool:
        """Whether the class of each image is looked for by its known pixels."""
        return self.name == "inpaint" and 1 < len(checkpoint.class_names) <= MAX_SEARCHED

    def edit(self, checkpoint, model, diffusion, request, world, output: Path):
        """The edit of the batches.  Inversion is done here, and what is left is to sample from its noise."""
        from tiny_diffusion.data.pixels import to_pictures
        from tiny_diffusion.diffusion.edits import Inpaint, SDEdit

        sources = self.sources
        if self.name == "init":
            return SDEdit(sources.images, STRENGTH if self.options.strength is None else self.options.strength)
        if self.name == "inpaint":
            searched = not request.classes and checkpoint.config.class_cond and self._searches(checkpoint)
            masks = sources.masks
            self.shown["known"] = to_pictures((sources.images + 1) * (1 - masks) - 1)
            return Inpaint(sources.images, masks, checkpoint.trained_labels if searched else ())
        noise, self.measured = invert_images(sources, model, diffusion, request, checkpoint.shape, world, output)
        self.shown["noise"] = to_pictures(noise / NOISE_SHOWN)
        return self.measured

    def watch(self, batches: Iterator) -> Iterator:
        """The same batches, of whose images the first SHOWN are kept."""
        for indices, images in batches:
            self.first.extend(images[: SHOWN - len(self.first)])
            yield indices, images

    def finish(self, request, output: Path) -> None:
        """Saves the first images before and after, a row each, and reports the error of an inversion."""
        import numpy as np

        from tiny_diffusion.visuals.images import save_png, strip

        if self.measured:
            self.measured.report(request.steps)
        columns = {"before": self.sources.before, **self.shown}
        rows = [index for index in request.indices[: len(self.first)]]
        pictures = [images[[row % len(images) for row in rows]] for images in columns.values()]
        path = beside(output, "before_after.png")
        save_png(path, strip([*pictures, np.stack(self.first)], [*columns, "after"]))
        print(f"before and after: {path}", file=sys.stderr)


def _check_invertible(given: dict) -> None:
    if given.get("sampler", "ddim") != "ddim":
        raise OptionError(
            f"--sampler {given['sampler']} cannot be used with --invert, which runs ddim backwards. "
            "Leave it out, or use ddim."
        )
    if given.get("eta"):
        raise OptionError(
            f"--eta {given['eta']:g} cannot be used with --invert: fresh noise has no way back. Leave it out."
        )
