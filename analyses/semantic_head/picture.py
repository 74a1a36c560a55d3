"""Figures of the study; each function writes one file and returns its caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from analyses.common import figure
from analyses.common.autoencoder import Trained
from analyses.semantic_head.attention import CosineCurve, SelfAttention
from analyses.semantic_head.behaviour import Change
from analyses.semantic_head.category import Categories
from analyses.semantic_head.circuit import Circuit
from analyses.semantic_head.community import Communities, lay_out
from analyses.semantic_head.score import Ranked

Floats = npt.NDArray[np.float64]
Reals = npt.NDArray[Any]
N_SHOWN_TOKENS, N_SHOWN_HEADS, N_SHOWN_COMMUNITIES, N_WORDS_A_CATEGORY = 32, 16, 7, 8
PALETTE = (*figure.COLOURS[:6], "#999999", "#8B4513")


def draw_pattern(path: Path, pattern: Floats, tokens: Sequence[int], categories: Categories, *, title: str) -> str:
    """The pattern on the first words of a prompt, labels coloured by category, what should be attended to outlined."""
    n = min(N_SHOWN_TOKENS, len(tokens))
    made, (axes,) = figure.new_figure(width=8.6, height=7.4)
    shown = np.where(np.tril(np.ones((n, n), bool)), pattern[:n, :n], np.nan)
    texts = [_text(categories, token) for token in tokens[:n]]
    figure.heat_map(
        axes, shown, title=title, x="key", y="query", label="attention", x_ticks=texts, y_ticks=texts, limits=(0, 1)
    )
    labels = categories.labels(max(*tokens, *categories.words) + 1)[list(tokens[:n])]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick, label in zip(ticks, labels, strict=True):
            tick.set(color=PALETTE[label] if label >= 0 else "black", fontsize=7)
    for tick in axes.get_xticklabels():
        tick.set_rotation(90)
    same = (labels[:, None] == labels[None]) & (labels[:, None] >= 0)
    differ = np.array(tokens[:n])[:, None] != np.array(tokens[:n])[None]
    for query, key in np.argwhere(np.tril(same & differ, -1)):
        axes.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, edgecolor="0.35", linewidth=0.5))
    handles = [Rectangle((0, 0), 1, 1, color=PALETTE[i]) for i in range(len(categories.names))]
    axes.legend(handles, categories.names, fontsize=8, frameon=False, loc="upper right")
    figure.save(made, path)
    return "Attention on the first words of a prompt; outlined: earlier words of the query's category"


def draw_ranking(path: Path, ranked: Sequence[Ranked], *, title: str) -> str:
    """Scores of the best heads beside the same with categories shuffled."""
    shown = ranked[:N_SHOWN_HEADS]
    made, (axes,) = figure.new_figure(width=6.0, height=0.6 + 0.27 * len(shown))
    estimates = {e.name: (e.score, e.score - 1.96 * e.error, e.score + 1.96 * e.error) for e in shown}
    marks = {entry.name: entry.shuffled for entry in shown}
    figure.intervals(
        axes, estimates, title=title, x_label="semantic score, nats (0 is best)", marks=marks, mark="shuffled"
    )
    axes.set_xlim(0, 1.06 * max(max(entry.score, entry.shuffled) for entry in shown))
    figure.save(made, path)
    return f"The {len(shown)} heads with the best scores of {len(ranked)}, and with categories shuffled over the words"


def draw_ablation(path: Path, scores: Mapping[str, Floats], null: float, *, title: str) -> str:
    """Box plots of the score over prompts, a box a component."""
    made, (axes,) = figure.new_figure(width=1.6 + 0.95 * len(scores), height=3.6)
    axes.boxplot(
        list(scores.values()), tick_labels=list(scores), widths=0.55, medianprops={"color": figure.COLOURS[1]},
        flierprops={"markersize": 3, "markeredgecolor": "0.5"},
    )  # fmt: skip
    axes.axhline(null, color="0.5", linestyle=":", linewidth=1.2, label="categories shuffled")
    axes.set(title=title, xlabel="component of the head's input at its mean", ylabel="semantic score, nats")
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False)
    figure.save(made, path)
    n = len(next(iter(scores.values())))
    return f"Semantic score with one component of the head's input replaced by its mean, {n} prompts"


def draw_cosine(path: Path, curve: CosineCurve, controls: Sequence[CosineCurve], *, title: str) -> str:
    """Attention minus that of the token itself, by the cosine of the head's inputs."""
    made, (axes,) = figure.new_figure(width=6.0, height=3.6)
    axes.axhline(0, color="0.6", linewidth=0.8)
    for i, control in enumerate(controls):
        label = "random weights" if i == 0 else None
        axes.plot(control.centres, control.means, color="0.75", linewidth=0.8, label=label)
    axes.plot(
        curve.centres, curve.means, color=figure.COLOURS[0], marker=".", markersize=4, linewidth=1.6, label="the head"
    )
    held = curve.centres[curve.filled]
    axes.set_xlim(held.min() - 0.03, held.max() + 0.03)
    axes.set(title=title, xlabel="cosine of the two tokens' inputs", ylabel="log attention − that of the token itself")
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False)
    figure.save(made, path)
    return "Log attention to another token, minus that to the token itself, by the cosine of their inputs"


