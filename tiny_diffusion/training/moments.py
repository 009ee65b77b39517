"""Moment matching: the features of a student's samples shall have the mean and the covariance of real images' features.

The features are activations of the teacher, so nothing else has to be trained or loaded.  The loss is the Frechet
distance between the two Gaussians (Dowson & Landau, 1982), whose gradient needs moments of thousands of samples: they
are averages over the latest steps, and only the newest samples carry gradients.  So what is matched is a distribution,
not a path; the consistency loss (training/distill.py), taken in every other step, keeps the samples on the teacher's.
"""

import math
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_diffusion.data.batches import Batches
from tiny_diffusion.diffusion.editing import level_at
from tiny_diffusion.diffusion.levels import Level
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.samplers import ddim
from tiny_diffusion.models.unet import UNet, run_residual

ANGLE = math.radians(9)  # of the noise level that the teacher is told of when it sees an image without noise
REAL_IMAGES = 10_000  # whose moments are the target
COMPONENTS = 200  # principal components of the features
WHITENING = 0.25  # a component is divided by variance^0.25: half way from the features' metric to Mahalanobis'
CLASS_WEIGHT = 4.0  # of the distance of the means of each class
MEMORY = 0.98  # share of the averages that a step keeps
WARM_UP, REFRESH = 30, 10  # batches before the first gradient; batches for which its coefficients are kept
SMALLEST_VARIANCE = 1e-6  # of a feature, and of a covariance relative to its largest


class Moments(nn.Module):
    """The target, and averages over the samples of each of the student's evaluations: buffers, so that a run resumes.

    classes: of the labels, whose last, one more, is the null class; 0 without labels.   evaluations: of a student.
    """

    def __init__(self, width: int, classes: int, evaluations: int):
        super().__init__()
        k, labels = min(width, COMPONENTS), classes + 1
        sizes = {
            "steps": (), "centre": (width,), "basis": (width, k), "real_mean": (k,), "real_covariance": (k, k),
            "real_class_means": (labels, k), "batches": (evaluations,), "mean": (evaluations, k),
            "second": (evaluations, k, k), "class_sums": (evaluations, labels, k),
            "class_counts": (evaluations, labels), "slope": (evaluations, k), "curvature": (evaluations, k, k),
            "distance": (evaluations,),
        }  # fmt: skip
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))

    def project(self, features: Tensor) -> Tensor:
        """(B, width) features -> (B, k) components."""
        return (features - self.centre) @ self.basis

    def set_target(self, features: Tensor, label: Tensor) -> None:
        """From the (N, width) features of real images and their labels."""
        features, label = features.double().cpu(), label.cpu()
        centre, scale = features.mean(0), features.var(0, correction=0).clamp(min=SMALLEST_VARIANCE).sqrt()
        values, vectors = torch.linalg.eigh(torch.cov(((features - centre) / scale).T, correction=0))
        k = self.basis.shape[1]
        values, vectors = values[-k:].clamp(min=SMALLEST_VARIANCE), vectors[:, -k:]
        self.centre.copy_(centre)
        self.basis.copy_(vectors / values**WHITENING / scale[:, None])
        z = (features - centre) @ self.basis.cpu().double()
        self.real_mean.copy_(z.mean(0))
        self.real_covariance.copy_(torch.cov(z.T, correction=0))
        self.real_class_means.copy_(self.real_mean.expand_as(self.real_class_means))
        for each in label.unique().tolist() if len(self.real_class_means) > 1 else ():
            self.real_class_means[each] = z[label == each].mean(0).to(self.real_mean)

    def add(self, evaluation: int, sums: dict[str, Tensor]) -> None:
        """Averages one more batch of samples in.   sums: as `sums_of` makes them."""
        n = int(self.batches[evaluation])
        kept = min(MEMORY, n / (n + 8))
        size = sums["count"]
        self.mean[evaluation].lerp_(sums["z"] / size, 1 - kept)
        self.second[evaluation].lerp_(sums["zz"] / size, 1 - kept)
        for name in ("class_sums", "class_counts"):
            getattr(self, name)[evaluation].mul_(kept).add_(sums[name])
        self.batches[evaluation] += 1
        if n < WARM_UP or n % REFRESH == 0:
            self._refresh(evaluation)

    def _refresh(self, evaluation: int) -> None:
        mean, second, target, covariance = (
            tensor.double().cpu()
            for tensor in (self.mean[evaluation], self.second[evaluation], self.real_mean, self.real_covariance)
        )
        slope, curvature, distance = frechet_gradient(mean, second - torch.outer(mean, mean), target, covariance)
        self.slope[evaluation] = slope.to(self.slope)
        self.curvature[evaluation] = curvature.to(self.curvature)
        self.distance[evaluation] = distance / covariance.trace().clamp(min=SMALLEST_VARIANCE)

    def is_warm(self, evaluation: int) -> bool:
        """Whether there are enough samples for a gradient."""
        return int(self.batches[evaluation]) >= WARM_UP

    def witness(self, z: Tensor, label: Tensor | None, evaluation: int) -> Tensor:
        """A scalar whose gradient is that of the distance, and whose value is the distance over the real variance."""
        centred = z - self.mean[evaluation]
        slope = self.slope[evaluation].expand_as(z)
        if label is not None:
            means = self.class_sums[evaluation] / self.class_counts[evaluation].clamp(min=1e-3)[:, None]
            slope = slope + 2 * CLASS_WEIGHT * (means - self.real_class_means)[label]
        value = ((centred @ self.curvature[evaluation] * centred) + slope * z).sum(1).mean()
        return value - value.detach() + self.distance[evaluation]


