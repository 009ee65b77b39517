"""Writes the page of a run: one HTML file with its style, scripts and pictures and the model, which asks for nothing.

page.html is the frame; page.css its style; scripts.py names its scripts.  What the page shows is one JSON value, made
here.  To add to a section: a value here, and what shows it in the script of that section.
"""

import html
import json
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion import __version__
from tiny_diffusion.diffusion.schedules import SCHEDULES
from tiny_diffusion.errors import FileError, OptionError, printable
from tiny_diffusion.files import finite, write_text
from tiny_diffusion.page import facts, judged, recordings
from tiny_diffusion.page.model import model_of, schedule_of, why_not_live
from tiny_diffusion.page.pictures import base64_of
from tiny_diffusion.page.scripts import FOLDER, PAGE, WORKER, kernel, script
from tiny_diffusion.runs.checkpoint import Checkpoint, load_checkpoint, load_model
from tiny_diffusion.runs.folder import RunFolder

UNFINISHED = (
    "The run has not ended: this is its state after step {step:,}. report --watch writes this file again while the run "
    "goes on, and reloading the page shows it."
)
FILM_BYTES, FILM_BYTES_BESIDE_STUDENT = 400_000, 150_000


@dataclass(frozen=True, eq=False)
class Run:
    """What a page is made of: a checkpoint and, if there is one, a model distilled from it, each with its path."""

    folder: Path
    path: Path
    checkpoint: Checkpoint
    student_path: Path
    student: Checkpoint | None


def open_run(folder: str, student: str | None = None) -> Run:
    """The newest checkpoint of a run, and its student: the one named, or that of RUN/student.

    Raises FileError if there is no run, and OptionError for a student that makes other images.
    """
    run = RunFolder(folder)
    if not run.path.is_dir():
        is_file = run.path.is_file()
        what = f"is a file. Name the folder that it lies in: {run.path.parent}" if is_file else "does not exist"
        raise FileError(f"--run {folder} {what}" + ("." if is_file else ". Name the --output_dir of a run of train."))
    if (found := run.newest()) is None:
        raise FileError(f"--run {folder} holds no checkpoint yet. Name the --output_dir of a run of train.")
    path = Path(student) if student else run.path / "student"
    path = path / "model_final.pt" if path.is_dir() else path
    distilled = load_checkpoint(path) if student or path.is_file() else None
    if distilled is not None:
        _check_student(distilled, found[1], path)
    return Run(run.path, *found, path, distilled)


def _check_student(student: Checkpoint, teacher: Checkpoint, path: Path) -> None:
    if student.student is None:
        raise OptionError(f"--student {path} was not made by distill. Leave it out, or name a distilled model.")
    if (student.shape, student.class_names) != (teacher.shape, teacher.class_names):
        raise OptionError(f"--student {path} makes other images than this run. Name a model distilled from it.")


def write_page(run: Run, output: Path, data_dir: str | None = None) -> int:
    """Writes the page, whole or not at all, and returns its number of bytes.   data_dir: where the data set lies."""
    text = page_of(content_of(run, data_dir))
    write_text(output, text)
    return len(text.encode())


def page_of(content: dict) -> str:
    """The HTML of this content."""
    plain = json.dumps(finite(content), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    parts = {
        "title": html.escape(content["title"]),
        "version": __version__,
        "style": (FOLDER / "page.css").read_text("utf-8").rstrip(),
        "data": plain.replace("<", "\\u003c"),  # a name in the data cannot end the script that holds it
        "worker": script(WORKER).rstrip(),
        "script": script(PAGE).rstrip(),
    }
    frame, *pieces = (FOLDER / "page.html").read_text("utf-8").split("{{")
    for piece in pieces:  # once from left to right, so that no part is searched for the names of others
        name, rest = piece.split("}}", 1)
        frame += parts[name] + rest
    return frame


def content_of(run: Run, data_dir: str | None = None) -> dict[str, object]:
    """What the page shows, as plain values."""
    checkpoint, config = run.checkpoint, run.checkpoint.config
    model = load_model(checkpoint)
    channels, height, width = checkpoint.shape
    title = f"{config.dataset}: a diffusion model"
    return {
        "title": title,
        "summary": _summary(run, model),
        "shape": {"channels": channels, "height": height, "width": width},
        "run": _run(run, model),
        "schedule": schedule_of(config),
        "schedules": list(dict.fromkeys((*SCHEDULES, config.schedule))),
        "images": recordings.real_images(config, run.folder, data_dir),
        "film": recordings.film_of(checkpoint, model, FILM_BYTES_BESIDE_STUDENT if run.student else FILM_BYTES),
        "live": _live(run),
        "judged": judged.judged_of(run.folder / "evaluation", printable(str(run.path))),
    }


def _summary(run: Run, model) -> str:
    config, steps = run.checkpoint.config, run.checkpoint.about["step"]
    kind = "A class-conditional" if config.class_cond else "An unconditional"
    size = f"{_parameters(model) / 1e6:.2f} million parameters"
    live = "" if why_not_live(run.checkpoint) else " It runs in this page."
    return f"{kind} U-Net of {size}, trained on {config.dataset} for {steps:,} steps.{live}"


def _parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _run(run: Run, model) -> dict[str, object]:
    checkpoint, log = run.checkpoint, facts.log_of(run.folder)
    changed, options = facts.options_of(checkpoint.config)
    multiplications = facts.multiplications_of(checkpoint.config, checkpoint.shape, len(checkpoint.class_names))
    finished = checkpoint.about["finished"]
    return {
        "text": "" if finished else UNFINISHED.format(step=checkpoint.about["step"]),
        "facts": facts.facts_of(checkpoint, log, _parameters(model), multiplications),
        "changed": changed,
        "options": options,
        "curves": facts.curves_of(checkpoint, log),
        "epochs": recordings.epochs_of(run.folder),
    }


def _live(run: Run) -> dict[str, object]:
    """The models by name, as process.js takes them, each with a "title"; or "missing", which says why there is none."""
    if reason := why_not_live(run.checkpoint):
        return {"missing": f"This model cannot run in a page: {reason}. The recordings above show what it does."}
    models = {"main": model_of(run.checkpoint) | {"title": "the run's model", "path": printable(str(run.path))}}
    if run.student and why_not_live(run.student) is None:
        steps = run.student.student.steps
        models["student"] = model_of(run.student) | {
            "title": f"its student of {steps} steps",
            "path": printable(str(run.student_path)),
        }
    return {"models": models, "kernel": base64_of(kernel())}
