"""The catalogue of data sets: what they are called, how large, which part trains, and what suits them.

It opens nothing: `data.sources` does, by a row's `format`.  To add a set in a known format: a row in DATASETS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass(frozen=True)
class Dataset:
    """format: a key of data.sources.OPENERS.  source: what that opener is told.  images: in the training split.

    train, heldout: which part trains and which is kept for measuring, in words.  defaults: options that suit the set.
    """

    title: str
    format: str
    source: str
    channels: int
    size: int
    classes: tuple[str, ...]
    images: int
    train: str
    heldout: str
    download: bool = True
    defaults: Mapping[str, object] = field(default_factory=dict)


DATASETS = {
    "digits": Dataset(
        title="1,797 real handwritten digits of 8x8 pixels, inside scikit-learn: no download",
        format="sklearn_digits",
        source="load_digits",
        channels=1,
        size=8,
        classes=DIGITS,
        images=1498,
        train="every image but each sixth",
        heldout="each sixth image",
        download=False,
        defaults={"patch_size": 1, "epochs": 60, "sample_interval": 20, "save_interval": 20},
    ),
    "mnist": Dataset(
        title="70,000 handwritten digits of 28x28 pixels",
        format="idx",
        source="MNIST",
        channels=1,
        size=28,
        classes=DIGITS,
        images=60_000,
        train="the training split",
        heldout="the test split",
    ),
    "fashion_mnist": Dataset(
        title="70,000 pictures of clothes of 28x28 pixels",
        format="idx",
        source="FashionMNIST",
        channels=1,
        size=28,
        classes=CLOTHES,
        images=60_000,
        train="the training split",
        heldout="the test split",
    ),
}
