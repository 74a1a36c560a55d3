"""Head statistics as grids of layers × heads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.catalog.tables import BUILT_IN
from actdb.errors import SelectionError
from actdb.plots.source import choose, lacking, statistic_rows
from actdb.plots.style import COLOURS, DIVERGING, PLAIN, ink, run_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from actdb.database import Database

DEFAULT_COLUMNS = ("prev_mass", "first_mass", "self_mass", "duplicate_mass", "induction_mass", "entropy")
KEYS = ("run", "prompt_id", "layer", "head")
UNITS = {
    "entropy": "nats",
    "mean_distance": "positions",
    "max_weight": "attention weight",
    "z_norm": "norm",
    "result_norm": "norm",
    "direct_logit_attribution": "logits",
}
MASS_UNIT = "share of attention"
ATTRIBUTION = "direct_logit_attribution"
"""Null throughout without lens statistics."""
GRID_COLUMNS = 3
MAX_NUMBERS = 16
"""Most layers, and most heads, with which cells hold their value as a number."""
Floats = npt.NDArray[np.float64]


def heads(
    db: "Database", columns: str | Sequence[str] | None = None, *, run: str | None = None, where: str | None = None
) -> "Figure":
    """Draw columns of `head_stats` as grids of layers × heads: the mean over prompts, those `where` holds if given.

    `where` is an SQL condition over labels and `run_prompts`. A head that no prompt has a value for stays white with a
    dash. Each grid has its own colour scale, from 0 or, where values lie on both sides of 0, symmetric about it. Costs
    one query. Raises `SettingError` for an unknown column, naming the nearest, or a run without head statistics;
    `SelectionError` where no prompt matches.
    """
    names = [columns] if isinstance(columns, str) else list(columns or DEFAULT_COLUMNS)
    valid = [column.name for column in BUILT_IN["head_stats"].columns if column.name not in KEYS]
    for name in names:
        choose("head statistic", name, valid)
    chosen = db.run(run)
    condition = ""
    parameters: list[Any] = [chosen.name]
    if where is not None:
        prompts = chosen.prompt_ids(where)
        if not prompts:
            raise SelectionError(f"no prompt of run {chosen.name!r} satisfies {where!r}")
        condition, parameters = " AND prompt_id IN (SELECT unnest(?::INTEGER[]))", [chosen.name, prompts]
    means = ", ".join(f'avg("{name}")' for name in names)
    query = f"SELECT layer, head, count(*), {means} FROM head_stats WHERE run = ?{condition} GROUP BY ALL"
    rows = statistic_rows(db, query, parameters, run=chosen, statistic="heads")
    layers, grids = _grids(rows)
    if ATTRIBUTION in names and np.isnan(grids[names.index(ATTRIBUTION)]).all():
        raise lacking(db, chosen, "lens")
    over = f"mean over {max(row[2] for row in rows):,} prompts" + (f" where {where}" if where else "")
    return _figure(f"{run_title(chosen)}: heads, {over}", names, layers, grids)


def _grids(rows: Sequence[tuple[Any, ...]]) -> tuple[list[int], Floats]:
    """Return the layers, and the values [column, layer, head] of rows (layer, head, n, values…), NaN where null."""
    layers = sorted({row[0] for row in rows})
    grids = np.full((len(rows[0]) - 3, len(layers), 1 + max(row[1] for row in rows)), np.nan)
    for layer, head, _, *values in rows:
        grids[:, layers.index(layer), head] = [np.nan if value is None else value for value in values]
    return layers, grids


def _figure(title: str, names: Sequence[str], layers: Sequence[int], grids: Floats) -> "Figure":
    from matplotlib.figure import Figure

    _, n_layers, n_heads = grids.shape
    numbered = max(n_layers, n_heads) <= MAX_NUMBERS
    cell = 0.42 if numbered else max(0.06, min(0.25, 6 / max(n_layers, n_heads)))  # inches
    across = min(len(names), GRID_COLUMNS)
    down = -(-len(names) // across)
    size = (max(4.5, across * max(2.7, 1.7 + cell * n_heads)), 0.7 + down * max(1.7, 0.9 + cell * n_layers))
    figure = Figure(figsize=size, layout="compressed")
    for i, (name, grid) in enumerate(zip(names, grids, strict=True)):
        axes = figure.add_subplot(down, across, i + 1)
        axes.set_title(name, fontsize=11)
        _draw(axes, grid, layers, unit=MASS_UNIT if name.endswith("_mass") else UNITS.get(name, name))
        if numbered:
            _number(axes, grid)
    figure.suptitle(title, fontsize=12, wrap=True, **PLAIN)
    return figure


def _draw(axes: "Axes", grid: Floats, layers: Sequence[int], *, unit: str) -> None:
    known = grid[np.isfinite(grid)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    both = low < 0
    most = max(-low, high) or 1.0
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        cmap=DIVERGING if both else COLOURS,
        vmin=-most if both else 0,
        vmax=most,
        interpolation="nearest",
    )
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis, numbers in ((axes.xaxis, list(range(grid.shape[1]))), (axes.yaxis, list(layers))):
        step = -(-len(numbers) // MAX_NUMBERS)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]], fontsize=8)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=unit).ax.tick_params(labelsize=8)


def _number(axes: "Axes", grid: Floats) -> None:
    """Write each cell's value into it."""
    colours = axes.images[0].to_rgba(np.nan_to_num(grid))
    for (row, column), value in np.ndenumerate(grid):
        known = bool(np.isfinite(value))
        text, colour = (_short(float(value)), ink(colours[row, column])) if known else ("–", "black")
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _short(value: float) -> str:
    """Return a number in up to five characters."""
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.3g}"
