"""evaluate: how good a model's images are, or any images, against real ones: a table, a JSON file and figures."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.sample import SampleOptions
from tiny_diffusion.config.option import Choice, Flag, Int, ListOf, Text, again, option
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.files import check_writable, write_json

DESCRIPTION = """
Measure how good a model's images are.  Each number says the features, the count and the split it was taken with, and
beside it stands the floor: what as many real images, held out, score.

  python -m tiny_diffusion evaluate --checkpoint outputs/mnist/model_final.pt
  python -m tiny_diffusion evaluate --checkpoint outputs/mnist/model_final.pt --sampler sa_solver,abm --steps 5,10,20
  python -m tiny_diffusion evaluate --images samples.npz --dataset mnist
  python -m tiny_diffusion evaluate --images drawn/ --reference real/ --features pixels
"""
OF_A_MODEL = (
    "sampler", "steps", "grid", "guidance", "eta", "weights", "train_on_synthetic", "bits_per_dim", "batch_size",
)  # fmt: skip
LIKELIHOOD_IMAGES = 256


@dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` measures, and against what."""

    # fmt: off
    checkpoint: str | None = option(Text(), None, "the model whose images are drawn and scored")
    images: str | None = option(Text(), None, "instead of a model: samples.npz (arr_0) or a folder of images")
    dataset: str | None = again(
        Config, "dataset", default=None, help="real images to compare with [those of the checkpoint]")
    reference: str | None = option(
        Text(), None, "instead of a data set: reference.npz (arr_0), a folder of images, or another model's .pt")
    data_dir: str | None = again(Config, "data_dir")
    features: str | None = option(
        Text(), None,
        "pixels, classifier, inception, or a file .pt (TorchScript), .onnx, .safetensors [classifier, or pixels]")
    num_images: int = option(Int(2, 1_000_000), 10_000, "images drawn; with --images at most so many")
    sampler: tuple[str, ...] | None = option(
        ListOf(Choice(SAMPLERS)), None, "one or several, for a sweep: sa_solver,ddim [the checkpoint's]")
    steps: tuple[int, ...] | None = option(
        ListOf(Int(1, 100_000)), None, "one number or several, for a sweep: 5,10,20,50 [the checkpoint's]")
    grid: str | None = again(SampleOptions, "grid")
    guidance: float | None = again(SampleOptions, "guidance")
    eta: float | None = again(SampleOptions, "eta")
    weights: str = again(SampleOptions, "weights")
    train_on_synthetic: bool = option(
        Flag(), False, "also train a classifier on drawn images and try it on real ones; needs --class_cond models")
    bits_per_dim: bool = option(Flag(), False, "also the likelihood of held-out images, by the probability flow")
    batch_size: int | None = again(SampleOptions, "batch_size")
    seed: int = again(Config, "seed", help="which images are drawn")
    device: str = again(Config, "device")
    output: str | None = option(Text(), None, "folder for evaluation.json and the figures [evaluation/ of the run]")
    # fmt: on


