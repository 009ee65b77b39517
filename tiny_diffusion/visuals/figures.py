"""Figures with axes and words: the loss of a run, the forward process, the schedules side by side.

Knows matplotlib's object interface and never pyplot, which would keep global state and look for a screen.  Knows no
diffusion either: what to draw comes in as arrays.  Each function saves one PNG, whole or not at all.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from tiny_diffusion.files import atomic_write
from tiny_diffusion.visuals.images import grid

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito (2008)
LOG_SNR_LIMIT = 20  # beyond this an image is all signal or all noise to any eye and any float16


def save_loss_curve(
    path: str | os.PathLike,
    steps: Sequence[float],
    losses: Sequence[float],
    heldout_steps: Sequence[float] = (),
    heldout_losses: Sequence[float] = (),
    title: str = "",
    scores: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Loss over steps: each value light, their running average dark, held-out losses as points.

    scores: name -> (step, value) pairs, what was measured of drawn images; drawn beside the loss.

    A loss that is not finite (a skipped step) leaves a gap.  The axis is logarithmic if the average falls (or rises)
    more than threefold and every loss is positive.
    """
    steps, losses, heldout_steps, heldout_losses = (
        np.asarray(v, dtype=np.float64) for v in (steps, losses, heldout_steps, heldout_losses)
    )
    losses = np.where(np.isfinite(losses), losses, np.nan)
    average = smoothed(losses)
    marker = "o" if len(steps) < 50 else None
    figure = _figure(12 if scores else 7, 4.2)
    axes = figure.add_subplot(1, 2 if scores else 1, 1)
    axes.plot(
        *thinned(steps, losses),
        color=COLOURS[5],
        alpha=0.45,
        linewidth=0.8,
        marker=marker,
        markersize=3,
        label="each step",
    )
    every = max(1, len(steps) // 2000)
    axes.plot(
        np.append(steps[:-1:every], steps[-1:]),
        np.append(average[:-1:every], average[-1:]),
        color=COLOURS[0],
        linewidth=1.8,
        marker=marker,
        markersize=3,
        label="running average",
    )
    if len(heldout_steps):
        axes.plot(
            heldout_steps,
            heldout_losses,
            color=COLOURS[1],
            linewidth=1.2,
            marker="o",
            markersize=4,
            label="held-out images",
        )
    drawn = np.concatenate([losses, heldout_losses])
    drawn, middle = drawn[np.isfinite(drawn)], average[np.isfinite(average)]
    if len(middle) == 0:
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", va="center", color="0.4")
    elif drawn.min() > 0 and middle.max() > 3 * middle.min():
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    _recede(axes)
    if scores:
        beside = figure.add_subplot(1, 2, 2)
        for i, (name, pairs) in enumerate(scores.items()):
            beside.plot(
                *zip(*pairs, strict=True), color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, label=name
            )
        if all(value > 0 for pairs in scores.values() for _, value in pairs):
            beside.set_yscale("log")
            _plain_log_ticks(beside)
        beside.xaxis.get_major_locator().set_params(integer=True)
        beside.set(xlabel="step", title="drawn images against real ones: lower is better")
        beside.legend(frameon=False, fontsize=8)
        _recede(beside)
    _save(path, figure)


def save_noise_level_losses(path: str | os.PathLike, log_snr: Sequence[float], curves: Mapping[str, Sequence[float]]):
    """Where a model fails: the error of its output by noise level, for images that trained and for held-out ones."""
    figure = _figure(6.5, 4.2)
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(curves.items()):
        axes.plot(log_snr, values, color=COLOURS[i % len(COLOURS)], marker="o", markersize=3, label=name)
    axes.set(
        xlabel=r"log-SNR (noise $\leftarrow$   $\rightarrow$ image)",
        ylabel="error of the image, over its variance",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    _recede(axes)
    _save(path, figure)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The average over about the last tenth of the run so far, at each step, past NaN.

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


def thinned(steps: np.ndarray, losses: np.ndarray, most: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """A line of at most this many points that looks the same: the lowest and highest loss of each run of steps."""
    if len(steps) <= most:
        return steps, losses
    starts = np.linspace(0, len(steps), most // 2, endpoint=False).astype(int)
    ends = np.fmin.reduceat(losses, starts), np.fmax.reduceat(losses, starts)
    return steps[starts].repeat(2), np.stack(ends, axis=1).ravel()


def save_forward_figure(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    times: Sequence[float],
    *,
    title: str,
    captions: Sequence[str] | None = None,
) -> None:
    """The forward process: each row an image, each column a time.

    images: for each time, the images at that time, uint8 (n, H, W, C).   captions: a line per time, under "t = 0".
    """
    assert len(images) == len(times), f"images for {len(images)} times, and {len(times)} times"
    n, h, w, _ = images[0].shape
    tile = min(144, max(32, 6000 // n))
    scale, padding = max(1, round(tile / max(h, w))), 6
    together = np.stack(images, axis=1).reshape(-1, *images[0].shape[1:])
    picture = grid(together, columns=len(times), scale=scale, padding=padding, background=255)
    # One axes of exactly the picture's size, so that each of its pixels becomes one of the figure's.
    height, width = picture.shape[:2]
    points = max(4.5, min(10, 10 * w * scale / 130))
    line = points * 1.5 * DPI / 72
    margin, top = 12, line * (1.4 + (captions is not None)) + 42
    full_width, full_height = width + 2 * margin, math.ceil(height + top + margin)
    figure = _figure(full_width / DPI, full_height / DPI, layout=None)
    axes = figure.add_axes((margin / full_width, margin / full_height, width / full_width, height / full_height))
    axes.imshow(picture, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    axes.set_axis_off()
    for i, time in enumerate(times):
        x = padding + i * (w * scale + padding) + w * scale / 2
        axes.text(x, -line * (1.1 if captions else 0.2), f"t = {time:g}", ha="center", va="bottom", fontsize=points)
        if captions:
            axes.text(x, -line * 0.2, captions[i], ha="center", va="bottom", fontsize=points * 0.8, color="0.4")
    fitting = full_width / DPI * 72 / (0.6 * max(1, len(title)))  # a letter is about 0.6 of its size wide
    figure.text(0.5, 1 - 10 / full_height, title, ha="center", va="top", fontsize=min(11, fitting))
    _save(path, figure)


def save_schedules_figure(path: str | os.PathLike, curves: Mapping[str, Mapping[str, np.ndarray]], title: str) -> None:
    """Noise schedules, compared: what is left of image and noise, log-SNR, and where the time is spent.

    curves: name -> {"time": t/T in [0, 1] ascending, "alpha": array, "sigma": array}.
    The third panel is the density of log-SNR when t is uniform: the noise levels that training sees.  But for the scale
    of x_t, it is all that training sees of a schedule (Kingma & Gao 2023).
    """
    figure = _figure(12, 4)
    levels, log_snr, density = figure.subplots(1, 3)
    for i, (name, curve) in enumerate(curves.items()):
        time, alpha, sigma = (np.asarray(curve[key], dtype=np.float64) for key in ("time", "alpha", "sigma"))
        colour = COLOURS[i % len(COLOURS)]
        with np.errstate(divide="ignore"):
            snr = (2 * np.log(alpha) - 2 * np.log(sigma)).clip(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        levels.plot(time, alpha, color=colour, label=name)
        levels.plot(time, sigma, color=colour, linestyle=(0, (4, 2)))
        log_snr.plot(time, snr, color=colour)
        # P(log-SNR > s) is t(s)/T, read from the falling curve; its slope is the density.
        edges = np.linspace(-LOG_SNR_LIMIT + 0.5, LOG_SNR_LIMIT - 0.5, 79)
        reached = np.interp(edges, snr[::-1], time[::-1])
        density.plot((edges[1:] + edges[:-1]) / 2, -np.diff(reached) / np.diff(edges), color=colour)
    levels.set(xlabel="t / T", title=r"image $\alpha$ (solid) and noise $\sigma$ (dashed)")
    log_snr.set(xlabel="t / T", title=r"log-SNR, $\ln(\alpha^2 / \sigma^2)$")
    for limit in (-LOG_SNR_LIMIT, LOG_SNR_LIMIT):
        log_snr.axhline(limit, color="0.6", linewidth=0.8, linestyle=":")
    log_snr.text(0.99, -LOG_SNR_LIMIT + 0.5, f"cut at ±{LOG_SNR_LIMIT}", ha="right", color="0.4", fontsize=8)
    density.set(
        xlabel=r"log-SNR (noise $\leftarrow$   $\rightarrow$ image)",
        ylim=(0, None),
        title="share of the time spent at each log-SNR",
    )
    for axes in (levels, log_snr, density):
        _recede(axes)
    figure.legend(loc="outside lower center", ncols=max(1, len(curves)), frameon=False)
    figure.suptitle(title)
    _save(path, figure)


def save_sweep(
    path: str | os.PathLike, curves: Mapping[str, Sequence[tuple[int, float]]], floor: float | None, title: str
) -> None:
    """Quality against evaluations of the network, a curve for each sampler; lower is better.

    curves: name -> (evaluations, distance) pairs.   floor: what real images score.
    """
    figure = _figure(6.5, 4.2)
    axes = figure.add_subplot()
    for i, (name, pairs) in enumerate(curves.items()):
        evaluations, values = zip(*sorted(pairs), strict=True)
        axes.plot(evaluations, values, color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, label=name)
    if floor is not None:
        axes.axhline(floor, color="0.5", linewidth=1, linestyle=":", label="real images")
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=title)
    shown = sorted({count for pairs in curves.values() for count, _ in pairs})
    axes.set_xticks(shown, [str(count) for count in shown], minor=False)
    axes.minorticks_off()
    _plain_log_ticks(axes)
    _recede(axes)
    axes.legend(frameon=False)
    _save(path, figure)


def _figure(width: float, height: float, layout: str | None = "constrained"):
    """A white figure of this many inches, with its own canvas and no state outside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _recede(axes) -> None:
    """Frame and grid step back, so that the curves come forward."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.title.set_fontsize(11)


def _plain_log_ticks(axes) -> None:
    """0.02, 0.05, 0.1 rather than powers of ten: a loss rarely spans two of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _save(path: str | os.PathLike, figure) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
