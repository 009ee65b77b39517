"""An evaluation as text and as JSON.  Knows neither how the numbers were computed nor where they are written."""

from tiny_diffusion.evaluation.features import Features
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.evaluation.reference import Real


def reference_line(real: Real, features: Features) -> str:
    """What the images are compared with, and in which features."""
    right = "" if features.accuracy is None else f", {features.accuracy:.2%} accurate"
    return (
        f"reference: {real.images.name}, {real.split}, {len(real.images.images):,} images; "
        f"features {features.name} (sha256 {features.hash}{right})"
    )


def source(path: str, images: NamedImages) -> dict[str, object]:
    """What --images are, as plain JSON."""
    return {"images": path, "images_sha256": images.sha256(), "images_in_all": images.total}


def result_lines(result: dict) -> list[str]:
    """Each number of one set of images, with the floor beside it."""
    floors = {name.split("[")[0]: value for name, value in result["floor"].items()}
    lines = []
    for name, value in result["metrics"].items():
        floor = floors.get(name.split("[")[0])
        lines.append(f"  {name:<72}{value:>10.4g}" + ("" if floor is None else f"   real: {floor:.4g}"))
    return lines


def sweep_lines(results: list[dict]) -> list[str]:
    """A table with a line for each sampler, number of steps and guidance: what it costs and how good it is."""
    name = next(name for name in results[0]["metrics"] if name.startswith("relative_frechet"))
    several = len({result["guidance"] for result in results}) > 1
    lines = [f"sampler      steps  {'guidance  ' if several else ''}evaluations  {name}"]
    for result in results:
        value = relative_distance(result["metrics"])
        about = f"{result['sampler']:<12}{result['steps']:>6}" + (f"{result['guidance']:>10g}" if several else "")
        lines.append(f"{about}{result['evaluations']:>13}  {value:.4g}")
    if (floor := relative_distance(results[0]["floor"])) is not None:
        lines.append(f"{'real images':<{41 if several else 31}}  {floor:.4g}")
    return lines


def sweep_curves(results: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """(evaluations, relative Frechet distance) pairs by sampler, and by guidance if several weights were tried."""
    curves, several = {}, len({result["guidance"] for result in results}) > 1
    for result in results:
        curve = f"{result['sampler']}, guidance {result['guidance']:g}" if several else result["sampler"]
        curves.setdefault(curve, []).append((result["evaluations"], relative_distance(result["metrics"])))
    return curves


def relative_distance(numbers: dict[str, float]) -> float | None:
    """The relative Frechet distance among numbers by their full names."""
    return next((value for name, value in numbers.items() if name.startswith("relative_frechet")), None)


def as_json(real: Real, features: Features, results: list[dict]) -> dict:
    """The whole evaluation as plain JSON."""
    return {
        "features": {"name": features.name, "hash": features.hash, "accuracy": features.accuracy},
        "reference": {
            "name": real.images.name,
            "split": real.split,
            "images": len(real.images.images),
            "sha256": real.images.sha256(),
            "heldout": 0 if real.heldout is None else len(real.heldout.images),
        },
        "results": results,
    }
