"""The folder that a run writes: which file lies where, and what a resume keeps of it.

tensorboard/, wandb/             with --log
samples/epoch_XXX.png            sampled from the averaged weights
checkpoints/model_epoch_XXX.pt   every --save_interval epochs
checkpoints/latest.pt            rolling, deleted when the run ends
checkpoints/best.pt              the best score, with --keep_best
latest.png                       the newest of samples/
training_loss.png
log.jsonl                        one line per step
model_final.pt                   at the end
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import finite, make_folder, partials_of, write_text
from tiny_diffusion.runs.checkpoint import Checkpoint, load_checkpoint


class RunFolder:
    """Paths and the log of one run.  Nothing is created before `open`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.final = self.path / "model_final.pt"
        self.checkpoints = self.path / "checkpoints"
        self.latest = self.checkpoints / "latest.pt"
        self.best = self.checkpoints / "best.pt"
        self.loss_plot = self.path / "training_loss.png"
        self.newest_picture = self.path / "latest.png"
        self.log_path = self.path / "log.jsonl"
        self._log = None
        self._losses: list[tuple[int, float]] = []
        self._scores: list[tuple[int, str, float]] = []
        self._adopted: tuple[Path, Sequence[Sequence]] = self.log_path, ()

    def sample_picture(self, epoch: int) -> Path:
        return self.path / "samples" / f"epoch_{epoch:03d}.png"

    def epoch_checkpoint(self, epoch: int) -> Path:
        return self.checkpoints / f"model_epoch_{epoch:03d}.pt"

    def holds_a_run(self) -> bool:
        """Whether an earlier run wrote here."""
        return any(path.exists() for path in (self.final, self.log_path, self.latest, *self._numbered()))

    def clear(self) -> None:
        """Deletes what an earlier run wrote here, and nothing else."""
        written = [
            self.final,
            self.loss_plot,
            self.newest_picture,
            self.log_path,
            self.latest,
            self.best,
            *self._numbered(),
            *self.path.glob("samples/epoch_*.png"),
        ]
        for path in written:
            path.unlink(missing_ok=True)

    def open(self, from_step: int = 0) -> None:
        """Makes the folders and opens the log, cut back to the step from which the run continues."""
        try:
            for folder in (self.path, self.checkpoints, self.path / "samples"):
                make_folder(folder)
            for stale in self._partial_files():
                stale.unlink(missing_ok=True)
            texts, kept = self._kept_lines(from_step) if from_step else ([], [])
            self._losses = [(line["step"], _number(line.get("loss"))) for line in kept]
            self._scores = [score for line in kept for score in _scores(line)]
            write_text(self.log_path, "".join(text + "\n" for text in texts))
            self._log = open(self.log_path, "a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise FileError(
                f"--output_dir {self.path} cannot be written: {error.strerror or error}. Name another folder."
            ) from error

    def last_logged_step(self) -> int:
        """The last step in the log of an earlier session; 0 without one."""
        return max((line["step"] for line in read_log(self.log_path)[1]), default=0)

    def adopt_log(self, other: "RunFolder", loss_history: Sequence[Sequence]) -> None:
        """Continues the log of a run that began in another folder.

        loss_history: [step, loss] pairs of its checkpoint, for want of its log.
        """
        self._adopted = other.log_path, loss_history

    def _kept_lines(self, from_step: int) -> tuple[list[str], list[dict]]:
        """The lines of the log up to this step, as text and as values."""
        path, loss_history = self._adopted
        texts, lines = read_log(self.log_path if self.log_path.exists() else path)
        if not lines:
            lines = [{"step": step, "loss": loss} for step, loss in loss_history]
            texts = [json.dumps(line) for line in lines]
        kept = [i for i, line in enumerate(lines) if line["step"] <= from_step]
        return [texts[i] for i in kept], [lines[i] for i in kept]

    def log(self, **values) -> None:
        """Writes one line of JSON; NaN and infinity become null."""
        plain = finite(values)
        self._log.write(json.dumps(plain) + "\n")
        self._losses.append((plain["step"], _number(plain["loss"])))
        self._scores += _scores(plain)

    def flush(self) -> None:
        """Hands the log's lines to the system."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Closes the log."""
        if self._log is not None:
            self._log.close()

    def losses(self) -> tuple[list[int], list[float]]:
        """Steps and losses in the log, NaN where a step was skipped."""
        return [step for step, _ in self._losses], [loss for _, loss in self._losses]

    def scores(self) -> list[tuple[int, str, float]]:
        """(step, name, value) of each measurement in the log."""
        return self._scores

    def newest(self) -> tuple[Path, Checkpoint] | None:
        """The readable checkpoint with the most steps, or None.  Raises FileError if all are unreadable."""
        found, failures = [], []
        for paths in ([self.final], [self.latest], reversed(self._numbered())):
            for path in filter(Path.is_file, paths):
                try:
                    found.append((path, load_checkpoint(path)))
                    break
                except FileError as error:
                    failures.append(error)
        if failures and not found:
            raise failures[0]
        return max(found, key=lambda pair: pair[1].about["step"], default=None)

    def prune(self, keep: int | None, newest: Path) -> None:
        """Deletes all but the last `keep` numbered checkpoints up to this one, which has just been saved.

        None keeps all.  Later ones do not count: the run went back behind them, perhaps because they are damaged.
        """
        if keep is not None:
            numbered = self._numbered()
            for path in numbered[: max(0, numbered.index(newest) + 1 - keep)]:
                path.unlink(missing_ok=True)

    def _partial_files(self) -> list[Path]:
        """The temporary files that a killed process left of this run; `sample` may be writing others here meanwhile."""
        return [
            *partials_of(self.path / "samples", "epoch_*.png"),
            *partials_of(self.checkpoints, "*.pt"),
            *(
                part
                for path in (self.final, self.loss_plot, self.newest_picture, self.log_path)
                for part in partials_of(self.path, path.name)
            ),
        ]

    def _numbered(self) -> list[Path]:
        """The numbered checkpoints in the order of their epochs: 1000 after 999."""
        return sorted(self.checkpoints.glob("model_epoch_*.pt"), key=lambda path: (len(path.name), path.name))


