"""Figures of concepts; each function writes one file and returns its caption."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analyses.common import figure
from analyses.modular_arithmetic.concept import Clusters, Probed
from analyses.modular_arithmetic.feature import LABELS, Features


def draw_probes(path: Path, found: Sequence[Probed], *, title: str) -> str:
    """Selectivity of probes on held-out pairs, and accuracy on unseen values, by property and state."""
    names = list(dict.fromkeys(entry.concept for entry in found))
    states = list(dict.fromkeys(entry.state for entry in found))
    made, grid = figure.new_figure(2, width=2.6 + 0.55 * len(states), height=1.6 + 0.3 * len(names), title=title)
    selectivity, unseen = np.full((2, len(names), len(states)), np.nan)
    for entry in found:
        at = names.index(entry.concept), states.index(entry.state)
        selectivity[at], unseen[at] = entry.selectivity.value, entry.unseen
    maps = {"selectivity, held-out pairs": (selectivity, (0.0, 0.5)), "accuracy, unseen values": (unseen, (0.0, 1.0))}
    for axes, (label, (values, limits)) in zip(grid, maps.items(), strict=True):
        figure.heat_map(
            axes, values, title=label, x="", y="", label=label.partition(",")[0], x_ticks=states, y_ticks=names,
            limits=limits,
        )  # fmt: skip
        for tick in axes.get_xticklabels():
            tick.set(rotation=45, ha="right")
    figure.save(made, path)
    return "Linear probes: balanced accuracy minus that of the control task; and of values never seen (blank: too few)"


def draw_clusters(path: Path, found: Sequence[Clusters], *, title: str) -> str:
    """Agreement of clusters with a, b and the answer, by state."""
    states = list(dict.fromkeys(entry.state for entry in found))
    made, (axes,) = figure.new_figure(width=2.4 + 0.9 * len(states), height=3.2)
    labels = list(dict.fromkeys(entry.label for entry in found))
    for i, label in enumerate(labels):
        values = [entry.agreement for entry in found if entry.label == label]
        x = np.arange(len(states)) + (i - 1) * 0.27
        axes.bar(x, values, width=0.25, color=figure.COLOURS[i], label=label)
    axes.set_xticks(range(len(states)), [state.replace(" ", "\n") for state in states])
    axes.set(title=title, ylabel="adjusted Rand index", ylim=(min(0.0, axes.get_ylim()[0]), 1.05))
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False)
    figure.save(made, path)
    return "Agreement of k-means clusters, as many as numbers, with a, b and the answer; 0 is chance, 1 the same"


def draw_features(path: Path, found: Sequence[Features], *, title: str) -> str:
    """Of each autoencoder: its training, and what its features are tuned to."""
    made, grid = figure.new_figure(1 + len(found), width=3.9, height=3.2, title=title)
    n = min(len(entry.trained.losses) for entry in found)
    lines = {entry.kind: entry.trained.losses[:n] for entry in found}
    figure.curves(grid[0], np.arange(n), lines, title="training", x_label="step", y_label="variance unexplained")
    grid[0].set(yscale="log")
    for axes, entry in zip(grid[1:], found, strict=True):
        samples = {label: entry.tuning[i] for i, label in enumerate(LABELS)}
        figure.histograms(axes, samples, title=f"{entry.kind} features", x_label="η² with", y_label="share")
    figure.save(made, path)
    return "Sparse autoencoders: training, and the share of each feature's variance between values of a, b, the answer"
