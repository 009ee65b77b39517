"""The command line: `main` finds the command, runs it and turns what users can cause into one line and an exit code.

To add a command: a file here with ``run(argv, program, started)``, a row in COMMANDS.
"""

import importlib
import os
import sys
import time
from difflib import get_close_matches
from pathlib import Path

from tiny_diffusion.errors import DivergenceError, FileError, LostProcessError, OptionError
from tiny_diffusion.runtime import cpu
from tiny_diffusion.runtime.ranks import DISTRIBUTED_COMMANDS, is_main, only_main_prints, run_alone, should_report
from tiny_diffusion.runtime.streams import protect_streams

COMMANDS = {
    "train": ("tiny_diffusion.cli.train", "train a model on a data set"),
    "sample": ("tiny_diffusion.cli.sample", "draw images from a trained model"),
    "visualize": ("tiny_diffusion.cli.visualize", "show how noise covers images, and the schedules side by side"),
    "evaluate": ("tiny_diffusion.cli.evaluate", "measure how good a model's images are, or any other images"),
    "classifier": ("tiny_diffusion.cli.classifier", "train the small classifier that evaluate compares images in"),
    "benchmark": ("tiny_diffusion.cli.benchmark", "measure how fast this machine trains and draws"),
    "info": ("tiny_diffusion.cli.info", "say what a checkpoint holds"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs ``COMMAND [options]`` and returns the exit code."""
    started = time.monotonic()
    protect_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name, which any console must be able to print
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return _fail("tiny_diffusion", f"command {command!r} is not one of {', '.join(COMMANDS)}.{hint}", 2)
    cpu.tune_cpu()
    script = Path(sys.argv[0]).name
    program = script if script in SCRIPTS else f"tiny_diffusion {command}"
    if command not in DISTRIBUTED_COMMANDS:
        if not is_main():
            return 0
        run_alone()
    try:
        with only_main_prints():
            return importlib.import_module(COMMANDS[command][0]).run(rest, program, started) or 0
    except (OptionError, FileError, DivergenceError) as error:
        return _fail(program, str(error), error.exit_code)
    except LostProcessError as error:
        return _fail(program, str(error), error.exit_code, because_of_another=True)
    except KeyboardInterrupt:
        return _fail(program, "interrupted", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tiny_diffusion"):
            raise
        return _fail(program, f"{error.name} is not installed. Run: pip install -r requirements.txt", 1)
    except BrokenPipeError:  # who read our standard output, `head` for example, has gone: no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(program, f"{where}{error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        reason = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
        way_out = "Lower --batch_size, --base_channels or --image_size; for training, raise --accumulate."
        return _fail(program, f"out of memory{reason}. {way_out}", 1)


def _fail(program: str, message: str, code: int, because_of_another: bool = False) -> int:
    if should_report(message, because_of_another):
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    return (
        "usage: python -m tiny_diffusion COMMAND [options]\n\n"
        "Train, sample and look into small diffusion models of images.\n\n"
        + "\n".join(lines)
        + "\n\npython -m tiny_diffusion COMMAND --help lists a command's options."
        + "\nTry: python train.py --dataset digits --output_dir outputs/digits"
    )


SCRIPTS = ("train.py", "sample.py", "visualize_diffusion.py")
