"""The study's figures; each function writes one and returns its caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import networkx as nx
import numpy as np
from sklearn.isotonic import IsotonicRegression

from analyses.common.figure import COLOURS, LINES, heat_map, histograms, intervals, new_figure, save, scatter
from analyses.forward_proportion.claims import CLAIMED_ACCURACY, CLAIMED_RATIO, DISTANCES
from analyses.forward_proportion.finding import Heads, Shares, States
from analyses.forward_proportion.patching import ALL
from analyses.forward_proportion.perturbation import Perturbed
from analyses.forward_proportion.ring import Ring, principal_plane
from analyses.forward_proportion.subject import Subject

MOST_NAMED = 40
MOST_EDGES = 400
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_communities(path: Path, subject: Subject, heads: Heads) -> str:
    """Draw the co-activation graph by community, and its matrix with communities as blocks."""
    found, names = heads.communities, subject.head_names()
    figure, (left, right) = new_figure(
        2, title=f"Heads of {subject.run.name} that are active together", width=5.6, height=5.0
    )
    graph = nx.from_numpy_array(found.weights)
    places = nx.spring_layout(graph, seed=1, iterations=200, k=2.2 / np.sqrt(len(names)))
    strongest = sorted(graph.edges(data="weight"), key=lambda edge: -edge[2])[:MOST_EDGES]
    for a, b, weight in strongest:
        shade = 0.8 * weight / strongest[0][2]
        left.plot(*zip(places[a], places[b], strict=True), color="0.5", alpha=shade, linewidth=1.2, zorder=1)
    for i in range(found.n):
        members = np.flatnonzero(found.member == i)
        x, y = np.array([places[m] for m in members]).T
        marker = MARKERS[i % len(MARKERS)]
        left.scatter(x, y, s=90, color=COLOURS[i % len(COLOURS)], marker=marker, label=f"community {i}", zorder=2)
    if len(names) <= MOST_NAMED:
        for i, name in enumerate(names):
            left.annotate(name, places[i], xytext=(5, 5), textcoords="offset points", fontsize=8, zorder=3)
    left.legend(fontsize=8, frameon=False, loc="best")
    left.set_axis_off()
    left.margins(0.12)
    order = np.argsort(found.member, kind="stable")
    ticks = [names[i] for i in order] if len(names) <= MOST_NAMED else None
    heat_map(
        right,
        found.weights[np.ix_(order, order)],
        title=f"Q = {found.modularity:.3f}",
        x="head",
        y="head",
        label="max(0, Pearson r)",
        x_ticks=ticks,
        y_ticks=ticks,
        limits=(0, float(found.weights.max()) or 1.0),
    )
    if ticks:
        right.tick_params(axis="x", rotation=90)
    for border in np.flatnonzero(np.diff(found.member[order])) + 0.5:
        right.axhline(border, color=COLOURS[1], linewidth=1.5)
        right.axvline(border, color=COLOURS[1], linewidth=1.5)
    save(figure, path)
    return (
        "Communities of heads by co-activation: the graph's strongest edges, and the matrix with communities as blocks."
    )


def draw_modularity(path: Path, subject: Subject, heads: Heads) -> str:
    """Draw the modularity against its null, and each community's activation by category."""
    found = heads.communities
    figure, (left, right) = new_figure(
        2, title="Are the communities more than chance, and what are they for?", width=5.0
    )
    histograms(left, {"columns permuted": found.null}, title=f"{len(found.null)} permutations", x_label="modularity Q")
    left.axvline(found.modularity, color=COLOURS[1], linewidth=2, label=f"measured, {found.modularity:.3f}")
    left.axvspan(heads.spread.low, heads.spread.high, color=COLOURS[1], alpha=0.15, label="95 % over prompts")
    left.legend(fontsize=8, frameon=False)
    heat_map(
        right,
        heads.separation.by_category,
        title="mean z-score of a community's heads",
        x="category",
        y="community",
        label="standard deviations",
        x_ticks=subject.names,
        y_ticks=[str(i) for i in range(found.n)],
        centred=True,
    )
    right.tick_params(axis="x", rotation=30)
    save(figure, path)
    return "Modularity against permuted columns, and the communities' mean activation by category."


