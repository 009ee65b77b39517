"""The JSON of a checkpoint: which keys it has, and which values a run can have written."""

from collections.abc import Mapping

from tiny_diffusion.config.student import is_student
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.grids import GRIDS
from tiny_diffusion.diffusion.samplers import SAMPLERS, Sampler

KEYS = {
    "format", "config", "step", "elapsed_seconds", "loss_history", "heldout_history", "best_score", "class_names",
    "image_size", "images", "channels", "background", "sampling", "stretch", "finished", "versions", "sha256",
}  # fmt: skip
OPTIONAL_KEYS = {"images", "student"}  # which the first checkpoints lack, and which only distilled models have


def number(value: object, *kinds: type) -> bool:
    """Whether it is a number of one of these types, from 0 to what 63 bits hold."""
    return type(value) in kinds and 0 <= value < 2**63


def _valid_images(images: object, classes: int) -> bool:
    """The number of the images, hashes, and how many there are of each class: all optional."""

    def valid(key: str, value: object) -> bool:
        if key == "class_counts":
            numbers = isinstance(value, list) and all(number(count, int) for count in value)
            return numbers and len(value) == classes and 0 < sum(value) < 2**40
        return number(value, int) if key == "count" else isinstance(value, str)

    return isinstance(images, dict) and all(valid(key, value) for key, value in images.items())


def invalid_keys(about: Mapping, config: Config) -> list[str]:
    """The keys whose values no run can have written.  Commands rely on all of them once the file is loaded."""

    def pairs(values: object, *losses: type) -> bool:
        return isinstance(values, list) and all(
            isinstance(pair, list) and len(pair) == 2 and number(pair[0], int) and type(pair[1]) in losses
            for pair in values
        )

    def valid_eta(eta: object, row: Sampler) -> bool:
        return eta is None or (row.eta is not None and number(eta, int, float) and eta <= row.max_eta)

    def valid_interval(interval: object) -> bool:
        return interval is None or (
            isinstance(interval, list)
            and len(interval) == 2
            and all(number(end, int, float) for end in interval)
            and interval[0] < interval[1] <= 1
        )

    names, segment, sampling = about["class_names"], about["stretch"], about["sampling"]
    best = about["best_score"]
    valid = {
        "step": number(about["step"], int),
        "student": "student" not in about or is_student(about["student"]),
        "elapsed_seconds": number(about["elapsed_seconds"], int, float),
        "finished": type(about["finished"]) is bool,
        "stretch": isinstance(segment, list) and len(segment) == 2 and all(number(x, int, float) for x in segment),
        "loss_history": pairs(about["loss_history"], float, type(None)),
        "heldout_history": pairs(about["heldout_history"], float),
        "channels": type(about["channels"]) is int and 1 <= about["channels"] <= 4,
        "images": isinstance(names, list) and _valid_images(about.get("images", {}), len(names)),
        "image_size": about["image_size"] == list(config.size),
        "best_score": best is None
        or (isinstance(best, dict) and isinstance(best.get("name"), str) and number(best.get("value"), int, float)),
        "background": about["background"] == config.background,
        "class_names": isinstance(names, list) and len(names) <= 100_000 and all(isinstance(n, str) for n in names),
        "sampling": isinstance(sampling, dict)
        and sampling.get("sampler") in list(SAMPLERS)
        and sampling.get("grid") in list(GRIDS)
        and number(sampling.get("steps"), int)
        and 1 <= sampling["steps"] <= config.timesteps
        and number(sampling.get("guidance"), int, float)
        and valid_interval(sampling.get("guidance_interval"))  # the first checkpoints do not hold it
        and valid_eta(sampling.get("eta"), SAMPLERS[sampling["sampler"]])
        and type(sampling.get("clip")) is bool,
    }
    return [key for key, is_valid in valid.items() if not is_valid]
