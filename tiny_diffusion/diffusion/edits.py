"""Edits: what `sample` does with a batch instead of sampling from noise.  `sample(..., edit=SDEdit(images, 0.5))`.

An edit is a function of a Batch that yields Steps as `denoising` does.  Image i of a seed edits images[i % len(images)]
with its own noise and label, so it is the same picture in any batch.  The mathematics is in diffusion/editing.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tiny_diffusion.diffusion.editing import (
    between,
    corrections,
    invert,
    known_pixels,
    levels_from,
    likeliest_labels,
    noised,
    paste,
)
from tiny_diffusion.diffusion.levels import Denoise, Level, Step
from tiny_diffusion.diffusion.sampling import Batch, from_noise

EVALUATIONS_PER_STEP = 3  # of inpainting, corrections included


@dataclass(frozen=True, eq=False)
class SDEdit:
    """Images noised a part of the way and sampled back: Meng et al. (2022).

    images: (K, C, H, W) in [-1, 1].   strength: the start's share of the angle of pure noise: 0 returns the images, 1
    is plain sampling, bit for bit.  Every strength takes the request's number of steps.
    """

    images: Tensor
    strength: float

    def __call__(self, batch: Batch) -> Iterator[Step]:
        levels = levels_from(batch.schedule, batch.request.grid, batch.request.steps, self.strength)
        if self.strength == 1:
            yield from from_noise(batch)
            return
        clean = _rows(self.images, batch)
        x = noised(clean, batch.draw(), levels[0])
        yield Step(levels[0], x, clean)
        yield from batch.run(batch.denoiser(batch.labels), x, levels)


@dataclass(frozen=True, eq=False)
class Inpaint:
    """Images whose unknown pixels are sampled given the others, which come back exactly: see `known_pixels`.

    images: (K, C, H, W) in [-1, 1].   masks: (K or 1, 1, H, W), 1 where pixels are sampled, 0 where they are known.
    classes: labels of which each image gets the one that suits its known pixels best, if the request has no classes.
    A step costs EVALUATIONS_PER_STEP in all; finding the class takes its evaluations from the corrections.
    """

    images: Tensor
    masks: Tensor
    classes: Sequence[int] = ()

    def __call__(self, batch: Batch) -> Iterator[Step]:
        known, mask, labels = _rows(self.images, batch), _rows(self.masks, batch), batch.labels
        levels, noise = batch.levels(), batch.draw()
        spare = (EVALUATIONS_PER_STEP - 1) * (len(levels) - 1)
        if labels is None and self.classes:
            plain = partial(batch.denoiser, guidance=1.0)
            labels, used = likeliest_labels(plain, known, mask, self.classes, batch.schedule)
            spare = max(0, spare - used)
        x = noise * levels[0].sigma
        yield Step(levels[0], x, paste(known, mask, torch.zeros_like(x)))
        corrections_at = corrections(levels, spare)
        yield from batch.run(known_pixels(batch.denoiser(labels), known, mask, corrections_at), x, levels)


@dataclass(frozen=True, eq=False)
class Interpolate:
    """Between the two images of a request: the noise that each starts from, and each step's fresh noise, on the sphere.

    frames: how many images there are, both ends included, which are the plain samples.  Where the two have different
    labels, the denoiser's estimates for both are mixed in the shares of the frame, in one batched evaluation.
    """

    frames: int

    def __call__(self, batch: Batch) -> Iterator[Step]:
        assert len(batch.request.indices) == 2 and self.frames >= 2
        shares = torch.linspace(0, 1, self.frames, dtype=torch.float64)[1:-1].tolist()
        draws = _Replayed(batch.draw)
        ends = from_noise(replace(batch, draw=draws.record))
        levels, draw = batch.levels(), between(draws.play, shares)
        middle: Iterator[Step] | None = None
        for end in ends:
            if not shares:
                yield end
                continue
            if middle is None:
                x = draw() * levels[0].sigma
                inner = Step(levels[0], x, torch.zeros_like(x))
                middle = batch.run(self._denoiser(batch, shares), x, levels, draw)
            else:
                inner = next(middle)
            x, clean = (torch.cat([a[:1], b, a[1:]]) for a, b in ((end.x, inner.x), (end.clean, inner.clean)))
            yield Step(end.level, x, clean)

    def _denoiser(self, batch: Batch, shares: Sequence[float]) -> Denoise:
        """For the frames between: of the common label, or a mix of both labels' estimates."""
        count, labels = len(shares), batch.labels
        if labels is None or labels[0] == labels[1]:
            return batch.denoiser(None if labels is None else labels[:1] * count)
        both = batch.denoiser([labels[0]] * count + [labels[1]] * count)
        weight = torch.tensor(shares, device=batch.device).view(-1, 1, 1, 1)

        def mixed(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            estimates = both(torch.cat([x, x]), level)
            clean, noise = ((1 - weight) * e[:count] + weight * e[count:] for e in estimates)
            return clean, noise

        return mixed


@dataclass(frozen=True, eq=False)
class Invert:
    """Images turned into the noise that `ddim` makes them from: the last Step is at the noisiest level.  See `invert`.

    images: (K, C, H, W) in [-1, 1].   The request needs the sampler ddim with eta 0, and clip False.
    """

    images: Tensor

    def __call__(self, batch: Batch) -> Iterator[Step]:
        return invert(batch.denoiser(batch.labels), _rows(self.images, batch), batch.levels())


@dataclass(frozen=True, eq=False)
class FromNoise:
    """Sampling from given noise instead of the seed's, such as that of `Invert`.   noise: (K, C, H, W)."""

    noise: Tensor

    def __call__(self, batch: Batch) -> Iterator[Step]:
        first = iter([_rows(self.noise, batch)])
        return from_noise(replace(batch, draw=lambda: next(first, None)))


class _Replayed:
    """Draws that are made once and read twice: first by `record`, then by `play`."""

    def __init__(self, draw):
        self.draw, self.waiting = draw, []

    def record(self) -> Tensor:
        self.waiting.append(self.draw())
        return self.waiting[-1]

    def play(self) -> Tensor:
        return self.waiting.pop(0)


def _rows(images: Tensor, batch: Batch) -> Tensor:
    """The images that those of this batch edit, by their index of the seed."""
    return images[[index % len(images) for index in batch.request.indices]].to(batch.device)
