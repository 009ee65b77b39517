"""The real images that others are compared with: which of them, which are held out, and their features.

There are four sources, a function each: the set that a model was trained on, any other data set, an .npz file or a
folder, and the samples of another model.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.data.files.scan import Progress
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.errors import OptionError
from tiny_diffusion.evaluation.distances import Moments
from tiny_diffusion.evaluation.features import Features
from tiny_diffusion.evaluation.generate import ModelImages
from tiny_diffusion.evaluation.images import NamedImages, read_images
from tiny_diffusion.runs.images import open_images
from tiny_diffusion.runtime.world import World

OF_ANY_SIZE = ("flowers102", "folder")  # formats whose images have no size of their own


@dataclass(frozen=True, eq=False)
class Real:
    """Real images to compare with.

    split: which part of its set `images` is, in words.  heldout: other real images, if there are any.
    option: the option that named the set.
    """

    images: NamedImages
    split: str
    heldout: NamedImages | None = None
    option: str = "dataset"

    def in_channels(self, channels: int) -> "Real":
        """See NamedImages.in_channels."""
        images, heldout = self.images.in_channels(channels), self.heldout
        if images is self.images:
            return self
        return dataclasses.replace(self, images=images, heldout=heldout and heldout.in_channels(channels))

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raises OptionError unless the images have this shape, which is (C, H, W) of the images to score."""
        if self.images.shape != shape:
            wanted, given = ("x".join(map(str, sides)) for sides in (self.images.shape, shape))
            raise OptionError(
                f"--{self.option} {self.images.name} has images of {wanted}, and those to score are {given}. "
                "Compare images of one shape. Those of three equal channels are compared as grey."
            )


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images, their features (N, D), and the mean and covariance of these."""

    real: Real
    features: Tensor
    moments: Moments

    @property
    def trace(self) -> float:
        """The total variance of the features."""
        return float(self.moments.covariance.trace())


def open_training_set(config: Config, cache: Cache, progress: Progress) -> Real:
    """The images that a model with this configuration was trained on, and those held out.  Raises FileError."""
    data = open_images(config, cache=cache, progress=progress)
    heldout = open_images(config, heldout=True, channels=data.channels)
    return _real(config.dataset, data, heldout, config.splits)


def open_data_set(dataset: str, data_dir: str | None, size: tuple[int, int], cache: Cache, progress: Progress) -> Real:
    """The training and held-out images of a data set, at this size if its images have none of their own.

    Raises FileError, or OptionError for a folder that is not named.
    """
    if dataset == "folder" and data_dir is None:
        raise OptionError("--dataset folder needs --data_dir, the folder of real images. Add it.")
    row = DATASETS[dataset]
    options = {"data_dir": data_dir, "size": size if row.format in OF_ANY_SIZE else None, "cache": cache}
    data = open_dataset(dataset, **options, progress=progress)
    heldout = open_dataset(dataset, **options, heldout=True, channels=data.channels)
    return _real(dataset, data, heldout, row.train)


def read_reference(path: str) -> Real:
    """The images of an .npz file or a folder.  Raises FileError or OptionError."""
    return Real(read_images("reference", path), "reference", option="reference")


def sample_reference(path: str, num_images: int, seed: int, weights: str, device: torch.device) -> Real:
    """Samples of another model, with its own defaults.  Raises FileError.

    seed: another than that of the images to score, because equal noise would make the two sets alike.
    """
    model = ModelImages(path, World(device), weights)  # a world of one: only rank 0 compares
    (request,) = model.requests(num_images, seed=seed)
    return Real(dataclasses.replace(model.sample(request), name=path), "reference model", option="reference")


def check_heldout(real: Real, bits_per_dim: bool, class_names: tuple[str, ...] | None) -> None:
    """Raises OptionError if held-out images are needed and there are none.

    class_names: of the classifier of --train_on_synthetic; None if it is not asked for.
    """
    heldout, name = real.heldout, real.images.name
    if bits_per_dim and heldout is None:
        raise OptionError(f"--bits_per_dim is measured on held-out images, and {name} has none. Leave it out.")
    if class_names is not None and (heldout is None or heldout.class_names != class_names):
        raise OptionError(
            f"--train_on_synthetic needs held-out images of the model's classes, and {name} has none. Leave it out."
        )


def _real(name: str, data: ImageSet, heldout: ImageSet, splits: tuple[str, ...]) -> Real:
    def whole(name: str, opened: ImageSet) -> NamedImages:
        return NamedImages(name, opened.take(np.arange(len(opened))), opened.labels, opened.class_names)

    return Real(whole(name, data), split_name(splits), whole(f"{name}, held out", heldout) if len(heldout) else None)


def split_name(splits: Sequence[str]) -> str:
    """The splits as they appear in the name of a number, such as train,test.  A folder without splits is "folder"."""
    return ",".join(splits) or "folder"


def make_reference(real: Real, features: Features, cache: Cache | None = None) -> Reference:
    """The real images with their features, which are cached under the hash of the images and of the features.

    Raises OptionError for a single image, or where all features are equal.
    """
    name = real.images.name
    if len(real.images.images) < 2:
        raise OptionError(f"--reference {name} holds one image, which has no spread. Name a larger set.")
    cached = cache is not None and features.hash != "none"  # pixels are computed faster than they are read
    key = cache.key("features", features.name, features.hash, real.images.sha256()) if cached else ""
    found = cache.tensors(key) if cached else None
    vectors = found["features"] if found else features.of(real.images.images)
    if cached and not found:
        cache.keep(key, {"features": vectors.contiguous()})
    reference = Reference(real, vectors, Moments.of(vectors))
    if not reference.trace > 0:
        raise OptionError(
            f"the real images of {name} all have the same {features.name} features, so nothing can be "
            "compared with them. Name other images, or other --features."
        )
    return reference
