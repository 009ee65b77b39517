"""classifier: trains the small network in whose features `evaluate` compares images."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Int, Size, Text, again, option
from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Train a small classifier, in whose features `evaluate` compares images.  Those of digits, mnist, fashion_mnist and
cifar10 come with the package; this command made them.  A classifier of colour images takes images of any size.

  python -m tiny_diffusion classifier --dataset mnist --output mnist-classifier-v1.safetensors
  python -m tiny_diffusion classifier --dataset folder --data_dir sorted --image_size 64   # sorted/train, sorted/test
"""


@dataclass(frozen=True)
class ClassifierOptions:
    """What `classifier` trains."""

    dataset: str = again(Config, "dataset", help="whose images it classifies")
    data_dir: str | None = again(Config, "data_dir")
    image_size: int | tuple[int, int] | None = again(Config, "image_size")
    epochs: int = option(Int(1, 1000), 8, "passes over the training images")
    seed: int = again(Config, "seed")
    output: str | None = option(Text(), None, "the .safetensors file to write [DATASET-classifier.safetensors]")


OPTIONS = (ClassifierOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Trains the classifier and saves it.  Returns the exit code."""
    options = ClassifierOptions(**parse(argv, program, DESCRIPTION, *OPTIONS))
    if options.dataset == "folder" and options.data_dir is None:
        raise OptionError("--dataset folder needs --data_dir, the folder of images. Add it.")
    path = Path(options.output or f"{options.dataset}-classifier.safetensors")
    if path.suffix.lower() != ".safetensors":
        raise OptionError(f"--output {path}: a classifier is a .safetensors file. End the name in .safetensors.")
    check_writable("output", path)

    import torch
    from tqdm import tqdm

    from tiny_diffusion.data.sources import open_dataset
    from tiny_diffusion.evaluation.classifier import BATCH, accuracy, save_classifier, train_classifier
    from tiny_diffusion.evaluation.features import file_hash

    where = {"data_dir": options.data_dir, "size": options.image_size}
    data = open_dataset(options.dataset, **where)
    heldout = open_dataset(options.dataset, **where, heldout=True, channels=data.channels)
    _check(options, data, heldout)
    steps = max(1, options.epochs * len(data) // BATCH)
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        model = train_classifier(data, steps, options.seed, lambda step, loss: bar.update())
    share_right = accuracy(model, heldout)
    about = {
        "dataset": options.dataset,
        "training_images": len(data),
        "channels": data.channels,
        "size": list(data.images.shape[2:]),
        "classes": list(data.class_names),
        "accuracy": share_right,
        "heldout_images": len(heldout),
        "command": _command(options),
        "torch": torch.__version__,
    }
    try:
        save_classifier(path, model, about)
    except OSError as error:
        raise FileError(f"--output {path} cannot be written: {error.strerror or error}.") from error
    result = f"{share_right:.2%} of {len(heldout):,} held-out images classified correctly"
    print(f"{path}: {result}, sha256 {file_hash(path)}", file=sys.stderr)
    return 0


def _check(options: ClassifierOptions, data, heldout) -> None:
    """Raises OptionError unless these image sets have classes to learn and images to measure the accuracy on."""
    from tiny_diffusion.evaluation.classifier import MIN_PHOTOGRAPH

    named = f"--data_dir {options.data_dir}" if options.dataset == "folder" else f"--dataset {options.dataset}"
    if len(data.class_names) < 2:
        raise OptionError(f"{named} has no classes. A classifier needs a sub-folder for each class, two at least.")
    if not len(heldout):
        raise OptionError(
            f"{named} has no held-out images to measure the accuracy on. Put images into sub-folders train and test, "
            "with those of the classes inside."
        )
    if data.channels == 3 and min(data.images.shape[2:]) < MIN_PHOTOGRAPH:
        raise OptionError(
            f"--image_size {Size().show(options.image_size)} is below {MIN_PHOTOGRAPH} pixels, too small for colour "
            "images. Raise it."
        )


def _command(options: ClassifierOptions) -> str:
    """The command line that trains this classifier; of a folder of images only its own name, not its place."""
    words = [f"--dataset {options.dataset}"]
    if options.dataset == "folder":
        words.append(f"--data_dir {shlex.quote(Path(options.data_dir).resolve().name)}")
    if options.image_size is not None:
        words.append(f"--image_size {Size().show(options.image_size)}")
    return " ".join(["python -m tiny_diffusion classifier", *words, f"--epochs {options.epochs} --seed {options.seed}"])
