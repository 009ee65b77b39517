"""tiny_diffusion: train, sample from, inspect and evaluate small image diffusion models.

Public names are resolved on first use (PEP 562), so that importing the package loads no torch.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "tiny_diffusion.config.training",
    "resolve": "tiny_diffusion.config.training",
    "Level": "tiny_diffusion.diffusion.levels",
    "make_schedule": "tiny_diffusion.diffusion.schedules",
    "make_levels": "tiny_diffusion.diffusion.grids",
    "SAMPLERS": "tiny_diffusion.diffusion.samplers",
    "Diffusion": "tiny_diffusion.diffusion.process",
    "UNet": "tiny_diffusion.models.unet",
    "make_diffusion": "tiny_diffusion.models.build",
    "make_model": "tiny_diffusion.models.build",
    "open_dataset": "tiny_diffusion.data.sources",
    "load_checkpoint": "tiny_diffusion.runs.checkpoint",
    "load_model": "tiny_diffusion.runs.checkpoint",
    "Request": "tiny_diffusion.diffusion.request",
    "sample": "tiny_diffusion.diffusion.sampling",
    "SDEdit": "tiny_diffusion.diffusion.edits",
    "Inpaint": "tiny_diffusion.diffusion.edits",
    "Interpolate": "tiny_diffusion.diffusion.edits",
    "Invert": "tiny_diffusion.diffusion.edits",
    "open_model": "tiny_diffusion.cli.python",
    "run_command": "tiny_diffusion.cli.python",
    "train": "tiny_diffusion.cli.python",
    "FromNoise": "tiny_diffusion.diffusion.edits",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tiny_diffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
