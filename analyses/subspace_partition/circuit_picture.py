"""Figures of circuits between subspaces and of copy transformers; each writes one file and returns its caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import actdb
from actdb import plots
from analyses.common import figure
from analyses.subspace_partition.circuit import SIDES, Edge, Graph
from analyses.subspace_partition.copying import HeadScore
from analyses.subspace_partition.edge import EdgeEffect
from analyses.subspace_partition.interpretation import Agreement

SHOWN_Z = 2.0
"""Edges of the graph with a lesser z are left out."""
SIDE_COLOURS = dict(zip(SIDES, figure.COLOURS, strict=False))
PAIR_COLOURS = {"MLP": figure.COLOURS[4], "residual": "0.55"}
SUBSPACE, COMPONENT = (0.86, 0.52), (0.42, 0.42)
"""Width and height of a subspace's box and of a component's."""
ENDS = {"query": 0.12, "value": -0.12}
"""How far above the middle of its nodes an edge begins and ends."""
Point = tuple[float, float]


def draw_graph(path: Path, graph: Graph, *, title: str) -> str:
    """Draw planes as columns of subspaces, heads between them, and the edges above `SHOWN_Z`, as wide as their z."""
    places = _lay_out(graph)
    columns = 2 * len(graph.planes) - 1
    made, (axes,) = figure.new_figure(width=2.0 * columns + 0.6, height=0.9 + 1.3 * _tallest(graph))
    axes.axis("off")
    subspaces = {plane.label(i): size for plane in graph.planes for i, size in enumerate(plane.partition.sizes)}
    for edge in sorted(graph.of(*SIDES, *PAIR_COLOURS), key=lambda each: np.nan_to_num(each.z, nan=-1.0)):
        if edge.z >= SHOWN_Z and {edge.source, edge.target} <= places.keys():
            _draw_edge(axes, edge, places, subspaces)
        elif edge.kind in ("value", "output") and not np.isfinite(edge.z):
            axes.plot(*zip(places[edge.source], places[edge.target], strict=True), color="0.8", linewidth=0.8, zorder=0)
    for name, place in places.items():
        _draw_node(axes, name, place, subspaces.get(name))
    handles = [
        axes.plot([], [], color=colour, linewidth=2.4, label=name)[0]
        for name, colour in {**SIDE_COLOURS, **PAIR_COLOURS}.items()
        if any(edge.kind == name and edge.z >= SHOWN_Z for edge in graph.edges)
    ]
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(-0.8, _tallest(graph) - 0.4), title=title)
    axes.title.set_fontsize(11)
    if handles:
        axes.legend(handles=handles, fontsize=8, frameon=False, loc="lower center", ncols=len(handles))
    figure.save(made, path)
    return (
        f"The circuit from weights alone: edges at least {SHOWN_Z:g} standard deviations above random subspaces, with"
        " their z, and in brackets the share of the causal effect where it was measured"
    )


def draw_strengths(path: Path, graph: Graph, *, title: str) -> str:
    """Draw z of each head's OV and QK edges between subspaces as matrices; those without a null stay empty."""
    panels: dict[tuple[str, str], list[Edge]] = {}
    for edge in graph.edges:
        if edge.kind in ("OV", "QK", "MLP") and np.isfinite(edge.z):
            panels.setdefault((edge.via, edge.kind), []).append(edge)
    if not panels:
        raise actdb.SettingError("no edge of this graph has a null: cut at least one plane into subspaces")
    made, grid = figure.new_figure(len(panels), width=4.2, height=3.2, title=title)
    bound = max(abs(edge.z) for edges in panels.values() for edge in edges)
    for axes, ((via, kind), edges) in zip(grid, panels.items(), strict=True):
        sources, targets = (list(dict.fromkeys(getattr(e, end) for e in edges)) for end in ("source", "target"))
        values = np.full((len(sources), len(targets)), np.nan)
        for edge in edges:
            values[sources.index(edge.source), targets.index(edge.target)] = edge.z
        names = ("query", "key") if kind == "QK" else ("to", "from")
        figure.heat_map(
            axes, values, title=f"{via}, {kind}", x=names[0], y=names[1], label="z", limits=(-bound, bound),
            x_ticks=[_short(name) for name in targets], y_ticks=[_short(name) for name in sources], centred=True,
        )  # fmt: skip
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 * bound else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=colour)
    figure.save(made, path)
    return "How far each head's maps between subspaces lie above those between random subspaces, standard deviations"


