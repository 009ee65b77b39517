"""Records of a run where people look for them: TensorBoard and Weights & Biases.

A tracker gets numbers, pictures and the configuration, and knows nothing of training.  Only rank 0 has any.  To add
one: a class with `numbers`, `picture` and `close`, a row in TRACKERS, and its name in the row `log` of Config.
"""

import importlib.util
import json
import math
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from tiny_diffusion.errors import FileError
from tiny_diffusion.files import write_text


class Trackers:
    """The trackers of a run, as one.

    from_step: the step that the run continues from; 0 begins a record.   logged_step: the last one that an earlier
    session logged, perhaps beyond from_step.   A tracker that fails is reported and left out, and the run goes on.
    Raises FileError if one cannot begin.
    """

    def __init__(self, names: Iterable[str], folder: Path, config: Mapping, from_step: int = 0, logged_step: int = 0):
        self.open = {name: TRACKERS[name](folder, config, from_step, logged_step) for name in names}
        self.last_steps: dict[str, int] = {}
        for name, tracker in self.open.items():
            print(f"{name}: {tracker.where}", file=sys.stderr)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to the curve of each name, unless it is not finite or the curve has one at this step."""
        values = {name: value for name, value in values.items() if math.isfinite(value) and self._is_new(name, step)}
        if values:
            self._each("numbers", step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Adds a PNG file to the pictures of this name."""
        if self._is_new(name, step):
            self._each("picture", step, name, path)

    def close(self) -> None:
        """Writes what is left."""
        self._each("close", None)
        self.open = {}

    def _is_new(self, name: str, step: int) -> bool:
        if self.last_steps.get(name, -1) >= step:
            return False
        self.last_steps[name] = step
        return True

    def _each(self, what: str, step: int | None, *arguments) -> None:
        for name, tracker in list(self.open.items()):
            try:
                getattr(tracker, what)(*(() if step is None else (step,)), *arguments)
            except Exception as error:  # a record only shows the run
                del self.open[name]
                where = "" if step is None else f" at step {step}"
                tqdm.write(f"--log {name}: the record ends{where}: {_one_line(error)}", file=sys.stderr)


def check_trackers(names: Iterable[str]) -> None:
    """Raises FileError if the library of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise FileError(f"--log {name} needs {name}. Run: pip install {name}, or leave --log out.")


class TensorBoard:
    """Event files in the folder `tensorboard` of the run, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, config: Mapping, from_step: int, logged_step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        if not from_step:
            for earlier in path.glob("events.out.tfevents.*"):
                earlier.unlink()
        # Readers drop what an earlier session wrote at steps from purge_step on.
        self.writer = SummaryWriter(str(path), purge_step=from_step + 1 if from_step else None, flush_secs=30)
        self.where = f"tensorboard --logdir {path}"
        if not from_step:
            self.writer.add_text("configuration", f"```json\n{json.dumps(config, indent=2)}\n```", 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, offline if WANDB_MODE says so.  Its id is kept in the folder, so a resume finds it."""

    def __init__(self, folder: Path, config: Mapping, from_step: int, logged_step: int):
        import wandb

        name = folder / "wandb" / "run_id"
        run_id = name.read_text("utf-8").strip() if from_step and name.exists() else uuid.uuid4().hex[:8]
        self.logged_step = logged_step if from_step else 0
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True
        )
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tiny_diffusion"), id=run_id, resume="allow", dir=str(folder),
                name=os.environ.get("WANDB_NAME", folder.resolve().name), config=dict(config), settings=quiet,
            )  # fmt: skip
        except Exception as error:
            raise FileError(
                f"--log wandb cannot begin: {_one_line(error)}. Run wandb login, or set WANDB_MODE=offline."
            ) from error
        write_text(name, run_id + "\n")
        self.where = f"offline, wandb sync {Path(self.run.dir).parent}" if self.run.offline else self.run.url

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if step > self.logged_step:  # Weights & Biases keeps the first value of a step
            self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        if step > self.logged_step:
            self.run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}
