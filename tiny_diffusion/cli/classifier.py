"""classifier: trains the small network in whose features `evaluate` compares digits and clothes."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Int, Text, again, option
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Train a small classifier, in whose features `evaluate` compares images.  The classifiers of digits, mnist and
fashion_mnist come with the package; this command made them.

  python -m tiny_diffusion classifier --dataset mnist --output mnist-classifier-v1.safetensors
"""


@dataclass(frozen=True)
class ClassifierOptions:
    """What `classifier` trains."""

    dataset: str = again(Config, "dataset", help="whose images it classifies")
    data_dir: str | None = again(Config, "data_dir")
    epochs: int = option(Int(1, 1000), 8, "passes over the training images")
    seed: int = again(Config, "seed")
    output: str | None = option(Text(), None, "the .safetensors file to write [DATASET-classifier.safetensors]")


OPTIONS = (ClassifierOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Trains the classifier and saves it.  Returns the exit code."""
    options = ClassifierOptions(**parse(argv, program, DESCRIPTION, *OPTIONS))
    dataset = DATASETS[options.dataset]
    if dataset.channels != 1 or not dataset.classes:
        grey = ", ".join(name for name, row in DATASETS.items() if row.channels == 1)
        raise OptionError(f"--dataset {options.dataset} is in colour, and the classifier takes grey images: {grey}.")
    path = Path(options.output or f"{options.dataset}-classifier.safetensors")
    if path.suffix.lower() != ".safetensors":
        raise OptionError(f"--output {path}: a classifier is a .safetensors file. End the name in .safetensors.")
    check_writable("output", path)

    import torch
    from tqdm import tqdm

    from tiny_diffusion.data.sources import open_dataset
    from tiny_diffusion.evaluation.classifier import BATCH, accuracy, save_classifier, train_classifier
    from tiny_diffusion.evaluation.features import file_hash

    data = open_dataset(options.dataset, data_dir=options.data_dir)
    heldout = open_dataset(options.dataset, heldout=True, data_dir=options.data_dir)
    steps = options.epochs * len(data) // BATCH
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        model = train_classifier(data, steps, options.seed, lambda step, loss: bar.update())
    share_right = accuracy(model, heldout)
    about = {
        "dataset": options.dataset,
        "size": list(data.images.shape[2:]),
        "classes": list(data.class_names),
        "accuracy": share_right,
        "heldout_images": len(heldout),
        "command": f"python -m tiny_diffusion classifier --dataset {options.dataset} --epochs {options.epochs} "
        f"--seed {options.seed}",
        "torch": torch.__version__,
    }
    try:
        save_classifier(path, model, about)
    except OSError as error:
        raise FileError(f"--output {path} cannot be written: {error.strerror or error}.") from error
    result = f"{share_right:.2%} of {len(heldout):,} held-out images classified correctly"
    print(f"{path}: {result}, sha256 {file_hash(path)}", file=sys.stderr)
    return 0
