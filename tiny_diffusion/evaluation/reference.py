"""The real images that others are compared with: which, of which split, which are held out, and their features."""

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

OF_ANY_SIZE = ("flowers102", "folder")  # formats of images that have no size of their own


@dataclass(frozen=True, eq=False)
class Real:
    """split: which part of the set the pictures are, in words.  heldout: real images besides, if there are any."""

    pictures: NamedImages
    split: str
    heldout: NamedImages | None = None


@dataclass(frozen=True, eq=False)
class Reference(Real):
    """Real images with their features and the moments of these."""

    features: Tensor | None = None
    moments: Moments | None = None

    @property
    def trace(self) -> float:
        return float(self.moments.covariance.trace())


def open_real(
    options,
    dataset: str | None,
    shape: tuple[int, int, int],
    trained_on: Config | None,
    cache: Cache,
    progress: Progress,
    device: torch.device,
) -> Real:
    """--reference if it was given, drawn on the device if it is a model; otherwise the data set.

    trained_on: how the model saw the data set, if it did.  shape: of the images that will be compared.  Raises
    OptionError if these are of another, FileError.
    """
    if options.reference is not None and options.reference.endswith(".pt"):
        # From the next seed: the same noise would make the two sets of images alike.
        asked = type(options)(
            checkpoint=options.reference, num_images=options.num_images, seed=options.seed + 1, weights=options.weights
        )
        other = ModelImages(asked, World(device))  # only the first process compares
        drawn = other.draw(next(other.requests()))
        real = Real(dataclasses.replace(drawn, name=options.reference), "reference model")
    elif options.reference is not None:
        real = Real(read_images("reference", options.reference), "reference")
    elif trained_on is not None:
        data = open_images(trained_on, cache=cache, progress=progress)
        heldout = open_images(trained_on, heldout=True, channels=data.channels)
        real = _of_sets(dataset, data, heldout, trained_on.splits)
    else:
        if dataset == "folder" and options.data_dir is None:
            raise OptionError("--dataset folder needs --data_dir, the folder of real images. Add it.")
        row = DATASETS[dataset]
        size = shape[1:] if row.format in OF_ANY_SIZE else None
        asked = {"name": dataset, "data_dir": options.data_dir, "size": size, "cache": cache}
        data = open_dataset(**asked, progress=progress)
        real = _of_sets(dataset, data, open_dataset(**asked, heldout=True, channels=data.channels), row.train)
    if real.pictures.shape != shape:
        wanted, given = ("x".join(map(str, sides)) for sides in (real.pictures.shape, shape))
        raise OptionError(
            f"--{'reference' if options.reference is not None else 'dataset'} {real.pictures.name} has images of "
            f"{wanted}, and those to score are {given}. Compare images of one shape."
        )
    return real


def _of_sets(name: str, data: ImageSet, heldout: ImageSet, splits: tuple[str, ...]) -> Real:
    def pictures(name: str, opened: ImageSet) -> NamedImages:
        return NamedImages(name, opened.take(np.arange(len(opened))), opened.labels, opened.class_names)

    held = pictures(f"{name}, held out", heldout) if len(heldout) else None
    return Real(pictures(name, data), split_name(splits), held)


def split_name(splits: Sequence[str]) -> str:
    """As it stands in the name of a number: train,test; the images of a folder without parts are of the folder."""
    return ",".join(splits) or "folder"


def make_reference(real: Real, features: Features, cache: Cache | None = None) -> Reference:
    """With its features, taken once and kept under the hash of the images and of the features.

    Raises OptionError where there are too few images, or nothing that varies.
    """
    if len(real.pictures.images) < 2:
        raise OptionError(f"--reference {real.pictures.name} holds one image, which has no spread. Name a larger set.")
    learnt = cache is not None and features.hash != "none"  # pixels are sooner taken than read
    key = cache.key("features", features.name, features.hash, real.pictures.sha256()) if learnt else ""
    kept = cache.tensors(key) if learnt else None
    vectors = kept["features"] if kept else features.of(real.pictures.images)
    if learnt and not kept:
        cache.keep(key, {"features": vectors.contiguous()})
    reference = Reference(real.pictures, real.split, real.heldout, vectors, Moments.of(vectors))
    if not reference.trace > 0:
        raise OptionError(
            f"the real images of {real.pictures.name} all have the same {features.name} features, so nothing can be "
            "compared with them. Name other images, or other --features."
        )
    return reference
