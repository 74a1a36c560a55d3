"""Figures of path patching and circuits; each function writes one file and returns its caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from analyses.common import figure
from analyses.modular_arithmetic.component import EMBED, HEAD, MLP, OUTPUT, Component
from analyses.modular_arithmetic.discovery import Circuit
from analyses.modular_arithmetic.faithfulness import Curve
from analyses.modular_arithmetic.neighbourhood import CLAIMED_LOST, Moved
from analyses.modular_arithmetic.path import Change, PathEffect

SHADES = {EMBED: figure.COLOURS[5], HEAD: figure.COLOURS[4], MLP: figure.COLOURS[2], OUTPUT: "#DDDDDD"}
MOST_WIDTH, LEAST_WIDTH = 5.0, 0.8


def draw_circuit(
    path: Path,
    circuit: Circuit,
    nodes: Sequence[Component],
    effects: Sequence[PathEffect],
    importance: Mapping[str, Change],
    *,
    title: str,
) -> str:
    """The components from embedding (below) to output, all edges faint, those of the circuit as wide as strong."""
    places = _places(nodes)
    widest = max(sum(node.depth == other.depth for other in nodes) for node in nodes)
    made, (axes,) = figure.new_figure(width=2.4 + 1.25 * widest, height=0.9 + 0.95 * (nodes[-1].depth + 1))
    strength = {(effect.sender, effect.receiver): effect.direct.loss_rise.value for effect in effects}
    most = max((strength[edge] for edge in circuit.edges), default=1.0) or 1.0
    for edge, value in strength.items():
        kept = edge in circuit.edges
        share = max(value, 0.0) / most
        width = LEAST_WIDTH + (MOST_WIDTH - LEAST_WIDTH) * share if kept else 0.5
        _arrow(axes, places[edge[0]], places[edge[1]], width=width, kept=kept)
    for node in nodes:
        _node(axes, node, places[node.name], importance.get(node.name), kept=node.name in circuit.components)
    x = [place[0] for place in places.values()]
    axes.set(xlim=(min(x) - 0.75, max(x) + 0.75), ylim=(-0.4, nodes[-1].depth + 0.4), title=title)
    axes.title.set_fontsize(10)
    axes.set_axis_off()
    figure.save(made, path)
    return (
        f"Minimal circuit: {len(circuit.edges)} of {circuit.n_edges} edges, {circuit.accuracy:.1%} of the pairs right "
        f"(in the model {circuit.whole:.1%}). Width: what patching the edge adds to the loss; in a node: accuracy lost "
        "with the component at its mean"
    )


def draw_effects(path: Path, effects: Sequence[PathEffect], nodes: Sequence[Component], *, title: str) -> str:
    """Accuracy lost by patching each edge from sender (row) to receiver (column): direct, and along all paths."""
    senders = [node.name for node in nodes if node.kind != OUTPUT]
    receivers = [node.name for node in nodes if node.kind != EMBED]
    made, grid = figure.new_figure(2, width=2.0 + 0.5 * len(receivers), height=1.8 + 0.38 * len(senders), title=title)
    for axes, kind in zip(grid, ("direct", "total"), strict=True):
        values = np.full((len(senders), len(receivers)), np.nan)
        for effect in effects:
            at = senders.index(effect.sender), receivers.index(effect.receiver)
            values[at] = getattr(effect, kind).accuracy_lost.value
        figure.heat_map(
            axes, values, title=f"{kind} effect", x="receiver", y="sender", label="accuracy lost",
            x_ticks=receivers, y_ticks=senders, limits=(0.0, 1.0),
        )  # fmt: skip
        for tick in axes.get_xticklabels():
            tick.set_rotation(90)
    figure.save(made, path)
    return "Accuracy lost when a sender's change reaches one receiver: directly, and along all paths to it"


def draw_pruning(path: Path, circuit: Circuit, *, chance: float, title: str) -> str:
    """Accuracy of the model, the circuit, what is left without it, and random circuits of its size."""
    made, (axes,) = figure.new_figure(width=5.0, height=3.2)
    bars = {"model": circuit.whole, "circuit": circuit.accuracy, "rest": circuit.rest}
    axes.bar(range(3), list(bars.values()), color=figure.COLOURS[:3], width=0.6)
    spread = np.linspace(-0.18, 0.18, max(len(circuit.random), 1))[: len(circuit.random)]
    axes.scatter(3 + spread, circuit.random, s=18, color=figure.COLOURS[3], alpha=0.7, linewidths=0)
    axes.axhline(chance, color="0.5", linestyle=":", linewidth=1.2, label="chance")
    axes.axhline(
        circuit.threshold * circuit.whole,
        color="0.3",
        linestyle="--",
        linewidth=1,
        label=f"{circuit.threshold:.0%} kept",
    )
    axes.set_xticks(range(4), [*bars, "random\ncircuits"])
    axes.set(title=title, ylabel="accuracy, all pairs", ylim=(0, 1.08))
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.9))
    figure.save(made, path)
    return f"The circuit against {len(circuit.random)} random ones of as many edges, and the model without its edges"


def draw_curves(path: Path, curves: Mapping[str, Curve], *, title: str) -> str:
    """Held-out accuracy with each state replaced by its first principal components, and by random directions."""
    made, grid = figure.new_figure(len(curves), width=4.0, height=3.2, title=title)
    for axes, (state, curve) in zip(grid, curves.items(), strict=True):
        lines = {"principal components": curve.principal, "random directions": curve.random}
        figure.curves(
            axes, curve.n_dimensions, lines, title=state, x_label="dimensions kept", y_label="accuracy, held out"
        )
        axes.axhline(curve.whole, color="0.5", linestyle=":", linewidth=1.2)
        axes.set(xscale="log", ylim=(0, 1.05))
    figure.save(made, path)
    return "Held-out accuracy with a state replaced by its projection; dotted: the model as it is"


def draw_neighbours(path: Path, moves: Mapping[str, Sequence[Moved]], *, title: str) -> str:
    """Accuracy lost, and how far the logits move, by where the patch comes from; what was claimed as open marks."""
    made, grid = figure.new_figure(2, width=4.2, height=3.4, title=title)
    names = [found.source for found in next(iter(moves.values()))]
    for i, (state, moved) in enumerate(moves.items()):
        x = np.arange(len(names)) + (i - (len(moves) - 1) / 2) * 0.8 / len(moves)
        colour = figure.COLOURS[i % len(figure.COLOURS)]
        for axes, values in zip(grid, ([m.lost.value for m in moved], [m.distance.value for m in moved]), strict=True):
            axes.bar(x, values, width=0.8 / len(moves), color=colour, label=state)
    places = [names.index(name) for name in CLAIMED_LOST if name in names]
    grid[0].plot(places, list(CLAIMED_LOST.values()), "D", mfc="none", mec="black", label="claimed")
    for axes, label in zip(grid, ("accuracy lost", "logits moved ÷ mean distance"), strict=True):
        axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        axes.set_ylabel(label)
        axes.tick_params(axis="x", labelsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.save(made, path)
    return "Patches between pairs: what the source's answer is to the pair's own"


def _places(nodes: Sequence[Component]) -> dict[str, tuple[float, float]]:
    """Nodes of one depth side by side, about 0; single ones a little aside, so that edges past them can be seen."""
    places = {}
    for depth in sorted({node.depth for node in nodes}):
        row = [node for node in nodes if node.depth == depth]
        aside = 0.55 if len(row) == 1 and row[0].kind == MLP else 0.0
        for i, node in enumerate(row):
            places[node.name] = (1.25 * (i - (len(row) - 1) / 2) + aside, float(depth))
    return places


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], *, width: float, kept: bool) -> None:
    bend = 0.12 if end[1] - begin[1] > 1 else 0.0  # around the components between
    arrow = FancyArrowPatch(
        begin, end, arrowstyle="-|>", mutation_scale=7 + 1.5 * width if kept else 5, linewidth=width,
        color=figure.COLOURS[0] if kept else "0.82", alpha=0.85 if kept else 0.7, shrinkA=15, shrinkB=15,
        connectionstyle=f"arc3,rad={bend}", zorder=2 if kept else 1,
    )  # fmt: skip
    axes.add_patch(arrow)


def _node(axes: Axes, node: Component, place: tuple[float, float], found: Change | None, *, kept: bool) -> None:
    text = node.name if found is None else f"{node.name}\n{found.accuracy_lost.value:.2f}"
    box = {
        "boxstyle": "round,pad=0.35",
        "facecolor": SHADES[node.kind] if kept else "white",
        "edgecolor": "0.2" if kept else "0.7",
        "linewidth": 1.2 if kept else 0.8,
    }
    axes.text(*place, text, ha="center", va="center", fontsize=8, color="black" if kept else "0.6", bbox=box, zorder=3)
