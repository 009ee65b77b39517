"""How good a recipe's samples are after some minutes of training.  Each budget trains, samples and scores a new model.

python benchmarks/time_to_quality.py --dataset mnist --data_dir data --minutes 2,5,10 --recipes "" "--optimizer adamw"

A recipe is a string of options of train.py.  The empty string means the defaults; a single flag needs a space before it
(" --class_cond").  Prints a Markdown table, each row as soon as it is known.  images/s counts the training steps alone;
wall seconds are those of the whole command.  A run that fails stays in the table with its error message.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runtime.cpu import SPINS_ALONE

ROOT = Path(__file__).resolve().parent.parent
MAX_OVERRUN = 1.05  # times its minutes: the longest that a command may take
SCORES = {  # heading: the metric of `evaluate`
    "relative FD": "relative_frechet_distance",
    "confidence": "confidence",
    "entropy": "class_entropy",
    "precision": "precision",
    "recall": "recall",
}
HEADINGS = ("recipe", "minutes", "steps", "images/s", "wall s", *SCORES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=DATASETS)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--minutes", type=budgets, default=(2.0, 5.0, 10.0), help="one budget or several [2,5,10]")
    parser.add_argument("--recipes", nargs="+", default=[""], help="strings of train.py's options ['', the defaults]")
    parser.add_argument("--num_images", type=count, default=1000, help="images sampled from each model [1000]")
    parser.add_argument("--features", help="of evaluate [the default for the data set]")
    parser.add_argument("--threads", type=count, help="OMP_NUM_THREADS of every command [all cores]")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/time_to_quality"))
    asked = parser.parse_args()
    environment, rows, floor = child_environment(asked.threads), [], {}
    print(headings(HEADINGS), flush=True)
    for minutes in asked.minutes:
        for recipe in asked.recipes:
            folder = asked.output_dir / f"{minutes:g}-minutes{re.sub(r'[^A-Za-z0-9.]+', '_', ' ' + recipe).rstrip('_')}"
            rows.append(train_and_score(asked, recipe, minutes, folder, environment))
            floor = rows[-1].pop("floor", floor)
            print(line(HEADINGS, rows[-1]), flush=True)
            if asked.json:
                asked.json.parent.mkdir(parents=True, exist_ok=True)
                content = {"options": vars(asked), "rows": rows, "floor": floor}
                asked.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    print(line(HEADINGS, {"recipe": "real images, held out", **floor}))
    late = [row for row in rows if row["wall s"] > 60 * MAX_OVERRUN * row["minutes"]]
    named = ", ".join(f"{row['recipe']} ({row['minutes']:g})" for row in late)
    print(f"\ncommands that took more than {MAX_OVERRUN} times their minutes: {named or 'none'}")


def train_and_score(
    asked: argparse.Namespace, recipe: str, minutes: float, folder: Path, environment: dict[str, str]
) -> dict:
    """Trains and scores one recipe; the row by heading.

    "floor" holds what real images score; "failed" holds the error message of a command that failed.
    """
    row = {"recipe": f"`{recipe.strip()}`" if recipe.strip() else "defaults", "minutes": minutes}
    # The options of the script come last, so that a recipe cannot override them.
    trained = run(
        [ROOT / "train.py", *shlex.split(recipe), "--dataset", asked.dataset, "--data_dir", asked.data_dir,
         "--minutes", f"{minutes:g}", "--output_dir", folder, "--overwrite"], environment,
    )  # fmt: skip
    row["wall s"] = round(trained.seconds, 1)
    if trained.error is not None:
        return {**row, "failed": trained.error}
    run_folder = RunFolder(folder)
    row["steps"], row["images/s"] = training_speed(run_folder.log_path)
    source = ["--checkpoint", run_folder.final, "--data_dir", asked.data_dir]
    return row | score(source, asked.num_images, folder / "evaluation", asked.features, environment)


@dataclass(frozen=True)
class Done:
    """seconds: of the whole command.  error: its last line if it failed, else None."""

    seconds: float
    error: str | None


def run(arguments: Sequence[object], environment: dict[str, str]) -> Done:
    """Runs Python with these arguments in a fresh process."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode == 0:
        return Done(seconds, None)
    if done.returncode < 0:
        return Done(seconds, f"ended by {signal.Signals(-done.returncode).name}")
    lines = [text.strip() for text in done.stderr.splitlines() if text.strip()]
    return Done(seconds, lines[-1] if lines else f"exit code {done.returncode}, without a message")


def child_environment(threads: int | None) -> dict[str, str]:
    """The environment of every command: it finds the package, and has equal threads with equal spinning."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"GOMP_SPINCOUNT": SPINS_ALONE, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return environment | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def training_speed(log: Path) -> tuple[int, float]:
    """The steps of a run and the images/s over all of them, from its log.jsonl."""
    reports = [json.loads(text) for text in log.read_text("utf-8").splitlines()]
    if not reports:  # the minutes were too short for a step
        return 0, 0.0
    rates = [report["images_per_second"] for report in reports]
    return reports[-1]["step"], round(len(rates) / sum(1 / rate for rate in rates), 1)


def score(
    source: Sequence[object], num_images: int, folder: Path, features: str | None, environment: dict[str, str]
) -> dict:
    """The scores of `evaluate` by heading, with those of real images as "floor"; or {"failed": its error message}.

    source: the options of `evaluate` that name the images and what they are compared with.
    """
    command = ["-m", "tiny_diffusion", "evaluate", *source, "--num_images", num_images, "--output", folder]
    done = run([*command, *(["--features", features] if features else [])], environment)
    if done.error is not None:
        return {"failed": done.error}
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))["results"][0]
    return by_heading(found["metrics"]) | {"floor": by_heading(found["floor"])}


def by_heading(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers of `evaluate` that the table shows."""
    plain = {name.split("[")[0]: value for name, value in numbers.items()}
    return {heading: plain[metric] for heading, metric in SCORES.items() if plain.get(metric) is not None}


def headings(names: Sequence[str]) -> str:
    """The head of a Markdown table."""
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"


def line(names: Sequence[str], row: dict) -> str:
    """One line of a Markdown table; an error message goes into the first empty cell."""
    cells = [formatted(row.get(name, "")) for name in names]
    if "failed" in row:
        cells[cells.index("")] = row["failed"].replace("|", "\\|")
    return f"| {' | '.join(cells)} |"


def formatted(value: object) -> str:
    """A cell of the table."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:g}" if value == round(value, 1) else f"{value:.4f}" if value < 1 else f"{value:.3f}"


def budgets(text: str) -> tuple[float, ...]:
    """An option's minutes, one or several."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value < 1e4 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one number of minutes or several. Give, for example, 2,5,10."
        )
    return values


def count(text: str) -> int:
    """An option's positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number. Give, for example, 100.")
    return int(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
