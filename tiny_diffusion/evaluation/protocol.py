"""The protocol: which numbers are taken of which images against which, so that nobody can misread them.

Every number carries features, count and split in its name, and beside it stands the floor: what held-out real images
score in the same place.
"""

import math
from dataclasses import asdict, dataclass, field

from torch import Tensor

from tiny_diffusion.data.image_set import ImageSet, evenly_spaced, thin_out
from tiny_diffusion.evaluation.classifier import BATCH, accuracy, train_classifier
from tiny_diffusion.evaluation.distances import (
    Moments,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbourhoods,
)
from tiny_diffusion.evaluation.features import Features
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.evaluation.reference import Reference

MAX_COMPARED = 10_000  # images of each set whose distances to all others are taken
FEWEST = 6  # images of a set that has neighbourhoods
NEIGHBOURS = 1000  # drawn images whose nearest training image is looked for
ENOUGH = 10  # images a dimension, below which a Frechet distance is mostly bias


def scores(reference: Reference, drawn: NamedImages, features: Features) -> dict[str, float]:
    """Every number of these images, by name.  Two images at least; fewer than FEWEST have no neighbourhoods."""
    vectors = features.of(drawn.images)
    n = len(vectors)
    distance = frechet_distance(reference.moments, Moments.of(vectors))
    real, some = thin_out(reference.features, MAX_COMPARED), thin_out(vectors, MAX_COMPARED)
    found = {
        "frechet_distance": distance,
        "relative_frechet_distance": distance / reference.trace,
        "kernel_distance": kernel_distance(real, some),
    }
    same = thin_out(reference.features, min(n, MAX_COMPARED))
    if min(len(same), len(some)) >= FEWEST:
        found |= asdict(neighbourhoods(same, some))
    if features.classify is not None:
        probabilities = features.probabilities(drawn.images).double()
        found["confidence"] = float(probabilities.max(1).values.mean())
        share = probabilities.mean(0)
        found["class_entropy"] = float(-(share * share.clamp(min=1e-12).log()).sum())
        if drawn.labels is not None and drawn.class_names == features.class_names:
            found["label_accuracy"] = float((probabilities.argmax(1) == drawn.labels).double().mean())
    return found


@dataclass(frozen=True)
class Floor:
    """What held-out real images score where drawn ones are scored; nothing where none are held out.

    count: of images that the scores, by their short names, were taken of.  near: how near to a training image only 1 %
    of the held-out ones come, root mean square in grey levels.
    """

    count: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    near: float | None = None


def floor_of(reference: Reference, features: Features, n: int) -> Floor:
    """For n drawn images, however they are drawn."""
    if reference.heldout is None or len(reference.heldout.images) <= 10:
        return Floor()
    real, near = reference.heldout.evenly(n), None
    if len(reference.heldout.images) >= 100:
        usual, _ = _nearest_real(reference, thin_out(reference.heldout.images, NEIGHBOURS))
        near = float(usual.quantile(0.01))
    return Floor(len(real.images), scores(reference, real, features), near)


@dataclass(frozen=True, eq=False)
class Memorised:
    """looked: indices of drawn images; distances: of each to the nearest training image, root mean square in grey
    levels; which: the index of that.

    share: of drawn images nearer to one than 99 % of the held-out images are; about 0.01 where nothing is learnt by
    heart.  None where nothing is held out.
    """

    looked: Tensor
    distances: Tensor
    which: Tensor
    share: float | None


def memorised(reference: Reference, drawn: NamedImages, floor: Floor) -> Memorised:
    """How near the drawn images come to training images, pixel by pixel, against what held-out real ones do."""
    looked = evenly_spaced(len(drawn.images), NEIGHBOURS)
    distances, which = _nearest_real(reference, drawn.images[looked])
    share = None if floor.near is None else float((distances < floor.near).double().mean())
    return Memorised(looked, distances, which, share)


def _nearest_real(reference: Reference, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image the distance to the nearest training image, root mean square in grey levels, and which that is."""
    real = reference.pictures.images.float().flatten(1)
    distances, which = nearest(images.float().flatten(1), real, exact=False)
    return distances / math.sqrt(real.shape[1]), which


def label(metric: str, features: Features, n: int, split: str) -> str:
    """The name a number is printed under: frechet_distance[mnist-classifier-v1, n=10000, train]."""
    return f"{metric}[{features.name}, n={n}, {split}]"


def evaluate(reference: Reference, drawn: NamedImages, features: Features, floor: Floor, close: Memorised) -> dict:
    """Scores and floor under their full names, and what is to be warned of.  close: memorised(...) of these images."""
    n, dimension = len(drawn.images), reference.features.shape[1]
    found = scores(reference, drawn, features)
    warnings = []
    if "precision" not in found:
        warnings.append(f"precision, recall, density and coverage need {FEWEST} images of each kind and are left out")
    if n < ENOUGH * dimension:
        warnings.append(
            f"{n:,} images are few for {dimension:,} features: distances come out too large. Compare with the floor, "
            f"or take {ENOUGH * dimension:,}"
        )
    if 0 < floor.count < n:
        warnings.append(f"the floor is that of {floor.count:,} images, all that are held out, not of {n:,}")
    metrics = {label(name, features, n, reference.split): value for name, value in found.items()}
    looked = f"[pixels, n={len(close.distances)}, {reference.split}]"
    metrics["nearest_training_image" + looked] = float(close.distances.median())
    if close.share is not None:
        metrics["memorised_share" + looked] = close.share
    return {
        "metrics": metrics,
        "floor": {label(name, features, floor.count, reference.split): v for name, v in floor.scores.items()},
        "warnings": warnings,
    }


def train_on_synthetic(drawn: NamedImages, heldout: NamedImages, seed: int) -> dict[str, float]:
    """By name the accuracy on real held-out grey images of a classifier that has only seen drawn ones."""
    steps = max(200, 8 * len(drawn.images) // BATCH)
    model = train_classifier(ImageSet(drawn.images, drawn.labels, drawn.class_names), steps, seed)
    right = accuracy(model, ImageSet(heldout.images, heldout.labels, heldout.class_names))
    n, tested = len(drawn.images), len(heldout.images)
    return {f"train_on_synthetic_accuracy[n={n}, {tested} held-out]": right}
