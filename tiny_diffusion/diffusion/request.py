"""What to sample, and how: the images of a seed, the sampler, its steps, the classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.guidance import evaluations_at
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import Schedule
from tiny_diffusion.randomness import stream
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World


@dataclass(frozen=True)
class Request:
    """Which images to sample, and how.

    indices: which images of the seed.   classes: labels that the images take in turn; empty for unconditional models.
    guidance: its weight; 1 is plain.   guidance_interval: (low, high), the times at which it holds, from 0 (clean) to 1
    (pure noise), as diffusion/guidance.py defines them; None is everywhere.
    eta: the amount of fresh noise, for samplers that let it be chosen.   clip: keep estimates of x_0 in [-1, 1].
    batch_size: images sampled together, on each rank.
    """

    indices: Sequence[int]
    sampler: str
    steps: int
    grid: str
    seed: int = 0
    classes: tuple[int, ...] = ()
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    eta: float | None = None
    clip: bool = True
    batch_size: int = 64

    def batches(self, world: World = SINGLE_PROCESS) -> Iterator["Request"]:
        """The request in batches, each of the images that all ranks sample together."""
        together = self.batch_size * world.size
        for start in range(0, len(self.indices), together):
            yield replace(self, indices=self.indices[start : start + together])

    def local(self, world: World = SINGLE_PROCESS) -> "Request":
        """This rank's part of a batch.  A rank without a part takes the first image, which `World.gather` drops."""
        share = self.indices[world.local_slice(len(self.indices))]
        return replace(self, indices=share if len(share) else self.indices[:1])

    def labels(self) -> list[int] | None:
        """The label of each image, which depends on its index alone; None for an unconditional model."""
        return [self.classes[i % len(self.classes)] for i in self.indices] if self.classes else None

    @property
    def shows_classes(self) -> bool:
        """Whether the images depend on their labels: guidance 0 leaves only the model without classes."""
        return bool(self.classes) and self.guidance != 0

    def describe(self) -> str:
        """The sampler, its steps and its grid in words."""
        fresh = "" if self.eta is None else f", eta {self.eta:g}"
        return f"{self.sampler}{fresh}, {self.steps} steps on the {self.grid} grid{self.describe_guidance()}"

    def describe_guidance(self) -> str:
        """The weight of guidance and its interval in words; empty where it is plain."""
        between = "" if self.guidance_interval is None else " from {:g} to {:g}".format(*self.guidance_interval)
        return "" if self.guidance == 1 else f", guidance {self.guidance:g}{between}"

    def evaluations(self, schedule: Schedule | None = None) -> int:
        """How often a network is evaluated for each image: twice at each level that is guided.

        schedule: says which levels lie in the guidance interval; needed if there is one.
        """
        sampler = SAMPLERS[self.sampler]
        if self.guidance_interval is None:
            return sampler.evaluations(self.steps) * (1 if self.guidance in (0, 1) else 2)
        first, *others = make_levels(schedule, self.grid, self.steps)[:-1]
        levels = [first, *others * sampler.evaluations_per_step]
        return sum(evaluations_at(level, self.guidance, self.guidance_interval) for level in levels)


def order_in_shares(class_counts: Sequence[int]) -> tuple[int, ...]:
    """Labels to take in turn, so that the images have the shares of these counts, which are not all 0.

    Every first n images hold each class within one or two of n times its share.  The k-th image of a class, k = 0, 1,
    ..., stands at (k + 1/2) / share; where classes tie, the smaller label comes first, so equal counts take turns.
    """
    counts = np.asarray(class_counts, dtype=np.int64)
    counts = counts // np.gcd.reduce(counts)
    labels = np.repeat(np.arange(len(counts)), counts)
    k = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Fractions of whole numbers below 2^26 are equal as float64 only if they are equal.
    return tuple(labels[np.lexsort((labels, (2 * k + 1) / counts[labels]))].tolist())


def labels_in_shares(class_counts: Sequence[int], num_images: int, seed: int) -> tuple[int, ...]:
    """A random label for each image, with the classes in the shares of these counts, which are not all 0.

    Systematic sampling: a class gets its share of the images, rounded down or up, and on average over seeds exactly
    its share, even where there are more classes than images.  The order is random.
    """
    random = stream(seed, "classes")
    order = random.permutation(len(class_counts))
    ends = np.cumsum(np.asarray(class_counts, dtype=np.int64)[order])
    total = int(ends[-1])
    positions = (np.arange(num_images) * total + random.integers(total)) // max(num_images, 1)
    labels = order[np.searchsorted(ends, positions, side="right")]
    return tuple(random.permutation(labels).tolist())


def default_sampling(
    sampler: str, timesteps: int, guidance: float = 1.0, guidance_interval: tuple[float, float] | None = None
) -> dict[str, object]:
    """How a model samples unless a request says otherwise, as checkpoints store it under "sampling".

    sampler: the one that suits the model's images.   timesteps: T of its schedule.   guidance, guidance_interval: those
    of Request; an interval is stored only if there is one.
    """
    row = SAMPLERS[sampler]
    steps = row.usual_steps(timesteps)
    usual = {"sampler": sampler, "steps": steps, "grid": row.grid, "guidance": guidance, "eta": row.eta, "clip": True}
    return usual if guidance_interval is None else {**usual, "guidance_interval": list(guidance_interval)}


def request_from(
    defaults: Mapping[str, object],
    timesteps: int,
    indices: Sequence[int],
    *,
    sampler: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    eta: float | None = None,
    **more,
) -> Request:
    """A model's default sampling, with the given options in place of its own.

    Another sampler brings its own steps, grid and eta.
    defaults: as `default_sampling` makes them.   timesteps: T of the model's schedule.   more: other fields of Request.
    """
    sampler = sampler or defaults["sampler"]
    other, row = sampler != defaults["sampler"], SAMPLERS[sampler]
    if eta is None:
        eta = row.eta if other else defaults.get("eta", row.eta)  # the first checkpoints do not hold it
    guidance = defaults["guidance"] if guidance is None else guidance
    interval = guidance_interval or defaults.get("guidance_interval")
    whole = interval is None or guidance == 1 or tuple(interval) == (0, 1)
    return Request(
        indices=indices,
        sampler=sampler,
        steps=steps or (row.usual_steps(timesteps) if other else defaults["steps"]),
        grid=grid or (row.grid if other else defaults["grid"]),
        guidance=guidance,
        guidance_interval=None if whole else tuple(interval),
        eta=eta,
        clip=defaults["clip"],
        **more,
    )
