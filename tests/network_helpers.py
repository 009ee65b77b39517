"""A network that no training made."""

import torch
from torch import nn

from tiny_diffusion.config.training import Config
from tiny_diffusion.models.build import make_model


@torch.no_grad()
def random_network(config: Config, deviation: float) -> nn.Module:
    """The network of this configuration for grey images of ten classes, with normal weights of this deviation."""
    generator = torch.Generator().manual_seed(0)
    model = make_model(config, 1, 10).eval()
    for parameter in model.parameters():
        parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
    return model
