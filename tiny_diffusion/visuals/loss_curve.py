"""The plot of a run's loss, with the scores of its samples in a second panel."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from tiny_diffusion.visuals import plotting


def save_loss_curve(
    path: str | os.PathLike,
    steps: Sequence[float],
    losses: Sequence[float],
    heldout_steps: Sequence[float] = (),
    heldout_losses: Sequence[float] = (),
    title: str = "",
    scores: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Saves the loss over steps as PNG: each loss light, their running average dark, held-out losses as points.

    scores: name -> (step, value) pairs, measured on samples of the run and plotted in a second panel.
    A loss that is not finite (a skipped step) leaves a gap.  The axis is logarithmic if the average falls (or rises)
    more than threefold and every loss is positive.
    """
    figure = plotting.new_figure(12 if scores else 7, 4.2)
    axes = figure.add_subplot(1, 2 if scores else 1, 1)
    steps, losses = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    losses = np.where(np.isfinite(losses), losses, np.nan)
    _plot_losses(axes, steps, losses, heldout_steps, heldout_losses)
    axes.set(xlabel="step", ylabel="loss")
    plotting.show_name(axes.title, title)
    plotting.quiet_axes(axes)
    if scores:
        _plot_scores(figure.add_subplot(1, 2, 2), scores)
    plotting.save_figure(path, figure)


def _plot_losses(axes, steps: np.ndarray, losses: np.ndarray, heldout_steps, heldout_losses) -> None:
    average = running_average(losses)
    dots = {"marker": "o" if len(steps) < 50 else None, "markersize": 3}
    axes.plot(*thinned(steps, losses), color=plotting.COLOURS[5], alpha=0.45, linewidth=0.8, **dots)
    every = max(1, len(steps) // 2000)
    few = [np.append(values[:-1:every], values[-1:]) for values in (steps, average)]
    axes.plot(*few, color=plotting.COLOURS[0], linewidth=1.8, **dots)
    names = ["each step", "running average"]
    if len(heldout_steps):
        axes.plot(heldout_steps, heldout_losses, color=plotting.COLOURS[1], linewidth=1.2, marker="o", markersize=4)
        names.append("held-out images")
    plotting.name_curves(axes, names)
    plotting.whole_steps(axes)
    plotted = np.concatenate([losses, np.asarray(heldout_losses, dtype=np.float64)])
    plotted, average = plotted[np.isfinite(plotted)], average[np.isfinite(average)]
    if len(average) == 0:
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", va="center", color="0.4")
    elif plotted.min() > 0 and average.max() > 3 * average.min():
        plotting.plain_log_scale(axes)


def _plot_scores(axes, scores: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    plotting.plot_curves(axes, {name: tuple(zip(*pairs, strict=True)) for name, pairs in scores.items()})
    if all(value > 0 for pairs in scores.values() for _, value in pairs):
        plotting.plain_log_scale(axes)
    plotting.whole_steps(axes)
    axes.set(xlabel="step", title="samples against real images: lower is better")
    plotting.name_curves(axes, list(scores), fontsize=8)
    plotting.quiet_axes(axes)


def running_average(losses: np.ndarray) -> np.ndarray:
    """The average over about the last tenth of the run so far, at each step; NaN is skipped.

    A window that grows with the run (much like the power-function EMA of Karras et al. 2024) follows the steep
    beginning without the lag of a fixed one, and is calm at the end.
    """
    average, seen, out = 0.0, 0, np.full(len(losses), np.nan)
    for i, loss in enumerate(losses.tolist()):
        if not math.isnan(loss):
            seen += 1
            average += (loss - average) * 10 / (seen + 9)
            out[i] = average
    return out


def thinned(steps: np.ndarray, losses: np.ndarray, max_points: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """A line of at most max_points points that looks the same: the lowest and highest loss of each segment of steps."""
    if len(steps) <= max_points:
        return steps, losses
    starts = np.linspace(0, len(steps), max_points // 2, endpoint=False).astype(int)
    ends = np.fmin.reduceat(losses, starts), np.fmax.reduceat(losses, starts)
    return steps[starts].repeat(2), np.stack(ends, axis=1).ravel()
