"""The figures of partitions: rotated weights of the toy, training curves, information matrices, baselines, effects."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from analyses.common import figure
from analyses.subspace_partition.baseline import TRAINED
from analyses.subspace_partition.evaluation import Effects, Geometry, gini_measures
from analyses.subspace_partition.planted import GROUP_SIZE
from analyses.subspace_partition.toy import Toy
from analyses.subspace_partition.training import Recipe, Trained, sizes_text

N_SHOWN = 48
SMOOTH_STEPS = 50


def draw_toy(path: Path, toy: Toy) -> str:
    """The features' directions as they are and rotated, and the cosines among them; returns the caption."""
    made, axes = figure.new_figure(
        3, width=4.4, height=4.2, title=f"Toy (a), seed {toy.seed}: 40 features, 12 dimensions"
    )
    weights = toy.model.W.detach().numpy()
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    cosines = (weights @ weights.T) / (lengths * lengths.T)
    sizes = "+".join(map(str, toy.trained.partition.sizes))
    maps = {
        "cosines of features": (cosines, "feature"),
        "W, as trained": (weights, "dimension"),
        f"W R: subspaces of {sizes}": (weights @ toy.trained.partition.rotation, "dimension, rotated"),
    }
    for i, (title, (values, x)) in enumerate(maps.items()):
        figure.heat_map(axes[i], values, title=title, x=x, y="feature" if i == 0 else "", label="", centred=True)
        axes[i].axhline(GROUP_SIZE - 0.5, color="black", linewidth=0.8)
    for edge in np.cumsum(toy.trained.partition.sizes)[:-1]:
        axes[2].axvline(edge - 0.5, color="black", linewidth=0.8)
    figure.save(made, path)
    return "The two groups' directions: after the rotation each group lies in its own block; lines divide the groups"


def draw_recovery(path: Path, toys: Sequence[Toy]) -> str:
    """The overlap of each group's span with its subspace by seed, and of chance; returns the caption."""
    made, (axes,) = figure.new_figure(width=6.2, height=3.2)
    seeds = [toy.seed for toy in toys]
    for group in range(2):
        values = [toy.recovery.overlap[group] for toy in toys]
        axes.plot(
            np.arange(len(seeds)) + 0.16 * (group - 0.5),
            values,
            "os"[group],
            color=figure.COLOURS[group],
            label=f"group {group}",
        )
    axes.plot(range(len(seeds)), [toy.chance for toy in toys], "|", color="0.35", markersize=9, label="random spans")
    axes.axhline(0.95, color="0.6", linewidth=0.8)
    axes.set_xticks(range(len(seeds)), [str(seed) for seed in seeds])
    axes.set(
        xlabel="seed", ylabel="overlap", ylim=(0, 1.03), title="Toy (a): overlap of a group's span with its subspace"
    )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.save(made, path)
    return "Mean squared cosine of principal angles, by seed and group; the grey line is 0.95"


