"""The catalogue of data sets: names, sizes, splits, and the options that suit each set.

`data.sources` opens a set by its `format`.  To add a set of a known format: a row in DATASETS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FLOWERS = (
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia?", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush",
    "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania",
    "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily",
    "anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia",
    "cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea",
    "camellia", "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
)  # fmt: skip
IDX_FILES = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the same two of t10k, or Kaggle's .idx3-ubyte"
COLOURS = {"white": "#ffffff", "black": "#000000", "grey": "#808080"}


@dataclass(frozen=True)
class Dataset:
    """A data set.  format: a key of data.sources.OPENERS.  source: the name that this opener knows it by.

    channels, size: of its images; those of a folder are read from its files.  classes: the name of each label.
    splits: the number of images of each split; empty if only opening the set shows it.
    train: the splits to train on unless --splits names others.
    image_files: whether its images are files, of any size.  transparent: whether these may have transparency.
    defaults: options that suit the set.  sampler: the default sampler, chosen by measurement: fresh noise helps with
    strokes and shapes, and does harm with photographs.
    guidance, guidance_interval: the default weight, and the times at which it holds, of models that learn the classes,
    chosen by measurement: the asked class is read more often, and images become less diverse.
    download: the files that torchvision downloads.  download_to: where in --data_dir a user can put them.
    """

    title: str
    format: str
    source: str
    channels: int
    size: int
    classes: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    train: tuple[str, ...] = ("train",)
    image_files: bool = False
    transparent: bool = False
    download: str = ""
    download_to: str = ""
    defaults: Mapping[str, object] = field(default_factory=dict)
    sampler: str = "abm"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None

    def images(self, splits: Sequence[str]) -> int:
        """The number of images in these splits."""
        return sum(self.splits.get(split, 0) for split in splits)


DATASETS = {
    "digits": Dataset(
        title="1,797 real handwritten digits of 8x8 pixels, inside scikit-learn: no download",
        format="sklearn_digits",
        source="load_digits",
        channels=1,
        size=8,
        classes=DIGITS,
        splits={"train": 1498, "test": 299},  # every sixth image is in the test split
        sampler="sa_solver",
        defaults={"patch_size": 1, "epochs": 60, "sample_interval": 20, "save_interval": 20},
    ),
    "mnist": Dataset(
        title="70,000 handwritten digits of 28x28 pixels",
        format="idx",
        source="MNIST",
        channels=1,
        size=28,
        classes=DIGITS,
        splits={"train": 60_000, "test": 10_000},
        sampler="sa_solver",
        guidance=1.5,
        guidance_interval=(0.12, 0.65),
        download=IDX_FILES,
        download_to="MNIST/raw",
    ),
    "fashion_mnist": Dataset(
        title="70,000 pictures of clothes of 28x28 pixels",
        format="idx",
        source="FashionMNIST",
        channels=1,
        size=28,
        classes=CLOTHES,
        splits={"train": 60_000, "test": 10_000},
        sampler="sa_solver",
        guidance=2.0,
        guidance_interval=(0.12, 0.65),
        download=IDX_FILES,
        download_to="FashionMNIST/raw",
    ),
    "cifar10": Dataset(
        title="60,000 photographs of ten kinds of things, 32x32 pixels",
        format="cifar10",
        source="CIFAR10",
        channels=3,
        size=32,
        classes=THINGS,
        splits={"train": 50_000, "test": 10_000},
        download="cifar-10-python.tar.gz",
    ),
    "flowers102": Dataset(
        title="8,189 photographs of 102 kinds of flowers, scaled and cropped to 64x64 pixels",
        format="flowers102",
        source="Flowers102",
        channels=3,
        size=64,
        classes=FLOWERS,
        splits={"train": 1020, "val": 1020, "test": 6149},
        train=("train", "val", "test"),  # to generate, every photograph helps
        image_files=True,
        download="102flowers.tgz, imagelabels.mat and setid.mat",
        download_to="flowers-102",
        defaults={"epochs": 100, "sample_interval": 5, "save_interval": 10},
    ),
    "folder": Dataset(
        title="the images in --data_dir, with a sub-folder for each class or flat",
        format="folder",
        source="",
        channels=3,
        size=64,
        train=(),
        image_files=True,
        transparent=True,
        defaults={"sample_interval": None, "save_interval": None},
    ),
}


def background_colour(name: object) -> tuple[tuple[int, int, int] | None, str | None]:
    """(red, green, blue) of a name in COLOURS or of #rrggbb; None and the reason if it is neither."""
    digits = COLOURS.get(name, name) if isinstance(name, str) else ""
    if len(digits) == 7 and digits[0] == "#" and all(digit in "0123456789abcdefABCDEF" for digit in digits[1:]):
        return tuple(int(digits[i : i + 2], 16) for i in (1, 3, 5)), None
    return None, f"{name!r} is not a colour: {', '.join(COLOURS)}, or #rrggbb such as #ff8000"
