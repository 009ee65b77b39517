"""The model that is exported: one set of weights of a checkpoint, with all its classes or without."""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import FileError
from tiny_diffusion.models.build import CLASSES, TIME_BIAS, make_meta_model
from tiny_diffusion.runs.checkpoint import Checkpoint, load_model


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """about: the JSON of a checkpoint without its sha256.   network: on the CPU, in evaluation mode."""

    about: dict
    network: nn.Module

    @property
    def config(self) -> Config:
        return Config.from_dict(self.about["config"])

    @property
    def num_classes(self) -> int:
        """How many classes the network takes, the null class not counted."""
        return len(self.about["class_names"]) if self.config.class_cond else 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.about["channels"], *self.about["image_size"])

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random (noisy images, times, labels or None) to compare outputs on; all times and classes take their turn."""
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.shape, generator=random)
        time = torch.rand(batch, generator=random) * (self.config.timesteps - 1)
        label = torch.arange(batch) % (self.num_classes + 1) if self.num_classes else None
        return x, time, label


def exported_model(checkpoint: Checkpoint, weights: str = "ema", label: int | None = None) -> ExportedModel:
    """The model of a checkpoint.   weights: ema or raw.

    label: the class to bake into the weights, the number of classes for the null class; None keeps all classes.  The
    embedding of a class is added to that of the time, so the bias of the latter can hold it, exactly.
    """
    network = load_model(checkpoint, weights)
    about = {key: value for key, value in checkpoint.about.items() if key not in ("sha256", "imported")}
    if label is None or not checkpoint.config.class_cond:
        return ExportedModel(about, network)
    config = dataclasses.replace(checkpoint.config, class_cond=False)
    sampling = {key: value for key, value in about["sampling"].items() if key != "guidance_interval"}
    about |= {"config": config.to_dict(), "sampling": sampling | {"guidance": 1.0}}
    state = network.state_dict()
    state[TIME_BIAS] = state[TIME_BIAS] + state.pop(CLASSES)[label]
    plain = make_meta_model(config, about["channels"], len(about["class_names"]))
    plain.load_state_dict(state, assign=True)
    return ExportedModel(about, plain.eval().requires_grad_(False))


def require(library: str, extra: str, format: str) -> ModuleType:
    """A library that only an export needs.  Raises FileError saying how to install it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise FileError(
            f"--format {format} needs {library}, which is not installed. Run: pip install tiny-diffusion[{extra}]"
        ) from error


def refuse_difference(what: str, outputs: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> float:
    """The largest difference of pairs of outputs, relative to the largest of a pair.  Raises FileError if too large."""
    worst = 0.0
    for name, (ours, theirs) in outputs.items():
        error = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
        if not error <= tolerance:
            raise FileError(f"{what} differs from this model by {error:.1e} on {name}; nothing was written.")
        worst = max(worst, error)
    return worst
