"""Figures of steps 1 to 3. Each function writes a file and returns its caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analyses.common import figure
from analyses.modular_arithmetic.ablation import Directions, Effect, falls
from analyses.modular_arithmetic.fourier import NeuronSpectrum, Spectrum, grid_transform, plane
from analyses.modular_arithmetic.progress import Measures, Phases, series
from analyses.modular_arithmetic.training import Trained

Floats = npt.NDArray[np.float64]
PHASES = ("memorisation", "circuit formation", "clean-up")
SHADES = ("0.93", "0.86", "0.93")
N_NEURONS = 5
CIRCLES = 6


def draw_progress(path: Path, trained: Trained | None, found: Sequence[Measures], ends: Phases, *, title: str) -> str:
    """Loss curves and progress measures over the epochs, the phases shaded."""
    made, (losses, measures, shape, norm) = figure.new_figure(2, 2, width=5.2, height=3.4, title=title)
    epochs = series(found, "step")
    if trained is not None:
        losses.plot(trained.epochs, trained.losses, color=figure.COLOURS[0], linewidth=1.4, label="training pairs")
    else:
        losses.plot(epochs, series(found, "train_loss"), color=figure.COLOURS[0], label="training pairs")
    losses.plot(epochs, series(found, "test_loss"), color=figure.COLOURS[1], marker=".", markersize=4, label="held-out")
    for i, (label, name) in enumerate((("restricted, all pairs", "restricted_loss"), ("excluded", "excluded_loss"))):
        values = series(found, name)
        measures.plot(epochs, values, color=figure.COLOURS[2 + i], marker=".", markersize=4, label=label)
        random = series(found, f"random_{name.removesuffix('_loss')}")
        measures.plot(
            epochs, random, color=figure.COLOURS[2 + i], linestyle=":", label=f"{label.partition(',')[0]}, random"
        )
    for i, (label, name) in enumerate(
        (
            ("Gini of the embedding's power", "gini"),
            ("embedding in key frequencies", "key_share"),
            ("logits in their waves", "logit_share"),
            ("held-out accuracy", "test_accuracy"),
        )
    ):
        shape.plot(epochs, series(found, name), color=figure.COLOURS[i], linestyle=figure.LINES[i], label=label)
    norm.plot(epochs, series(found, "weight_norm"), color=figure.COLOURS[0], marker=".", markersize=4)
    for axes, label in ((losses, "loss, nats"), (measures, "loss, nats"), (shape, "share"), (norm, "‖weights‖")):
        axes.set(xlabel="epoch", ylabel=label)
        _shade(axes, ends, last=float(epochs[-1]), named=axes is losses)
    for axes in (losses, measures):
        axes.set_yscale("log")
    for axes in (losses, measures, shape):
        axes.legend(fontsize=7, frameon=False)
    figure.save(made, path)
    return "Loss curves and progress measures over the epochs; dotted: as many random frequencies"


def draw_spectra(path: Path, spectra: Mapping[str, Spectrum], *, title: str) -> str:
    """Fourier power of several embeddings by frequency, with what random matrices have."""
    n_columns = min(len(spectra), 3)
    made, grid = figure.new_figure(n_columns, -(-len(spectra) // n_columns), width=4.2, height=2.9, title=title)
    for axes in grid[len(spectra) :]:
        axes.set_axis_off()
    for axes, (name, found) in zip(grid, spectra.items(), strict=False):
        frequencies = np.arange(1, len(found.power) + 1)
        keys = np.isin(frequencies, found.keys)
        for chosen, colour, label in ((keys, 0, "key"), (~keys, 5, "other")):
            if chosen.any():
                axes.bar(frequencies[chosen], found.power[chosen], color=figure.COLOURS[colour], label=label)
        axes.axhline(found.threshold, color="0.3", linestyle="--", linewidth=1, label="99 % of random maxima")
        axes.axhline(1 / len(frequencies), color="0.6", linestyle=":", linewidth=1, label="all alike")
        axes.set(xlabel="frequency", ylabel="share of the variance")
        axes.set_title(f"{name}: {len(found.keys)} key, {found.key_share:.0%}", fontsize=10)
        axes.margins(y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].legend(fontsize=7, frameon=False)
    figure.save(made, path)
    return "Fourier power of the embedding by frequency, against random matrices of the same shape"


def draw_circles(path: Path, matrix: npt.NDArray[np.float32], frequencies: Sequence[int], *, title: str) -> str:
    """The embedding in the plane of each key frequency, numbers joined in the order of that frequency."""
    shown = frequencies[:CIRCLES]
    made, grid = figure.new_figure(max(len(shown), 1), width=3.2, height=3.2, title=title)
    p = len(matrix)
    for axes, frequency in zip(grid, shown, strict=False):
        points = plane(matrix, frequency)
        order = np.argsort(frequency * np.arange(p) % p)
        around = np.append(order, order[0])
        axes.plot(*points[around].T, color="0.8", linewidth=0.8)
        axes.scatter(points[:, 0], points[:, 1], c=frequency * np.arange(p) % p, cmap="twilight", s=14)
        for number in range(0, p, max(1, p // 30)):
            axes.annotate(str(number), points[number], fontsize=6, xytext=(2, 2), textcoords="offset points")
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"frequency {frequency}", fontsize=10)
    for axes in grid:
        axes.set_axis_off()
    figure.save(made, path)
    return "The embedding in the plane of each key frequency; neighbours on the line are one step of it apart"


def draw_neurons(
    path: Path, neurons: npt.NDArray[np.float32], found: NeuronSpectrum, before: NeuronSpectrum | None, *, title: str
) -> str:
    """2-D Fourier transforms of the neurons that one frequency explains best, and how well it explains all."""
    modulus = round(len(neurons) ** 0.5)
    strength = np.where(found.active, np.nan_to_num(found.explained) * neurons.std(0), 0)
    shown = _distinct(strength, found.frequency)
    made, grid = figure.new_figure(3, -(-(len(shown) + 1) // 3), width=4.2, height=3.2, title=title)
    transforms = np.abs(grid_transform(neurons[:, shown], modulus))
    transforms[0, 0] = 0
    for axes, number, values in zip(grid, shown, np.moveaxis(transforms, -1, 0), strict=False):
        share, frequency = found.explained[number], found.frequency[number]
        name = f"neuron {number}: frequency {frequency}, {share:.0%}"
        figure.heat_map(axes, values, title=name, x="wave of b", y="wave of a", label="|component|")
    samples = {"last checkpoint": found.explained[found.active]}
    if before is not None:
        samples["initial"] = before.explained[before.active]
    label = "share of the variance at the best frequency"
    axes = grid[len(shown)]
    figure.histograms(axes, samples, title="all active neurons", x_label=label, y_label="share of the neurons")
    for rest in grid[len(shown) + 1 :]:
        rest.set_axis_off()
    figure.save(made, path)
    return "2-D Fourier transforms over the grid of neurons (waves: 0 constant, 2k − 1 cosine and 2k sine of k)"


def draw_ablation(
    path: Path, effects: Mapping[str, Mapping[str, Effect]], directions: Directions | None, *, title: str
) -> str:
    """Falls of the accuracy by component for each intervention, and accuracy without directions of the embedding."""
    kinds = list(effects)
    names = list(dict.fromkeys(name for by_name in effects.values() for name in by_name))
    n = 1 if directions is None else 2
    made, grid = figure.new_figure(n, width=6.2, height=1.2 + 0.42 * len(names), title=title)
    axes, height = grid[0], 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        found = falls(effects, kind)
        rows = [names.index(name) + (i - (len(kinds) - 1) / 2) * height for name in found]
        values = np.array([value for value, _, _ in found.values()])
        ends = np.array([(value - low, high - value) for value, low, high in found.values()]).T
        label = f"{kind} ablation" if kind in ("zero", "mean") else f"patched: {kind}"
        axes.barh(
            rows, values, height=height, xerr=ends, color=figure.COLOURS[i], label=label, error_kw={"linewidth": 0.6}
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="fall of the accuracy over all pairs")
    axes.legend(fontsize=8, frameon=False)
    if directions is not None:
        _draw_directions(grid[1], directions)
    figure.save(made, path)
    return "What each component is worth: fall of the accuracy, 95 % over pairs; and directions of the embedding"


def _draw_directions(axes: Axes, found: Directions) -> None:
    bars = {
        "whole": (found.clean, 0.0, 0.0),
        f"without the {found.n} key waves": (found.key, 0.0, 0.0),
        f"without {found.n} random directions": _ends(found.random.value, found.random.low, found.random.high),
        "without as many other waves": _ends(found.others.value, found.others.low, found.others.high),
        "only the key waves": (found.only_key, 0.0, 0.0),
        "only as many random directions": _ends(found.only_random.value, found.only_random.low, found.only_random.high),
    }
    kept = {name: bar for name, bar in bars.items() if np.isfinite(bar[0])}
    values = np.array(list(kept.values()))
    colours = [figure.COLOURS[5 if "random" in name or "other" in name else 0] for name in kept]
    axes.barh(range(len(kept)), values[:, 0], xerr=values[:, 1:].T, color=colours, height=0.6)
    axes.set_yticks(range(len(kept)), list(kept))
    axes.invert_yaxis()
    axes.set(xlabel="accuracy over all pairs", xlim=(0, 1.02))
    axes.set_title("the embedding's directions", fontsize=10)


def _ends(value: float, low: float, high: float) -> tuple[float, float, float]:
    return value, value - low, high - value


def _distinct(strength: Floats, frequency: npt.NDArray[np.int64]) -> list[int]:
    """The strongest neurons, of different frequencies as far as there are."""
    order = np.argsort(-strength).tolist()
    first = {int(frequency[i]): i for i in reversed(order) if frequency[i] > 0}
    chosen = sorted(first.values(), key=lambda i: -strength[i])[:N_NEURONS]
    return [*chosen, *(i for i in order if i not in chosen)][:N_NEURONS]


def _shade(axes: Axes, ends: Phases, *, last: float, named: bool) -> None:
    """Shade the phases of a training that grokked; `named` writes their names at the top."""
    if not ends.are_distinct or ends.memorised is None or ends.grokked is None:
        return
    turning = ends.turning if ends.turning is not None and ends.turning > ends.memorised else ends.memorised
    edges = (0.0, float(turning), float(ends.grokked), last)
    for name, shade, begin, end in zip(PHASES, SHADES, edges, edges[1:], strict=False):
        if end <= begin:
            continue
        axes.axvspan(begin, end, color=shade, linewidth=0, zorder=-1)
        if named:
            axes.text((begin + end) / 2, 1.01, name, ha="center", fontsize=7, transform=axes.get_xaxis_transform())
