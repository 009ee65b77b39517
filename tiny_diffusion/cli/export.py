"""export: a trained model as a folder of diffusers, an ONNX file or a .safetensors file, checked after writing."""

from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.sample import SampleOptions
from tiny_diffusion.cli.selection import labels_of
from tiny_diffusion.config.option import Choice, Text, again, option
from tiny_diffusion.errors import OptionError, listed
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Write a trained model for other programs.  What was written is loaded again and compared with the model.

  PROGRAM --checkpoint outputs/mnist/model_final.pt --format diffusers --output outputs/mnist/diffusers
  PROGRAM --checkpoint outputs/mnist/model_final.pt --format diffusers --classes 3 --output outputs/three
  PROGRAM --checkpoint outputs/mnist/model_final.pt --format onnx --output outputs/mnist/model.onnx
  PROGRAM --checkpoint outputs/mnist/model_final.pt --format safetensors --output outputs/mnist/model.safetensors

sample, evaluate, info and train --init_from read diffusers' folders and these .safetensors files, too.
"""
ENDINGS = {"diffusers": "", "onnx": ".onnx", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class ExportOptions:
    """What `export` writes."""

    # fmt: off
    checkpoint: str | None = option(Text(), None, "the model: model_final.pt, or any checkpoint of a run")
    format: str | None = option(
        Choice(ENDINGS), None, "diffusers: a folder of UNet2DModel and scheduler; onnx; safetensors: weights, options")
    output: str | None = option(Text(), None, "the folder, or the file.onnx or file.safetensors, to write")
    classes: str | None = option(
        Text("CLASS"), None,
        "the class that the exported model has, baked in: its name or number, none, or all to keep them as an input "
        "[none for diffusers, else all]")
    weights: str = again(SampleOptions, "weights")
    # fmt: on


OPTIONS = (ExportOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Exports, and returns the exit code."""
    options = ExportOptions(**parse(argv, program, DESCRIPTION, *OPTIONS))
    for name, example in (("checkpoint", "outputs/model_final.pt"), ("format", "diffusers"), ("output", "exported")):
        if getattr(options, name) is None:
            raise OptionError(f"--{name} is required, for example --{name} {example}")
    path = _output(options)

    from tiny_diffusion.export.model import exported_model
    from tiny_diffusion.runs.checkpoint import load_checkpoint
    from tiny_diffusion.runs.folder import newest_in

    checkpoint = load_checkpoint(newest_in(options.checkpoint))
    label = _label(options, checkpoint)
    model = exported_model(checkpoint, options.weights, label)
    check_writable("output", path)
    for line in _write(options.format, model, path):
        print(line)
    return 0


def _output(options: ExportOptions) -> Path:
    """The path to write.  Raises OptionError for another ending, and for a folder that holds something."""
    path, ending = Path(options.output), ENDINGS[options.format]
    if path.suffix.lower() != ending and ending:
        raise OptionError(f"--output {path}: --format {options.format} writes a file whose name ends in {ending}.")
    if not ending and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise OptionError(f"--output {path} exists already. Name a new folder, or delete that one first.")
    return path


def _label(options: ExportOptions, checkpoint) -> int | None:
    """The label to bake into the model; None to keep the classes, or where there are none."""
    config, names, text = checkpoint.config, checkpoint.class_names, options.classes
    if text is None:
        text = ("none" if options.format == "diffusers" else "all") if config.class_cond else ""
    if text in ("", "all") and text not in names:
        if text and not config.class_cond:
            labels_of(text, False, ())  # refuses it
        return None
    if text == "none" and text not in names and config.class_cond:
        if not config.label_dropout:
            raise OptionError(
                "--classes none: the model was trained with --label_dropout 0, never without a class. Add --classes "
                f"{names[0]}, for example, or --classes all."
            )
        return len(names)
    labels = labels_of(text, config.class_cond, names)
    if len(labels) != 1:
        raise OptionError(f"--classes {text}: one class can be baked in, or none, or all kept as an input.")
    if labels[0] not in checkpoint.trained_labels:
        raise OptionError(
            f"--classes {text}: the model was trained on no image of class {listed(names[labels[0] :][:1])}."
        )
    return labels[0]


def _write(format: str, model, path: Path) -> list[str]:
    """Writes the model, and returns what to print."""
    if format == "diffusers":
        from tiny_diffusion.export.diffusers import PLAIN, export_diffusers

        kind, error = export_diffusers(model, path)
        load = (
            f'{kind}.from_pretrained("{path}")'
            if kind == PLAIN
            else (
                f'DiffusionPipeline.from_pretrained("{path}", trust_remote_code=True), whose code is pipeline.py there'
            )
        )
        steps = min(model.config.timesteps, 1000)
        return [
            f"{path}: a pipeline of diffusers, whose outputs differ by {error:.1e} after loading",
            f"load it by {load}; sample by pipeline(batch_size=16, num_inference_steps={steps})",
        ]
    if format == "onnx":
        from tiny_diffusion.export.onnx import export_onnx

        error = export_onnx(model, path)
        inputs = "x, time, label" if model.num_classes else "x, time"
        return [f"{path}: takes {inputs}, in batches of any size; onnxruntime differs from torch by {error:.1e}"]
    from tiny_diffusion.export.safetensors import export_safetensors

    export_safetensors(model, path)
    return [f"{path}: read back with the same weights; --checkpoint {path} samples from it"]