def draw_training(path: Path, trainings: Mapping[str, Trained]) -> str:
    """The loss of each training with its merges, and the highest information at each event; returns the caption."""
    made, axes = figure.new_figure(2, width=5.2, height=3.4)
    for i, (name, trained) in enumerate(trainings.items()):
        n = min(SMOOTH_STEPS, max(1, len(trained.losses) // 4))
        smooth = np.convolve(trained.losses, np.ones(n) / n, mode="valid")
        colour, line = figure.COLOURS[i % len(figure.COLOURS)], figure.LINES[i % len(figure.LINES)]
        axes[0].plot(np.arange(n, n + len(smooth)), smooth, color=colour, linestyle=line, linewidth=1.4, label=name)
        steps, highest = zip(*((event.step, event.highest) for event in trained.events), strict=True)
        axes[1].plot(steps, highest, marker="o", color=colour, linestyle=line, markersize=4, linewidth=1.4, label=name)
        for event in trained.merges:
            axes[0].axvline(event.step, color=colour, linewidth=0.5, alpha=0.4)
    axes[1].axhline(Recipe().threshold, color="0.5", linewidth=0.9)
    axes[0].set(title="loss; lines are merges", xlabel="step", ylabel="mean distance to the nearest key")
    axes[1].set(title="highest information of a pair", xlabel="step", ylabel="nats a dimension")
    axes[1].legend(fontsize=8, frameon=False)
    figure.save(made, path)
    return (
        "Training: the loss as a moving mean, which rises at merges, since larger subspaces have larger distances, and "
        "the information that decides merges; the grey line is the threshold"
    )


def draw_merging(path: Path, trained: Trained, *, title: str) -> str:
    """The normalised information of all pairs at each event, one scale for all; returns the caption."""
    events = [event for event in trained.events if len(event.sizes) > 1]
    made, axes = figure.new_figure(len(events), width=3.4, height=2.9, title=title)
    highest = max(event.highest for event in events)
    for i, event in enumerate(events):
        names = [f"{size}" for size in event.sizes]
        figure.heat_map(
            axes[i],
            event.information,
            title=f"step {event.step:,}, {event.kind}",
            x="subspace, by its dimensions",
            y="",
            label="nats a dimension",
            limits=(0, max(highest, Recipe().threshold)),
            x_ticks=names,
            y_ticks=names,
        )
    figure.save(made, path)
    return "Information of pairs of subspaces, divided by their dimensions, before each decision to merge"


def draw_information(path: Path, geometry: Mapping[str, Geometry]) -> str:
    """The information of all pairs of subspaces, a matrix for each partition; returns the caption."""
    made, axes = figure.new_figure(len(geometry), width=3.6, height=3.0)
    highest = max(float(np.nanmax(found.information, initial=0)) for found in geometry.values()) or 1.0
    for i, (name, found) in enumerate(geometry.items()):
        title = f"{name}, mean {found.mean_information:.2f}"
        figure.heat_map(
            axes[i], found.information, title=title, x="subspace", y="subspace", label="nats", limits=(0, highest)
        )
    figure.save(made, path)
    return "Mutual information of pairs of subspaces in nats, by partition"


def draw_baselines(path: Path, toys: Sequence[Toy]) -> str:
    """Distance, information and Gini of each partition over seeds; returns the caption."""
    made, axes = figure.new_figure(3, width=4.0, height=2.8, title="Toy (a): trained partitions and baselines")
    names = list(toys[0].geometry)
    labels = [f"{name} ({sizes_text(toys[0].geometry[name].sizes)})" for name in names]
    values = {
        "mean distance": [[toy.geometry[name].unweighted for toy in toys] for name in names],
        "mean information, nats": [[toy.geometry[name].mean_information for toy in toys] for name in names],
        "Gini of |effect|": [[float(toy.gini[name]["effect"].mean()) for toy in toys] for name in names],
    }
    for i, (label, rows) in enumerate(values.items()):
        for row, samples in enumerate(rows):
            colour = figure.COLOURS[0 if names[row] == TRAINED else 1]
            axes[i].plot(samples, np.full(len(samples), row), "o", color=colour, alpha=0.5, markersize=5, mew=0)
            axes[i].plot(np.mean(samples), row, "|", color="black", markersize=14)
        axes[i].set_yticks(range(len(names)), labels if i == 0 else [])
        axes[i].set(xlabel=label, ylim=(len(names) - 0.5, -0.5), xlim=(0, None))
    figure.save(made, path)
    return "Each partition by its distances, its information and the Gini coefficient of patching; a dot a seed"


def draw_effects(path: Path, effects: Mapping[str, Effects], geometry: Mapping[str, Geometry]) -> str:
    """What patching each subspace does, strongest first, and the Gini coefficients; returns the caption."""
    made, axes = figure.new_figure(2, width=5.4, height=3.4)
    for i, (name, found) in enumerate(effects.items()):
        mean = np.sort(found.effect.mean(0))[::-1][:N_SHOWN]
        colour, line = figure.COLOURS[i % len(figure.COLOURS)], figure.LINES[i % len(figure.LINES)]
        axes[0].plot(range(1, len(mean) + 1), mean, marker="o", color=colour, linestyle=line, markersize=4, label=name)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    whole = float(effects[TRAINED].whole.mean())
    axes[0].axhline(whole, color="0.5", linewidth=0.9)
    axes[0].set(
        title="effect of patching a subspace", xlabel="subspace, strongest first", ylabel="fall of the logit difference"
    )
    axes[0].legend(fontsize=8, frameon=False)
    ginis = {
        name: gini_measures(found.effect, geometry[name].sizes, geometry[name].variance)
        for name, found in effects.items()
    }
    measures = list(next(iter(ginis.values())))
    for i, (name, found_gini) in enumerate(ginis.items()):
        places = np.arange(len(measures)) + 0.15 * (i - len(ginis) / 2)
        axes[1].bar(places, [found_gini[m].mean() for m in measures], 0.15, color=figure.COLOURS[i], label=name)
    axes[1].set_xticks(range(len(measures)), ["|effect|", "÷ dimension", "÷ variance"])
    axes[1].set(title="Gini over subspaces, mean over pairs", ylim=(0, 1))
    figure.save(made, path)
    return f"Patching one subspace after another; the grey line is patching all of the site, {whole:.2f}"
