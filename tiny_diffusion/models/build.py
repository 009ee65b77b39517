"""Builds what a configuration describes: the network, on its device, and the diffusion process."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tiny_diffusion.config.training import Config
from tiny_diffusion.config.unet_details import UNetDetails
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.models.unet import UNet

# Tensors of models.unet.UNet.  The last row of CLASSES is the null class.
CLASSES, TIME_BIAS = "class_embedding.weight", "time_embedding.linear_2.bias"


def make_model(config: Config, channels: int, num_classes: int) -> UNet:
    """The network, its weights drawn from torch's global generator.

    channels: of the images.  num_classes: used by class-conditional configurations only.
    """
    return UNet(
        channels,
        base_channels=config.base_channels,
        channel_mult=config.channel_mult,
        layers_per_block=config.layers_per_block,
        time_emb_dim=config.time_emb_dim,
        attention_levels=config.attention_levels,
        attention_heads=config.attention_heads,
        patch_size=config.patch_size,
        activation=config.activation,
        dropout=config.dropout,
        num_classes=num_classes if config.class_cond else 0,
        checkpoint_activations=config.checkpoint_activations,
        details=UNetDetails.of(config.unet_details),
    )


class _NoInitialValues(TorchFunctionMode):
    """Skips the functions of torch.nn.init.  For a tensor without memory normal_ would load torch's compiler first."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def make_meta_model(config: Config, channels: int, num_classes: int) -> UNet:
    """The network on torch's meta device: its tensors have shapes, and neither memory nor values.

    Arguments as in make_model.
    """
    with torch.device("meta"), _NoInitialValues():
        return make_model(config, channels, num_classes)


def count_parameters(config: Config, channels: int, num_classes: int) -> int:
    """How many parameters the network has, without the memory for them."""
    return sum(parameter.numel() for parameter in make_meta_model(config, channels, num_classes).parameters())


def make_diffusion(config: Config) -> Diffusion:
    """The noising process, and what the network learns about it."""
    return Diffusion(
        config.make_schedule(), config.prediction, config.loss_weight, config.timestep_distribution, config.loss
    )


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, in the memory format that its convolutions are fastest in."""
    model = model.to(device)
    return model if device.type == "mps" else model.to(memory_format=torch.channels_last)


def part_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of a run, such as model or ema, from a flat table of "part/tensor" names."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def is_finite(tensor: Tensor) -> bool:
    """Whether no item is NaN or infinite.  One that is makes the sum so, and so may a sum that is too large."""
    return not tensor.is_floating_point() or math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())