def draw_accuracies(path: Path, subject: Subject, heads: Heads, *, seed: int) -> str:
    """Draw the classifiers' accuracies with intervals, beside chance and what was claimed."""
    figure, (axes,) = new_figure(1, width=6.4, height=3.2)
    estimates = {name: found.estimate(seed=seed) for name, found in heads.accuracies.items()}
    entries = {name: (e.value, e.low, e.high) for name, e in estimates.items()}
    title = f"Naming the category of {len(subject.prompts)} prompts of {len(subject.names)}"
    intervals(axes, entries, title=title, x_label="accuracy on held-out prompts", marks=CLAIMED_ACCURACY)
    nulls = [found.null for found in heads.accuracies.values()]
    axes.axvline(float(np.nanmean(nulls)), color="0.5", linestyle=":", linewidth=1.4, label="labels permuted")
    axes.set_xlim(0, 1.02)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    save(figure, path)
    return "Accuracies with 95 % intervals over prompts; length and marks alone are the baseline."


def draw_rewiring(path: Path, subject: Subject, heads: Heads) -> str:
    """Draw the rewiring ratio with its bootstrap interval, and the mean interaction matrix."""
    found = heads.rewiring
    figure, (left, right) = new_figure(2, title="Do heads read others differently by category?", width=5.2, height=4.2)
    entries = {"within ÷ between": (found.ratio, found.low, found.high)}
    intervals(
        left,
        entries,
        title=f"n = {found.n} prompts",
        x_label="ratio of cosines",
        marks={"within ÷ between": CLAIMED_RATIO},
    )
    left.axvline(1, color="0.6", linewidth=1)
    left.axvline(found.null, color="0.5", linestyle=":", linewidth=1.4, label="labels permuted")
    left.legend(fontsize=8, frameon=False, loc="lower center")
    names = subject.head_names()
    ticks = names if len(names) <= MOST_NAMED else None
    heat_map(
        right,
        heads.mean,
        title="mean interaction I[A → B]",
        x="B (reads)",
        y="A (wrote)",
        label="Σ attention · ‖z W_O‖",
        x_ticks=ticks,
        y_ticks=ticks,
    )
    if ticks:
        right.tick_params(axis="x", rotation=90)
    save(figure, path)
    return "The rewiring ratio with its bootstrap interval and permuted null, and what heads read of others on average."


