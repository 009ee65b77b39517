"""The protocol: which numbers are computed from which images, so that nobody can misread them.

Every number carries its features, its number of images and the reference split in its name.  Beside it stands the
floor: what as many held-out real images score.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor

from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.evaluation.classifier import BATCH, accuracy, train_classifier
from tiny_diffusion.evaluation.distances import Moments, frechet_distance, kernel_distance, nearest, neighbourhoods
from tiny_diffusion.evaluation.features import Features
from tiny_diffusion.evaluation.images import NamedImages, random_indices
from tiny_diffusion.evaluation.reference import Reference

MAX_COMPARED = 10_000  # images of each set whose pairwise distances are computed
PAIRWISE = ("kernel_distance", "precision", "recall", "density", "coverage")
MIN_NEIGHBOURHOODS = 6  # images of a set, below which it has no neighbourhoods
MAX_NEAREST = 1000  # images whose nearest training image is searched
MIN_HELDOUT = 11  # held-out images, below which there is no floor
IMAGES_PER_FEATURE = 10  # below which a Frechet distance is mostly bias


@dataclass(frozen=True)
class Floor:
    """The scores of held-out real images, to compare the scores of samples with; empty if no images are held out.

    count: how many held-out images.  scores: by their short names.  near: the distance to the nearest training image
    that 99 % of the held-out images exceed, in grey levels (root mean square).  in_shares: whether the classes have the
    shares that the images to score have.
    """

    count: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    near: float | None = None
    in_shares: bool = False


@dataclass(frozen=True, eq=False)
class NearestTraining:
    """The nearest training image of some of the images to score, pixel by pixel.

    indices: (M,) of the images looked at.  distances: (M,) in grey levels (root mean square).  nearest: (M,) indices of
    training images.  share: the part of them that is memorised, that is, nearer to a training image than 99 % of the
    held-out images are; about 0.01 if nothing is memorised, None if nothing is held out.
    """

    indices: Tensor
    distances: Tensor
    nearest: Tensor
    share: float | None


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One set of images and its evaluation.

    numbers: plain JSON with num_images; metrics and floor by their full names; warnings; seconds.
    """

    images: NamedImages
    nearest: NearestTraining
    numbers: dict


def floor_of(reference: Reference, features: Features, n: int, class_counts: Sequence[int] = ()) -> Floor:
    """The floor of n images.  class_counts: take the held-out images with the classes in the shares of these counts."""
    heldout = reference.real.heldout
    if heldout is None or len(heldout.images) < MIN_HELDOUT:
        return Floor()
    real, near = heldout.subset(n, class_counts), None
    if len(real.images) < min(n, MIN_HELDOUT):
        return Floor()
    nearby = heldout.subset(MAX_NEAREST, class_counts).images
    if len(nearby) >= 100:
        distances, _ = _nearest_training(reference, nearby)
        near = float(distances.quantile(0.01))
    return Floor(len(real.images), scores(reference, real, features), near, bool(class_counts))


