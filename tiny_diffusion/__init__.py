"""tiny_diffusion: train, sample from, inspect and evaluate small image diffusion models.

Public names are resolved on first use (PEP 562), so that importing the package loads no torch.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    # the commands, and a model that samples
    "train": "tiny_diffusion.cli.python",
    "distill": "tiny_diffusion.cli.python",
    "evaluate": "tiny_diffusion.cli.python",
    "run_command": "tiny_diffusion.cli.python",
    "open_model": "tiny_diffusion.cli.python",
    # edits
    "SDEdit": "tiny_diffusion.diffusion.edits",
    "Inpaint": "tiny_diffusion.diffusion.edits",
    "Interpolate": "tiny_diffusion.diffusion.edits",
    "Invert": "tiny_diffusion.diffusion.edits",
    "FromNoise": "tiny_diffusion.diffusion.edits",
    # the parts
    "Config": "tiny_diffusion.config.training",
    "resolve": "tiny_diffusion.config.training",
    "Level": "tiny_diffusion.diffusion.levels",
    "make_schedule": "tiny_diffusion.diffusion.schedules",
    "make_levels": "tiny_diffusion.diffusion.grids",
    "Diffusion": "tiny_diffusion.diffusion.process",
    "UNet": "tiny_diffusion.models.unet",
    "make_diffusion": "tiny_diffusion.models.build",
    "make_model": "tiny_diffusion.models.build",
    "open_dataset": "tiny_diffusion.data.sources",
    "load_checkpoint": "tiny_diffusion.runs.checkpoint",
    "load_model": "tiny_diffusion.runs.checkpoint",
    "Request": "tiny_diffusion.diffusion.request",
    "sample": "tiny_diffusion.diffusion.sampling",
    # the tables: each row is a choice of the option of that name
    "SCHEDULES": "tiny_diffusion.diffusion.schedules",
    "PREDICTIONS": "tiny_diffusion.diffusion.predictions",
    "LOSS_WEIGHTS": "tiny_diffusion.diffusion.loss_weights",
    "TIMESTEP_DISTRIBUTIONS": "tiny_diffusion.diffusion.timesteps",
    "GRIDS": "tiny_diffusion.diffusion.grids",
    "SAMPLERS": "tiny_diffusion.diffusion.samplers",
    "DATASETS": "tiny_diffusion.data.catalog",
    "PRESETS": "tiny_diffusion.config.presets",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tiny_diffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
