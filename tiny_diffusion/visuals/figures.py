"""Figures with axes and labels: the forward process, the noise schedules, the error by noise level, quality by cost.

They know no diffusion: what to plot comes in as arrays.  Each function saves one PNG, whole or not at all.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from tiny_diffusion.visuals import plotting
from tiny_diffusion.visuals.images import grid

LOG_SNR_LIMIT = 20  # beyond this an image is all signal or all noise to any eye and any float16
LOG_SNR_LABEL = r"log-SNR (noise $\leftarrow$   $\rightarrow$ image)"


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
    together = np.stack(images, axis=1).reshape(-1, *images[0].shape[1:])  # row by row
    picture = grid(together, columns=len(times), scale=scale, padding=padding, background=255)
    points = max(4.5, min(10, 10 * w * scale / 130))
    line = points * 1.5 * plotting.DPI / 72
    figure, axes, height = _around(picture, margin=12, top=line * (1.4 + (captions is not None)) + 42)
    for i, time in enumerate(times):
        x = padding + i * (w * scale + padding) + w * scale / 2
        axes.text(x, -line * (1.1 if captions else 0.2), f"t = {time:g}", ha="center", va="bottom", fontsize=points)
        if captions:
            axes.text(x, -line * 0.2, captions[i], ha="center", va="bottom", fontsize=points * 0.8, color="0.4")
    fitting = figure.get_figwidth() * 72 / (0.6 * max(1, len(title)))  # a letter is about 0.6 times as wide as its size
    plotting.show_name(figure.text(0.5, 1 - 10 / height, "", ha="center", va="top", fontsize=min(11, fitting)), title)
    plotting.save_figure(path, figure)


def _around(picture: np.ndarray, margin: int, top: float):
    """A figure with margins in pixels around a picture, axes of exactly the picture's size, and the figure's height.

    Each pixel of the picture becomes one pixel of the figure.
    """
    height, width = picture.shape[:2]
    full_width, full_height = width + 2 * margin, math.ceil(height + top + margin)
    figure = plotting.new_figure(full_width / plotting.DPI, full_height / plotting.DPI, layout=None)
    axes = figure.add_axes((margin / full_width, margin / full_height, width / full_width, height / full_height))
    axes.imshow(picture, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    axes.set_axis_off()
    return figure, axes, full_height


def save_schedules_figure(path: str | os.PathLike, curves: Mapping[str, Mapping[str, np.ndarray]], title: str) -> None:
    """Compares noise schedules: alpha and sigma, log-SNR, and how much of the time is spent at each log-SNR.

    curves: name -> {"time": t/T in [0, 1] ascending, "alpha": array, "sigma": array}.
    The third panel is the density of log-SNR when t is uniform: the noise levels that training sees.  Apart from the
    scale of x_t, a schedule affects training by this density alone (Kingma & Gao 2023).
    """
    figure = plotting.new_figure(12, 4)
    levels, log_snr, density = figure.subplots(1, 3)
    for i, (name, curve) in enumerate(curves.items()):
        time, alpha, sigma = (np.asarray(curve[key], dtype=np.float64) for key in ("time", "alpha", "sigma"))
        with np.errstate(divide="ignore"):
            snr = (2 * np.log(alpha) - 2 * np.log(sigma)).clip(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        levels.plot(time, alpha, color=plotting.colour_of(i), label=name)
        levels.plot(time, sigma, color=plotting.colour_of(i), linestyle=(0, (4, 2)))
        log_snr.plot(time, snr, color=plotting.colour_of(i))
        density.plot(*_density_of_log_snr(time, snr), color=plotting.colour_of(i))
    levels.set(xlabel="t / T", title=r"image $\alpha$ (solid) and noise $\sigma$ (dashed)")
    log_snr.set(xlabel="t / T", title=r"log-SNR, $\ln(\alpha^2 / \sigma^2)$")
    for limit in (-LOG_SNR_LIMIT, LOG_SNR_LIMIT):
        log_snr.axhline(limit, color="0.6", linewidth=0.8, linestyle=":")
    log_snr.text(0.99, -LOG_SNR_LIMIT + 0.5, f"cut at ±{LOG_SNR_LIMIT}", ha="right", color="0.4", fontsize=8)
    density.set(xlabel=LOG_SNR_LABEL, ylim=(0, None), title="share of the time spent at each log-SNR")
    for axes in (levels, log_snr, density):
        plotting.quiet_axes(axes)
    figure.legend(loc="outside lower center", ncols=max(1, len(curves)), frameon=False)
    figure.suptitle(title)
    plotting.save_figure(path, figure)


def _density_of_log_snr(time: np.ndarray, snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log-SNR, and its density when t is uniform.

    P(log-SNR > s) is t(s)/T, read from the falling curve; the density is its slope.
    """
    edges = np.linspace(-LOG_SNR_LIMIT + 0.5, LOG_SNR_LIMIT - 0.5, 79)
    reached = np.interp(edges, snr[::-1], time[::-1])
    return (edges[1:] + edges[:-1]) / 2, -np.diff(reached) / np.diff(edges)


def save_noise_level_losses(
    path: str | os.PathLike, log_snr: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> None:
    """A model's error by noise level.

    curves: name of a set of images -> the error of x_0 over its variance, at each log-SNR.
    """
    figure = plotting.new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    plotting.plot_curves(axes, {name: (log_snr, values) for name, values in curves.items()}, markersize=3)
    axes.set(xlabel=LOG_SNR_LABEL, ylabel="error of the image, over its variance", ylim=(0, None))
    plotting.name_curves(axes, list(curves))
    plotting.quiet_axes(axes)
    plotting.save_figure(path, figure)


def save_sweep(
    path: str | os.PathLike, curves: Mapping[str, Sequence[tuple[int, float]]], floor: float | None, title: str
) -> None:
    """Quality against evaluations of the network, a curve for each sampler; lower is better.

    curves: name -> (evaluations, distance) pairs.   floor: the distance of real images.   title: the distance's name.
    """
    figure = plotting.new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    plotting.plot_curves(axes, {name: tuple(zip(*sorted(pairs), strict=True)) for name, pairs in curves.items()})
    names = list(curves)
    if floor is not None:
        axes.axhline(floor, color="0.5", linewidth=1, linestyle=":")
        names.append("real images")
    axes.set(xscale="log", xlabel="evaluations of the network")
    plotting.show_name(axes.yaxis.label, title)
    shown = sorted({count for pairs in curves.values() for count, _ in pairs})
    axes.set_xticks(shown, [str(count) for count in shown], minor=False)
    plotting.plain_log_scale(axes)
    axes.minorticks_off()
    plotting.quiet_axes(axes)
    plotting.name_curves(axes, names)
    plotting.save_figure(path, figure)
