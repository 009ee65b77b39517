"""Random streams: functions of (seed, purpose, index) and of nothing else."""

import itertools

import numpy as np
import pytest
import torch

from tiny_diffusion.randomness import PURPOSES, seed_torch, stream, torch_stream

every_purpose = pytest.mark.parametrize("purpose", PURPOSES)
LARGEST = 2**63 - 1


def from_stream(seed, purpose, index=0):
    return stream(seed, purpose, index).standard_normal(8).tolist()


def from_torch_stream(seed, purpose, index=0):
    return torch.randn(8, generator=torch_stream(seed, purpose, index, "cpu")).tolist()


def from_torch_itself(seed, purpose, index=0):
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed, purpose, index)
        return torch.randn(8).tolist()


every_kind = pytest.mark.parametrize("draw", [from_stream, from_torch_stream, from_torch_itself])


@every_kind
def test_equal_keys_give_equal_numbers(draw):
    for key in itertools.product((0, 1, 2**32, LARGEST), PURPOSES, (5,)):
        assert draw(*key) == draw(*key), key


@every_kind
def test_another_seed_purpose_or_index_gives_other_numbers(draw):
    """Also for seeds and indices of more than 32 bits, which are two words to the generator that mixes them."""
    numbers = [0, 1, 2, 3, 7, 63, 2**32, 2**33, 2**32 + 7, 3 * 2**32 + 7, 2**62, LARGEST]
    keys = list(itertools.product(numbers, PURPOSES, (0, 1, 2, 3, 7, 9, 2**32, 2**32 + 1)))
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


@every_kind
def test_what_was_drawn_before_does_not_matter(draw):
    alone = draw(3, "image", 7)
    for index in (6, 7, 8):
        draw(3, "image", index)
    torch.randn(5)
    assert draw(3, "image", 7) == alone


@every_purpose
def test_two_streams_that_are_open_at_once_do_not_disturb_each_other(purpose):
    expected = from_stream(0, purpose, 0), from_stream(0, purpose, 1)
    first, second = stream(0, purpose, 0), stream(0, purpose, 1)
    turns = [(first.standard_normal(), second.standard_normal()) for _ in range(8)]
    assert tuple(map(list, zip(*turns, strict=True))) == expected


def test_streams_leave_the_generators_of_torch_and_numpy_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    from_stream(0, "noise")
    from_torch_stream(0, "noise")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_seeding_torch_seeds_what_layers_draw_from():
    with torch.random.fork_rng(devices=[]):
        weights = []
        for _ in range(2):
            seed_torch(0, "weights")
            weights.append(torch.nn.Linear(3, 3).weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("axis", ["seed", "purpose", "index"])
def test_neighbouring_streams_are_independent(axis):
    """20 streams of 4000 numbers: 190 correlations of standard error 0.016, and the moments of a normal law."""
    keys = {
        "seed": [(seed, "noise", 0) for seed in range(20)],
        "purpose": [(seed, purpose, 0) for purpose in PURPOSES for seed in (0, 1)][:20],
        "index": [(0, "noise", index) for index in range(20)],
    }[axis]
    numbers = np.stack([stream(*key).standard_normal(4000) for key in keys])
    correlations = np.corrcoef(numbers)[np.triu_indices(len(keys), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)
    assert abs(numbers.mean()) < 5 / np.sqrt(numbers.size)
    assert abs(numbers.std() - 1) < 5 / np.sqrt(2 * numbers.size)


def test_purposes_have_numbers_of_their_own():
    """Two purposes with one number would draw the same."""
    assert len(set(PURPOSES.values())) == len(PURPOSES)


def test_an_unknown_purpose_is_an_error():
    with pytest.raises(KeyError):
        stream(0, "luck")
