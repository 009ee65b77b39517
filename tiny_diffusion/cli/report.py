"""report: a run as one HTML file, in which its model runs."""

import time
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Flag, Text, again, option
from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Write one HTML file that shows a run and in which its model runs: without a network, in any browser of today.
It shows the options and curves, real images under noise, a recorded sampling, the model itself with every sampler,
a drawing that it denoises, and what `evaluate` measured.

  python -m tiny_diffusion report --run outputs/mnist --output mnist.html
  python -m tiny_diffusion report --run outputs/mnist --watch      # the page changes in the browser when you reload it
"""
WATCH_SECONDS = 5.0  # between looks at a run


@dataclass(frozen=True)
class ReportOptions:
    """What `report` shows, and where it is written."""

    run: str | None = option(Text(), None, "folder of the run, the --output_dir of train or distill")
    output: str | None = option(Text(), None, "the page to write, .html [report.html in the folder of the run]")
    student: str | None = option(
        Text(), None, "a model that distill made of this one: its folder or checkpoint [RUN/student, if there is one]"
    )
    data_dir: str | None = again(Config, "data_dir", help="folder of the data set, for real images [the run's]")
    watch: bool = option(Flag(), False, "write the page again whenever the run has written something, until it ends")


OPTIONS = (ReportOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Writes the page.  Returns the exit code."""
    options = ReportOptions(**parse(argv, program, DESCRIPTION, *OPTIONS))
    if options.run is None:
        raise OptionError("--run is required: the folder of a run, for example outputs/mnist")
    output = Path(options.output or Path(options.run) / "report.html")
    if output.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--output {output}: the page is an HTML file. End its name with .html.")
    if not options.watch:
        _write(options, output)
        return 0
    if not Path(options.run).is_dir():
        raise FileError(f"--run {options.run} does not exist. Start the run first, or name its --output_dir.")
    seen = None
    while True:
        state = _state(Path(options.run))
        if state != seen and _write_if_there(options, output):
            seen = state
            if _is_finished(options.run):
                return 0
        time.sleep(WATCH_SECONDS)


def _write(options: ReportOptions, output: Path) -> None:
    from tiny_diffusion.page.build import open_run, write_page

    opened = open_run(options.run, options.student)
    check_writable("output", output)
    try:
        size = write_page(opened, output, options.data_dir)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    print(f"wrote {output} ({size / 1e6:.1f} MB) of step {opened.checkpoint.about['step']:,}", flush=True)


def _write_if_there(options: ReportOptions, output: Path) -> bool:
    """Writes the page unless the run has not written a checkpoint yet.  Returns whether it did."""
    from tiny_diffusion.runs.folder import RunFolder

    run = RunFolder(options.run)
    if not any(path.exists() for path in (run.final, run.latest, *run.checkpoints.glob("*.pt"))):
        return False
    _write(options, output)
    return True


def _state(folder: Path) -> dict[Path, float]:
    """When the checkpoints, the pictures and the evaluation of a run were written."""
    found = {}
    for pattern in ("*.pt", "checkpoints/*.pt", "samples/*.png", "evaluation/*"):
        for path in folder.glob(pattern):
            try:
                found[path] = path.stat().st_mtime
            except OSError:
                continue  # replaced in this moment
    return found


def _is_finished(folder: str) -> bool:
    from tiny_diffusion.runs.folder import RunFolder

    found = RunFolder(folder).newest()
    return found is not None and found[1].about["finished"]
