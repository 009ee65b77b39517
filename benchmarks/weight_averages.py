"""Whether another length of the weight average would have sampled better.  Trains one run and averages it several ways.

python benchmarks/weight_averages.py --dataset mnist --data_dir data --minutes 10

Beside the run's own average, which follows a moving window of about an eighth of the steps so far, it keeps power-
function averages of the relative widths that are asked for: at step n their decay is (1 - 1/n)^(gamma + 1), so that the
average's standard deviation in time is `width` times the length of the run.  Karras et al. (2024), "Analyzing and
Improving the Training Dynamics of Diffusion Models" (EDM2), equations 121 to 127.  Each average becomes a checkpoint of
its own beside model_final.pt, and `evaluate` scores it.  Prints a Markdown table, each row as soon as it is known.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from time_to_quality import HEADINGS, child_environment, headings, line, score

import tiny_diffusion.training.trainer as training
from tiny_diffusion.cli.python import train
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.runs.checkpoint import load_checkpoint, save_checkpoint
from tiny_diffusion.training.ema import Ema

SHOWN = ("average", *HEADINGS[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=DATASETS)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.02, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25])
    parser.add_argument("--num_images", type=int, default=4000, help="images sampled from each average [4000]")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/weight_averages"))
    parser.add_argument("--scored_only", action="store_true", help="score the averages that lie in --output_dir")
    asked = parser.parse_args()
    if not asked.scored_only:
        train_and_average(asked)
    print(headings(SHOWN), flush=True)
    for name in ("today's", *(f"{width:g}" for width in asked.widths)):
        path = asked.output_dir / (f"width_{name}.pt" if name != "today's" else "model_final.pt")
        source = ["--checkpoint", path, "--data_dir", asked.data_dir]
        row = score(source, asked.num_images, asked.output_dir / f"scores_{name}", None, child_environment(None))
        floor = row.pop("floor", {})
        print(line(SHOWN, {"average": name, **row}), flush=True)
    print(line(SHOWN, {"average": "real images, held out", **floor}))


def train_and_average(asked: argparse.Namespace) -> None:
    """Trains by today's defaults, and writes a checkpoint for each width."""
    kept: list[PowerAverages] = []

    class EmaAndMore(Ema):
        """The run's own average, and the others beside it."""

        def __init__(self, model: nn.Module, decay: float):
            super().__init__(model, decay)
            kept[:] = [PowerAverages(model, asked.widths)]

        def update(self, steps: int) -> None:
            super().update(steps)
            kept[0].update(steps)

    training.Ema = EmaAndMore
    final = train(
        dataset=asked.dataset, data_dir=asked.data_dir, minutes=asked.minutes, output_dir=asked.output_dir,
        overwrite=True,
    )  # fmt: skip
    checkpoint = load_checkpoint(final)
    for width, average in zip(asked.widths, kept[0].averages, strict=True):
        tensors = checkpoint.tensors | {f"ema/{name}": tensor for name, tensor in average.items()}
        save_checkpoint(asked.output_dir / f"width_{width:g}.pt", checkpoint.about, tensors)


class PowerAverages:
    """Averages of a network's parameters, of several relative widths at once."""

    def __init__(self, model: nn.Module, widths: Sequence[float]):
        self.sources = dict(model.named_parameters())
        self.gammas = [gamma_of(width) for width in widths]
        self.averages = [{name: torch.zeros_like(tensor) for name, tensor in self.sources.items()} for _ in widths]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Follows optimiser step number `steps`, counted from 1."""
        sources = list(self.sources.values())
        for gamma, average in zip(self.gammas, self.averages, strict=True):
            torch._foreach_lerp_(list(average.values()), sources, 1 - (1 - 1 / steps) ** (gamma + 1))


def gamma_of(width: float) -> float:
    """The exponent whose average has this relative standard deviation: (g + 1) / ((g + 2)^2 (g + 3)) = width^2."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots[np.isreal(roots)].real.max())


if __name__ == "__main__":
    main()
