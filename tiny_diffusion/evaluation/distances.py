"""Distances between two sets of feature vectors, each from its definition, in float64.

Knows vectors, not images: (N, D) tensors, or their moments gathered a batch at a time.  To add one: a function here and
a line in evaluate.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # rows whose distances to all others are held at once


@dataclass
class Moments:
    """Mean and covariance of vectors that come a batch at a time; merging two is as having seen both.

    Chan et al. (1979): centred sums, so that a large mean costs no digits.
    """

    count: int
    mean: Tensor  # (D,)
    scatter: Tensor  # (D, D), the sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        if len(features) > BLOCK:  # not all of them in float64 at once
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

    The trace of the root is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2): eigenvalues of symmetric matrices only.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def relative_frechet_distance(real: Moments, drawn: Moments) -> float:
    """The Frechet distance over the trace of the real covariance: the same however the features are scaled."""
    return frechet_distance(real, drawn) / float(real.covariance.trace())


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy under (x.y / D + 1)^3.  Binkowski et al. (2018), eq. 4.

    Of all pairs, not of subsets; it averages 0 for two samples of one distribution, and may so be below 0.
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
    """precision: share of drawn images within a real image's neighbourhood; recall: of real ones within a drawn one's.

    density: how many real neighbourhoods a drawn image lies in, over k; coverage: share of real ones that hold one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(real: Tensor, drawn: Tensor, k: int = 3, k_density: int = 5) -> Neighbourhoods:
    """A neighbourhood reaches to the k-th nearest of the same set: Kynkaanniemi et al. (2019), k = 3; density and
    coverage: Naeem et al. (2020), k = 5.  Needs more than k images in each set."""
    real_radii, drawn_radii = radii(real, (k, k_density)), radii(drawn, (k,))
    in_real = torch.zeros(len(drawn), dtype=torch.bool)
    density = 0
    in_drawn, covered = [], []
    for rows, distances in _distances(real, drawn):
        in_real |= (distances <= real_radii[rows, :1]).any(0)
        density += int((distances <= real_radii[rows, 1:]).sum())
        in_drawn.append((distances <= drawn_radii[:, 0]).any(1))
        covered.append((distances <= real_radii[rows, 1:]).any(1))
    return Neighbourhoods(
        float(in_real.double().mean()),
        float(torch.cat(in_drawn).double().mean()),
        density / (k_density * len(drawn)),
        float(torch.cat(covered).double().mean()),
    )


def radii(features: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(N, len(ks)): the distance of each vector to its k-th nearest other one."""
    found = []
    for rows, distances in _distances(features, features):
        distances[torch.arange(len(distances)), torch.arange(len(features))[rows]] = 0.0
        nearest = distances.topk(max(ks) + 1, largest=False).values  # itself is the first
        found.append(nearest[:, list(ks)])
    return torch.cat(found)


def nearest(features: Tensor, among: Tensor, exact: bool = True) -> tuple[Tensor, Tensor]:
    """For each vector the distance to the nearest among others, and which that is: (N,), (N,) int64.

    exact: sought in float64; otherwise as the vectors are, which is enough to find it.  The distance is exact.
    """
    which = torch.cat([distances.argmin(1) for _, distances in _distances(features, among, exact)])
    return (features.double() - among[which].double()).square().sum(1).sqrt(), which


def _distances(one: Tensor, other: Tensor, exact: bool = True):
    """Euclidean distances a block of rows at a time: (slice of rows, (rows, M))."""
    one, other = (one.double(), other.double()) if exact else (one, other)
    for start in range(0, len(one), BLOCK):
        rows = slice(start, min(start + BLOCK, len(one)))
        yield rows, torch.cdist(one[rows], other)