def run(argv: list[str], program: str, started: float) -> int:
    given = parse(argv, program, DESCRIPTION, EvaluateOptions)
    options = EvaluateOptions(**given)
    _check(options, given)

    from tiny_diffusion.data.files.cache import Cache, cache_folder
    from tiny_diffusion.evaluation.features import default_features, make_features
    from tiny_diffusion.evaluation.generate import ModelImages
    from tiny_diffusion.evaluation.images import read_images
    from tiny_diffusion.evaluation.protocol import evaluate, floor_of, memorised, train_on_synthetic
    from tiny_diffusion.evaluation.reference import make_reference, open_real
    from tiny_diffusion.runs.messages import show_progress
    from tiny_diffusion.runtime.world import make_world

    world = make_world(options.device, os.environ)
    device, model = world.device, ModelImages(options, world) if options.checkpoint else None
    if not world.is_main:  # the others help to draw
        for request in model.requests() if model else []:
            model.draw(request)
        return 0
    images = None if model else read_images("images", options.images).evenly(options.num_images)
    if images is not None and len(images.images) < 2:
        raise OptionError(f"--images {options.images} holds one image, which has no spread. Name a larger set.")
    folder = _output(options)
    check_writable("output", folder, folder=True)
    cache, shape = Cache(cache_folder(folder)), model.shape if model else images.shape
    dataset = options.dataset or (model.config.dataset if model and not options.reference else None)
    trained_on = model.training_config() if model and dataset == model.config.dataset else None
    real = open_real(options, dataset, shape, trained_on, cache, show_progress, device)
    _check_heldout(options, model, real)
    features = make_features(
        options.features or default_features(dataset, shape), dataset or "these images", shape, device
    )
    reference = make_reference(real, features, cache)
    print(
        f"reference: {real.pictures.name}, {real.split}, {len(real.pictures.images):,} images; "
        f"features {_named(features)}"
    )
    floor = floor_of(reference, features, options.num_images if model else len(images.images))
    results = []
    for request in model.requests() if model else [None]:
        drawn = _draw(model, request) if model else images
        begun = time.monotonic()
        close = memorised(reference, drawn, floor)
        found = evaluate(reference, drawn, features, floor, close)
        if options.train_on_synthetic:
            found["metrics"] |= train_on_synthetic(drawn, real.heldout, options.seed)
        about = model.protocol(request) if model else {"images": options.images, "images_sha256": images.sha256()}
        seconds = round(time.monotonic() - begun, 1)
        results.append({**about, "num_images": len(drawn.images), **found, "seconds": seconds})
        _print(results[-1], request)
    if options.bits_per_dim:
        results[0]["metrics"] |= _bits(model, real.heldout, options.seed)
    if len(results) > 1:
        _print_table(results)
    for warning in dict.fromkeys(warning for found in results for warning in found["warnings"]):
        print(f"warning: {warning}.", file=sys.stderr)
    about = {
        "features": {"name": features.name, "hash": features.hash, "accuracy": features.accuracy},
        "reference": {
            "name": real.pictures.name,
            "split": real.split,
            "images": len(real.pictures.images),
            "sha256": real.pictures.sha256(),
            "heldout": 0 if real.heldout is None else len(real.heldout.images),
        },
        "results": results,
    }
    write_json(folder / "evaluation.json", about)
    print(f"\nnumbers    {folder / 'evaluation.json'}")
    _draw_figures(folder, model, drawn, close, real, results, features)
    return 0


def _check(options: EvaluateOptions, given: dict) -> None:
    if (options.checkpoint is None) == (options.images is None):
        raise OptionError("give --checkpoint, the model to score, or --images, an .npz file or a folder; one of them.")
    if options.dataset is not None and options.reference is not None:
        raise OptionError("--dataset and --reference both say what to compare with. Give one of them.")
    if options.images is not None:
        if options.dataset is None and options.reference is None:
            raise OptionError("--images needs what to compare with: --dataset, or --reference with real images.")
        if ignored := [name for name in OF_A_MODEL if name in given]:
            raise OptionError(f"--{ignored[0]} would be ignored with --images, which are drawn already. Leave it out.")
    if "data_dir" in given and options.reference is not None:
        raise OptionError("--data_dir would be ignored with --reference. Leave one of them out.")


def _output(options: EvaluateOptions) -> Path:
    if options.output is not None:
        return Path(options.output)
    if options.checkpoint is not None:
        from tiny_diffusion.runs.folder import run_of

        return run_of(Path(options.checkpoint)) / "evaluation"
    return Path(options.images).resolve().parent / "evaluation"


def _check_heldout(options: EvaluateOptions, model, real) -> None:
    """What is tried on held-out images is refused before anything is drawn if there are none."""
    if options.bits_per_dim and real.heldout is None:
        raise OptionError(
            f"--bits_per_dim is measured on held-out images, and {real.pictures.name} has none. Leave it out."
        )
    if options.train_on_synthetic and (
        real.heldout is None or model.shape[0] != 1 or real.heldout.class_names != model.class_names
    ):
        raise OptionError(
            f"--train_on_synthetic needs grey images of the model's classes that are held out, and "
            f"{real.pictures.name} has none. Leave it out."
        )


def _draw(model, request):
    from tqdm import tqdm

    what = f"{request.sampler}, {request.steps} steps"
    with tqdm(
        total=len(request.indices), desc=what, unit="image", leave=False, disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    ) as bar:  # fmt: skip
        return model.draw(request, bar.update)


def _named(features) -> str:
    right = "" if features.accuracy is None else f", {features.accuracy:.2%} accurate"
    return f"{features.name} (sha256 {features.hash}{right})"