def frechet_gradient(mean: Tensor, covariance: Tensor, target: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)): its gradient by m, its gradient by C, and its value.

    The gradient by C is 1 - S (S C S)^(-1/2) S, where S^2 = C'.   All float64.
    """
    values, vectors = torch.linalg.eigh(wanted)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    shared = values.clamp(min=0).sqrt().sum()
    values = values.clamp(min=float(values.max().clamp(min=1e-30)) * SMALLEST_VARIANCE)
    curvature = torch.eye(len(mean), dtype=mean.dtype) - root @ ((vectors * values.rsqrt()) @ vectors.T) @ root
    distance = (mean - target).square().sum() + covariance.trace() + wanted.trace() - 2 * shared
    return 2 * (mean - target), curvature, distance


def sums_of(z: Tensor, label: Tensor | None, labels: int) -> dict[str, Tensor]:
    """What `Moments.add` needs of a batch (B, k) of components; the sums of two batches add up."""
    label = torch.full((len(z),), labels - 1, device=z.device) if label is None else label
    each = F.one_hot(label, labels).to(z.dtype)
    return {
        "count": each.sum(), "z": z.sum(0), "zz": z.T @ z, "class_sums": each.T @ z, "class_counts": each.sum(0),
    }  # fmt: skip


class TeacherFeatures:
    """The features: pooled activations of the way down and of the middle of a U-Net that is shown a clean image."""

    def __init__(self, teacher: UNet, diffusion: Diffusion):
        self.teacher, self.time = teacher, float(level_at(diffusion.schedule, ANGLE).time)
        levels = [block.resnets[-1].conv2.out_channels for block in teacher.down_blocks]
        self.width = 2 * sum(levels) + 6 * levels[-1]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, width): of each level's last block and of the middle block each channel's mean
        and root mean square, and of the middle block also the means of its four quarters."""
        net = self.teacher
        embedding = net.embed(images.new_full((len(images),), self.time), None, images.dtype)
        down = net.way_down(images, embedding, run_residual)
        outputs, end = [], 0
        for block in net.down_blocks:
            outputs.append(down[end + len(block.resnets)])
            end += len(block.resnets) + len(block.downsamplers)
        outputs.append(run_residual(net.mid_block.resnets[0], net.mid_block.attentions[0], embedding, down[-1]))
        means = [output.mean((2, 3)) for output in outputs]
        sizes = [(output.square().mean((2, 3)) + SMALLEST_VARIANCE).sqrt() for output in outputs]
        return torch.cat([F.adaptive_avg_pool2d(outputs[-1], 2).flatten(1), *means, *sizes], 1).float()


