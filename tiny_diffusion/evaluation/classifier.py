"""Small classifiers, in whose features samples are compared: grey ones for one data set each, one for any photographs.

`train_classifier` makes one.  The weights in the package carry their accuracy and the command that made them.  They
only evaluate samples; no model is trained or guided by them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.errors import FileError
from tiny_diffusion.files import atomic_write
from tiny_diffusion.randomness import seed_torch, stream

WEIGHTS = Path(__file__).parent / "weights"
VERSION = 1
WIDTHS = {1: (16, 32, 32, 48, 64), 3: (32, 64, 64, 96, 128)}  # of each convolution, by channels; the last: features
MIN_PHOTOGRAPH = 16  # pixels: the shortest side of which a classifier of photographs makes features
PEAK_LR, BATCH = 0.01, 128


class Classifier(nn.Module):
    """Images -> features -> logits: five convolutions with batch norm, then the mean over the pixels."""

    def __init__(self, num_classes: int, strides: tuple[int, ...] = (1, 2, 1, 2, 1), channels: int = 1):
        super().__init__()
        widths = (channels, *WIDTHS[channels])
        layers = []
        for in_width, width, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(in_width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, 64) for grey images, (B, 128) for colour."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.features(images))


def make_classifier(size: tuple[int, int], num_classes: int, channels: int = 1) -> Classifier:
    """The network for images of this size; small images are halved later and less often."""
    return Classifier(num_classes, (1, 2, 1, 2, 1) if min(size) >= 16 else (1, 1, 1, 2, 1), channels)


def train_classifier(
    data: ImageSet, steps: int, seed: int, on_step: Callable[[int, float], object] = lambda step, loss: None
) -> Classifier:
    """AdamW on batches of 128 images, which are shifted by up to a tenth of their side; photographs are also mirrored.

    on_step: called with the index and the loss of each finished step.
    """
    seed_torch(seed, "weights")
    model = make_classifier(data.images.shape[2:], len(data.class_names), data.channels)
    batches = Batches(data, BATCH, seed, hflip=data.channels == 3)

    def loss(step: int, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(_shifted(images, seed, step)), labels)

    return fit(model, batches, steps, PEAK_LR, loss, on_step)


def fit(
    model: nn.Module, batches: Batches, steps: int, peak_lr: float, loss: Callable[[int, Tensor, Tensor], Tensor],
    on_step: Callable[[int, float], object],
) -> nn.Module:  # fmt: skip
    """The network after AdamW with a learning rate that rises and falls, frozen.

    loss: of (step, images in [-1, 1], labels).   on_step: called with the index and the loss of each finished step.
    """
    model.train().to(memory_format=torch.channels_last)  # half the time on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), peak_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps)
    for step in range(steps):
        found = loss(step, *batches.at(step))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        schedule.step()
        on_step(step, float(found.detach()))
    return model.eval().requires_grad_(False)


def _shifted(images: Tensor, seed: int, step: int) -> Tensor:
    """The batch shifted by one random offset; its edges are black (-1), or in colour the image reflected."""
    max_shift = max(1, images.shape[-1] // 10)
    down, right = stream(seed, "crops", step).integers(-max_shift, max_shift + 1, 2).tolist()
    sides = (max_shift,) * 4
    padded = F.pad(images, sides, value=-1.0) if images.shape[1] == 1 else F.pad(images, sides, mode="reflect")
    top, left = max_shift + down, max_shift + right
    return padded[..., top : top + images.shape[2], left : left + images.shape[3]]


@torch.no_grad()
def accuracy(model: Classifier, data: ImageSet) -> float:
    """The share of images that are classified right."""
    right = 0
    for start in range(0, len(data), 1000):
        rows = slice(start, start + 1000)
        right += int((model(to_float(data.images[rows])).argmax(1) == data.labels[rows]).sum())
    return right / len(data)


def weights_path(dataset: str) -> Path:
    """Where the package keeps the data set's classifier, if it has one."""
    return WEIGHTS / f"{dataset}-classifier-v{VERSION}.safetensors"


def save_classifier(path: Path, model: Classifier, about: dict) -> None:
    """Writes the weights as safetensors, whole or not at all.  about: plain JSON, kept in the file's header."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(tensors, {"about": json.dumps(about)}))


def load_classifier(path: Path) -> tuple[Classifier, dict]:
    """The network, and the JSON that `save_classifier` kept about it.  Raises FileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "null"))
            if about is None:
                raise ValueError("it does not name its classes")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = make_classifier(tuple(about["size"]), len(about["classes"]), about.get("channels", 1))
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise FileError(
            f"{path} is not a classifier of this program ({reason}). Train one by python -m tiny_diffusion classifier."
        ) from error
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last), about
