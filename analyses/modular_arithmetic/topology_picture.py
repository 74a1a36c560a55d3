"""Figures of the concept graphs: layouts in 2-D and 3-D, loops, and their course over the checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.common import figure
from analyses.modular_arithmetic.graph import Shown, affinity_of
from analyses.modular_arithmetic.homology import LEVEL
from analyses.modular_arithmetic.layout import LAYOUTS, lay_out
from analyses.modular_arithmetic.page import CYCLIC
from analyses.modular_arithmetic.topology import Edge, addition_edges, similarity_edges

Floats = npt.NDArray[np.float64]
MOST_LABELS = 40
TITLES = {"pca": "principal components", "spectral": "spectral", "force": "force-directed", "circular": "circular"}


def draw_graphs(path: Path, shown: Mapping[str, Shown], *, seed: int) -> str:
    """A row a model: its numbers by two principal components, the most similar ones on the ring, and its loops."""
    made, grid = figure.new_figure(3, len(shown), width=4.2, height=3.9)
    for row, (name, each) in enumerate(shown.items()):
        left, middle, right = grid[3 * row : 3 * row + 3]
        order = each.shape.order
        edges = addition_edges(each.held.modulus, order.step)
        _draw_points(left, each, "pca", edges, seed=seed)
        left.set_title(f"{name}: edges n to n + {order.step}", fontsize=10)
        _draw_points(middle, each, "circular", similarity_edges(each.held), seed=seed)
        middle.set_title("in order, the most similar joined", fontsize=10)
        _draw_loops(right, each)
    figure.save(made, path)
    return (
        "The numbers of each model's embedding: two principal components, coloured by their place on the circle of the "
        "strongest frequency; the two most similar of each number, on the ring; loops (H1), the line what 95 % of "
        "Gaussian clouds of the same covariance stay below"
    )


def draw_space(path: Path, shown: Shown, *, name: str, seed: int) -> str:
    """Every layout in 3-D."""
    made = Figure(figsize=(4.0 * len(LAYOUTS), 4.2), layout="constrained")
    made.suptitle(f"{name}: {shown.held.place} in 3-D", fontsize=12)
    edges = addition_edges(shown.held.modulus, shown.shape.order.step)
    for i, layout in enumerate(LAYOUTS):
        axes: Any = made.add_subplot(1, len(LAYOUTS), i + 1, projection="3d")
        points = lay_out(layout, shown.held.vectors, affinity_of(shown.held), 3, seed=seed)
        for n, m, _ in edges:
            axes.plot(*points[[n, m]].T, color="0.6", linewidth=0.8)
        axes.scatter(*points.T, c=_places(shown), cmap=CYCLIC, s=26, depthshade=False)
        axes.set_title(TITLES[layout], fontsize=10)
        axes.set_xticks([], [])
        axes.set_yticks([], [])
        axes.set_zticks([], [])
    figure.save(made, path)
    return "The same numbers in the four layouts in 3-D; the page topology.html turns them"


def draw_course(path: Path, models: list[Mapping[str, Any]]) -> str:
    """Circularity, agreement and the longest loop of the embedding over the checkpoints, a column a model."""
    kept = [model for model in models if len(model["checkpoints"]) > 1]
    made, grid = figure.new_figure(max(len(kept), 1), width=4.6, height=3.3)
    for axes, model in zip(grid, kept, strict=False):
        lines = {
            name.removeprefix("embedding: "): np.array(each["value"], np.float64)
            for name, each in model["history"].items()
            if name.startswith("embedding: ")
        }
        epochs = [checkpoint["epoch"] for checkpoint in model["checkpoints"]]
        figure.curves(axes, epochs, lines, title=model["name"], x_label="epoch", y_label="of the embedding")
        axes.set_ylim(-0.03, 1.03)
    figure.save(made, path)
    return "Order and loops of the embedding over the checkpoints"


def _draw_points(axes: Axes, shown: Shown, layout: str, edges: list[Edge], *, seed: int) -> None:
    points = lay_out(layout, shown.held.vectors, affinity_of(shown.held), 2, seed=seed)
    for n, m, _ in edges:
        axes.plot(*points[[n, m]].T, color="0.7", linewidth=0.8, zorder=1)
    axes.scatter(
        points[:, 0], points[:, 1], c=_places(shown), cmap=CYCLIC, s=60, edgecolors="0.2", linewidths=0.6, zorder=2
    )
    if len(points) <= MOST_LABELS:
        for n, (x, y) in enumerate(points):
            axes.annotate(str(n), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_loops(axes: Axes, shown: Shown) -> None:
    loops = shown.shape.loops
    bound = float(np.quantile(loops.null, 1 - LEVEL))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes.plot([0, 1 - bound], [bound, 1], color=figure.COLOURS[1], linestyle="--", label="95 % of the null below")
    axes.scatter(loops.bars[:, 0], loops.bars[:, 1], color=figure.COLOURS[0], s=22, label="loops")
    axes.set(xlabel="appears at this distance", ylabel="filled at this distance", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"loops: longest {loops.longest:.2f}, null {loops.expected:.2f}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _places(shown: Shown) -> Floats:
    """Each number's place on the circle of the strongest frequency [number], from 0 to 1."""
    p = shown.held.modulus
    return np.asarray(np.arange(p) * shown.shape.order.frequency % p / p, np.float64)
