"""A checkpoint as a source of images to score: every way of drawing that is asked for, and the protocol of each.

Knows neither what the images are compared with nor how they are shown.
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import product

import torch

from tiny_diffusion.config.rules import refuse_drawing
from tiny_diffusion.data.pixels import to_uint8
from tiny_diffusion.diffusion.sampling import Request, sample
from tiny_diffusion.errors import OptionError
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.models.build import make_diffusion, to_device
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
from tiny_diffusion.runtime.world import World

BATCH = 128


class ModelImages:
    """The model that is asked, and how it draws.  Raises OptionError for what it cannot do, FileError.

    The processes of the world share the drawing, and each has all images.
    """

    def __init__(self, options, world: World):
        self.options = options
        self.checkpoint = load_checkpoint(options.checkpoint)
        self.config = config = self.checkpoint.config
        if options.train_on_synthetic and not config.class_cond:
            raise OptionError(
                "--train_on_synthetic needs a model trained with --class_cond; this one was not. Leave it out."
            )
        refuse_drawing(
            config,
            samplers=options.sampler or [self.checkpoint.about["sampling"]["sampler"]],
            steps=options.steps or [],
            eta=options.eta,
            guidance=options.guidance,
        )
        self.world, self.device = world, world.device
        self.model = to_device(load_model(self.checkpoint, options.weights), self.device)
        self.diffusion = make_diffusion(config)
        self.shape = (self.checkpoint.about["channels"], *config.size)
        self.class_names = tuple(self.checkpoint.about["class_names"])

    def requests(self) -> Iterator[Request]:
        """Each way to draw that was asked for: what is not named is as `sample` would have it."""
        options = self.options
        for sampler, steps in product(options.sampler or (None,), options.steps or (None,)):
            yield self.checkpoint.request(
                range(options.num_images),
                sampler=sampler,
                steps=steps,
                grid=options.grid,
                guidance=options.guidance,
                eta=options.eta,
                seed=options.seed,
                batch_size=options.batch_size or BATCH,
            )

    def draw(self, request: Request, told: Callable[[int], object] = lambda count: None) -> NamedImages:
        """The images as they would be saved.  told: after each batch how many it had.  Raises DivergenceError."""
        parts = []
        for batch in request.batches(self.world):
            parts.append(to_uint8(sample(self.model, self.diffusion, batch, self.shape, self.world)))
            told(len(batch.indices))
        labels = request.labels()
        labels = None if labels is None else torch.tensor(labels)
        return NamedImages("drawn", torch.cat(parts), labels, self.class_names)

    def protocol(self, request: Request) -> dict:
        """All that the images follow from, as plain JSON."""
        drawn_by = {
            name: getattr(request, name) for name in ("sampler", "steps", "grid", "seed", "guidance", "eta", "clip")
        }
        return {
            "checkpoint": self.options.checkpoint,
            "checkpoint_sha256": self.checkpoint.about["sha256"],
            "step": self.checkpoint.about["step"],
            "weights": self.options.weights,
            **drawn_by,
            "evaluations": request.evaluations(),
        }

    def training_config(self):
        """The configuration whose images trained it, each of them whole: no random crops."""
        return dataclasses.replace(
            self.config, random_crop=False, data_dir=self.options.data_dir or self.config.data_dir
        )