def draw_effects(path: Path, effects: Sequence[EdgeEffect], *, title: str) -> str:
    """Draw the share of the whole effect that each edge carries, with intervals, beside random subspaces."""
    made, (axes,) = figure.new_figure(width=6.6, height=0.9 + 0.32 * len(effects))
    estimates, null = {}, {}
    for effect in effects:
        to = f"{effect.reader} {effect.side}" if effect.reader else "all that follows"
        name = f"{effect.source} → {_short(effect.subspace)} → {to}"
        estimates[name] = [end / effect.whole for end in (effect.fall.value, effect.fall.low, effect.fall.high)]
        null[name] = effect.null_share
    figure.intervals(axes, estimates, title=title, x_label="share of the effect", marks=null, mark="random subspaces")
    axes.axvline(0, color="0.7", linewidth=0.8)
    figure.save(made, path)
    return "Edges patched one by one: the share of what the whole stream's corruption does to the same input"


def draw_patterns(
    path: Path,
    run: actdb.Run,
    prompt: int,
    heads: Sequence[HeadScore],
    *,
    title: str,
    tokens: Sequence[str] | None = None,
) -> str:
    """Draw every head's attention on one prompt; `tokens` are their texts, by default their numbers."""
    patterns = [run["pattern"].sel(layer=head.layer, head=head.head, prompt=prompt).numpy() for head in heads]
    titles = [f"{head.name}: {head.role or 'no role'}" for head in heads]
    texts = [str(token) for token in run.tokens(prompt).tolist()] if tokens is None else tokens
    made = plots.patterns_figure(patterns, titles=titles, tokens=texts, title=title)
    figure.save(made, path)
    return "Attention patterns on one prompt, rows are queries"


def draw_progress(path: Path, curves: Mapping[str, Sequence[float]], steps: Sequence[int], *, title: str) -> str:
    """Draw exact match and head scores over the checkpoints of a training."""
    made, (axes,) = figure.new_figure(width=5.6, height=3.4)
    lines = {name: np.asarray(values, np.float64) for name, values in curves.items()}
    figure.curves(axes, np.asarray(steps), lines, title=title, x_label="training step", y_label="share or mass")
    axes.set_ylim(-0.03, 1.03)
    figure.save(made, path)
    return "Exact match and attention masses at the stored checkpoints"


def draw_agreement(path: Path, found: Mapping[str, Sequence[Agreement]], *, title: str) -> str:
    """Draw, for each subspace, how often neighbours share an attribute with their query, above chance."""
    names = list(dict.fromkeys(each.attribute for agreements in found.values() for each in agreements))
    made, (axes,) = figure.new_figure(width=6.4, height=3.4)
    width = 0.8 / len(found)
    for i, (subspace, agreements) in enumerate(found.items()):
        by_name = {each.attribute: each for each in agreements}
        values = [by_name[name].share.value if name in by_name else np.nan for name in names]
        at = np.arange(len(names)) + (i - (len(found) - 1) / 2) * width
        axes.bar(at, values, width, label=subspace, color=figure.COLOURS[i % len(figure.COLOURS)])
    chance = {each.attribute: each.chance for agreements in found.values() for each in agreements}
    for i, name in enumerate(names):
        axes.plot(
            [i - 0.4, i + 0.4], [chance[name]] * 2, color="black", linewidth=1.4, label="chance" if not i else None
        )
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set(title=title, ylabel="neighbours that share it", ylim=(0, 1.02))
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False)
    figure.save(made, path)
    return "Share of a row's nearest neighbours in each subspace that have the row's own value of an attribute"


