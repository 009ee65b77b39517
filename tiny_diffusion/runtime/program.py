"""How this process was started, so that a message names a command the way the user starts commands.  No torch."""

import sys
from pathlib import Path

CONSOLE = "tiny-diffusion"  # the script that installing the package makes, which runs in any folder
SCRIPTS = {"train": "train.py", "sample": "sample.py", "visualize": "visualize_diffusion.py"}  # of a checkout


def started_script() -> Path | None:
    """The script of a checkout that started this process, as it was typed; None if something else did."""
    script = Path(sys.argv[0])
    return script if script.name in SCRIPTS.values() else None


def is_console() -> bool:
    """Whether the installed console script started this process."""
    return Path(sys.argv[0]).stem == CONSOLE


def typed(command: str) -> str:
    """The words that start this command: python train.py, python -m tiny_diffusion train, or tiny-diffusion train."""
    return f"{CONSOLE} {command}" if is_console() else f"python {module_or_script(command)}"


def module_or_script(command: str) -> str:
    """The words that follow `python` or the options of torchrun to start this command."""
    script = started_script()
    if script is None or command not in SCRIPTS:
        return f"-m tiny_diffusion {command}"
    return str(script.with_name(SCRIPTS[command]))


def version() -> str:
    """The versions of this program, of torch and of Python, without loading torch."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from tiny_diffusion import __version__

    try:
        torch = version_of("torch")
    except PackageNotFoundError:
        torch = "is not installed"
    return f"{CONSOLE} {__version__} (torch {torch}, Python {sys.version.split()[0]})"
