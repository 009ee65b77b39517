"""info: what a checkpoint holds, on standard output."""

from dataclasses import dataclass

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Text, option, specs
from tiny_diffusion.errors import OptionError, listed, printable

DESCRIPTION = "Show what a checkpoint holds: the network, the data, the run, its sampling.  Nothing in it is executed."
MAX_VALUE = 1000  # characters of an option's value


@dataclass(frozen=True)
class InfoOptions:
    """The checkpoint that `info` describes."""

    checkpoint: str | None = option(Text(), None, "the checkpoint to describe")


OPTIONS = (InfoOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Prints the description.  Returns the exit code."""
    options = InfoOptions(**parse(argv, program, DESCRIPTION, *OPTIONS))
    if options.checkpoint is None:
        raise OptionError("--checkpoint is required: the file to describe, for example outputs/model_final.pt")

    from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
    from tiny_diffusion.runs.folder import newest_in

    path = newest_in(options.checkpoint)
    checkpoint = load_checkpoint(path)
    about, config = checkpoint.about, checkpoint.config
    parameters = sum(tensor.numel() for tensor in load_model(checkpoint).parameters())
    height, width = about["image_size"]
    heldout = f", held-out loss {about['heldout_history'][-1][1]:.4f}" if about["heldout_history"] else ""
    state = "finished" if about["finished"] else "not finished; --resume continues it"
    rows = {
        "checkpoint": f"{path}, format {about['format']}, sha256 {about['sha256'][:12]} (verified)",
        "images": f"{about['channels']} x {height} x {width}, classes {listed(about['class_names']) or 'none'}",
        "network": f"{parameters:,} parameters, {'class-conditional' if config.class_cond else 'unconditional'}",
        "training": f"step {about['step']:,}, {about['elapsed_seconds'] / 60:.1f} minutes{heldout} ({state})",
        "sampling": checkpoint.request(()).describe(),
    }
    if student := checkpoint.student:
        baked = f", guidance {student.guidance:g} baked in" if student.guidance != 1 else ""
        rows["distilled"] = f"to {student.steps} evaluations{baked}, from the model of sha256 {student.teacher[:12]}"
    if "imported" in about:
        rows["checkpoint"] = f"{path}: {about['imported']}, sha256 {about['sha256'][:12]} of its weights"
        rows |= {} if about["step"] else {"training": "elsewhere"}
    for name, text in rows.items():
        print(f"{name:<12}{text}")
    print()
    for name in specs(type(config)):
        value, between = getattr(config, name), "x" if name == "image_size" else ","
        text = between.join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
        print(f"  --{name:<24}{printable(text, MAX_VALUE)}")
    return 0