def evaluate(
    reference: Reference, images: NamedImages, features: Features, floor: Floor, classifier_seed: int | None = None
) -> Evaluated:
    """Every number of the images.

    classifier_seed: if given, a classifier is also trained on the images, which need labels, with this seed, and tested
    on the held-out images, which are needed as well.
    """
    started = time.monotonic()
    close = nearest_training(reference, images, floor)
    n, split = len(images.images), reference.real.split
    metrics = {label(name, features, n, split): value for name, value in scores(reference, images, features).items()}
    looked = f"[pixels, n={len(close.distances)}, {split}]"
    metrics["nearest_training_image" + looked] = float(close.distances.median())
    if close.share is not None:
        metrics["memorised_share" + looked] = close.share
    if classifier_seed is not None:
        metrics |= train_on_synthetic(images, reference.real.heldout, classifier_seed)
    numbers = {
        "num_images": n,
        "metrics": metrics,
        "floor": {label(name, features, floor.count, split): value for name, value in floor.scores.items()},
        "warnings": _warnings(n, reference, floor),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Evaluated(images, close, numbers)


def scores(reference: Reference, images: NamedImages, features: Features) -> dict[str, float]:
    """Every number of at least two images against the reference, by its short name.

    Below MIN_NEIGHBOURHOODS images there are no precision, recall, density and coverage.
    """
    vectors = features.of(images.images)
    distance = frechet_distance(reference.moments, Moments.of(vectors))
    real, some = (each[random_indices(len(each), MAX_COMPARED)] for each in (reference.features, vectors))
    found = {
        "frechet_distance": distance,
        "relative_frechet_distance": distance / reference.trace,
        "kernel_distance": kernel_distance(real, some),
    }
    as_many = reference.features[random_indices(len(reference.features), len(some))]
    if min(len(as_many), len(some)) >= MIN_NEIGHBOURHOODS:
        found |= asdict(neighbourhoods(as_many, some))
    if features.classify is not None and reference.real.images.class_names in ((), features.class_names):
        found |= _class_scores(features, images)
    return found


def _class_scores(features: Features, images: NamedImages) -> dict[str, float]:
    """What the features' classifier says of the images."""
    probabilities = features.probabilities(images.images).double()
    share = probabilities.mean(0)
    found = {
        "confidence": float(probabilities.max(1).values.mean()),
        "class_entropy": float(-(share * share.clamp(min=1e-12).log()).sum()),
    }
    if images.labels is not None and images.class_names == features.class_names:
        found["label_accuracy"] = float((probabilities.argmax(1) == images.labels).double().mean())
    return found


def nearest_training(reference: Reference, images: NamedImages, floor: Floor) -> NearestTraining:
    """How near the images come to training images, pixel by pixel, measured by what held-out images do."""
    indices = random_indices(len(images.images), MAX_NEAREST)
    distances, which = _nearest_training(reference, images.images[indices])
    share = None if floor.near is None else float((distances < floor.near).double().mean())
    return NearestTraining(indices, distances, which, share)


def _nearest_training(reference: Reference, images: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each image to its nearest training image, in grey levels, and the index of that image."""
    real = reference.real.images.images.float().flatten(1)
    distances, which = nearest(images.float().flatten(1), real, exact=False)
    return distances / math.sqrt(real.shape[1]), which


def label(metric: str, features: Features, n: int, split: str) -> str:
    """The full name of a number, such as frechet_distance[mnist-classifier-v1, n=10000, train].

    n: the number of images; a metric of pairwise distances counts only those that it compares.
    """
    n = min(n, MAX_COMPARED) if metric in PAIRWISE else n
    return f"{metric}[{features.name}, n={n}, {split}]"


def _warnings(n: int, reference: Reference, floor: Floor) -> list[str]:
    """What makes the numbers of n images hard to compare, one sentence each."""
    found, dimension = [], reference.features.shape[1]
    if min(n, len(reference.features)) < MIN_NEIGHBOURHOODS:
        found.append(
            f"precision, recall, density and coverage need {MIN_NEIGHBOURHOODS} images of each kind and are left out"
        )
    if n < IMAGES_PER_FEATURE * dimension:
        found.append(
            f"{n:,} images are few for {dimension:,} features: distances come out too large. Compare with the floor, "
            f"or take {IMAGES_PER_FEATURE * dimension:,}"
        )
    if 0 < floor.count < n:
        shares = " in the shares of the classes of the images" if floor.in_shares else ""
        found.append(f"the floor is that of {floor.count:,} images, all that are held out{shares}, not of {n:,}")
    return found


def train_on_synthetic(images: NamedImages, heldout: NamedImages, seed: int) -> dict[str, float]:
    """The accuracy on held-out images of a classifier that was trained on the given images only, by its name."""
    steps = max(200, 8 * len(images.images) // BATCH)
    model = train_classifier(ImageSet(images.images, images.labels, images.class_names), steps, seed)
    right = accuracy(model, ImageSet(heldout.images, heldout.labels, heldout.class_names))
    return {f"train_on_synthetic_accuracy[n={len(images.images)}, {len(heldout.images)} held-out]": right}
