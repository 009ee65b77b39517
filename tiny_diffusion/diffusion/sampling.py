"""From a model and a request to images.  Every command samples through this file, and so does Python code.

Image i of a seed starts from its own random stream, so it is the same picture alone, in any batch and on any rank.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.levels import Step
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.randomness import stream
from tiny_diffusion.runtime.memory import SplitBatches
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World


def denoising(model: nn.Module, diffusion: Diffusion, request: Request, shape: tuple[int, int, int]) -> Iterator[Step]:
    """Yields the steps of one batch: first the pure noise, last the images.

    shape: (C, H, W).  Computes on the model's device, in smaller batches where memory runs out.
    """
    device = next(model.parameters()).device
    streams = [stream(request.seed, "image", index) for index in request.indices]

    def draw() -> Tensor:
        # On the CPU, so that a seed gives the same picture on every device.
        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])).to(device)

    sampler = SAMPLERS[request.sampler]
    options = {"draw": draw} if sampler.draws or request.eta else {}
    if request.eta is not None:
        options["eta"] = request.eta
    labels = request.labels()
    label = None if labels is None else torch.tensor(labels, device=device)
    denoise = diffusion.denoiser(SplitBatches(model), label, request.guidance, request.clip)
    levels = make_levels(diffusion.schedule, request.grid, request.steps)
    noise = draw() * levels[0].sigma
    yield Step(levels[0], noise, torch.zeros_like(noise))
    yield from sampler.run(denoise, noise, levels, **options)


def sample(
    model: nn.Module, diffusion: Diffusion, request: Request, shape: tuple[int, int, int], world: World = SINGLE_PROCESS
) -> Tensor:
    """The sampled images, all batches together: (N, C, H, W) float32 on the CPU, approximately in [-1, 1].

    The ranks of the world share the work, and each returns all images.
    """
    images = []
    for batch in request.batches(world):
        last = deque(denoising(model, diffusion, batch.local(world), shape), maxlen=1).pop()
        images.append(world.gather(last.x, len(batch.indices)))
    return torch.cat(images)
