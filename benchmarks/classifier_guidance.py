"""Classifier guidance beside classifier-free guidance: the same steps, seed and classes, scored alike.

python train.py --dataset mnist --minutes 10 --output_dir outputs/mnist
python benchmarks/classifier_guidance.py --checkpoint outputs/mnist --data_dir data

Classifier guidance (Dhariwal & Nichol 2021, algorithm 2) adds scale * grad log p(class | x) to the score, here to that
of the checkpoint with its null class, and to that with the asked class.  Its noisy classifier is trained here, at the
checkpoint's noise levels.  Two classifiers read the class of each image: the package's, in whose features the distance
is computed, and a judge of another kind, which is trained here.  Seconds are CPU time for each image.  What is trained
is kept in --output_dir.  Prints a Markdown table, each row as soon as it is known.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_float, to_uint8
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.levels import Denoise, Level, Step
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.request import labels_in_shares
from tiny_diffusion.diffusion.sampling import Batch, Edit, from_noise, sample
from tiny_diffusion.diffusion.timesteps import stratified
from tiny_diffusion.evaluation.classifier import fit
from tiny_diffusion.evaluation.features import Features, make_features
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.evaluation.protocol import scores
from tiny_diffusion.evaluation.reference import Reference, make_reference, open_training_set
from tiny_diffusion.models.build import make_diffusion, make_model
from tiny_diffusion.randomness import seed_torch, stream, torch_stream
from tiny_diffusion.runs.checkpoint import Checkpoint, load_checkpoint, load_model
from tiny_diffusion.runs.folder import newest_in

WEIGHTS = (1.0, 1.25, 1.5, 2.0)  # of classifier-free guidance
SCALES, LOW_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), (0.25, 0.5, 1.0)  # from the null class, from the asked one
BATCH, PEAK_LR = 128, 2e-3


class NoisyClassifier(nn.Module):
    """log p(class | x) at a noise level: the way down of the package's U-Net, the mean over its pixels, a linear layer.

    It is given alpha * x, the best linear estimate of the image.  So its gradient vanishes at pure noise as the exact
    one does, where the shift of x_0 is divided by alpha.
    """

    def __init__(self, config: Config, channels: int, num_classes: int):
        super().__init__()
        self.unet = make_model(replace(config, class_cond=False), channels, 0)
        self.head = nn.Linear(config.base_channels * config.channel_mult[-1], num_classes)

    def forward(self, x: Tensor, time: Tensor, alpha: Tensor) -> Tensor:
        """x: (B, C, H, W).   time: (B,).   alpha: (B, 1, 1, 1).   Returns (B, classes)."""
        embedding = self.unet.embed(time, None, x.dtype)
        h = self.unet.way_down(alpha * x, embedding, self.unet.runner())[-1]
        return self.head(F.silu(h).mean((2, 3))).log_softmax(1)

    def at(self, x: Tensor, level: Level) -> Tensor:
        """The same for images of one level."""
        return self(x, torch.full((len(x),), level.time), torch.full((len(x), 1, 1, 1), level.alpha))


def classifier_guided(
    denoise: Denoise, log_posterior: Callable[[Tensor, Level], Tensor], labels: Tensor, scale: float, clip: bool = True
) -> Denoise:
    """The denoiser of the score plus scale * grad log p(label | x), the score being -noise / sigma.

    log_posterior: (x, level) -> (B, classes).   clip: keep x_0 in [-1, 1], after guiding.
    """

    def guided(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        clean, _ = denoise(x, level)
        if scale:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                chosen = log_posterior(leaf, level)[torch.arange(len(x)), labels]
                (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
            clean = clean + scale * level.sigma**2 / level.alpha * gradient  # the noise less scale * sigma * gradient
        clean = clean.clamp(-1, 1) if clip else clean
        return clean, (x - level.alpha * clean) / level.sigma

    return guided


def by_classifier(classifier: NoisyClassifier, labels: Sequence[int], scale: float) -> Edit:
    """Plain sampling, by the request's classes or without, guided by the classifier.  labels: of the seed's images."""

    def edit(batch: Batch) -> Iterator[Step]:
        asked = torch.tensor([labels[index] for index in batch.request.indices])
        plain = batch.denoiser(batch.labels)
        guided = replace(batch, denoiser=lambda _: classifier_guided(plain, classifier.at, asked, scale))
        yield from from_noise(guided)

    return edit


def check_law(level: Level) -> None:
    """By the exact p(class | x), scale 1 turns the exact p(x) into the exact p(x | class): a mixture of Gaussians."""
    random = torch.Generator().manual_seed(0)
    means, deviation = torch.randn(3, 1, 2, 2, generator=random, dtype=torch.float64), 0.4
    x, labels = torch.randn(6, 1, 2, 2, generator=random, dtype=torch.float64), torch.arange(6) % 3
    variance = (level.alpha * deviation) ** 2 + level.sigma**2

    def posterior(x: Tensor, level: Level) -> Tensor:
        return (-(x[:, None] - level.alpha * means).square().sum((2, 3, 4)) / (2 * variance)).log_softmax(1)

    def both(x: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        return clean, (x - level.alpha * clean) / level.sigma

    def of_class(x: Tensor, mean: Tensor) -> Tensor:
        return mean + level.alpha * deviation**2 / variance * (x - level.alpha * mean)

    def denoise(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        shares = posterior(x, level).exp()[:, :, None, None, None]
        return both(x, (shares * of_class(x[:, None], means)).sum(1))

    guided = classifier_guided(denoise, posterior, labels, 1.0, clip=False)(x, level)
    torch.testing.assert_close(guided, both(x, of_class(x, means[labels])))


def noisy_loss(diffusion: Diffusion) -> Callable[..., Tensor]:
    """That of a NoisyClassifier, at the noise levels that the diffusion model is trained at: see `kept`."""

    def loss(network: nn.Module, step: int, images: Tensor, labels: Tensor) -> Tensor:
        t = diffusion.timesteps(stratified(stream(1, "timesteps", step), len(images)))
        noise = torch.randn(images.shape, generator=torch_stream(1, "noise", step, "cpu"))
        time, alpha, _ = (torch.as_tensor(each, dtype=torch.float32) for each in diffusion.schedule.at(t))
        return F.nll_loss(network(diffusion.add_noise(images, noise, t), time, alpha.view(-1, 1, 1, 1)), labels)

    return loss


def make_judge(num_classes: int) -> nn.Sequential:
    """A classifier of 28x28 images of another kind than the package's: wide filters, max pooling, no batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, num_classes),
    )  # fmt: skip


