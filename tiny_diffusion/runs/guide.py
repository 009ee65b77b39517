"""Autoguidance by a checkpoint: loads the guide, and refuses one of other images or another noising process."""

from torch import nn

from tiny_diffusion.diffusion.guidance import Autoguided
from tiny_diffusion.errors import OptionError, printable
from tiny_diffusion.runs.checkpoint import Checkpoint, load_checkpoint, load_model

SAME = (  # of a model and its guide: the option, and its value in a checkpoint
    ("channels", lambda checkpoint: checkpoint.shape[0]),
    ("image_size", lambda checkpoint: "x".join(map(str, checkpoint.shape[1:]))),
    ("dataset", lambda checkpoint: checkpoint.config.dataset),
    ("class_cond", lambda checkpoint: checkpoint.config.class_cond),
    ("classes", lambda checkpoint: ", ".join(checkpoint.class_names) if checkpoint.config.class_cond else ""),
    ("schedule", lambda checkpoint: checkpoint.config.schedule),
    ("timesteps", lambda checkpoint: checkpoint.config.timesteps),
    ("beta_start", lambda checkpoint: checkpoint.config.beta_start),
    ("beta_end", lambda checkpoint: checkpoint.config.beta_end),
    ("logsnr_shift", lambda checkpoint: checkpoint.config.logsnr_shift),
    ("prediction", lambda checkpoint: checkpoint.config.prediction),
)


def with_guide(model: nn.Module, checkpoint: Checkpoint, path: str, weights: str = "ema") -> Autoguided:
    """The model of a checkpoint, on the CPU, guided by that of another.

    Raises FileError for an unreadable guide, and OptionError for one that knows other images or another process.
    """
    guide = load_checkpoint(path)
    for name, value in SAME:
        own, other = value(checkpoint), value(guide)
        if own != other:
            shown = [printable(str(each), 60) for each in (other, own)]
            raise OptionError(
                f"--guide_checkpoint {path} has {name} {shown[0]}, and this model has {shown[1]}. "
                "Use an earlier checkpoint of the run, or a smaller model of the same data."
            )
    return Autoguided(model, load_model(guide, weights))
