"""The JavaScript of the page: which files the worker and the page are made of, in the order in which they are read.

They are plain scripts, not modules, because a page that is opened from a disk may not load modules.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
METHOD = ("random.js", "schedules.js", "samplers.js", "pixels.js")
NETWORK = ("weights.js", "kernel.js", "network.js", "tensors.js", "process.js")
WORKER = (*METHOD, *NETWORK, "worker.js")
PAGE = (
    "random.js",
    "schedules.js",
    "samplers.js",
    "pixels.js",
    "charts.js",
    "pictures.js",
    "run.js",
    "films.js",
    "drawing.js",
    "live.js",
    "page.js",
)


def script(names: tuple[str, ...]) -> str:
    """These files one after another."""
    return "\n".join((FOLDER / name).read_text("utf-8") for name in names)


def kernel() -> bytes:
    """The WebAssembly module that page/assemble.py made of kernel.wat."""
    return (FOLDER / "kernel.wasm").read_bytes()
