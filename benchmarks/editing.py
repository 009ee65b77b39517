"""How good inpainting and inversion are: the lower half of test digits repainted, and there and back.

python benchmarks/editing.py --checkpoint outputs/mnist/model_final.pt --data_dir data

The reference for the class that is read is a classifier of the upper half alone, trained here by --half_steps steps.
The distance is that of the repainted digits and of as many plain samples, in the features of `evaluate`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_float, to_uint8
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.diffusion.edits import FromNoise, Inpaint, Invert
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.request import labels_in_shares
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.evaluation.classifier import train_classifier
from tiny_diffusion.evaluation.distances import Moments, frechet_distance
from tiny_diffusion.evaluation.features import make_features
from tiny_diffusion.models.build import make_diffusion
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model


class Counted(torch.nn.Module):
    """A model that counts how many images it was evaluated on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x, *rest):
        self.images += len(x)
        return self.model(x, *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--half_steps", type=int, default=1200, help="0: without the classifier of the upper half")
    asked = parser.parse_args()
    checkpoint = load_checkpoint(asked.checkpoint)
    diffusion, model = make_diffusion(checkpoint.config), Counted(load_model(checkpoint))
    config: Config = checkpoint.config
    train, test = (open_dataset(config.dataset, data_dir=asked.data_dir, heldout=heldout) for heldout in (False, True))
    digits, labels = test.images[: asked.num_images], test.labels[: asked.num_images]

    inversion(checkpoint, model, diffusion, to_float(digits[:100]))

    mask = torch.ones(1, 1, *checkpoint.shape[1:])
    mask[..., : mask.shape[2] // 2, :] = 0
    if asked.half_steps:
        halves = ImageSet((train.images[:] * (1 - mask)).to(torch.uint8), train.labels, train.class_names)
        half = train_classifier(halves, asked.half_steps, seed=0)
        found = half(to_float((digits * (1 - mask)).to(torch.uint8))).softmax(1)
        right = (found.argmax(1) == labels).float().mean()
        likely = found[torch.arange(len(labels)), labels].mean()
        print(f"a classifier of the upper half alone: {right:.3f} right, {likely:.3f} on the true class", flush=True)

    features = make_features("classifier", config.dataset, checkpoint.shape, torch.device("cpu"))
    real = Moments.of(features.of(train.images[:]))

    def score(name: str, images: torch.Tensor, labels: torch.Tensor | None, started: float) -> None:
        distance = frechet_distance(Moments.of(features.of(images)), real) / float(real.covariance.trace())
        read = ""
        if labels is not None:
            read = (
                f", read as the true class: {(features.probabilities(images).argmax(1) == labels).float().mean():.3f}"
            )
        cost = model.images / len(images)
        print(
            f"{name}: relative FD {distance:.4f}{read}, {cost:.0f} evaluations, {time.time() - started:.0f} s",
            flush=True,
        )
        model.images = 0

    score("the test digits", digits, labels, time.time())
    counts = checkpoint.class_counts
    for name, classes in (("classes in their shares", labels_in_shares(counts, len(digits), 0)), ("no classes", ())):
        started, model.images = time.time(), 0
        request = checkpoint.request(range(len(digits)), classes=classes)
        score(f"plain samples, {name}", to_uint8(sample(model, diffusion, request, checkpoint.shape)), None, started)
    searched = range(len(checkpoint.class_names))
    for name, classes, given in (
        ("class found", (), searched),
        ("no class", (), ()),
        ("class given", labels.tolist(), ()),
    ):
        started = time.time()
        request = checkpoint.request(range(len(digits)), classes=tuple(classes), guidance=1.0)
        images = to_uint8(
            sample(model, diffusion, request, checkpoint.shape, edit=Inpaint(to_float(digits), mask, given))
        )
        assert torch.equal(images * (1 - mask), digits * (1 - mask)), "known pixels changed"
        score(f"lower half repainted, {name}", images, labels, started)


def inversion(checkpoint, model, diffusion, images: torch.Tensor) -> None:
    """Prints the error of there and back at 50 steps."""
    request = checkpoint.request(
        range(len(images)), classes=(), sampler="ddim", grid="angle", steps=50, eta=0.0, guidance=1.0
    )
    request = type(request)(**{**vars(request), "clip": False})
    noise = sample(model, diffusion, request, checkpoint.shape, edit=Invert(images))
    noise = noise / make_levels(diffusion.schedule, "angle", 50)[0].sigma
    back = sample(model, diffusion, request, checkpoint.shape, edit=FromNoise(noise))
    errors = (back - images).abs().flatten(1).mean(1)
    cost = model.images / len(images)
    print(
        f"inversion of {len(images)}: mean absolute error {np.mean(errors.tolist()):.5f}, at most {errors.max():.5f}, "
        f"{cost:.0f} evaluations there and back",
        flush=True,
    )
    model.images = 0


if __name__ == "__main__":
    main()
