"""sample: from a checkpoint and a request to a picture, an animation, an array or a folder of images."""

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.edit_files import interpolate
from tiny_diffusion.cli.editing import FRAMES, EditOptions, EditPlan
from tiny_diffusion.cli.guidance import Interval
from tiny_diffusion.cli.sample_files import FILM_ENDINGS, IMAGES_IN_FRAMES, write, write_frames
from tiny_diffusion.cli.selection import labels_of, number_list
from tiny_diffusion.config.option import Choice, Flag, Int, Number, Text, again, option, specs
from tiny_diffusion.config.rules import refuse_sampling
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.grids import GRIDS
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.errors import FileError, OptionError, listed
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Sample images from a trained model.  The checkpoint says how; the options change it.

  PROGRAM --checkpoint outputs/mnist/model_final.pt --num_images 64
  PROGRAM --checkpoint outputs/mnist/model_final.pt --output outputs/mnist/denoising.gif
  PROGRAM --checkpoint outputs/mnist/model_final.pt --num_images 1000 --output outputs/mnist/samples/
"""
ENDINGS = (".png", *FILM_ENDINGS, ".npz")
MODELS = ("checkpoint", "guide_checkpoint")  # options that take a checkpoint, or the folder of a run
FLAT = 8  # grey levels between the darkest and the lightest pixel of an image that shows nothing
FRESH = {name: row for name, row in SAMPLERS.items() if row.eta is not None}  # samplers that can add fresh noise


@dataclass(frozen=True)
class SampleOptions:
    """What `sample` is asked for; what is None comes from the checkpoint."""

    # fmt: off
    checkpoint: str | None = option(Text(), None, "the model: model_final.pt, or any checkpoint of a run")
    num_images: int = option(Int(1, 10_000_000), 64, "total number of images, shared evenly over --classes")
    output: str | None = option(
        Text(), None, "picture.png, film.gif, .webp, .mp4, samples.npz, or folder/ [generated_samples.png of the run]")
    show_intermediate: bool = option(Flag(), False, "also write intermediate/step_XXXX.png, the steps of sampling")
    sampler: str | None = option(Choice(SAMPLERS), None, "how to step from noise to image [the checkpoint's]")
    steps: int | None = option(
        Int(1, 100_000), None, "sampling steps, at most the model's T (--timesteps means the same)")
    grid: str | None = option(Choice(GRIDS), None, "which noise levels to visit [the checkpoint's]")
    eta: float | None = option(
        Number(0, max(row.max_eta for row in FRESH.values())), None,
        "how much noise is fresh, 1 being the process's own: "
        + ", ".join(f"{name} 0 to {row.max_eta:g} [{row.eta:g}]" for name, row in FRESH.items()))
    classes: str | None = option(
        Text("LIST"), None, "classes to take in turn: names, numbers such as 3,5-7, all, none [by shares in training]")
    guidance: float | None = option(
        Number(0, 100), None, "how strongly to follow the class; 1 is plain, 0 ignores it [the checkpoint's]")
    guidance_interval: tuple[float, float] | None = option(
        Interval(), None,
        "times at which guidance holds, 0 clean to 1 pure noise, in quarter turns of atan2(sigma, alpha), which is t/T "
        "on the cosine schedule; elsewhere guidance is 1 and costs half; 0,1 is everywhere [the checkpoint's]")
    guide_checkpoint: str | None = option(
        Text(), None, "autoguidance: guide away from this earlier or smaller model, not from the null class")
    indices: str | None = option(Text("LIST"), None, "images of this seed, instead of the first: 0-63 or 1,2,5-10")
    weights: str = option(Choice(("ema", "raw")), "ema", "averaged weights or the last ones")
    batch_size: int | None = option(Int(1, 65_536), None, "images sampled together [64]")
    seed: int = again(Config, "seed", help="image i of a seed is always the same image")
    device: str = again(Config, "device")
    # fmt: on


OPTIONS = (SampleOptions, EditOptions)


def run(argv: list[str], program: str, started: float) -> int:
    given = parse(argv, program, DESCRIPTION, *OPTIONS, aliases={"steps": ("timesteps",)})
    options = SampleOptions(**{name: given[name] for name in given if name in SampleOptions.__dataclass_fields__})
    if options.checkpoint is None:
        raise OptionError("--checkpoint is required: the model to sample from, for example outputs/model_final.pt")
    plan = EditPlan.of(given)
    output, ending = _output(options.output)
    indices = _indices(options, given, folder=not ending)

    from tiny_diffusion.models.build import make_diffusion, to_device
    from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
    from tiny_diffusion.runs.folder import newest_in, run_of
    from tiny_diffusion.runs.guide import with_guide
    from tiny_diffusion.runtime.world import make_world
    from tiny_diffusion.visuals.animations import check_film
    from tiny_diffusion.visuals.film import Film

    options = replace(options, **{name: newest_in(getattr(options, name)) for name in MODELS if name in given})
    checkpoint = load_checkpoint(options.checkpoint)
    if plan:
        indices, options = plan.indices(checkpoint, indices), replace(options, **plan.defaults(checkpoint))
    request = _request(options, checkpoint, indices)
    if plan:
        request = plan.request(request, checkpoint)
    world, diffusion = make_world(options.device, os.environ), make_diffusion(checkpoint.config)
    model = load_model(checkpoint, options.weights)
    if options.guide_checkpoint:
        model = with_guide(model, checkpoint, options.guide_checkpoint, options.weights)
    model = to_device(model, world.device)
    output = output or run_of(Path(options.checkpoint)) / "generated_samples.png"
    check_writable("output", output, folder=not ending)
    check_film(output)
    if plan and plan.name == "interpolate":
        if world.is_main:
            count = plan.options.frames or FRAMES
            interpolate(count, model, diffusion, request, checkpoint.shape, output, ending)
        return 0
    edit = plan and plan.edit(checkpoint, model, diffusion, request, world, output)
    labels, names = request.labels() if request.shows_classes else None, checkpoint.class_names
    film = None
    is_film = ending in FILM_ENDINGS
    if is_film or options.show_intermediate:
        film = Film(request.steps, len(indices) if is_film else IMAGES_IN_FRAMES, labels, names)
    batches = _sample(model, diffusion, request, checkpoint, film, world, edit)
    if not world.is_main:
        deque(batches, maxlen=0)
        return 0
    try:
        write(output, ending, plan.watch(batches) if plan else batches, len(indices), film, labels, names)
        if plan:
            plan.finish(request, output)
        if options.show_intermediate:
            write_frames(output, film, len(indices))
    except OSError as error:
        raise FileError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    return 0


def _output(text: str | None) -> tuple[Path | None, str]:
    """The path to write and its ending, which is "" for a folder of images.  Checked before anything is loaded."""
    if text is None:
        return None, ".png"
    path = Path(text)
    if text.endswith(("/", os.sep)) or path.is_dir():
        return path, ""
    if path.suffix.lower() not in ENDINGS:
        raise OptionError(
            f"--output {text}: the ending says what to write: {', '.join(ENDINGS)}, or a folder with a trailing slash."
        )
    return path, path.suffix.lower()


def _indices(options: SampleOptions, given: dict, folder: bool) -> Sequence[int]:
    """Which images of the seed.  folder: each is written to a file that its index names."""
    if options.indices is None:
        return range(options.num_images)
    if "num_images" in given:
        raise OptionError(
            f"--num_images {options.num_images} would be ignored: --indices says which images. Give one of them."
        )
    indices = number_list("indices", options.indices)
    if folder and len(set(indices)) < len(indices):
        raise OptionError(f"--indices {options.indices} names an image twice, which is one file. Name it once.")
    return indices


def make_request(given: dict, checkpoint):
    """The request of these options of `sample`, for a caller that writes no files.  Raises OptionError."""
    options = SampleOptions(**given)
    return _request(options, checkpoint, _indices(options, given, folder=False))


def _request(options: SampleOptions, checkpoint, indices: Sequence[int]):
    """The checkpoint's own way of sampling, with what was asked for instead."""
    usual, config = checkpoint.about["sampling"], checkpoint.config
    refuse_sampling(
        config,
        usual,
        samplers=[options.sampler or usual["sampler"]],
        steps=[options.steps] if options.steps else [],
        eta=options.eta,
        guidance=[] if options.guidance is None else [options.guidance],
        interval=options.guidance_interval,
        guide=options.guide_checkpoint,
    )
    names = ("sampler", "steps", "grid", "guidance", "guidance_interval", "eta", "seed")
    asked = {name: getattr(options, name) for name in names}
    if options.batch_size is not None:
        asked["batch_size"] = options.batch_size
    if options.classes is not None:
        asked["classes"] = labels = _labels(options.classes, checkpoint)
        for name in ("guidance", "guidance_interval", "guide_checkpoint") if not labels else ():
            if (value := getattr(options, name)) is not None:
                shown = specs(SampleOptions)[name].type.show(value)
                raise OptionError(f"--{name} {shown} would be ignored with --classes none. Leave it out.")
    return checkpoint.request(indices, **asked)