def _print(found: dict, request) -> None:
    if request is not None:
        print(f"\n{request.describe()}, seed {request.seed}")
    floors = {name.split("[")[0]: value for name, value in found["floor"].items()}
    for name, value in found["metrics"].items():
        floor = floors.get(name.split("[")[0])
        print(f"  {name:<72}{value:>10.4g}" + ("" if floor is None else f"   real: {floor:.4g}"))


def _relative(numbers: dict) -> float | None:
    return next((value for name, value in numbers.items() if name.startswith("relative_frechet")), None)


def _print_table(results: list[dict]) -> None:
    """A sweep, a line each: what it costs and how good it is."""
    name = next(name for name in results[0]["metrics"] if name.startswith("relative_frechet"))
    print(f"\nsampler      steps  evaluations  {name}")
    for found in results:
        value = _relative(found["metrics"])
        print(f"{found['sampler']:<12}{found['steps']:>6}{found['evaluations']:>13}  {value:.4g}")
    if (floor := _relative(results[0]["floor"])) is not None:
        print(f"{'real images':<31}  {floor:.4g}")


def _bits(model, heldout, seed: int) -> dict:
    """Bits per dimension of held-out images."""
    import torch

    from tiny_diffusion.evaluation.likelihood import bits_per_dimension
    from tiny_diffusion.runs.messages import show_progress

    chosen = heldout.evenly(LIKELIHOOD_IMAGES).images
    starts = range(0, len(chosen), 64)
    parts = [
        bits_per_dimension(model.model, model.diffusion, chosen[i : i + 64].to(model.device), seed=seed, first=i).cpu()
        for i in show_progress(starts, len(starts), "likelihood")
    ]
    bits = torch.cat(parts)
    error = float(bits.std() / len(bits) ** 0.5)
    what = f"bits per dimension of {len(chosen)} held-out images, uniformly dequantised"
    print(f"  {what}: {bits.mean():.3f} ± {error:.3f}")
    return {f"bits_per_dim[n={len(chosen)}, held-out, uniform dequantisation]": float(bits.mean())}


def _draw_figures(folder: Path, model, drawn, close, real, results: list[dict], features) -> None:
    """The pictures beside the numbers; those of images are of the last way of drawing."""
    from tiny_diffusion.evaluation.error_by_noise import LOG_SNRS
    from tiny_diffusion.visuals.figures import save_noise_level_losses, save_sweep
    from tiny_diffusion.visuals.images import save_png

    save_png(folder / "nearest.png", _beside(drawn, close, real.pictures))
    print(f"neighbours {folder / 'nearest.png'}")
    if model:
        path = folder / "error_by_noise.png"
        save_noise_level_losses(path, LOG_SNRS, _by_level(model, real, results[0]["seed"]))
        print(f"by noise   {path}")
    if len(results) > 1:
        curves = {}
        for found in results:
            pair = found["evaluations"], _relative(found["metrics"])
            curves.setdefault(found["sampler"], []).append(pair)
        title = f"relative Fréchet distance, {features.name}"
        save_sweep(folder / "sweep.png", curves, _relative(results[0]["floor"]), title)
        print(f"sweep      {folder / 'sweep.png'}")


def _by_level(model, real, seed: int) -> dict[str, list[float]]:
    """The error at each noise level, of real images and of those held out."""
    from tiny_diffusion.evaluation.error_by_noise import error_by_level

    sets = {f"{real.pictures.name}, {real.split}": real.pictures}
    sets |= {} if real.heldout is None else {"held out": real.heldout}
    found = {}
    for name, pictures in sets.items():
        chosen = pictures.evenly(LIKELIHOOD_IMAGES).images.to(model.device)
        found[name] = error_by_level(model.model, model.diffusion, chosen, seed)
    return found


def _beside(drawn, close, real):
    """Drawn images, those nearest to a training image first, each above that image."""
    import numpy as np

    from tiny_diffusion.visuals.images import grid

    order = close.distances.argsort()[:16].tolist()
    tiles, captions = [], []
    for start in range(0, len(order), 8):
        row = order[start : start + 8]
        tiles += [drawn.images[close.looked[i]] for i in row] + [real.images[close.which[i]] for i in row]
        captions += ["drawn"] * len(row) + [f"{close.distances[i]:.0f} away" for i in row]
    pictures = np.stack([tile.numpy().transpose(1, 2, 0) for tile in tiles])
    return grid(pictures, columns=min(8, len(order)), captions=captions)
