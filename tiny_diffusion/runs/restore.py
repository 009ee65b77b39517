"""What a trainer takes from a checkpoint: everything, to continue its run, or the weights, to start a new one."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.models.build import CLASSES, TIME_BIAS
from tiny_diffusion.runs.checkpoint import Checkpoint, load_model
from tiny_diffusion.training.trainer import Trainer

OF_WEIGHTS = {"model", "ema", "teacher"}  # the trainer's networks that are U-Nets


def restore(trainer: Trainer, data: ImageSet, checkpoint: Checkpoint, path: Path) -> None:
    """Continues the checkpoint's run.

    Raises OptionError if the images are others than it was trained on, FileError if the tensors do not fit.
    """
    about = checkpoint.about
    if data.channels != about["channels"] or data.class_names != checkpoint.class_names:
        raise OptionError(
            f"--data_dir {trainer.config.data_dir} holds other classes or channels than the images of this run. "
            "Name the folder that it began with."
        )
    if change := _change_of_images(data, about.get("images", {})):
        raise OptionError(
            f"--data_dir {trainer.config.data_dir}: the images have changed since {path} was saved: {change}. Restore "
            f"them, name the folder that this run began with, or start a new run with --init_from {path}."
        )
    try:
        trainer.load(checkpoint.tensors, about["step"])
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"{path} cannot be resumed: its tensors do not fit its configuration ({reason}).") from error


def _change_of_images(data: ImageSet, before: Mapping[str, object]) -> str:
    """What is different from the images of a checkpoint; empty if nothing is, or if it does not say."""
    if before.get("count", len(data)) != len(data):
        return f"{before['count']:,} images then, {len(data):,} now"
    for name, change in (("files", "other names, sizes or classes"), ("content", "other contents")):
        hashes = before.get(name), data.fingerprint.get(name)
        if all(hashes) and hashes[0] != hashes[1]:
            return f"as many images, but {change}"
    return ""


def take_weights(trainer: Trainer, data: ImageSet, source: Checkpoint, path: str, option: str) -> None:
    """Starts from the averaged weights of another run.   Classes that it did not learn start as its null class.

    option: the one that names its checkpoint.

    Raises OptionError if its images have other channels, or its network other sizes.
    """
    config, channels = trainer.config, source.about["channels"]
    if data.channels != channels:
        raise OptionError(
            f"--{option} {path} samples images of {channels} channels, and those of --dataset {config.dataset} have "
            f"{data.channels}. Name images of the same kind, or another checkpoint."
        )
    state = with_classes_of(load_model(source).state_dict(), trainer, data.class_names == source.class_names)
    wanted = {name: tensor.shape for name, tensor in trainer.model.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in state.items()}:
        raise OptionError(
            f"--{option} {path} is a network of other sizes than the options ask for. "
            "Leave out the options of the network, and it keeps its own."
        )
    for name in OF_WEIGHTS & trainer.networks.keys():
        trainer.networks[name].load_state_dict(state)


def with_classes_of(state: dict[str, Tensor], trainer: Trainer, same: bool) -> dict[str, Tensor]:
    """The weights of a network of this trainer's classes, which computes what the given one does for its null class.

    same: whether both have the same classes; their embeddings are then kept.
    """
    wanted, null = trainer.model.class_embedding, state[CLASSES][-1] if CLASSES in state else None
    if wanted is None and null is not None:  # the embedding is added to that of the time, so its bias can hold it
        del state[CLASSES]
        state[TIME_BIAS] = state[TIME_BIAS] + null
    elif wanted is not None and not (same and null is not None):
        null = torch.zeros_like(state[TIME_BIAS]) if null is None else null
        state[CLASSES] = null.expand(len(wanted.weight), -1).clone()
    return state
