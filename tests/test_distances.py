"""Distances between sets of features: closed forms, reference implementations, and what they must be blind to."""

import math

import numpy as np
import pytest
import torch

from tiny_diffusion.evaluation.distances import (
    Moments,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbourhoods,
    radii,
    relative_frechet_distance,
)


def vectors(count, dimension=8, seed=0, mean=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(99)) / dimension**0.5
    return mean + spread * torch.randn(count, dimension, generator=generator) @ mix


def given_moments(mean, covariance, count=1000):
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return Moments(count, mean, covariance * (count - 1))


# Moments


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (7, 20, 23), (1,) * 50])
def test_moments_are_the_same_in_whatever_batches_the_vectors_come(sizes):
    features = 1000 + vectors(50)
    total = None
    for part in features.split(sizes):
        total = Moments.of(part) if total is None else total + Moments.of(part)
    torch.testing.assert_close(total.mean, features.double().mean(0))
    torch.testing.assert_close(total.covariance, torch.cov(features.double().T))


# Frechet


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    covariance = torch.cov(vectors(100).double().T)
    one, other = given_moments(torch.zeros(8), covariance), given_moments(torch.full((8,), 0.5), covariance)
    assert frechet_distance(one, other) == pytest.approx(8 * 0.25, rel=1e-10)


def test_covariances_that_commute_leave_the_squared_differences_of_the_deviations():
    """Diagonal ones: sum of (s1 - s2)^2."""
    one, other = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0])
    found = frechet_distance(given_moments(torch.zeros(3), one.diag()), given_moments(torch.zeros(3), other.diag()))
    assert found == pytest.approx(1 + 1 + 9, rel=1e-12)


def test_a_set_is_at_no_distance_from_itself():
    moments = Moments.of(vectors(500))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-10)


def test_the_distance_is_that_of_the_definition_with_a_matrix_root():
    from scipy.linalg import sqrtm

    one, other = Moments.of(vectors(300, seed=1)), Moments.of(vectors(200, seed=2, mean=0.3, spread=1.5))
    root = sqrtm(one.covariance.numpy() @ other.covariance.numpy()).real
    wanted = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace() - 2 * root.trace()
    assert frechet_distance(one, other) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(float(wanted), rel=1e-9)


def test_torch_fidelity_finds_the_same_distance():
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    one, other = vectors(300, 16, seed=1), vectors(300, 16, seed=2, mean=0.2)
    statistics = [
        {"mu": x.double().mean(0).numpy(), "sigma": np.cov(x.double().numpy(), rowvar=False)} for x in (one, other)
    ]
    wanted = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_scaling_and_moving_the_features_leaves_the_relative_distance(scale):
    real, sampled = vectors(400, seed=1), vectors(300, seed=2, mean=0.4)
    before = relative_frechet_distance(Moments.of(real), Moments.of(sampled))
    after = relative_frechet_distance(Moments.of(real.double() * scale + 3), Moments.of(sampled.double() * scale + 3))
    assert after == pytest.approx(before, rel=1e-6)


def test_fewer_images_than_features_still_have_a_finite_distance():
    found = frechet_distance(Moments.of(vectors(5, 20, seed=1)), Moments.of(vectors(6, 20, seed=2)))
    assert math.isfinite(found) and found > 0


# Kernel distance