def _labels(text: str, checkpoint) -> tuple[int, ...]:
    """The labels of --classes, to be taken in turn; empty for `none`.  The name of a class comes before a keyword."""
    config, names, trained = checkpoint.config, checkpoint.class_names, checkpoint.trained_labels
    if text == "none" and text not in names and config.class_cond:
        if not config.label_dropout:
            raise OptionError(
                "--classes none: the model was trained with --label_dropout 0, never without a class. Leave it out."
            )
        return ()
    if text == "all" and text not in names and config.class_cond:
        return trained
    labels = labels_of(text, config.class_cond, names)
    for label in labels:
        if label not in trained:
            name = listed(names[label : label + 1])
            raise OptionError(f"--classes {text}: the model was trained on no image of class {name}.")
    return labels


def _sample(model, diffusion, request, checkpoint, film, world, edit=None) -> Iterator:
    """Yields (indices, uint8 images (N, H, W, C)) of batch after batch, and adds their steps to the film.

    The ranks share each batch, and each has all of it.  Raises DivergenceError if the model's images hold NaN.
    """
    from tqdm import tqdm

    from tiny_diffusion.data.pixels import to_pictures
    from tiny_diffusion.diffusion.sampling import denoising, from_noise
    from tiny_diffusion.visuals.film import Frame

    shape, largest_range = (checkpoint.about["channels"], *checkpoint.about["image_size"]), 0
    with tqdm(total=len(request.indices), unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for batch in request.batches(world):
            for count, step in enumerate(denoising(model, diffusion, batch.local(world), shape, edit or from_noise)):
                if film and film.wants(count):
                    pictures = [to_pictures(world.gather(x, len(batch.indices))) for x in (step.x, step.clean)]
                    film.add(Frame(count, step.level.time, *pictures))
                bar.set_postfix_str(f"step {count}/{request.steps}", refresh=False)
                bar.update(0)
            images = to_pictures(world.gather(step.x, len(batch.indices)))
            yield batch.indices, images
            bar.update(len(images))
            largest_range = max(largest_range, *(int(image.max()) - int(image.min()) for image in images))
    if largest_range < FLAT:
        print(
            "warning: every image is one flat colour; the model has probably not learnt anything yet, or has diverged",
            file=sys.stderr,
        )
