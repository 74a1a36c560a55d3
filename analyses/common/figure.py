"""Figures by matplotlib's object interface, legible in print and to colour-blind eyes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from actdb import plots

SEQUENTIAL = plots.COLOURS
DIVERGING = "PuOr"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind eyes; line styles tell the same apart in grey."""
LINES = ("-", "--", "-.", ":")
INK = {"labelsize": 9}


def new_figure(
    n_columns: int = 1, n_rows: int = 1, *, width: float = 4.4, height: float = 3.4, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a grid of axes, in reading order; sizes are inches an axes."""
    figure = Figure(figsize=(width * n_columns, height * n_rows + (0.4 if title else 0.0)), layout="constrained")
    grid = np.atleast_1d(np.asarray(figure.subplots(n_rows, n_columns), object)).ravel().tolist()
    if title:
        figure.suptitle(title, fontsize=12)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(**INK)
    return figure, grid


def heat_map(
    axes: Axes,
    values: npt.NDArray[Any],
    *,
    title: str,
    x: str,
    y: str,
    label: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    centred: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw [row, column] as colours with a colour bar; `centred` puts 0 in the middle of a diverging scale."""
    bound = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    low, high = limits or ((-bound, bound) if centred else (min(0.0, float(np.nanmin(values))), bound))
    image = axes.imshow(
        values, cmap=DIVERGING if centred else SEQUENTIAL, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.title.set_fontsize(10)
    if x_ticks is not None:
        axes.set_xticks(range(len(x_ticks)), list(x_ticks))
    if y_ticks is not None:
        axes.set_yticks(range(len(y_ticks)), list(y_ticks))
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def curves(
    axes: Axes,
    x: Sequence[float] | npt.NDArray[Any],
    lines: Mapping[str, npt.NDArray[Any]],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """Draw a curve for each entry: values [x], or [sample, x] as mean with a band of one standard deviation."""
    for i, (name, values) in enumerate(lines.items()):
        samples = np.atleast_2d(np.asarray(values, np.float64))
        mean, spread = np.nanmean(samples, 0), np.nanstd(samples, 0)
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, mean, label=name, color=colour, linestyle=LINES[i % len(LINES)], linewidth=1.8)
        if len(samples) > 1:
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    _label(axes, title, x_label, y_label)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)


def histograms(
    axes: Axes,
    samples: Mapping[str, npt.NDArray[Any]],
    *,
    title: str,
    x_label: str,
    y_label: str = "share",
    n_bins: int = 30,
) -> None:
    """Draw the distributions of several samples over common bins, as outlines, each with a share of 1."""
    flat = {name: np.asarray(values, np.float64).ravel() for name, values in samples.items()}
    every = np.concatenate([values[np.isfinite(values)] for values in flat.values()])
    edges = np.histogram_bin_edges(every, bins=n_bins)
    for i, (name, values) in enumerate(flat.items()):
        kept = values[np.isfinite(values)]
        share = np.histogram(kept, edges)[0] / max(len(kept), 1)
        colour = COLOURS[i % len(COLOURS)]
        axes.stairs(share, edges, label=name, color=colour, linestyle=LINES[i % len(LINES)], linewidth=1.6)
        axes.stairs(share, edges, color=colour, alpha=0.1, fill=True)
    _label(axes, title, x_label, y_label)
    if len(flat) > 1:
        axes.legend(fontsize=8, frameon=False)


def intervals(
    axes: Axes,
    estimates: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    marks: Mapping[str, float] | None = None,
    mark: str = "claimed",
) -> None:
    """Draw (value, low, high) of each entry as a point with its interval, beside what was claimed of it."""
    names = list(estimates)
    for row, name in enumerate(names):
        value, low, high = estimates[name]
        axes.plot([low, high], [row, row], color=COLOURS[0], linewidth=1.6, solid_capstyle="butt")
        axes.plot(value, row, "o", color=COLOURS[0], markersize=5, label="measured, 95 %" if row == 0 else None)
    for i, (name, value) in enumerate((marks or {}).items()):
        axes.plot(
            value, names.index(name), "D", mfc="none", mec=COLOURS[1], markersize=7, label=mark if i == 0 else None
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _label(axes, title, x_label, "")
    if marks:
        axes.legend(fontsize=8, frameon=False)


def scatter(axes: Axes, x: Any, y: Any, *, title: str, x_label: str, y_label: str, colour: int = 0) -> None:
    """Draw points, faint enough that many can be told from few."""
    size = 16 if np.size(x) < 500 else 9
    axes.scatter(x, y, s=size, color=COLOURS[colour], alpha=0.5, linewidths=0)
    _label(axes, title, x_label, y_label)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by its name; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_figure(figure, path)


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.title.set_fontsize(10)