def test_the_kernel_distance_is_the_published_sum_over_pairs():
    one, other = vectors(7, seed=1).double(), vectors(5, seed=2).double()

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    own = [
        sum(kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (len(a) * (len(a) - 1))
        for a in (one, other)
    ]
    cross = sum(kernel(x, y) for x in one for y in other) / (len(one) * len(other))
    assert kernel_distance(one, other) == pytest.approx(float(sum(own) - 2 * cross), rel=1e-10)


def test_the_kernel_distance_of_independent_halves_averages_zero():
    """Unbiased: within four standard errors over 200 pairs of samples of one distribution."""
    found = torch.tensor([kernel_distance(vectors(40, seed=2 * i), vectors(30, seed=2 * i + 1)) for i in range(200)])
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5
    assert (found < 0).any()


# Neighbourhoods


def test_a_set_covers_itself():
    features = vectors(60)
    found = neighbourhoods(features, features)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_sets_far_apart_have_nothing_in_common():
    found = neighbourhoods(vectors(60), vectors(60, seed=1, mean=1000.0))
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_precision_and_recall_of_sets_built_by_hand():
    """Real: two clumps on a line.  Sampled: half in the first clump, half nowhere: precision 1/2, recall 1/2."""
    clump = torch.arange(10.0)[:, None]
    real, sampled = torch.cat([clump, clump + 1000]), torch.cat([clump + 0.25, 5000 + 100 * clump])
    found = neighbourhoods(real, sampled)
    assert (found.precision, found.recall) == (0.5, 0.5)
    assert found.coverage == 0.5


def test_one_repeated_image_is_precise_and_recalls_nothing():
    real = vectors(200)
    found = neighbourhoods(real, real[:1].repeat(200, 1))
    assert found.precision == 1 and found.recall <= 1 / 200 and found.coverage < 0.2


def test_neighbourhoods_are_those_of_the_papers():
    """Kynkaanniemi et al. (2019) with k = 3, Naeem et al. (2020) with k = 5, written out over pairs of vectors."""
    real, sampled = vectors(30, 4, seed=1).double(), vectors(25, 4, seed=2, mean=0.5).double()

    def radius(x, among, k):
        return sorted(float((x - y).norm()) for y in among if y is not x)[k - 1]

    def inside(k, x, centre, among):
        return float((x - centre).norm()) <= radius(centre, among, k)

    real_rows, sampled_rows = list(real), list(sampled)
    pairs = [[inside(5, x, y, real_rows) for y in real_rows] for x in sampled_rows]
    found = neighbourhoods(real, sampled)
    assert found.precision == np.mean([any(inside(3, x, y, real_rows) for y in real_rows) for x in sampled_rows])
    assert found.recall == np.mean([any(inside(3, y, x, sampled_rows) for x in sampled_rows) for y in real_rows])
    assert found.density == pytest.approx(np.sum(pairs) / (5 * len(sampled)))
    assert found.coverage == pytest.approx(np.mean(np.any(pairs, axis=0)))


def test_a_radius_reaches_to_the_kth_other():
    line = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    torch.testing.assert_close(
        radii(line, (1, 2)), torch.tensor([[1.0, 3.0], [1.0, 2.0], [2.0, 3.0], [3.0, 5.0]]).double()
    )


def test_order_does_not_matter():
    real, sampled, mixed = (
        vectors(80),
        vectors(70, seed=1),
        torch.randperm(70, generator=torch.Generator().manual_seed(5)),
    )
    assert neighbourhoods(real, sampled) == neighbourhoods(real, sampled[mixed])
    assert kernel_distance(real, sampled) == pytest.approx(kernel_distance(real, sampled[mixed]), rel=1e-9)


def test_neighbours_are_the_same_in_blocks(monkeypatch):
    import tiny_diffusion.evaluation.distances as distances

    real, sampled = vectors(50), vectors(40, seed=1)
    whole = neighbourhoods(real, sampled), nearest(sampled, real)[1].tolist(), kernel_distance(real, sampled)
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert (neighbourhoods(real, sampled), nearest(sampled, real)[1].tolist()) == whole[:2]
    assert kernel_distance(real, sampled) == pytest.approx(whole[2], rel=1e-10)


def test_the_nearest_is_found():
    among = vectors(100)
    distances, which = nearest(among[[3, 77]] + 1e-4, among)
    assert which.tolist() == [3, 77]
    torch.testing.assert_close(distances, torch.full((2,), 1e-4 * 8**0.5).double(), rtol=1e-2, atol=0)
