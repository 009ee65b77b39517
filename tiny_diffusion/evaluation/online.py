"""The evaluation that training runs every few epochs: one number, the same as `evaluate` prints."""

from torch import nn

from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_uint8
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.errors import DivergenceError, OptionError
from tiny_diffusion.evaluation.distances import Moments, relative_frechet_distance
from tiny_diffusion.evaluation.features import default_features, make_features
from tiny_diffusion.evaluation.images import random_indices
from tiny_diffusion.evaluation.protocol import label
from tiny_diffusion.evaluation.reference import split_name
from tiny_diffusion.runtime.world import World

REFERENCE_IMAGES = 10_000


class OnlineEvaluation:
    """The relative Frechet distance of samples to training images, in the default features of the data set.

    Knows no files.  world: the ranks that share the sampling.  splits: of the training images.  Raises OptionError if
    no features fit the images, or there is only one.
    """

    def __init__(self, dataset: str, data: ImageSet, world: World, splits: tuple[str, ...]):
        if len(data) < 2:
            raise OptionError("--eval_interval needs 2 images or more: one has no covariance. Leave it out.")
        self.world, self.shape = world, tuple(data.images.shape[1:])
        self.features = make_features(default_features(dataset, self.shape), dataset, self.shape, world.device)
        chosen = random_indices(len(data), REFERENCE_IMAGES).numpy()
        split = split_name(splits)
        self.split = split if len(chosen) == len(data) else f"{len(chosen)} of {split}"
        self.real = Moments.of(self.features.of(data.take(chosen)))

    def __call__(self, model: nn.Module, diffusion: Diffusion, request: Request) -> dict[str, float]:
        """The number by its full name; lower is better.  Empty if the model samples NaN."""
        try:
            pixels = to_uint8(sample(model, diffusion, request, self.shape, self.world))
        except DivergenceError:
            return {}
        distance = relative_frechet_distance(self.real, Moments.of(self.features.of(pixels)))
        return {label("relative_frechet_distance", self.features, len(pixels), self.split): distance}
