"""The protocol: which numbers are taken of which images against which, so that nobody can misread them.

Every number carries features, count and split in its name, and beside it stands the floor: what held-out real images
score in the same place.
"""

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.evaluation.classifier import BATCH, accuracy, train_classifier
from tiny_diffusion.evaluation.distances import (
    Moments,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbourhoods,
)
from tiny_diffusion.evaluation.features import Features
from tiny_diffusion.evaluation.inputs import Pictures, evenly, spread
from tiny_diffusion.evaluation.reference import Reference

MOST_COMPARED = 10_000  # images of each set whose distances to all others are taken
FEWEST = 6  # images of a set that has neighbourhoods
NEIGHBOURS = 1000  # drawn images whose nearest training image is looked for
ENOUGH = 10  # images a dimension, below which a Frechet distance is mostly bias


def scores(reference: Reference, drawn: Pictures, features: Features, vectors: Tensor | None = None) -> dict:
    """Every number of these images, by name.  Two images at least; fewer than FEWEST have no neighbourhoods."""
    vectors = features.of(drawn.images) if vectors is None else vectors
    n = len(vectors)
    distance = frechet_distance(reference.moments, Moments.of(vectors))
    real, some = evenly(reference.features, MOST_COMPARED), evenly(vectors, MOST_COMPARED)
    found = {
        "frechet_distance": distance,
        "relative_frechet_distance": distance / reference.trace,
        "kernel_distance": kernel_distance(real, some),
    }
    same = evenly(reference.features, min(n, MOST_COMPARED))
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


def memorised(reference: Reference, drawn: Pictures) -> Memorised:
    """How near the drawn images come to training images, pixel by pixel, against what held-out real ones do."""
    real = reference.pictures.images.float().flatten(1)
    scale = math.sqrt(real.shape[1])

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        distances, which = nearest(images.float().flatten(1), real, exact=False)
        return distances / scale, which

    looked = spread(len(drawn.images), NEIGHBOURS)
    distances, which = look(drawn.images[looked])
    share = None
    if reference.heldout is not None and len(reference.heldout.images) >= 100:
        usual, _ = look(evenly(reference.heldout.images, NEIGHBOURS))
        share = float((distances < usual.quantile(0.01)).double().mean())
    return Memorised(looked, distances, which, share)


def label(metric: str, features: Features, n: int, split: str) -> str:
    """The name a number is printed under: frechet_distance[mnist-classifier-v1, n=10000, train]."""
    return f"{metric}[{features.name}, n={n}, {split}]"


def evaluate(reference: Reference, drawn: Pictures, features: Features, close: Memorised | None = None) -> dict:
    """Scores and floor under their full names, and what is to be warned of.  close: memorised(...), if it is known."""
    n, dimension = len(drawn.images), reference.features.shape[1]
    found = scores(reference, drawn, features)
    close = close or memorised(reference, drawn)
    warnings = []
    if "precision" not in found:
        warnings.append(f"precision, recall, density and coverage need {FEWEST} images of each kind and are left out")
    if n < ENOUGH * dimension:
        warnings.append(
            f"{n:,} images are few for {dimension:,} features: distances come out too large. Compare with the floor, "
            f"or take {ENOUGH * dimension:,}"
        )
    floor, count = {}, 0
    if reference.heldout is not None and len(reference.heldout.images) > 10:
        real = reference.heldout.evenly(n)
        count = len(real.images)
        floor = scores(reference, real, features)
        if count < n:
            warnings.append(f"the floor is that of {count:,} images, all that are held out, not of {n:,}")
    metrics = {label(name, features, n, reference.split): value for name, value in found.items()}
    looked = f"[pixels, n={len(close.distances)}, {reference.split}]"
    metrics["nearest_training_image" + looked] = float(close.distances.median())
    if close.share is not None:
        metrics["memorised_share" + looked] = close.share
    return {
        "metrics": metrics,
        "floor": {label(name, features, count, reference.split): value for name, value in floor.items()},
        "warnings": warnings,
    }


def train_on_synthetic(drawn: Pictures, heldout: Pictures, seed: int) -> dict[str, float]:
    """By name the accuracy on real held-out grey images of a classifier that has only seen drawn ones."""
    steps = max(200, 8 * len(drawn.images) // BATCH)
    model = train_classifier(ImageSet(drawn.images, drawn.labels, drawn.class_names), steps, seed)
    right = accuracy(model, ImageSet(heldout.images, heldout.labels, heldout.class_names))
    n, tested = len(drawn.images), len(heldout.images)
    return {f"train_on_synthetic_accuracy[n={n}, {tested} held-out]": right}