def draw_communities(
    path: Path, found: Communities, vocabulary: npt.NDArray[np.int64], categories: Categories, *, title: str, seed: int
) -> str:
    """The largest communities of the token graph, each named by its central tokens."""
    shown = min(N_SHOWN_COMMUNITIES, len(found.sizes))
    tokens = np.flatnonzero(found.member < shown)
    places = lay_out(found, tokens, seed=seed)
    made, (axes,) = figure.new_figure(width=9.6, height=6.8)
    where = np.full(len(found.member), -1)
    where[tokens] = np.arange(len(tokens))
    inside = found.edges[(where[found.edges] >= 0).all(1)]
    lines = places[where[inside]]  # [edge, end, coordinate]
    axes.plot(lines[:, :, 0].T, lines[:, :, 1].T, color="0.8", linewidth=0.35, zorder=1)
    for community in range(shown):
        own = places[found.member[tokens] == community]
        names = ", ".join(_text(categories, int(vocabulary[t])) for t in found.central(community))
        size = int(found.sizes[community])
        axes.scatter(
            own[:, 0], own[:, 1], s=14, color=PALETTE[community % len(PALETTE)], label=f"{names} … ({size})", zorder=2
        )
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="central tokens (size)")
    figure.save(made, path)
    return f"The {shown} largest of {len(found.sizes)} communities in the graph of each token's strongest keys"


