"""A checkpoint as a source of images to score: one Request for each sampler and number of steps, and its images.

Knows neither what the images are compared with nor how they are shown.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product

import torch

from tiny_diffusion.config.rules import refuse_sampling
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.pixels import to_uint8
from tiny_diffusion.diffusion.request import Request, labels_in_shares
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.models.build import make_diffusion, to_device
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
from tiny_diffusion.runs.guide import with_guide
from tiny_diffusion.runtime.world import World

BATCH = 128  # images sampled together by each rank


class ModelImages:
    """The model of a checkpoint, ready to sample.

    path: of the checkpoint.  weights: "ema" or "raw".  shape: (C, H, W) of the images.  The ranks of the world share
    the sampling, and each of them returns all images.  class_counts: the training images of each class, in whose shares
    a class-conditional model is sampled; empty if unknown.   guide: the checkpoint of a guide, for autoguidance.
    Raises FileError for an unreadable checkpoint, and OptionError for a guide that does not fit.
    """

    def __init__(self, path: str, world: World, weights: str = "ema", guide: str | None = None):
        self.path, self.world, self.weights, self.guide_path = path, world, weights, guide
        self.checkpoint = load_checkpoint(path)
        self.config = self.checkpoint.config
        model = load_model(self.checkpoint, weights)
        model = model if guide is None else with_guide(model, self.checkpoint, guide, weights)
        self.model = to_device(model, world.device)
        self.diffusion = make_diffusion(self.config)
        self.shape, self.class_names = self.checkpoint.shape, self.checkpoint.class_names
        self.class_counts = self.checkpoint.class_counts if self.config.class_cond else []

    @property
    def knows_no_class(self) -> bool:
        """Whether the model was trained without classes, too, as its likelihood and its errors by noise level need."""
        return not self.config.class_cond or self.config.label_dropout > 0

    def requests(
        self,
        num_images: int,
        samplers: Sequence[str] = (),
        steps: Sequence[int] = (),
        *,
        grid: str | None = None,
        guidance: Sequence[float] = (),
        guidance_interval: tuple[float, float] | None = None,
        eta: float | None = None,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> list[Request]:
        """One request for each sampler, number of steps and guidance; whatever is not given is the checkpoint's own.

        Raises OptionError for what this model cannot do.
        """
        usual = self.checkpoint.about["sampling"]
        refuse_sampling(
            self.config, usual, samplers=samplers or [usual["sampler"]], steps=steps, eta=eta, guidance=guidance,
            interval=guidance_interval, guide=self.guide_path,
        )  # fmt: skip
        requests = [
            self.checkpoint.request(
                range(num_images), sampler=sampler, steps=count, grid=grid, guidance=weight,
                guidance_interval=guidance_interval, eta=eta, seed=seed, batch_size=batch_size,
            )
            for sampler, count, weight in product(samplers or (None,), steps or (None,), guidance or (None,))
        ]  # fmt: skip
        return self._in_shares(requests)

    def count_classes(self, requests: Sequence[Request], images: NamedImages | None = None) -> list[Request]:
        """The requests with the classes in the shares of these images, if the checkpoint is too old to hold its own.

        All ranks call it, rank 0 with images.  If these have other classes, the model's are sampled equally often.
        """
        if self.config.class_cond and not self.class_counts:
            counts = [0] * len(self.class_names)
            if images is not None and images.class_names == self.class_names:
                counts = torch.bincount(images.labels, minlength=len(counts)).tolist()
            counts = [int(count) for count in self.world.maximum(*counts)]
            self.class_counts = counts if any(counts) else []
        return self._in_shares(requests)

    def _in_shares(self, requests: Sequence[Request]) -> list[Request]:
        if not self.class_counts:
            return list(requests)
        return [
            dataclasses.replace(each, classes=labels_in_shares(self.class_counts, len(each.indices), each.seed))
            for each in requests
        ]

    def sample(self, request: Request, on_batch: Callable[[int], object] = lambda count: None) -> NamedImages:
        """The images as they would be saved.

        on_batch: called with the size of each finished batch.  Raises DivergenceError if an image holds NaN.
        """
        parts = []
        for batch in request.batches(self.world):
            parts.append(to_uint8(sample(self.model, self.diffusion, batch, self.shape, self.world)))
            on_batch(len(batch.indices))
        labels = torch.tensor(request.labels()) if request.shows_classes else None
        return NamedImages("samples", torch.cat(parts), labels, self.class_names)

    def protocol(self, request: Request) -> dict[str, object]:
        """Everything that determines the images, as plain JSON."""
        names = ("sampler", "steps", "grid", "seed", "guidance", "eta", "clip")
        return {
            "checkpoint": self.path,
            "checkpoint_sha256": self.checkpoint.about["sha256"],
            "step": self.checkpoint.about["step"],
            "weights": self.weights,
            **{name: getattr(request, name) for name in names},
            **({} if request.guidance_interval is None else {"guidance_interval": list(request.guidance_interval)}),
            **({} if self.guide_path is None else {"guide_checkpoint": self.guide_path}),
            "evaluations": request.evaluations(self.diffusion.schedule),
        }

    def training_config(self, data_dir: str | None = None) -> Config:
        """The configuration that opens the training images without random crops.  data_dir: where they are now."""
        return dataclasses.replace(self.config, random_crop=False, data_dir=data_dir or self.config.data_dir)
