"""Distances between two sets of feature vectors, computed from their definitions in float64.

Knows vectors, not images: (N, D) tensors, or their moments, which are gathered a batch at a time.  To add one: write a
function here, and add a line to protocol.scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # rows whose distances to all others are in memory at once


@dataclass
class Moments:
    """Mean and covariance of vectors that arrive in batches; the sum of two Moments is that of all their vectors.

    Chan et al. (1979): the sums are centred, so a large mean costs no digits.
    """

    count: int
    mean: Tensor  # (D,)
    scatter: Tensor  # (D, D), the sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """The moments of (N, D) vectors."""
        if len(features) > BLOCK:  # only one block in float64 at a time
            first, *rest = (cls.of(block) for block in features.split(BLOCK))
            return sum(rest, first)
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased."""
        return self.scatter / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).  Heusel et al. (2017), eq. 6; Dowson & Landau (1982).

    (C1 C2)^(1/2) has the trace of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), whose eigenvalues are found stably.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def relative_frechet_distance(real: Moments, sampled: Moments) -> float:
    """The Frechet distance divided by the trace of the real covariance, which makes it independent of the scale."""
    return frechet_distance(real, sampled) / float(real.covariance.trace())


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy under (x.y / D + 1)^3.  Binkowski et al. (2018), eq. 4.

    Over all pairs, not subsets.  Its expectation is 0 for two sets from one distribution, so it may be negative.
    """
    one, other = one.double(), other.double()

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        return sum(float(((block @ y.T / x.shape[1] + 1) ** 3).sum()) for block in x.split(BLOCK))

    def own(x: Tensor) -> float:
        diagonal = ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x) - float(diagonal)) / (len(x) * (len(x) - 1))

    return own(one) + own(other) - 2 * kernel_sum(one, other) / (len(one) * len(other))


@dataclass(frozen=True)
class Neighbourhoods:
    """precision: the share of samples in the neighbourhood of a real image.  recall: the share of real images in the
    neighbourhood of a sample.

    density: the mean number of real neighbourhoods that a sample lies in, divided by k.  coverage: the share of real
    neighbourhoods that hold a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(real: Tensor, sampled: Tensor, k: int = 3, k_density: int = 5) -> Neighbourhoods:
    """The neighbourhood of a vector reaches to the k-th nearest other vector of its own set.

    Precision and recall: Kynkaanniemi et al. (2019), k = 3.  Density and coverage: Naeem et al. (2020), k = 5.  Each
    set needs more vectors than k.
    """
    real_radii, sample_radii = radii(real, (k, k_density)), radii(sampled, (k,))
    in_real = torch.zeros(len(sampled), dtype=torch.bool)
    density = 0
    recalled, covered = [], []
    for rows, distances in _distances(real, sampled):
        in_real |= (distances <= real_radii[rows, :1]).any(0)
        density += int((distances <= real_radii[rows, 1:]).sum())
        recalled.append((distances <= sample_radii[:, 0]).any(1))
        covered.append((distances <= real_radii[rows, 1:]).any(1))
    return Neighbourhoods(
        precision=float(in_real.double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=density / (k_density * len(sampled)),
        coverage=float(torch.cat(covered).double().mean()),
    )


def radii(features: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(N, len(ks)): the distance of each vector to its k-th nearest other vector."""
    found = []
    for rows, distances in _distances(features, features):
        distances[torch.arange(len(distances)), torch.arange(len(features))[rows]] = 0.0
        nearest = distances.topk(max(ks) + 1, largest=False).values  # the first is the vector itself
        found.append(nearest[:, list(ks)])
    return torch.cat(found)


def nearest(features: Tensor, among: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
    """For each vector the distance to the nearest vector of `among`, and the index of that: (N,), (N,) int64.

    exact: search in float64; otherwise in the type of the vectors, which is enough to find it.  The distance is exact
    in both cases.
    """
    which = torch.cat([distances.argmin(1) for _, distances in _distances(features, among, exact)])
    return (features.double() - among[which].double()).square().sum(1).sqrt(), which


def _distances(one: Tensor, other: Tensor, exact: bool = True):
    """Yields (slice of rows, (rows, M) Euclidean distances), a block of rows at a time."""
    one, other = (one.double(), other.double()) if exact else (one, other)
    for start in range(0, len(one), BLOCK):
        rows = slice(start, min(start + BLOCK, len(one)))
        yield rows, torch.cdist(one[rows], other)
