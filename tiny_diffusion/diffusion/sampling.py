"""From a model and a request to images: the one place that every command, and Python, draws through.

Image i of a seed starts from its own stream, so it is the same picture alone, in any batch and in any process.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.levels import Step
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.randomness import stream
from tiny_diffusion.runtime.memory import SplitBatches
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World


@dataclass(frozen=True)
class Request:
    """What to draw and how.

    indices: which images of the seed.   classes: the labels they take in turn; empty for an unconditional model.
    eta: how much noise is fresh, where that can be chosen.   clip: hold estimates of x_0 in [-1, 1].
    batch_size: images drawn together, by each process.
    """

    indices: Sequence[int]
    sampler: str = "abm"
    steps: int = 20
    grid: str = "angle"
    seed: int = 0
    classes: tuple[int, ...] = ()
    guidance: float = 1.0
    eta: float | None = None
    clip: bool = True
    batch_size: int = 64

    def batches(self, world: World = SINGLE_PROCESS) -> Iterator["Request"]:
        """The same request, as much at a time as all processes draw together."""
        together = self.batch_size * world.size
        for start in range(0, len(self.indices), together):
            yield replace(self, indices=self.indices[start : start + together])

    def share(self, world: World) -> "Request":
        """What of it this process draws.  Where there is nothing left, the first image: `World.gather` drops it."""
        share = self.indices[world.local_slice(len(self.indices))]
        return replace(self, indices=share if len(share) else self.indices[:1])

    def labels(self) -> list[int] | None:
        """The label of each image; None for an unconditional model.  Image i's does not depend on its neighbours."""
        return [self.classes[i % len(self.classes)] for i in self.indices] if self.classes else None

    def describe(self) -> str:
        """In words, how it steps from noise to image."""
        fresh = "" if self.eta is None else f", eta {self.eta:g}"
        return f"{self.sampler}{fresh}, {self.steps} steps on the {self.grid} grid"

    def evaluations(self) -> int:
        """Calls of the network for each batch."""
        return SAMPLERS[self.sampler].evaluations(self.steps) * (2 if self.guidance != 1 else 1)


def request_from(
    usual: Mapping[str, object],
    timesteps: int,
    indices: Sequence[int],
    *,
    sampler: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    **more,
) -> Request:
    """A checkpoint's own way of sampling, with what was asked for instead; another sampler brings its own grid.

    usual: the checkpoint's "sampling".  timesteps: T of its process.  more: what else a Request says.
    """
    sampler = sampler or usual["sampler"]
    other, row = sampler != usual["sampler"], SAMPLERS[sampler]
    if eta is None:
        eta = row.eta if other else usual.get("eta", row.eta)  # the first checkpoints do not tell
    return Request(
        indices=indices,
        sampler=sampler,
        steps=steps or (usual["steps"] if row.few or not other else timesteps),
        grid=grid or (row.grid if other else usual["grid"]),
        guidance=usual["guidance"] if guidance is None else guidance,
        eta=eta,
        clip=usual["clip"],
        **more,
    )


def denoising(model: nn.Module, diffusion: Diffusion, request: Request, shape: tuple[int, int, int]) -> Iterator[Step]:
    """The steps of one batch from pure noise, which is the first, to the images, which are the last.

    shape: (C, H, W).  Computes where the model's weights are, and in parts where memory runs out.
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
    """The images alone, all batches together: (N, C, H, W) float32 on the CPU, about in [-1, 1].

    The processes of the world share the work, and each has all images.
    """
    drawn = []
    for batch in request.batches(world):
        last = deque(denoising(model, diffusion, batch.share(world), shape), maxlen=1).pop()
        drawn.append(world.gather(last.x, len(batch.indices)))
    return torch.cat(drawn)
