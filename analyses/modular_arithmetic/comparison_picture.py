"""The figure of the comparison: accuracies and the structure of the embedding, by architecture and modulus."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from analyses.common import figure
from analyses.modular_arithmetic.comparison import STRUCTURE, Entry, structure

Groups = Mapping[tuple[str, int], Sequence[Entry]]
Read = Callable[[Entry], tuple[float, float]]


def draw_comparison(path: Path, groups: Groups, *, claimed: Mapping[int, float]) -> str:
    """Accuracy on all and on held-out pairs, and the measures of the embedding beside their nulls, by modulus.

    `claimed` are accuracies on all pairs by modulus, of the transformer.
    """
    made, grid = figure.new_figure(3, 2, width=4.6, height=3.2)
    panels: dict[str, Read] = {
        "accuracy on all pairs, trained on all": lambda entry: (entry.all_accuracy, 1 / entry.modulus),
        "accuracy on unseen pairs": lambda entry: (entry.unseen_accuracy, 1 / entry.modulus),
    }
    for name, (title, _) in STRUCTURE.items():
        panels[f"embedding: {title}"] = _reader(name)
    for axes, (title, read) in zip(grid, panels.items(), strict=True):
        _draw_panel(axes, groups, read, title=title)
    moduli = _moduli(groups)
    kept = {moduli.index(p): value for p, value in claimed.items() if p in moduli}
    if kept:
        grid[0].plot(
            list(kept), list(kept.values()), "D", mfc="none", mec="black", markersize=8, label="claimed, pooled"
        )
    grid[0].legend(fontsize=7, frameon=False, loc="center right")
    figure.save(made, path)
    return "Architectures by modulus: large dots means over seeds, small dots single seeds, dashes the null"


def _draw_panel(axes: Axes, groups: Groups, read: Read, *, title: str) -> None:
    """A measure of every architecture, side by side at each modulus."""
    names, moduli = list(dict.fromkeys(name for name, _ in groups)), _moduli(groups)
    for i, name in enumerate(names):
        colour = figure.COLOURS[i]
        for place, p in enumerate(moduli):
            x = place + 0.14 * (i - (len(names) - 1) / 2)
            values, null = np.array([read(entry) for entry in groups[name, p]]).T
            label = name if place == 0 else None
            axes.plot(x, values.mean(), "o", color=colour, markersize=6, label=label)
            axes.plot([x] * len(values), values, ".", color=colour, markersize=3, alpha=0.6)
            axes.plot(x, null.mean(), "_", color=colour, markersize=10)
    axes.set_xticks(range(len(moduli)), [str(p) for p in moduli])
    axes.set(xlabel="modulus p", ylim=(min(-0.03, axes.get_ylim()[0]), 1.05))
    axes.set_title(title, fontsize=10)


def _reader(name: str) -> Read:
    return lambda entry: structure(entry, name)


def _moduli(groups: Groups) -> list[int]:
    return sorted({modulus for _, modulus in groups})
