"""What all figures share: a canvas, colours, names in any script, quiet axes, and saving.

Uses matplotlib's objects and never pyplot, which keeps global state and looks for a screen.
"""

import os
from collections.abc import Mapping, Sequence

from tiny_diffusion.files import atomic_write
from tiny_diffusion.visuals.text import in_one_font

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito (2008)


def new_figure(width: float, height: float, layout: str | None = "constrained"):
    """A white matplotlib figure of this size in inches, with its own canvas and no state outside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def colour_of(i: int) -> str:
    """The colour of the i-th curve."""
    return COLOURS[i % len(COLOURS)]


def plot_curves(axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], markersize: int = 4) -> None:
    """A line with points for each curve, name -> (x, y), in a colour of its own."""
    for i, (x, y) in enumerate(curves.values()):
        axes.plot(x, y, color=colour_of(i), marker="o", markersize=markersize)


def show_name(text, name: str) -> None:
    """Sets a matplotlib text to a name, in a font that has its letters; "$" does not begin a formula."""
    shown, font = in_one_font(name)
    text.set(text=shown, parse_math=False)
    if not shown.isascii():
        properties = text.get_fontproperties().copy()
        properties.set_file(font)
        text.set_fontproperties(properties)


def name_curves(axes, names: Sequence[str], **options) -> None:
    """A legend of the first curves of the axes, in the order in which they were plotted."""
    legend = axes.legend(axes.lines[: len(names)], [str(i) for i in range(len(names))], frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        show_name(text, name)


def quiet_axes(axes) -> None:
    """Keeps the frame and the grid light, so that the curves stand out."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.title.set_fontsize(11)


def whole_steps(axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def plain_log_scale(axes) -> None:
    """A logarithmic y axis with ticks such as 0.02, 0.05, 0.1: a loss rarely spans two powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save_figure(path: str | os.PathLike, figure) -> None:
    """Writes the figure as PNG, whole or not at all; the same figure is always the same bytes."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
