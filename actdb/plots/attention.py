"""Attention patterns with the tokens on both axes: one head, or the heads of a layer side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError, SiteError
from actdb.plots.style import COLOURS, PLAIN, label_tokens, run_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actdb.database import Database
    from actdb.run import Run

PATTERN = "pattern"
SIDES = {1: (4.6, 8.0), 2: (4.6, 7.0), 3: (4.0, 6.0), 4: (4.0, 6.0)}
SMALL_SIDES = (2.7, 4.0)
"""Least and greatest inches of a pattern's side by the number of patterns, and where there are more."""
INCHES_PER_TOKEN = 0.03
GRID_COLUMNS = {4: 2}
MOST_COLUMNS = 4
LABELS_PER_INCH = 7.0


@dataclass(frozen=True)
class Heads:
    """Attention patterns of one prompt: `weights` [layer, head, query, key] with the numbers of layers and heads.

    `queries` are the positions of the queries: all, or the last alone where the run stores no others.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: list[str]
    queries: range
    weights: npt.NDArray[Any]


def pattern(
    db: "Database",
    prompt: int,
    *,
    layer: int | None = None,
    head: int | Sequence[int] | None = None,
    run: str | None = None,
) -> "Figure":
    """Draw the attention pattern of one head on a prompt, or of several heads of a layer (all where none is given).

    Tokens stand on both axes, thinned out where there are too many; weights share one scale from 0 to 1, and what a
    causal model cannot reach stays white. Reads n² weights a head (half of it where causal). Raises `SiteError` where
    the run keeps no whole patterns, `SelectionError` for a layer, head or prompt that there is not, and where the run
    has several layers and none is given.
    """
    chosen = db.run(run)
    found = read_heads(chosen, prompt, layer=layer, head=head)
    if len(found.layers) > 1:
        raise SelectionError(f"choose one layer; run {chosen.name!r} keeps patterns of {_listed(found.layers)}")
    names = [f"layer {found.layers[0]} head {number}" for number in found.heads]
    title = f"{run_title(chosen)}: attention on prompt {prompt}"
    return patterns_figure(list(found.weights[0]), titles=names, tokens=found.tokens, title=title)


def read_heads(run: "Run", prompt: int, *, layer: int | None = None, head: int | Sequence[int] | None = None) -> Heads:
    """Read the patterns of one prompt: of a layer and head where given, else of all."""
    if PATTERN not in run:
        kept = "only the largest weights of each query" if f"{PATTERN}_value" in run else "no attention patterns"
        raise SiteError(f"run {run.name!r} keeps {kept}; harvest it with site {PATTERN} and --pattern full")
    heads = None if head is None else np.ravel(head).tolist()
    selection = run[PATTERN].sel(layer=None if layer is None else [layer], head=heads, prompt=prompt)
    weights = selection.numpy()
    tokens = run.token_texts(prompt)
    n_heads = run[PATTERN].shape[1]
    return Heads(
        layers=selection.layers,
        heads=tuple(number % n_heads for number in (range(n_heads) if heads is None else heads)),
        tokens=tokens,
        queries=range(len(tokens) - weights.shape[2], len(tokens)),
        weights=weights,
    )


def patterns_figure(
    patterns: Sequence[npt.NDArray[Any]], *, titles: Sequence[str], tokens: Sequence[str], title: str
) -> "Figure":
    """Draw attention patterns [query, key] side by side, tokens on both axes, one colour scale from 0 to 1.

    What a causal pattern cannot reach stays white, so that it is told from weak attention. A pattern may have the last
    queries alone.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps[COLOURS].with_extremes(bad="white")
    across = GRID_COLUMNS.get(len(patterns), min(len(patterns), MOST_COLUMNS))
    down = -(-len(patterns) // across)
    n_queries, n_keys = patterns[0].shape
    least, most = SIDES.get(len(patterns), SMALL_SIDES)
    side = min(most, max(least, INCHES_PER_TOKEN * n_keys))
    height = side if n_queries == n_keys else max(0.4, side * n_queries / n_keys)
    flat = height < side / 2
    figure = Figure(figsize=(1.2 + side * across, (1.6 if flat else 0.8) + height * down), layout="compressed")
    images = []
    for i, (weights, name) in enumerate(zip(patterns, titles, strict=True)):
        axes = figure.add_subplot(down, across, i + 1)
        images.append(axes.imshow(_reached(weights), cmap=colours, vmin=0, vmax=1, aspect="equal"))
        axes.set_title(name, fontsize=11 if len(patterns) in SIDES else 9, **PLAIN)
        limit = round(side * LABELS_PER_INCH)
        outer = i % across == 0, i + across >= len(patterns)
        label_tokens(axes.yaxis, tokens[n_keys - n_queries :] if outer[0] else [], limit=limit)
        label_tokens(axes.xaxis, tokens if outer[1] else [], limit=limit, upright=True)
        axes.set_ylabel(("query" if flat else "query: token that attends") if outer[0] else "")
        axes.set_xlabel("key: attended token" if outer[1] else "")
    where: dict[str, Any] = {"location": "bottom", "shrink": 0.5, "aspect": 40} if flat else {"shrink": 0.8}
    figure.colorbar(images[0], ax=figure.axes, label="attention weight", **where)
    figure.suptitle(title, fontsize=12, wrap=True, **PLAIN)
    return figure


def _reached(weights: npt.NDArray[Any]) -> Any:
    """Mask what lies ahead of each query, where nothing attends there."""
    n_queries, n_keys = weights.shape
    ahead = np.triu(np.ones((n_queries, n_keys), dtype=bool), k=1 + n_keys - n_queries)
    causal = not np.asarray(weights)[ahead].any()
    return np.ma.masked_array(np.asarray(weights, np.float32), ahead & causal)


def _listed(numbers: Sequence[int]) -> str:
    return "layers " + ", ".join(str(number) for number in numbers)
