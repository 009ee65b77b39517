"""Random streams, each a function of (seed, purpose, index) and of nothing else.

A function that draws takes a stream.  No state is kept between steps, so a checkpoint needs none, and image i of a seed
is the same picture alone, in a batch, on another device or on another rank.  To add one: a row in PURPOSES.
"""

import numpy as np
import torch


def stream(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A numpy generator (Philox) on the CPU."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, index)))


def torch_stream(seed: int, purpose: str, index: int, device: torch.device | str) -> torch.Generator:
    """A torch generator on the device; its numbers differ between kinds of device."""
    generator = torch.Generator(device)
    generator.manual_seed(int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0] >> 1))
    return generator


def seed_torch(seed: int, purpose: str, index: int = 0) -> None:
    """Seeds torch's global generators, from which initial weights and dropout are drawn."""
    torch.manual_seed(int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0] >> 1))


def _sequence(seed: int, purpose: str, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(PURPOSES[purpose], index))


PURPOSES = {
    "weights": 0,
    "order": 1,
    "timesteps": 2,
    "noise": 3,
    "labels": 4,
    "flips": 5,
    "dropout": 6,
    "image": 7,
    "heldout": 8,
    "figure": 9,
    "crops": 10,
    "likelihood": 11,
    "subset": 12,
    "classes": 13,
}
