"""sample: from a checkpoint and a request to a picture, an animation, an array or a folder of images."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Choice, Flag, Int, Number, Text, again, listed, not_one_of, option
from tiny_diffusion.config.rules import refuse_drawing
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.grids import GRIDS
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Draw images from a trained model.  The checkpoint says how; options change it.

  sample.py --checkpoint outputs/mnist/model_final.pt --num_images 64
  sample.py --checkpoint outputs/mnist/model_final.pt --output outputs/mnist/denoising.gif
  sample.py --checkpoint outputs/mnist/model_final.pt --num_images 1000 --output outputs/mnist/samples.npz
"""
MAX_FRAMES = 21  # the noise and 20 steps
BATCH = 64
ENDINGS = (".png", ".gif", ".npz")
FRESH = {name: row for name, row in SAMPLERS.items() if row.eta is not None}  # samplers that can add fresh noise


@dataclass(frozen=True)
class SampleOptions:
    """What `sample` is asked for; what is None comes from the checkpoint."""

    # fmt: off
    checkpoint: str | None = option(Text(), None, "the model: model_final.pt, or any checkpoint of a run")
    num_images: int = option(Int(1, 10_000_000), 64, "images in all, shared evenly over --classes")
    output: str | None = option(
        Text(), None, "picture.png, animation.gif, samples.npz, or a folder/ [generated_samples.png of the run]")
    show_intermediate: bool = option(Flag(), False, "write intermediate/step_XXXX.png too: the picture as it appears")
    sampler: str | None = option(Choice(SAMPLERS), None, "how to step from noise to image [the checkpoint's]")
    steps: int | None = option(
        Int(1, 100_000), None, "sampling steps, at most the model's T (--timesteps means the same)")
    grid: str | None = option(Choice(GRIDS), None, "which noise levels to visit [the checkpoint's]")
    eta: float | None = option(
        Number(0, max(row.max_eta for row in FRESH.values())), None,
        "how much noise is fresh, 1 being the process's own: "
        + ", ".join(f"{name} 0 to {row.max_eta:g} [{row.eta:g}]" for name, row in FRESH.items()))
    classes: str | None = option(Text("LIST"), None, "classes to draw, by name or number: 3,5 or 0-9 [all]")
    guidance: float | None = option(Number(0, 100), None, "how strongly to follow the class; 1 is plain")
    indices: str | None = option(Text("LIST"), None, "images of this seed, instead of the first: 0-63 or 1,2,5-10")
    weights: str = option(Choice(("ema", "raw")), "ema", "averaged weights or the last ones")
    batch_size: int | None = option(Int(1, 65_536), None, "images drawn together [what fits]")
    seed: int = again(Config, "seed", help="image i of a seed is always the same picture")
    device: str = again(Config, "device")
    # fmt: on


def run(argv: list[str], program: str, started: float) -> int:
    given = parse(argv, program, DESCRIPTION, SampleOptions, aliases={"steps": ("timesteps",)})
    options = SampleOptions(**given)
    if options.checkpoint is None:
        raise OptionError("--checkpoint is required: the model to draw from, for example outputs/model_final.pt")
    indices = _indices(options, given)
    output, ending = _output(options.output)

    from tiny_diffusion.models.build import make_diffusion, to_device
    from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
    from tiny_diffusion.runs.folder import run_of
    from tiny_diffusion.runtime.world import make_world

    checkpoint = load_checkpoint(options.checkpoint)
    request = _request(options, checkpoint, indices)
    world = make_world(options.device, os.environ)
    model = to_device(load_model(checkpoint, options.weights), world.device)
    output = output or run_of(Path(options.checkpoint)) / "generated_samples.png"
    check_writable("output", output, folder=not ending)
    animated = options.show_intermediate or ending == ".gif"
    images, frames = _draw(model, make_diffusion(checkpoint.config), request, checkpoint, animated, world)
    if not world.is_main:
        return 0
    _warn_if_constant(images)
    captions = [checkpoint.about["class_names"][label] for label in request.labels()] if request.classes else None
    try:
        _write(output, ending, images, frames, captions, options.show_intermediate)
    except OSError as error:
        raise FileError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    return 0


def _indices(options: SampleOptions, given: dict):
    """Which images of the seed."""
    if options.indices is None:
        return range(options.num_images)
    if "num_images" in given:
        raise OptionError(
            f"--num_images {options.num_images} would be ignored: --indices says which images. Give one of them."
        )
    return _number_list("indices", options.indices)


def _number_list(name: str, text: str) -> list[int]:
    """0-63 or 1,2,5-10."""
    numbers = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise OptionError(f"--{name} {text}: {word.strip()!r} is not a number or a range such as 0-63 or 1,2,5-10.")
        if int(last or first) >= 2**63 or int(last or first) - int(first) >= 10_000_000:
            raise OptionError(f"--{name} {text}: {word.strip()!r} is too large.")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _output(text: str | None) -> tuple[Path | None, str]:
    """Where to, and the ending that says what to write: none for a folder of images.  Checked before any loading."""
    if text is None:
        return None, ".png"
    path = Path(text)
    if text.endswith(("/", os.sep)) or path.is_dir():
        return path, ""
    if path.suffix.lower() not in ENDINGS:
        raise OptionError(
            f"--output {text}: the ending says what to write: .png, .gif, .npz, or a folder with a trailing slash."
        )
    return path, path.suffix.lower()