def newest_in(path: str | Path) -> str | Path:
    """The newest readable checkpoint of a run, said in one line, where the path is its folder; any other path as it is.

    Raises FileError if all checkpoints of the run are unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    run = RunFolder(folder.parent if folder.name == "checkpoints" else folder)
    if (newest := run.newest()) is None:
        return path
    found, checkpoint = newest
    print(f"{path}: its newest model is {found}, at step {checkpoint.about['step']:,}", file=sys.stderr)
    return str(found)


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint lies in; a folder that is a model itself is its own."""
    if checkpoint.is_dir():
        return checkpoint
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def own_folder(path: Path, checkpoint: Checkpoint) -> str:
    """The folder of the run that a checkpoint lies in, whatever folder its configuration names.

    Raises OptionError if it lies outside of any run: a file from elsewhere does not choose where to write.
    """
    folder, named = run_of(path.resolve()), checkpoint.config.output_dir
    if not RunFolder(folder).holds_a_run():
        raise OptionError(f"--resume {path} lies in no run's folder. Name the folder to write by --output_dir.")
    return named if Path(named).resolve() == folder else str(folder)


def read_log(path: Path) -> tuple[list[str], list[dict]]:
    """The log's lines, as text and as values, without one that a kill left incomplete."""
    texts, lines = [], []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            texts.append(text)
            lines.append(line)
    return texts, lines


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss


def _scores(line: dict) -> list[tuple[int, str, float]]:
    """(step, name, value) of the scores in a line of the log; their names have brackets, as evaluate prints them."""
    return [(line["step"], name, value) for name, value in line.items() if "[" in name and value is not None]
