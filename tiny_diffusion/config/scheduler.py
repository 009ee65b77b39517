"""The scheduler_config.json of diffusers, and the options of the noising process: each made from the other.

A scheduler of diffusers is a process (its betas, or flow matching) and a way to sample.  The process is read and
written; how to sample is ours, apart from clipping.  No torch here, and no diffusers.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from tiny_diffusion.config.unet2d import shown
from tiny_diffusion.diffusion.schedules import GIVEN, MAX_BETA
from tiny_diffusion.errors import OptionError

PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours -> theirs
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OF_BETAS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDIM", "DDPMParallel", "DDIMParallel", "DDIMInverse", "DPMSolverMultistep", "DPMSolverSinglestep",
        "DPMSolverSDE", "UniPCMultistep", "DEISMultistep", "SASolver", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
    )
)  # fmt: skip
LINEAR_BETAS = (1e-4, 0.02)  # diffusers' default beta_start and beta_end of most schedulers


def scheduler_config(config) -> dict[str, object]:
    """The scheduler with the process of a training configuration, class name included.

    Raises OptionError for a process that no scheduler of diffusers has.
    """
    schedule = config.make_schedule()
    if schedule.straight != (config.prediction == "flow"):
        hint = "--schedule flow with --prediction flow" if schedule.straight else "--prediction epsilon, x0 or v"
        raise OptionError(
            f"diffusers has no scheduler for --schedule {config.schedule} with --prediction {config.prediction}. "
            f"A model that is trained with {hint} can be exported."
        )
    if schedule.straight:
        return {
            "_class_name": FLOWS[0],
            "num_train_timesteps": schedule.timesteps,
            "shift": math.exp(-schedule.shift / 2),
        }
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.timesteps,
        "trained_betas": betas_of(schedule).tolist(),
        "prediction_type": PREDICTIONS[config.prediction],
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": False,
    }


def betas_of(schedule) -> np.ndarray:
    """The betas of a schedule with alpha^2 + sigma^2 = 1: (T,) float64."""
    log_alphas_cumprod = -np.logaddexp(0, -schedule.log_snr)
    return -np.expm1(np.diff(log_alphas_cumprod, prepend=0.0))


def process_options_of(given: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """The options of the process of a scheduler, and whether it clips estimates of x_0 to [-1, 1].

    given: its scheduler_config.json.  Raises ValueError or TypeError saying what is not understood.
    """
    name = str(given.get("_class_name")).removeprefix("Flax")
    timesteps = given.get("num_train_timesteps", 1000)
    if name in FLOWS:
        if given.get("use_dynamic_shifting"):
            raise ValueError("its scheduler shifts by the size of the image (use_dynamic_shifting)")
        shift = -2 * math.log(given.get("shift", 1.0))
        process = {"schedule": "flow", "timesteps": timesteps, "prediction": "flow", "logsnr_shift": shift + 0.0}
        return process, False
    if name not in OF_BETAS:
        raise ValueError(f"its scheduler is {shown(name)}, which is not one of {', '.join((*OF_BETAS, *FLOWS))}")
    theirs = given.get("prediction_type", "epsilon")
    ours = [key for key, value in PREDICTIONS.items() if value == theirs]
    if not ours:
        raise ValueError(f"its prediction_type is {shown(theirs)}; {', '.join(PREDICTIONS.values())} can be read")
    process = {"timesteps": timesteps, "prediction": ours[0], "logsnr_shift": 0.0, **_betas_options(given, timesteps)}
    clip = bool(given.get("clip_sample", name.startswith(("DDPM", "DDIM")))) and given.get("clip_sample_range", 1) == 1
    return process, clip


def _betas_options(given: Mapping[str, object], timesteps: int) -> dict[str, object]:
    """The schedule by its name where it is one of ours, and otherwise its betas."""
    kind, betas = given.get("beta_schedule", "linear"), given.get("trained_betas")
    start, end = (given.get(key, own) for key, own in zip(("beta_start", "beta_end"), LINEAR_BETAS, strict=True))
    again = given.get("rescale_betas_zero_snr", False)
    if betas is None and kind not in BETA_SCHEDULES:
        raise ValueError(f"its beta_schedule is {shown(kind)}; {', '.join(BETA_SCHEDULES)} can be read")
    if betas is None and not again:
        if kind == "squaredcos_cap_v2":
            return {"schedule": "cosine"}
        ends = start * timesteps / 1000, end * timesteps / 1000  # as papers state them, for 1000 steps
        if kind == "linear" and 0 < ends[0] <= ends[1] <= MAX_BETA:
            return {"schedule": "linear", "beta_start": ends[0], "beta_end": ends[1]}
    betas = np.array(betas, dtype=float) if betas is not None else BETA_SCHEDULES[kind](timesteps, start, end)
    if again:
        root = np.sqrt(np.cumprod(1 - betas))  # Lin et al. (2023), algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        betas = 1 - (root / np.append(1.0, root[:-1])) ** 2
    return {"schedule": GIVEN, "betas": tuple(betas.tolist())}


def _cosine(timesteps: int, start: float, end: float) -> np.ndarray:
    curve = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - curve[1:] / curve[:-1], MAX_BETA)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda timesteps, start, end: np.linspace(start, end, timesteps),
    "scaled_linear": lambda timesteps, start, end: np.linspace(start**0.5, end**0.5, timesteps) ** 2,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": lambda timesteps, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, timesteps))),
}
