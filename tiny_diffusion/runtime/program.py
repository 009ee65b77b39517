"""How this process was started, so that a message names a command the way the user starts commands.  No torch."""

import sys
from pathlib import Path

SCRIPTS = {"train": "train.py", "sample": "sample.py", "visualize": "visualize_diffusion.py"}  # of a checkout


def started_script() -> Path | None:
    """The script of a checkout that started this process, as it was typed; None if something else did."""
    script = Path(sys.argv[0])
    return script if script.name in SCRIPTS.values() else None


def typed(command: str) -> str:
    """The words that follow `python` to start this command: train.py, or -m tiny_diffusion train."""
    script = started_script()
    if script is None or command not in SCRIPTS:
        return f"-m tiny_diffusion {command}"
    return str(script.with_name(SCRIPTS[command]))
