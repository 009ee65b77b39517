"""A trained model as the page carries it: network, schedule, what it predicts, and how it samples by default."""

from tiny_diffusion.models.build import count_parameters
from tiny_diffusion.page.weights import network_of, too_large
from tiny_diffusion.runs.checkpoint import Checkpoint, load_model


def why_not_live(checkpoint: Checkpoint) -> str | None:
    """Why the page cannot run this model itself; None if it can."""
    if checkpoint.config.unet_details:
        return f"its network is of another program ({', '.join(checkpoint.config.unet_details)})"
    parameters = count_parameters(checkpoint.config, checkpoint.about["channels"], len(checkpoint.class_names))
    return too_large(parameters, checkpoint.config.size)


def model_of(checkpoint: Checkpoint, weights: str = "ema") -> dict[str, object]:
    """What process.js needs to sample as `sample` does, as plain values.   weights: ema or raw."""
    config = checkpoint.config
    return {
        "network": network_of(load_model(checkpoint, weights), config, checkpoint.shape),
        "schedule": schedule_of(config),
        "prediction": config.prediction,
        "sampling": sampling_of(checkpoint),
        "classes": [[label, checkpoint.class_names[label]] for label in labels_of(checkpoint)],
        "guidable": config.class_cond and config.label_dropout > 0,
    }


def schedule_of(config) -> dict[str, object]:
    """What schedules.js makes the same schedule from."""
    ends = {"ends": [config.beta_start, config.beta_end]} if config.beta_start is not None else {}
    ends |= {} if config.betas is None else {"betas": list(config.betas)}
    return {"name": config.schedule, "timesteps": config.timesteps, "shift": config.logsnr_shift, **ends}


def sampling_of(checkpoint: Checkpoint) -> dict[str, object]:
    """How the model samples unless asked otherwise, with the keys of process.js."""
    request = checkpoint.request(())
    names = ("sampler", "steps", "grid", "eta", "guidance", "clip")
    return {name: getattr(request, name) for name in names} | {"interval": request.guidance_interval}


def labels_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The labels that can be asked for; none of a model without classes."""
    return checkpoint.trained_labels if checkpoint.config.class_cond else ()