def kept(path: Path, network: nn.Module, data: ImageSet, loss: Callable[..., Tensor], steps: int, seed: int):
    """The trained network of this file; if there is none, it is trained and written.

    loss: of (network, step, images, labels).
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)

        def report(step: int, found: float) -> None:
            if (step + 1) % 100 == 0:
                print(f"step {step + 1:,} of {steps:,}: loss {found:.3f}", file=sys.stderr, flush=True)

        fit(network, Batches(data, BATCH, seed), steps, PEAK_LR, partial(loss, network), report)
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


def accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of float images (N, C, H, W) whose class is read right."""
    return float((torch.cat([network(part).argmax(1) for part in images.split(500)]) == labels).double().mean())


def by_noise(classifier: NoisyClassifier, diffusion: Diffusion, heldout: NamedImages) -> str:
    """How often the noisy classifier is right on held-out images, at some levels."""
    images, found = to_float(heldout.images), []
    noise = torch.randn(images.shape, generator=torch_stream(1, "heldout", 0, "cpu"))
    for level in make_levels(diffusion.schedule, "angle", 10)[1:-1:2]:
        x, at_level = level.alpha * images + level.sigma * noise, partial(classifier.at, level=level)
        found.append(f"{math.degrees(level.angle):.0f} degrees {accuracy(at_level, x, heldout.labels):.3f}")
    return ", ".join(found)


