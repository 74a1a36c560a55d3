"""The study's figures: heat maps of selectivity, persistence curves, distributions of effect sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from analyses.common import figure
from analyses.common.report import Claim
from analyses.feature_persistence.correlation import Share
from analyses.feature_persistence.selection import KINDS, Selectivity
from analyses.feature_persistence.tracking import FLOOR, History


def draw_selectivity(path: Path, history: History, *, title: str) -> str:
    """Heat maps of η² by step and neuron, a layer and kind each; returns the caption."""
    n_layers = history.eta[KINDS[0]].shape[1]
    made, axes = figure.new_figure(len(KINDS), n_layers, width=5.2, height=2.9, title=title)
    for i, (layer, kind) in enumerate((layer, kind) for layer in range(n_layers) for kind in KINDS):
        values = history.eta[kind][:, layer]
        order = np.argsort(-values[0], kind="stable")
        figure.heat_map(
            axes[i],
            values[:, order],
            title=f"layer {layer}, {kind}",
            x="neuron, most selective at initialisation first",
            y="training step",
            label="η²",
            y_ticks=[str(step) for step in history.steps],
            limits=(0.0, 1.0),
        )
    figure.save(made, path)
    return "η² of every neuron at each checkpoint; neurons ordered by their η² before training"


def draw_persistence(path: Path, histories: Sequence[History], *, title: str) -> str:
    """Curves of η² through training: the top neurons of initialisation, and all neurons; returns the caption."""
    n_layers = histories[0].eta[KINDS[0]].shape[1]
    made, axes = figure.new_figure(len(KINDS), n_layers, width=4.8, height=3.1, title=title)
    for i, (layer, kind) in enumerate((layer, kind) for layer in range(n_layers) for kind in KINDS):
        top = np.stack([h.of(kind, h.top(kind))[:, layer].mean(1) for h in histories])  # [seed, step]
        every = np.stack([h.eta[kind][:, layer].mean(1) for h in histories])
        figure.curves(
            axes[i],
            histories[0].steps,
            {"5 most selective at step 0": top, "all neurons": every},
            title=f"layer {layer}, {kind}",
            x_label="training step",
            y_label="mean η²",
        )
        axes[i].axhline(FLOOR, color="0.6", linewidth=0.8)
        axes[i].set_ylim(0, 1)
    figure.save(made, path)
    return (
        "Mean η² through training with one standard deviation over seeds; "
        "the grey line is 0.05, below which a feature counts as gone"
    )


def draw_effect_sizes(path: Path, before: Sequence[Selectivity], after: Sequence[Selectivity], noise: float) -> str:
    """Distributions of η² before and after training; returns the caption."""
    n_layers = before[0].token.p.shape[0]
    made, axes = figure.new_figure(len(KINDS), n_layers, width=4.8, height=3.0, title="Effect sizes of all neurons")
    for i, (layer, kind) in enumerate((layer, kind) for layer in range(n_layers) for kind in KINDS):
        samples = {
            name: np.concatenate([item.by_kind(kind).eta_squared[layer] for item in found])
            for name, found in (("untrained", before), ("trained", after))
        }
        figure.histograms(axes[i], samples, title=f"layer {layer}, {kind}", x_label="η²", y_label="share of neurons")
        axes[i].axvline(noise, color="0.6", linewidth=0.8)
    figure.save(made, path)
    return f"η² of all neurons over all seeds; the grey line is the mean of noise, {noise:.4f}"


def draw_shares(path: Path, claims: Sequence[Claim]) -> str:
    """Persistence by layer and kind with intervals beside the shipped figures and chance; returns the caption."""
    chosen = [c for c in claims if c.key.startswith("seeds.L") and c.key.endswith(".persistence")]
    made, (axes,) = figure.new_figure(width=6.4, height=3.0)
    names = {c.key: c.key.split(".")[1].replace("L", "layer ") + ", " + c.key.split(".")[2] for c in chosen}
    figure.intervals(
        axes,
        {names[c.key]: (c.value, _or(c.low, c.value), _or(c.high, c.value)) for c in chosen},
        title="Top neurons that persist",
        x_label="share",
        marks={names[c.key]: c.gold for c in chosen if c.gold is not None},
        mark="shipped, 5 seeds",
    )
    _mark_chance(axes, [_or(c.null, np.nan) for c in chosen])
    axes.set_xlim(-0.02, 1.05)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.save(made, path)
    return "Share of the five most selective neurons whose selectivity persists, by layer and kind"


def draw_variants(path: Path, shares: Mapping[str, Mapping[str, Share]]) -> str:
    """Persistence by how the model was initialised and trained; returns the caption."""
    made, axes = figure.new_figure(len(KINDS), width=4.8, height=0.34 * len(shares) + 1.0)
    for i, kind in enumerate(KINDS):
        found = {group: by_kind[kind].persisting for group, by_kind in shares.items()}
        figure.intervals(
            axes[i],
            {group: (e.value, e.low, e.high) for group, e in found.items()},
            title=f"top neurons by {kind} that persist",
            x_label="share",
        )
        _mark_chance(axes[i], [by_kind[kind].chance for by_kind in shares.values()])
        axes[i].legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        axes[i].set_xlim(-0.02, 1.02)
    figure.save(made, path)
    return "Persistence by initialisation, learning rate, duration, task and mask; ticks: neurons shuffled"


def draw_importance(path: Path, histories: Sequence[History], importances: Sequence[np.ndarray]) -> str:
    """Importance of every neuron against its selectivity after training; returns the caption."""
    made, axes = figure.new_figure(len(KINDS), width=4.8, height=3.4)
    for i, kind in enumerate(KINDS):
        final = np.concatenate([h.eta[kind][-1].ravel() for h in histories])
        rise = np.concatenate([values.ravel() for values in importances])
        figure.scatter(
            axes[i],
            final,
            rise,
            title=f"{kind}: selective and important",
            x_label="η² after training",
            y_label="rise of the loss when ablated, nats",
        )
    figure.save(made, path)
    return "Rise of the loss when a neuron is held at its mean, against its selectivity after training"


def _mark_chance(axes: Axes, values: Sequence[float]) -> None:
    axes.plot(values, range(len(values)), "|", color="0.35", markersize=9, label="neurons shuffled")


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