class MomentMatching:
    """`consistency` in even steps and the distance of the moments in odd ones, for each evaluation in turn.

    `MomentMatching(...)(progress)` is the objective of a step; `begin` and `after_step` are for the trainer.
    levels: those that the student visits, the noisiest first, with CLEAN.   classes: of the labels, 0 without.
    """

    def __init__(self, consistency, diffusion: Diffusion, levels: list[Level], teacher: UNet, classes: int):
        self.consistency, self.diffusion, self.levels = consistency, diffusion, levels
        self.features = TeacherFeatures(teacher, diffusion)
        self.moments = Moments(self.features.width, classes, len(levels) - 1)

    def __call__(self, progress: float) -> "MomentLoss":
        return MomentLoss(self, self.consistency(progress))

    @torch.no_grad()
    def begin(self, batches: Batches) -> None:
        """Sets the target from real images, the first that the run trains on; all ranks take the same."""
        size = min(REAL_IMAGES, len(batches))
        parts = [batches.at(step) for step in range(math.ceil(size / batches.batch_size))]
        features = torch.cat([self.features(images) for images, _ in parts])
        label = torch.cat([label for _, label in parts])
        world = batches.world
        self.moments.set_target(world.gather(features, len(features) * world.size),
                                world.gather(label, len(label) * world.size))  # fmt: skip

    @torch.no_grad()
    def after_step(self, objective: "MomentLoss", batches: Batches) -> None:
        """Averages in what the step has sampled, on all ranks, unless it is not finite, as the step is then undone."""
        if objective.sums is not None:
            batches.world.all_reduce_mean_(list(objective.sums.values()))
            if objective.sums["zz"].isfinite().all():
                self.moments.add(objective.evaluation, objective.sums)
        self.moments.steps += 1

    def sampled(self, model, noise: Tensor, label: Tensor | None, evaluation: int) -> Tensor:
        """The student's estimate at this evaluation (from 0) of its own sampling, with gradients of that one alone.

        Fresh noise is that of the images further on in the batch.
        """
        draws = (noise.roll(k, 0) for k in count())
        level, x = self.levels[evaluation], next(draws) * self.levels[0].sigma
        denoise = self.diffusion.denoiser(model, label)
        for step in ddim(denoise, x, self.levels[: evaluation + 1], lambda: next(draws), eta=1.0):
            x = step.x
        return self.consistency.clean(model, x, level, label)


class MomentLoss:
    """The objective of one step.   sums: what the step's samples add to the averages, None if it has none."""

    def __init__(self, task: MomentMatching, consistency):
        self.task, self.consistency = task, consistency
        steps = int(task.moments.steps)
        self.evaluation = steps // 2 % (len(task.levels) - 1) if steps % 2 else None
        self.sums: dict[str, Tensor] | None = None

    def timesteps(self, u):
        """Of the consistency loss.  A step begins here, also one that is tried again with less memory."""
        self.sums = None
        return self.consistency.timesteps(u)

    def loss(self, model, clean: Tensor, noise: Tensor, t, label: Tensor | None = None) -> Tensor:
        """Consistency, or the distance over the real variance; a scalar.  Shapes as in `Diffusion.loss`."""
        task, moments = self.task, self.task.moments
        if self.evaluation is None or not torch.is_grad_enabled():
            return self.consistency.loss(model, clean, noise, t, label)
        warm = moments.is_warm(self.evaluation)
        with torch.set_grad_enabled(warm):
            z = moments.project(task.features(task.sampled(model, noise, label, self.evaluation)))
        sums = sums_of(z.detach(), label, len(moments.real_class_means))
        self.sums = sums if self.sums is None else {name: self.sums[name] + sums[name] for name in sums}
        if warm:
            return moments.witness(z, label, self.evaluation)
        return self.consistency.loss(model, clean, noise, t, label)
