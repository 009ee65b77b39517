"""Protects standard output and error: a closed pipe or a full disk never ends the work."""

import os
import sys


class Messages:
    """Standard error, whose failures are ignored: a run continues when nobody reads its messages."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes as much as can be written."""
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream was closed
            return len(text)

    def flush(self) -> None:
        """Hands what was written to the system."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def protect_streams() -> None:
    """Makes messages safe to print, also where standard output or error is closed (None in Python)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if not isinstance(sys.stderr, Messages):
        sys.stderr = Messages(sys.stderr)