def _request(options: SampleOptions, checkpoint, indices):
    """The checkpoint's own way of sampling, with what was asked for instead."""
    usual, config = checkpoint.about["sampling"], checkpoint.config
    refuse_drawing(
        config,
        samplers=[options.sampler or usual["sampler"]],
        steps=[options.steps] if options.steps else [],
        eta=options.eta,
        guidance=options.guidance,
    )
    return checkpoint.request(
        indices,
        sampler=options.sampler,
        steps=options.steps,
        grid=options.grid,
        guidance=options.guidance,
        seed=options.seed,
        classes=_classes(options.classes, checkpoint),
        eta=options.eta,
        batch_size=options.batch_size or BATCH,
    )


def _classes(text: str | None, checkpoint) -> tuple[int, ...]:
    """Labels from names, numbers and ranges; all of them where none are named.

    Where there are names that are numbers, a number is one of these; elsewhere it is a place among the names.
    """
    names = checkpoint.about["class_names"]
    if not checkpoint.config.class_cond:
        if text is not None:
            raise OptionError(
                f"--classes {text} needs a model trained with --class_cond, which this one was not. Leave it out."
            )
        return ()
    if text is None:
        return tuple(range(len(names)))
    numbered = {int(name): label for label, name in enumerate(names) if name.isdecimal()}
    numbered = numbered or {label: label for label in range(len(names))}
    labels = []
    for word in _at_commas(unicodedata.normalize("NFC", text), names):
        if word in names:
            labels.append(names.index(word))
        elif word and all(part.isdecimal() for part in word.split("-", 1)):
            for number in _number_list("classes", word):
                if number not in numbered:
                    having = f"{min(numbered)} to {max(numbered)}: {listed(names)}"
                    raise OptionError(f"--classes {text}: there is no class {number}; this model has {having}.")
                labels.append(numbered[number])
        else:
            raise OptionError(f"--classes {text}: {not_one_of(word, names)}")
    return tuple(labels)


def _at_commas(text: str, names: list[str]) -> Iterator[str]:
    """The words of a list, where a name may hold commas itself."""
    rest = f"{text},"
    while rest:
        named = [name for name in names if "," in name and rest.startswith(f"{name},")]
        word = max(named, key=len, default=rest.partition(",")[0])
        yield word.strip()
        rest = rest[len(word) + 1 :].lstrip()


def _draw(model, diffusion, request, checkpoint, animated: bool, world):
    """uint8 images (N, H, W, C), and the frames of the first batch: (sampling step, time, x_t, estimate of x_0).

    The processes of the world share the drawing.  Raises DivergenceError if the model draws NaN.
    """
    import numpy as np
    from tqdm import tqdm

    from tiny_diffusion.data.pixels import to_pictures
    from tiny_diffusion.diffusion.sampling import denoising

    def pictures(x):
        return to_pictures(world.gather(x, len(batch.indices)))

    shape = (checkpoint.about["channels"], *checkpoint.about["image_size"])
    wanted = (
        set(np.linspace(0, request.steps, min(MAX_FRAMES, request.steps + 1)).round().astype(int).tolist())
        if animated
        else set()
    )
    drawn, frames = [], []
    with tqdm(total=len(request.indices), unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for number, batch in enumerate(request.batches(world)):
            for count, step in enumerate(denoising(model, diffusion, batch.local(world), shape)):
                if number == 0 and count in wanted:
                    noisy, clean = (pictures(x)[: request.batch_size] for x in (step.x, step.clean))
                    frames.append((count, step.level.time, noisy, clean))
                bar.set_postfix_str(f"step {count}/{request.steps}", refresh=False)
                bar.update(0)
            drawn.append(pictures(step.x))
            bar.update(len(batch.indices))
    return np.concatenate(drawn), frames


def _warn_if_constant(images) -> None:
    if (images.max(axis=(1, 2, 3)) - images.min(axis=(1, 2, 3)) < 8).all():
        print(
            "warning: every image is one flat colour; the model has probably not learnt anything yet, or has diverged",
            file=sys.stderr,
        )


def _write(output: Path, ending: str, images, frames, captions, show_intermediate: bool) -> None:
    from tiny_diffusion.visuals.images import denoising_frame, grid, save_folder, save_gif, save_npz, save_png, strip

    if ending == ".png":
        save_png(output, grid(images, captions=captions))
    elif ending == ".gif":
        save_gif(output, [denoising_frame(noisy, clean) for _, _, noisy, clean in frames])
    elif ending == ".npz":
        save_npz(output, images)
    else:
        save_folder(output, images)
    print(f"{len(images)} images: {output}", file=sys.stderr)
    if show_intermediate:
        folder = (output.parent if ending else output) / "intermediate"
        for stale in folder.glob("step_*.png"):
            stale.unlink()
        for count, _, noisy, clean in frames:
            save_png(folder / f"step_{count:04d}.png", denoising_frame(noisy, clean))
        chosen = frames[:: max(1, len(frames) // 8)]
        chosen = chosen if chosen[-1] is frames[-1] else [*chosen, frames[-1]]
        headings = [*(f"t = {time:.0f}" for _, time, _, _ in chosen[:-1]), "drawn"]
        save_png(folder / "strip.png", strip([noisy[:8] for _, _, noisy, _ in chosen], headings))
        print(f"{len(frames)} frames of the denoising: {folder}", file=sys.stderr)