def draw_perturbations(path: Path, found: Mapping[str, Perturbed], *, seed: int) -> str:
    """Draw bars of both interventions by pair."""
    figure, grid = new_figure(len(found), title="Ablating two heads against cutting the path between them", width=5.6)
    for axes, (kind, item) in zip(grid, found.items(), strict=True):
        order = np.argsort(-item.ablation.mean(1), kind="stable")[:20]
        x = np.arange(len(order))
        axes.bar(x - 0.2, item.ablation.mean(1)[order], 0.4, color=COLOURS[0], label="both heads ablated")
        cut = item.disruption.mean(1)[order]
        axes.bar(x + 0.2, cut, 0.4, color=COLOURS[1], hatch="///", edgecolor="white", label="path cut")
        names = ["{}.{}→{}.{}".format(*item.pairs[i][0], *item.pairs[i][1]) for i in order]
        axes.set_xticks(x, names, rotation=90, fontsize=7)
        ratio = item.ratio(seed=seed)
        axes.set_title(f"{kind} pairs: ratio {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", fontsize=10)
        axes.set_yscale("log")
        axes.set_ylim(top=6 * float(item.ablation.mean(1).max()))  # room for the legend
        axes.set_ylabel("KL(clean ‖ intervened), nats", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    save(figure, path)
    return "Mean KL at the last token by pair of heads: ablation of both, and A's contribution cut out of B's input."


def draw_divergence(path: Path, item: States) -> str:
    """Draw divergence against each distance of a layer's near and random pairs, with the isotonic fit."""
    figure, grid = new_figure(
        3, title=f"Divergence of outputs against distance of states, layer {item.layer}", width=4.2
    )
    for axes, (name, text) in zip(grid, DISTANCES.items(), strict=True):
        for colour, (kind, pairs) in enumerate((("random", item.random), ("near", item.near))):
            x, y = pairs.distances[name], pairs.kl
            scatter(axes, x, y, title="", x_label=text, y_label="KL of next-token outputs, nats", colour=1 - colour)
            grid_x = np.linspace(x.min(), x.max(), 200)
            fit = IsotonicRegression(out_of_bounds="clip").fit(x, y)
            r2 = item.explained[kind, name, "isotonic"].r2
            axes.plot(
                grid_x,
                fit.predict(grid_x),
                color="black" if kind == "near" else "0.35",
                linewidth=1.8,
                linestyle=LINES[1 - colour],
                label=f"{kind} pairs, isotonic: R² {r2:.2f}",
            )
        axes.legend(fontsize=8, frameon=False)
    save(figure, path)
    return f"Divergence against three distances at layer {item.layer}; nearest neighbours blue, random pairs orange."


def draw_sweep(path: Path, found: Sequence[States]) -> str:
    """Draw R² over k, inside the top-k singular directions and outside."""
    figure, grid = new_figure(
        min(len(found), 3), -(-len(found) // 3), title="Which part of the difference counts?", width=3.8
    )
    for axes, item in zip(grid, found, strict=False):
        axes.plot(item.swept.k, item.swept.inside, "o-", color=COLOURS[0], label="inside the top k")
        axes.plot(item.swept.k, item.swept.outside, "s--", color=COLOURS[1], label="the rest")
        axes.set_xscale("log", base=2)
        axes.axhline(0, color="0.7", linewidth=1)
        axes.set_title(f"layer {item.layer}", fontsize=10)
        axes.set_xlabel("k singular directions of W_U", fontsize=9)
        axes.set_ylabel("R² of KL, held out", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    save(figure, path)
    return "R² of the divergence from Δ ln_final inside the top k singular directions of W_U, and from the rest."


def draw_shares(path: Path, found: Shares, *, seed: int) -> str:
    """Draw the share explained by one state, by layer, and by the number of positions."""
    figure, (left, right) = new_figure(2, title="What one state explains of the divergence", width=5.0)
    for i, kind in enumerate(("convergent", "random")):
        for axes, entries in ((left, found.by_layer), (right, found.by_positions)):
            keys = [key for key, of in entries if of == kind]
            shares = [entries[key, kind].share(seed=seed) for key in keys]
            x = np.arange(len(keys))
            values = np.array([s.value for s in shares])
            ends = [values - [s.low for s in shares], np.array([s.high for s in shares]) - values]
            axes.errorbar(
                x + 0.06 * i,
                values,
                yerr=np.maximum(ends, 0),
                color=COLOURS[i],
                linestyle=LINES[i],
                marker=MARKERS[i],
                capsize=3,
                label=f"{kind} pairs",
            )
            axes.set_xticks(x, ["all" if key == ALL else str(key) for key in keys])
    for axes, text in (
        (left, "layer patched, last position"),
        (right, f"last positions patched, layer {found.middle}"),
    ):
        axes.axhline(1, color="0.7", linewidth=1)
        axes.axhline(0, color="0.7", linewidth=1)
        axes.set_xlabel(text, fontsize=9)
        axes.set_ylabel("1 − KL(A ‖ patched B) ÷ KL(A ‖ B)", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    save(figure, path)
    return "Forward-proportion patching: share of the divergence explained, 95 % over pairs."


def draw_rings(path: Path, subject: Subject, found: Mapping[tuple[int, str], Ring]) -> str:
    """Draw circularity and H1 less those of matched Gaussians, and the roundest cloud in its principal plane."""
    layers = sorted({layer for layer, _ in found})
    figure, grid = new_figure(3, title="Semantic rings?", width=4.6, height=3.6)
    for axes, name in zip(grid, ("circularity", "persistence"), strict=False):
        excess = [
            [getattr(found[layer, kind], name) - getattr(found[layer, kind], f"{name}_null") for kind in subject.names]
            for layer in layers
        ]
        title = "circularity" if name == "circularity" else "longest H1 life ÷ median distance"
        heat_map(
            axes,
            np.array(excess),
            title=title,
            x="category",
            y="layer",
            label="− matched Gaussians",
            x_ticks=subject.names,
            y_ticks=[str(layer) for layer in layers],
            centred=True,
        )
        axes.tick_params(axis="x", rotation=40)
    (layer, kind), ring = max(found.items(), key=lambda item: item[1].circularity)
    members = subject.prompts[subject.category == subject.names.index(kind)].tolist()
    plane = principal_plane(subject.run["resid_post"].sel(layer=layer, prompt=members, pos=-1).numpy())
    measured = f"{ring.circularity:.2f}, Gaussian {ring.circularity_null:.2f}, p {ring.circularity_p:.2g}"
    title = f"roundest: layer {layer}, {kind}\n{measured}"
    scatter(grid[2], *(plane / plane.std(0)).T, title=title, x_label="PC 1 (scaled)", y_label="PC 2 (scaled)")
    grid[2].set_aspect("equal")
    save(figure, path)
    return "Circularity and persistent H1 less those of Gaussians of the same covariance; the roundest cloud of all."
