"""The images of a run: those that train, and the few on which the loss is measured after each epoch."""

import dataclasses
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.files.cache import Cache, cache_folder
from tiny_diffusion.data.image_set import ImageSet, evenly_spaced
from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.errors import OptionError
from tiny_diffusion.models.build import count_parameters
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.messages import show_progress

VALIDATION_IMAGES = 256
WEIGHT_COPIES = 4  # at least, in training: the weights, their gradients, their momenta and their average


class RunData(NamedTuple):
    """config: with `class_cond` as these images decide it.   images: those that train.

    validation: images (N, C, H, W) in [-1, 1] and labels, held out if any are.
    """

    config: Config
    images: ImageSet
    validation: tuple[Tensor, Tensor]
    heldout_count: int


def open_run_data(config: Config, folder: RunFolder, device: torch.device) -> RunData:
    """Opens the images of a configuration and prints what was found."""
    data = open_images(config, cache=Cache(cache_folder(folder.path)), progress=show_progress)
    config = with_classes(config, data)
    heldout = open_images(config, heldout=True, channels=data.channels)
    # Without held-out images the loss is measured on training images: it shows divergence, but no overfitting.
    source = heldout if len(heldout) else data
    chosen = evenly_spaced(len(source), VALIDATION_IMAGES)
    validation = to_float(source.take(chosen.numpy()).to(device)), source.labels[chosen].to(device)
    for line in data.report:
        print(line, file=sys.stderr)
    return RunData(config, data, validation, len(heldout))


def with_classes(config: Config, data: ImageSet) -> Config:
    """The configuration with `class_cond` set by these images, where neither an option nor the data set has set it.

    One class is none: there is nothing to tell apart.  Raises OptionError for options that need classes.
    """
    if config.class_cond is None:
        config = dataclasses.replace(config, class_cond=len(data.class_names) > 1)
        if not config.class_cond and config.label_dropout != Config.label_dropout:
            raise OptionError(
                f"--label_dropout {config.label_dropout:g} would be ignored: {config.data_dir} has no sub-folders for "
                "classes. Leave it out, or sort the images into a sub-folder for each class."
            )
    if config.class_cond and not data.class_names:
        raise OptionError(
            f"--class_cond needs classes, and {config.data_dir} has no sub-folders that hold all of its images. "
            "Leave it out, or sort the images into a sub-folder for each class."
        )
    return config


def open_images(config: Config, heldout: bool = False, **options) -> ImageSet:
    """The images of a configuration: those that train, or those held out.   options: as in OpenRequest."""
    given = {
        "random_crop": config.random_crop and not heldout,
        "workers": config.workers,
        **({} if config.background is None else {"background": config.background}),
        **({} if config.cache_mb is None else {"cache_bytes": config.cache_mb * 1e6}),
    }
    return open_dataset(
        config.dataset,
        heldout=heldout,
        data_dir=config.data_dir,
        size=config.size,
        splits=config.splits,
        **given,
        **options,
    )


def check_device(config: Config, device: torch.device) -> None:
    """Refuses what the device cannot do, and what would not fit into memory: the system would swap or kill the process.

    Raises OptionError or MemoryError.
    """
    if config.precision == "fp16" and device.type != "cuda":
        raise OptionError(f"--precision fp16 needs a CUDA device, and this run is on {device.type}. Use bf16 or fp32.")
    dataset = DATASETS[config.dataset]
    parameters = count_parameters(config, dataset.channels, len(dataset.classes))
    height, width = config.size
    images = dataset.images(config.splits)
    needed = 4 * WEIGHT_COPIES * parameters + images * dataset.channels * height * width  # bytes
    if device.type == "cpu" and hasattr(os, "sysconf"):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > available:
            raise MemoryError(
                f"a network of {parameters / 1e6:,.1f} M parameters and {images:,} images of {height}x{width} take "
                f"{needed / 1e9:,.0f} GB or more, and this computer has {available / 1e9:,.0f}"
            )