class Table:
    """Scores sets of images and prints them as rows, each as soon as it is known."""

    def __init__(self, reference: Reference, features: Features, judge: nn.Module, labels: Sequence[int]):
        self.reference, self.features, self.judge = reference, features, judge
        self.labels, self.class_names = torch.tensor(labels), reference.real.images.class_names
        print("| guidance | relative Fréchet distance | recall | class read | by the judge | seconds |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)

    def add(self, name: str, images: Tensor, labels: Tensor, seconds: str = "") -> None:
        """images: (N, C, H, W) uint8.   seconds: for each image."""
        found = scores(self.reference, NamedImages(name, images, labels, self.class_names), self.features)
        judged = accuracy(self.judge, to_float(images), labels)
        numbers = f"{found['relative_frechet_distance']:.4f} | {found['recall']:.3f} | {found['label_accuracy']:.3f}"
        print(f"| {name} | {numbers} | {judged:.3f} | {seconds} |", flush=True)

    def sample(self, name: str, checkpoint: Checkpoint, edit: Edit = from_noise, **asked) -> None:
        """Samples by the checkpoint's own sampler and steps.   asked: what the request has of its own."""
        request = checkpoint.request(range(len(self.labels)), batch_size=BATCH, **asked)
        request = replace(request, clip=edit is from_noise)  # `classifier_guided` clips after guiding
        model, diffusion = load_model(checkpoint), make_diffusion(checkpoint.config)
        started = time.process_time()
        images = to_uint8(sample(model, diffusion, request, checkpoint.shape, edit=edit))
        seconds = (time.process_time() - started) / len(images)
        self.add(name, images, self.labels, f"{seconds:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a class-conditional model of 28x28 grey images")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--classifier_steps", type=int, default=1200, help="of 128 images, of the noisy classifier")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/classifier_guidance"))
    asked = parser.parse_args()
    checkpoint = load_checkpoint(newest_in(asked.checkpoint))
    config, diffusion = replace(checkpoint.config, data_dir=asked.data_dir), make_diffusion(checkpoint.config)
    for level in make_levels(diffusion.schedule, "angle", 10)[:-1]:
        check_law(level)
    real = open_training_set(config, Cache(None), lambda items, count, doing: items)
    data = ImageSet(real.images.images, real.images.labels, real.images.class_names)
    count, folder = len(data.class_names), asked.output_dir
    seed_torch(1, "weights")
    classifier, judge = NoisyClassifier(config, data.channels, count), make_judge(count)
    classifier = kept(folder / "noisy.pt", classifier, data, noisy_loss(diffusion), asked.classifier_steps, 1)
    judge = kept(folder / "judge.pt", judge, data, lambda net, step, x, y: F.cross_entropy(net(x), y), 900, 2)
    print(f"the noisy classifier is right at {by_noise(classifier, diffusion, real.heldout)}", flush=True)
    print(f"the judge at {accuracy(judge, to_float(real.heldout.images), real.heldout.labels):.3f}", flush=True)

    features = make_features("classifier", config.dataset, checkpoint.shape, torch.device("cpu"))
    labels = labels_in_shares(data.class_counts, asked.num_images, seed=0)
    table = Table(make_reference(real, features), features, judge, labels)
    some = real.heldout.subset(asked.num_images, data.class_counts)
    table.add("real images, held out", some.images, some.labels)
    for weight in WEIGHTS:
        whole = {"guidance": weight, "guidance_interval": (0.0, 1.0)}
        table.sample(f"classifier-free, {weight:g}", checkpoint, classes=labels, **whole)
    table.sample("classifier-free, the model's default", checkpoint, classes=labels)
    for base, classes, scales in (("null class", (), SCALES), ("with its class", labels, LOW_SCALES)):
        for scale in scales:
            edit = by_classifier(classifier, labels, scale)
            table.sample(f"{base}, classifier, {scale:g}", checkpoint, edit, classes=classes, guidance=1.0)


if __name__ == "__main__":
    main()
