"""evaluate: how good a model's samples, or any images, are against real ones: a table, a JSON file and figures."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.evaluate_files import likelihood, sample_showing_progress, write
from tiny_diffusion.cli.sample import MODELS, SampleOptions
from tiny_diffusion.config.option import Choice, Flag, Int, ListOf, Number, Text, again, option
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Measure how good a model's images are.  Each number says its features, its number of images and the reference split;
beside it stands the floor, which is what as many held-out real images score.

  python -m tiny_diffusion evaluate --checkpoint outputs/mnist/model_final.pt
  python -m tiny_diffusion evaluate --checkpoint outputs/mnist/model_final.pt --sampler sa_solver,abm --steps 5,10,20
  python -m tiny_diffusion evaluate --images samples.npz --dataset mnist
  python -m tiny_diffusion evaluate --images samples/ --reference real/ --features pixels
"""
OF_A_MODEL = (
    "sampler", "steps", "grid", "guidance", "guidance_interval", "guide_checkpoint", "eta", "weights",
    "train_on_synthetic", "bits_per_dim", "batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` measures, and against what."""

    # fmt: off
    checkpoint: str | None = option(Text(), None, "the model whose samples are scored")
    images: str | None = option(
        Text(), None, "instead of a model: samples.npz (arr_0, and labels if it has them) or a folder of images")
    dataset: str | None = again(
        Config, "dataset", default=None, help="real images to compare with [those of the checkpoint]")
    reference: str | None = option(
        Text(), None, "instead of a data set: reference.npz (arr_0), a folder of images, or another model's .pt")
    data_dir: str | None = again(Config, "data_dir")
    features: str | None = option(
        Text(), None,
        "pixels, classifier, inception, or a file .pt (TorchScript), .onnx, .safetensors [classifier, or pixels]")
    num_images: int = option(Int(2, 1_000_000), 10_000, "images to sample; with --images, the maximum that is scored")
    sampler: tuple[str, ...] | None = option(
        ListOf(Choice(SAMPLERS)), None, "one or several, for a sweep: sa_solver,ddim [the checkpoint's]")
    steps: tuple[int, ...] | None = option(
        ListOf(Int(1, 100_000)), None, "one number or several, for a sweep: 5,10,20,50 [the checkpoint's]")
    grid: str | None = again(SampleOptions, "grid")
    guidance: tuple[float, ...] | None = option(
        ListOf(Number(0, 100)), None, "one weight or several, for a sweep: 1,1.5,2; 1 is plain [the checkpoint's]")
    guidance_interval: tuple[float, float] | None = again(SampleOptions, "guidance_interval")
    guide_checkpoint: str | None = again(SampleOptions, "guide_checkpoint")
    eta: float | None = again(SampleOptions, "eta")
    weights: str = again(SampleOptions, "weights")
    train_on_synthetic: bool = option(
        Flag(), False, "also train a classifier on the samples and test it on real images; needs --class_cond models")
    bits_per_dim: bool = option(Flag(), False, "also the likelihood of held-out images, by the probability-flow ODE")
    batch_size: int | None = again(SampleOptions, "batch_size")
    seed: int = again(Config, "seed", help="of the samples")
    device: str = again(Config, "device")
    output: str | None = option(
        Text(), None,
        "folder for evaluation.json and the figures [evaluation/ of the run; outputs/evaluation with --images]")
    # fmt: on


OPTIONS = (EvaluateOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    given = parse(argv, program, DESCRIPTION, *OPTIONS)
    _check(options := EvaluateOptions(**given), given)

    from tiny_diffusion.data.files.cache import Cache, cache_folder
    from tiny_diffusion.evaluation.features import default_features, make_features
    from tiny_diffusion.evaluation.images import read_images
    from tiny_diffusion.evaluation.reference import check_heldout, make_reference
    from tiny_diffusion.evaluation.report import as_json, reference_line
    from tiny_diffusion.runs.folder import newest_in
    from tiny_diffusion.runtime.world import make_world

    options = replace(options, **{name: newest_in(getattr(options, name)) for name in MODELS if name in given})
    folder, world = output_folder(options), make_world(options.device, os.environ)
    model, requests = _open_model(options, world) if options.checkpoint else (None, [])
    if not world.is_main:  # the other ranks only help to sample
        for request in model.count_classes(requests):
            model.sample(request)
        return 0
    images = None if model else read_images("images", options.images).subset(options.num_images)
    if images is not None and len(images.images) < 2:
        raise OptionError(f"--images {options.images} holds one image, which has no spread. Name a larger set.")
    check_writable("output", folder, folder=True)
    cache, shape = Cache(cache_folder(folder)), model.shape if model else images.shape
    dataset = options.dataset or (model.config.dataset if model and not options.reference else None)
    real = _open_real(options, dataset, model, shape, cache, world.device).in_channels(shape[0])
    images = images and images.in_channels(real.images.shape[0]).with_classes_of(real.images)
    real.check_shape(shape := images.shape if images else model.shape)
    check_heldout(real, options.bits_per_dim, model.class_names if options.train_on_synthetic else None)
    requests = model.count_classes(requests, real.images) if model else []
    asked = options.features or default_features(dataset, shape)
    features = make_features(asked, dataset or "these images", shape, world.device)
    reference = make_reference(real, features, cache)
    print(reference_line(real, features))
    if images is not None:
        known = images.labels is not None and images.class_names == real.images.class_names
        print(f"images: {images.describe()}" + (", each of a known class" if known else ""))
    results, last = _evaluate_each(options, model, requests, images, reference, features)
    if options.bits_per_dim:
        results[0]["metrics"] |= likelihood(model, real.heldout, options.seed)
    write(folder, model, reference, features.name, as_json(real, features, results), last)
    return 0


def _evaluate_each(options: EvaluateOptions, model, requests, images, reference, features) -> tuple:
    """Evaluates the samples of each request, or the images, and prints: (results as JSON, the last evaluation)."""
    from tiny_diffusion.evaluation.protocol import evaluate, floor_of
    from tiny_diffusion.evaluation.report import result_lines, source

    heldout = reference.real.heldout
    source_of_classes = model or images
    counts = source_of_classes.class_counts if heldout and heldout.class_names == source_of_classes.class_names else ()
    floor = floor_of(reference, features, options.num_images if model else len(images.images), counts)
    classifier_seed = options.seed if options.train_on_synthetic else None
    results = []
    for request in requests or [None]:
        sampled = sample_showing_progress(model, request) if model else images
        found = evaluate(reference, sampled, features, floor, classifier_seed)
        about = model.protocol(request) if model else source(options.images, images)
        results.append({**about, **found.numbers})
        heading = [f"\n{request.describe()}, seed {request.seed}"] if model else []
        print("\n".join([*heading, *result_lines(results[-1])]))
    return results, found


def _check(options: EvaluateOptions, given: dict) -> None:
    """Raises OptionError for options that contradict one another or would be ignored."""
    if (options.checkpoint is None) == (options.images is None):
        raise OptionError("give --checkpoint, the model to score, or --images, an .npz file or a folder; one of them.")
    if options.dataset is not None and options.reference is not None:
        raise OptionError("--dataset and --reference both say what to compare with. Give one of them.")
    if options.images is not None:
        if options.dataset is None and options.reference is None:
            raise OptionError("--images needs what to compare with: --dataset, or --reference with real images.")
        if ignored := [name for name in OF_A_MODEL if name in given]:
            raise OptionError(f"--{ignored[0]} would be ignored with --images, which exist already. Leave it out.")
    if "data_dir" in given and options.reference is not None:
        raise OptionError("--data_dir would be ignored with --reference. Leave one of them out.")


def _open_model(options: EvaluateOptions, world):
    """The model, and a request for each sampler and number of steps."""
    from tiny_diffusion.evaluation.generate import BATCH, ModelImages

    model = ModelImages(options.checkpoint, world, options.weights, options.guide_checkpoint)
    if options.train_on_synthetic and not model.config.class_cond:
        raise OptionError("--train_on_synthetic needs a model trained with --class_cond. Leave it out.")
    if options.train_on_synthetic and 0 in (options.guidance or ()):
        raise OptionError("--train_on_synthetic needs classes, and --guidance 0 has none. Leave one of them out.")
    if options.bits_per_dim and not model.knows_no_class:
        raise OptionError(
            "--bits_per_dim needs a model trained without classes, too, not --label_dropout 0. Leave it out."
        )
    model.checkpoint.refuse_unknown_images(f"--checkpoint {options.checkpoint}", vars(options))
    requests = model.requests(
        options.num_images, options.sampler or (), options.steps or (), grid=options.grid,
        guidance=options.guidance or (), guidance_interval=options.guidance_interval,
        eta=options.eta, seed=options.seed, batch_size=options.batch_size or BATCH,
    )  # fmt: skip
    return model, requests


def output_folder(options: EvaluateOptions) -> Path:
    """The folder that evaluation.json and the figures go to.  Raises OptionError if it lies among images to read."""
    folder = Path(options.output or "outputs/evaluation")
    if options.output is None and options.checkpoint is not None:
        from tiny_diffusion.runs.folder import newest_in, run_of

        folder = run_of(Path(newest_in(options.checkpoint))) / "evaluation"
    for name in ("images", "reference"):
        path = getattr(options, name)
        if path is not None and Path(path).is_dir() and folder.resolve().is_relative_to(Path(path).resolve()):
            raise OptionError(
                f"--output {folder} lies inside --{name} {path}, whose images the figures would join. "
                "Name another folder by --output."
            )
    return folder


def _open_real(options: EvaluateOptions, dataset: str | None, model, shape: tuple[int, int, int], cache, device):
    """The real images that --reference or the data set names, in the shape of the images to score."""
    from tiny_diffusion.evaluation.reference import open_data_set, open_training_set, read_reference, sample_reference
    from tiny_diffusion.runs.messages import show_progress

    if options.reference is not None and options.reference.lower().endswith(".pt"):
        real = sample_reference(options.reference, options.num_images, options.seed + 1, options.weights, device)
    elif options.reference is not None:
        real = read_reference(options.reference)
    elif model and dataset == model.config.dataset:
        real = open_training_set(model.training_config(options.data_dir), cache, show_progress)
    else:
        real = open_data_set(dataset, options.data_dir, shape[1:], cache, show_progress)
    return real
