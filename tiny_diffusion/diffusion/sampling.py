"""From a model and a request to images.  Every command samples through this file, and so does Python code.

Image i of a seed starts from its own random stream, so it is the same picture alone, in any batch and on any rank.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.levels import Denoise, Draw, Level, Step
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import Schedule
from tiny_diffusion.randomness import stream
from tiny_diffusion.runtime.memory import SplitBatches
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World


@dataclass(frozen=True, eq=False)
class Batch:
    """What one batch of a request is sampled with, for an edit to put together in its own way.

    denoiser: from labels, or None, to a denoiser; its `guidance` is the request's unless given.   draw: the next noise
    of each image, (B, C, H, W).
    """

    request: Request
    schedule: Schedule
    device: torch.device
    denoiser: Callable[..., Denoise]
    draw: Draw

    @property
    def labels(self) -> list[int] | None:
        return self.request.labels()

    def levels(self) -> list[Level]:
        return make_levels(self.schedule, self.request.grid, self.request.steps)

    def run(self, denoise: Denoise, x: Tensor, levels: Sequence[Level], draw: Draw | None = None) -> Iterator[Step]:
        sampler, eta = SAMPLERS[self.request.sampler], self.request.eta
        options = {"draw": draw or self.draw} if sampler.draws or eta else {}
        if eta is not None:
            options["eta"] = eta
        return sampler.run(denoise, x, levels, **options)


Edit = Callable[[Batch], Iterator[Step]]  # how a batch is sampled instead: see diffusion/edits.py


def from_noise(batch: Batch) -> Iterator[Step]:
    """Plain sampling: from pure noise over all levels."""
    levels = batch.levels()
    noise = batch.draw() * levels[0].sigma
    yield Step(levels[0], noise, torch.zeros_like(noise))
    yield from batch.run(batch.denoiser(batch.labels), noise, levels)


def denoising(
    model: nn.Module, diffusion: Diffusion, request: Request, shape: tuple[int, int, int], edit: Edit = from_noise
) -> Iterator[Step]:
    """Yields the steps of one batch: first the pure noise, or where the edit starts, last the images.

    shape: (C, H, W).  Computes on the model's device, in smaller batches where memory runs out.
    """
    device = next(model.parameters()).device
    streams = [stream(request.seed, "image", index) for index in request.indices]

    def draw() -> Tensor:
        # On the CPU, so that a seed gives the same picture on every device.
        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])).to(device)

    def denoiser(labels: Sequence[int] | None, guidance: float = request.guidance) -> Denoise:
        label = None if labels is None else torch.as_tensor(labels, device=device)
        interval = request.guidance_interval
        return diffusion.denoiser(split, label, guidance, request.clip, interval=interval, guide=guide)

    split, guide = SplitBatches(model), getattr(model, "guide", None)  # of an Autoguided model
    guide = guide and SplitBatches(guide)
    return edit(Batch(request, diffusion.schedule, device, denoiser, draw))


def sample(
    model: nn.Module,
    diffusion: Diffusion,
    request: Request,
    shape: tuple[int, int, int],
    world: World = SINGLE_PROCESS,
    edit: Edit = from_noise,
) -> Tensor:
    """The sampled images, all batches together: (N, C, H, W) float32 on the CPU, approximately in [-1, 1].

    The ranks of the world share the work, and each returns all images.   edit: what to do instead of plain sampling,
    such as SDEdit(images, strength=0.5).
    """
    images = []
    for batch in request.batches(world):
        last = deque(denoising(model, diffusion, batch.local(world), shape, edit), maxlen=1).pop()
        images.append(world.gather(last.x, len(batch.indices)))
    return torch.cat(images)
