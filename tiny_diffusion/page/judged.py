"""What `evaluate` found out about a run, from the folder that it wrote."""

import json
from pathlib import Path

from tiny_diffusion.errors import printable
from tiny_diffusion.page.pictures import address_of

PICTURES = {
    "nearest.png": (
        "Nearest training images",
        "The samples that are closest to a training image, each beside that image. Equal pairs would be memorised.",
    ),
    "sweep.png": ("Distance by evaluations", "How far samples are from real images, by sampler and evaluations."),
    "error_by_noise.png": ("Error by noise level", "The network's error on training and held-out images."),
}
PICTURE_BYTES = 80_000  # of one
MAX_TABLES = 4


def judged_of(folder: Path, checkpoint: str) -> dict[str, object]:
    """The tables and pictures of `evaluate`; or "missing", with the "command" that makes them.

    folder: of the evaluation.   checkpoint: what the command names.
    """
    try:
        whole = json.loads((folder / "evaluation.json").read_text("utf-8"))
        tables = [_table(result) for result in whole["results"][:MAX_TABLES]]
        reference, features = whole["reference"], whole["features"]
        text = (
            f"Compared with {reference['images']:,} {reference['split']} images of {reference['name']}, by the "
            f"features {features['name']}. Real images are as many held-out ones: the best that samples can reach."
        )
    except FileNotFoundError:
        command = f"python -m tiny_diffusion evaluate --checkpoint {checkpoint}"
        return {
            "missing": "This run has not been evaluated yet. Evaluate it, and write this page again: ",
            "command": command,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"missing": f"{folder.name}/evaluation.json cannot be read. ", "command": ""}
    pictures = [
        {"title": title, "text": about, "address": address}
        for name, (title, about) in PICTURES.items()
        if (address := address_of(folder / name, PICTURE_BYTES))
    ]
    return {"text": printable(text, 400), "tables": tables, "pictures": pictures}


def _table(result: dict) -> dict[str, object]:
    """One set of samples: a title and [measure, samples, real images] rows."""
    guidance = f", guidance {result['guidance']:g}" if result.get("guidance", 1) != 1 else ""
    title = f"{result['sampler']}, {result['steps']} steps{guidance}" if "sampler" in result else "Images"
    floors = {name.split("[")[0]: value for name, value in result["floor"].items()}
    rows = [
        [printable(name), _number(value), _number(floors.get(name.split("[")[0]))]
        for name, value in result["metrics"].items()
    ]
    return {"title": title, "rows": rows}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