def _lay_out(graph: Graph) -> dict[str, Point]:
    """Place planes in every second column, by depth, and components between them."""
    places: dict[str, Point] = {}
    tallest = _tallest(graph)
    for column, plane in enumerate(graph.planes):
        places |= _stack([plane.label(i) for i in range(plane.partition.n_subspaces)], 2 * column, tallest)
    depth = {
        plane.label(i): 2 * at for at, plane in enumerate(graph.planes) for i in range(plane.partition.n_subspaces)
    }
    between: dict[int, list[str]] = {}
    for edge in graph.of("output"):
        between.setdefault(depth[edge.target] - 1, [])
        if edge.via not in between[depth[edge.target] - 1]:
            between[depth[edge.target] - 1].append(edge.via)
    for x, names in between.items():
        places |= _stack(sorted(names), x, tallest)
    return places


def _stack(names: Sequence[str], x: int, tallest: int) -> dict[str, Point]:
    """Spread names evenly over the height of a column."""
    step = tallest / len(names)
    return {name: (float(x), tallest - 0.5 - step * (i + 0.5)) for i, name in enumerate(names)}


def _tallest(graph: Graph) -> int:
    heads = len({edge.via for edge in graph.of("output")}) // max(len(graph.planes) - 1, 1)
    return max(2, heads, *(plane.partition.n_subspaces for plane in graph.planes))


def _draw_edge(axes: Axes, edge: Edge, places: Mapping[str, Point], subspaces: Mapping[str, int]) -> None:
    """An arrow from the right side of one node to the left side of another, with its z and its causal share."""
    colour = SIDE_COLOURS.get(edge.kind) or PAIR_COLOURS[edge.kind]
    halves = [(SUBSPACE if name in subspaces else COMPONENT)[0] / 2 for name in (edge.source, edge.target)]
    begin = np.add(places[edge.source], (halves[0], ENDS.get(edge.kind, 0.0)))
    end = np.add(places[edge.target], (-halves[1], ENDS.get(edge.kind, 0.0)))
    width = min(0.6 + 0.3 * edge.z, 4.0)
    axes.add_patch(
        FancyArrowPatch(
            tuple(begin), tuple(end), arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=width, shrinkA=0,
            shrinkB=1, zorder=1,
        )
    )  # fmt: skip
    effect = "" if edge.effect is None else f" [{edge.effect:.0%}]"
    at = begin + (0.45 - 1.2 * ENDS.get(edge.kind, 0.0)) * (end - begin)
    axes.text(
        float(at[0]), float(at[1]), f"{edge.z:.1f}{effect}", fontsize=8, color=colour, ha="center", va="center",
        zorder=4, bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.9},
    )  # fmt: skip


def _draw_node(axes: Axes, name: str, place: Point, size: int | None) -> None:
    """A subspace is a box with its size, a component a rounder one."""
    width, height = COMPONENT if size is None else SUBSPACE
    style = f"round,pad=0,rounding_size={0.12 if size is None else 0.02}"
    colour = "#FDF3E4" if size is None else "#EAF2F8"
    axes.add_patch(
        FancyBboxPatch(
            (place[0] - width / 2, place[1] - height / 2), width, height, boxstyle=style, facecolor=colour,
            edgecolor="0.35", linewidth=0.9, zorder=2,
        )
    )  # fmt: skip
    text = name if size is None else f"{name.replace(': ', chr(10))} ({size})"
    axes.text(*place, text, ha="center", va="center", fontsize=8, zorder=3)


def _short(label: str) -> str:
    """A subspace's own name, without its plane."""
    return label.partition(": ")[2] or label
