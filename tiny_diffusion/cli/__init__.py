"""The command line: `main` runs a command, and turns an error that a user can cause into one line and an exit code.

To add a command: a file here with ``run(argv, program, started)``, and a row in COMMANDS.
"""

import importlib
import os
import sys
import time
from difflib import get_close_matches

from tiny_diffusion.errors import DivergenceError, FileError, LostProcessError, OptionError, printable
from tiny_diffusion.runtime import cpu
from tiny_diffusion.runtime.program import CONSOLE, is_console, started_script, version
from tiny_diffusion.runtime.ranks import DISTRIBUTED_COMMANDS, is_main, only_main_prints, run_alone, should_report
from tiny_diffusion.runtime.streams import protect_streams

COMMANDS = {
    "train": ("tiny_diffusion.cli.train", "train a model on a data set"),
    "sample": ("tiny_diffusion.cli.sample", "sample images from a trained model"),
    "distill": ("tiny_diffusion.cli.distill", "make a trained model sample in one, two or four evaluations"),
    "visualize": ("tiny_diffusion.cli.visualize", "show how noise covers images, or compare the noise schedules"),
    "evaluate": ("tiny_diffusion.cli.evaluate", "measure how good a model's images are, or any other images"),
    "classifier": ("tiny_diffusion.cli.classifier", "train the small classifier whose features evaluate compares"),
    "benchmark": ("tiny_diffusion.cli.benchmark", "measure how fast this machine trains and samples"),
    "report": ("tiny_diffusion.cli.report", "show a run as one HTML page in which its model runs"),
    "export": ("tiny_diffusion.cli.export", "write a model for diffusers, ONNX or safetensors"),
    "info": ("tiny_diffusion.cli.info", "show what a checkpoint holds"),
}
COMMAND_NAMES = {  # what other programs call our commands
    "train": "fit training finetune fine_tune learn run",
    "sample": "generate generation gen draw infer inference predict synthesize create sampling inpaint edit",
    "evaluate": "eval evaluation test score fid metrics measure",
    "visualize": "visualise visualize_diffusion plot show forward_diffusion",
    "distill": "distil distillation consistency",
    "benchmark": "bench speed profile",
    "info": "inspect describe show_checkpoint summary",
}
MAX_MESSAGE = 5000  # characters


def main(argv: list[str] | None = None) -> int:
    """Runs ``COMMAND [options]`` and returns the exit code.  An error that is our own defect keeps its traceback."""
    started = time.monotonic()
    protect_streams()
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # so that any console can print any folder's name
    program = _program(argv)
    try:
        code = _run(argv, program, started)
        sys.stdout.flush()  # here, where the error of a closed pipe or a full disk is still caught
        return code
    except (Exception, KeyboardInterrupt) as error:
        if (answer := _answer(error)) is None:
            raise
        code, message = answer
        if isinstance(error, OSError):
            _drop_unwritten_output()
        if message and should_report(message, because_of_another=isinstance(error, LostProcessError)):
            print(f"{program}: error: {printable(' '.join(message.split()), MAX_MESSAGE)}", file=sys.stderr)
        return code


def _program(argv: list[str]) -> str:
    """The name of the command in its messages."""
    if script := started_script():
        return script.name
    name = CONSOLE if is_console() else "tiny_diffusion"
    return f"{name} {argv[0]}" if argv and argv[0] in COMMANDS else name


def _run(argv: list[str], program: str, started: float) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, *rest = argv
    if command in ("-V", "--version"):
        print(version())
        return 0
    if command.startswith("--print"):
        return importlib.import_module("tiny_diffusion.cli.completion").run(argv, program, started)
    if command not in COMMANDS:
        known = [name for name, words in COMMAND_NAMES.items() if command.lower() in words.split()]
        near = known or get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"command {command!r} is not one of {', '.join(COMMANDS)}.{hint}")
    cpu.tune_cpu()
    if command not in DISTRIBUTED_COMMANDS:
        if not is_main():
            return 0
        run_alone()
    with only_main_prints():
        return importlib.import_module(COMMANDS[command][0]).run(rest, program, started) or 0


def _answer(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message for an error that a user can cause; None for a defect of ours."""
    for kind, code, message in ANSWERS:
        if isinstance(error, kind):
            return code, message(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("tiny_diffusion"):
        return 1, f"{error.name} is not installed. Run: pip install -r requirements.txt"
    if isinstance(error, MemoryError | RuntimeError):
        from tiny_diffusion.runtime.memory import ran_out_of_memory  # torch is loaded already, by what raised this

        return (1, _out_of_memory(error)) if ran_out_of_memory(error) else None
    return None


def _os_error(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def _out_of_memory(error: BaseException) -> str:
    reason = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
    way_out = "Lower --batch_size, --base_channels or --image_size; for training, raise --accumulate."
    return f"out of memory{reason}. {way_out}"


ANSWERS = (
    # error, exit code, message; a subclass stands before its base class
    *((ours, ours.exit_code, str) for ours in (OptionError, FileError, DivergenceError, LostProcessError)),
    (KeyboardInterrupt, 130, lambda error: "interrupted"),
    (BrokenPipeError, 1, lambda error: ""),  # the reader of our standard output, such as `head`, has exited
    (OSError, 1, _os_error),
)


def _drop_unwritten_output() -> None:
    """Points standard output to os.devnull if it cannot be written, or the interpreter's flush at exit would fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    start = CONSOLE if is_console() else "python -m tiny_diffusion"
    return (
        f"usage: {start} COMMAND [options]\n\n"
        "Train small diffusion models of images, sample from them, and measure them.\n\n"
        + "\n".join(lines)
        + f"\n\n{start} COMMAND --help lists a command's options; --version shows the version,\n"
        "and --print_completion bash, zsh or fish prints the completion of a shell.\n"
        f"Try: {start} train --dataset digits --output_dir outputs/digits"
    )