def draw_parts(
    path: Path, parts: Mapping[str, Floats], names: Sequence[str], sizes: Sequence[int], *, title: str
) -> str:
    """E S Eᵀ and E A Eᵀ on words grouped by category, each beside its random control."""
    made, grid = figure.new_figure(2, 2, width=4.9, height=4.1, title=title)
    edges = np.cumsum([0, *sizes])
    middles = (edges[1:] + edges[:-1]) / 2 - 0.5
    bounds = [max(float(np.abs(values).max()) for values in list(parts.values())[i : i + 2]) for i in (0, 2)]
    for i, (axes, (name, values)) in enumerate(zip(grid, parts.items(), strict=True)):
        ends = (-bounds[i // 2], bounds[i // 2])  # S and A of one circuit share their scale
        figure.heat_map(axes, values, title=name, x="key", y="query", label="score", centred=True, limits=ends)
        axes.set_xticks(middles, names, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(middles, names, fontsize=7)
        for edge in edges[1:-1]:
            axes.axhline(edge - 0.5, color="0.4", linewidth=0.4)
            axes.axvline(edge - 0.5, color="0.4", linewidth=0.4)
    figure.save(made, path)
    return "Scores between words by the symmetric and the skew part, and by random matrices of the same rank and norm"


def draw_spectrum(path: Path, circuit: Circuit, controls: Sequence[Circuit], *, title: str) -> str:
    """Eigenvalues of S and frequencies of A in order, against random circuits of the same norm."""
    made, (left, right) = figure.new_figure(2, width=5.0, height=3.6, title=title)
    for axes, values, others, label in (
        (left, circuit.spectrum.values, [each.spectrum.values for each in controls], "eigenvalue of S"),
        (right, circuit.skew_values.imag, [each.skew_values.imag for each in controls], "eigenvalue of A ÷ i"),
    ):
        axes.axhline(0, color="0.6", linewidth=0.8)
        for i, other in enumerate(others):
            axes.plot(other, color="0.75", linewidth=0.8, label="random weights" if i == 0 else None)
        axes.plot(values, color=figure.COLOURS[0], marker=".", markersize=3, linewidth=1.0, label="the head")
        axes.set(xlabel="in order", ylabel=label)
        axes.legend(fontsize=8, frameon=False)
    figure.save(made, path)
    return "Eigenvalues of the symmetric and the skew part of W_Q W_Kᵀ, in the span of W_Q and W_K"


def draw_scaling(
    path: Path,
    scaled: Mapping[float, SelfAttention],
    control: Mapping[float, SelfAttention],
    first: Mapping[int, Mapping[float, SelfAttention]],
    *,
    n: int,
    title: str,
) -> str:
    """Rank of the token itself as negative eigenvalues are scaled: all of them, and the first k."""
    made, (left, middle, right) = figure.new_figure(3, width=4.4, height=3.6, title=title)
    x = sorted(scaled)
    for i, (name, found) in enumerate((("the head", scaled), ("random weights", control))):
        left.plot(x, [found[f].mean_rank for f in x], marker="o", markersize=4, color=figure.COLOURS[i], label=name)
    left.axhline(SelfAttention.chance(n).mean_rank, color="0.5", linestyle=":", label="chance")
    left.set(xlabel="factor on all negative eigenvalues", ylabel=f"mean rank of the token itself, of {n}")
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    colours = _shades(len(first))
    factors = list(next(iter(first.values())))
    for axes, name, label in (
        (middle, "mean_rank", "mean rank of the token itself"),
        (right, "spearman", "rank correlation with the unchanged rows"),
    ):
        for colour, (number, curve) in zip(colours, first.items(), strict=True):
            axes.plot(factors, [getattr(curve[factor], name) for factor in factors], color=colour, label=f"{number}")
        axes.set(xlabel="factor on the k most negative eigenvalues", ylabel=label)
    middle.set_yscale("log")
    middle.legend(fontsize=7, frameon=False, title="k", title_fontsize=8, ncols=2)
    figure.save(made, path)
    return f"How a token ranks among its own keys, of {n}, as eigenvalues of S are scaled"


def draw_steering(path: Path, patterns: Mapping[str, Floats], changes: Mapping[float, Change], *, title: str) -> str:
    """Patterns before and after steering, and what it costs on text."""
    made, grid = figure.new_figure(len(patterns) + 1, width=4.2, height=3.6, title=title)
    n = min(N_SHOWN_TOKENS, *(len(values) for values in patterns.values()))
    reach = np.tril(np.ones((n, n), bool))
    for axes, (name, values) in zip(grid, patterns.items(), strict=False):
        shown = np.where(reach, values[:n, :n], np.nan)
        figure.heat_map(axes, shown, title=name, x="key", y="query", label="attention", limits=(0, 1))
    last = grid[-1]
    last.axhline(0, color="0.6", linewidth=0.8)
    x = range(len(changes) + 1)
    rates = sorted([*changes, 0.0])
    for i, (name, key) in enumerate((("self-attention", "self_mass"), ("text loss, nats", "text"))):
        found = [getattr(changes[rate], key) if rate else None for rate in rates]
        middle = np.array([0.0 if e is None else e.value for e in found])
        ends = np.array([(0.0, 0.0) if e is None else (e.value - e.low, e.high - e.value) for e in found]).T
        last.errorbar(
            x, middle, yerr=np.maximum(ends, 0), marker="o", markersize=4, color=figure.COLOURS[i], label=name
        )
    last.set_xticks(list(x), [f"{rate:g}" for rate in rates])
    last.set(xlabel="rate of the step (− suppress, + boost)", ylabel="change")
    last.set_title("what it changes", fontsize=10)
    last.margins(y=0.15)
    last.legend(fontsize=8, frameon=False, loc="upper center")
    figure.save(made, path)
    return "The head's attention before and after a gradient step on tr(W_Q W_Kᵀ), and what the step changes"


def draw_removal(path: Path, changes: Mapping[int, Change], head: int, *, title: str) -> str:
    """Rise of the losses with the head, and with others of its layer, at their mean."""
    made, grid = figure.new_figure(2, width=4.8, height=0.9 + 0.5 * len(changes), title=title)
    for axes, key, label in zip(grid, ("text", "succession"), ("text", "successions"), strict=True):
        estimates = {
            f"head {other}{' (this)' if other == head else ''}": (e.value, e.low, e.high)
            for other, change in changes.items()
            for e in (getattr(change, key),)
        }
        axes.axvline(0, color="0.6", linewidth=0.8)
        figure.intervals(axes, estimates, title=label, x_label="rise of the loss, nats")
    figure.save(made, path)
    return "Rise of the loss when a head's output is held at its mean, over text and over words in a known order"


def draw_autoencoder(path: Path, trained: Trained, similar: Reals, scores: Reals, same: npt.NDArray[np.bool_]) -> str:
    """The autoencoder's training, and the cosine of two words' features against the head's score."""
    made, (left, right) = figure.new_figure(2, width=4.8, height=3.5)
    left.plot(trained.losses, color=figure.COLOURS[0], linewidth=1.0)
    left.set(title="training", xlabel="step", ylabel="share of variance unexplained", yscale="log")
    left.title.set_fontsize(10)
    for i, (name, chosen) in enumerate((("two categories", ~same), ("one category", same))):
        right.scatter(
            similar[chosen], scores[chosen], s=3, alpha=0.25, linewidths=0, color=figure.COLOURS[i], label=name
        )
    right.set(
        title="features and attention",
        xlabel="cosine of two words' features",
        ylabel="the head's score, mean of both ways",
    )
    right.title.set_fontsize(10)
    right.legend(fontsize=8, frameon=False, markerscale=3)
    figure.save(made, path)
    return "The sparse autoencoder: its loss, and pairs of words by the cosine of their features and the head's score"


def _text(categories: Categories, token: int) -> str:
    if token == categories.bos:
        return "BOS"
    return categories.text(token).replace("$", r"\$")


def _shades(n: int) -> list[tuple[float, float, float, float]]:
    shades = colormaps[figure.SEQUENTIAL]
    return [shades(value) for value in np.linspace(0.05, 0.85, n)]
