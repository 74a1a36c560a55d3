"""One neuron: the histogram of its stored activations, beside the contexts where it fires most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.output import text_width
from actdb.plots.style import (
    COLOURS,
    MARK,
    MONOSPACE,
    PLAIN,
    character_inches,
    cut,
    fonts,
    line_inches,
    run_title,
    text_axes,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from actdb.database import Database
    from actdb.run import Run

SITE = "mlp_post"
N_BINS = 60
N_CONTEXTS, MAX_CONTEXTS = 10, 100
TEXT_SIZE = 9.0
MARGIN, HISTOGRAM, GAP = 0.75, 3.6, 0.35
"""Inches: around the picture, of the histogram's width, and between the panels."""
VALUE, PLACE, BEFORE, AFTER = 8, 12, 34, 44
"""Characters of the columns: activation, prompt and position, context before, the token with the context after."""
TOKEN = 16
"""Most characters of the token itself."""


@dataclass(frozen=True)
class Context:
    """A place where a neuron fires: its activation, the token, and the text on both sides, all in visible signs."""

    value: float
    prompt_id: int
    pos: int
    before: str
    token: str
    after: str


def neurons(
    db: "Database",
    *,
    layer: int | None,
    neuron: int,
    site: str = SITE,
    n_contexts: int = N_CONTEXTS,
    run: str | None = None,
) -> "Figure":
    """Draw the histogram of one neuron's stored activations, and the contexts where it is highest (`db.top`).

    `neuron` is a place on the last axis of a site of rows without heads. The count axis is logarithmic; ticks below the
    histogram mark the contexts. Reads the layer's chunks of the site once and keeps one column, besides what `db.top`
    costs. Raises `SiteError` where the run does not store the site, `SelectionError` for a layer or neuron that there
    is not, `SettingError` for more than 100 contexts.
    """
    if not 1 <= n_contexts <= MAX_CONTEXTS:
        raise SettingError(f"{n_contexts} contexts: a picture shows 1 to {MAX_CONTEXTS}")
    chosen = db.run(run)
    contexts = top_contexts(db, layer=layer, neuron=neuron, site=site, k=n_contexts, run=run)
    values = np.asarray(chosen[site].sel(layer=layer, neuron=neuron).numpy(), np.float32)
    where = f"neuron {neuron}" if layer is None else f"layer {layer} neuron {neuron}"
    return _figure(f"{run_title(chosen)}: {site}, {where}", values, contexts)


def top_contexts(
    db: "Database",
    *,
    layer: int | None,
    neuron: int,
    site: str = SITE,
    k: int = N_CONTEXTS,
    run: str | None = None,
) -> list[Context]:
    """Return the `k` stored rows where a neuron is highest, highest first, all where there are fewer."""
    chosen = db.run(run)
    n_rows = chosen[site].sel(layer=layer).n_rows
    found = db.top(site, layer=layer, neuron=neuron, k=min(k, n_rows), run=run)
    columns = [found.columns.index(name) for name in ("value", "prompt_id", "pos")]
    return [_context(chosen, *(row[column] for column in columns)) for row in found.fetchall()]


def _context(run: "Run", value: float, prompt_id: int, pos: int) -> Context:
    # a token is at least one sign: no more of them are needed to fill a column, or to see that it is cut
    near = slice(max(0, pos - BEFORE - 1), pos + AFTER + 2)
    texts = [visible(text) for text in run.token_texts(prompt_id)[near]]
    apart = " " if texts == [str(token) for token in run.tokens(prompt_id)[near]] else ""  # ids, without a tokenizer
    place = min(pos, BEFORE + 1)
    token = cut(texts[place], TOKEN)
    before = "".join(text + apart for text in texts[:place])
    after = "".join(apart + text for text in texts[place + 1 :])
    return Context(
        value=value,
        prompt_id=prompt_id,
        pos=pos,
        before=cut(before[::-1], BEFORE)[::-1],
        token=token,
        after=cut(after, AFTER - text_width(token)),
    )


def _figure(title: str, values: npt.NDArray[np.float32], contexts: Sequence[Context]) -> "Figure":
    from matplotlib.figure import Figure

    columns = VALUE + PLACE + BEFORE + AFTER
    height = max(2.6, line_inches(TEXT_SIZE) * (len(contexts) + 1))
    left = MARGIN + HISTOGRAM + GAP
    size = (left + columns * character_inches(TEXT_SIZE) + 0.2, height + 1.1)
    figure = Figure(figsize=size)
    axes = figure.add_axes((MARGIN / size[0], 0.55 / size[1], HISTOGRAM / size[0], height / size[1]))
    _draw_histogram(axes, values, contexts)
    lines = len(contexts) + 1
    bottom = 0.55 + height - lines * line_inches(TEXT_SIZE)
    _write(text_axes(figure, left=left, bottom=bottom, columns=columns, lines=lines, size=TEXT_SIZE), contexts)
    figure.suptitle(title, x=0.15 / size[0], y=1 - 0.1 / size[1], ha="left", va="top", fontsize=12, **PLAIN)
    mean, std, active = values.mean(dtype=np.float64), values.std(dtype=np.float64), (values > 0).mean()
    moments = f"mean {mean:.3g}, std {std:.3g}, above 0: {active:.1%}"
    axes.set_title(f"{len(values):,} stored rows; {moments}", fontsize=8, loc="left")
    return figure


def _draw_histogram(axes: "Axes", values: npt.NDArray[np.float32], contexts: Sequence[Context]) -> None:
    from matplotlib import colormaps

    axes.hist(values, bins=N_BINS, color=colormaps[COLOURS](0.25), log=True)
    tops = [context.value for context in contexts]
    across = axes.get_xaxis_transform()
    axes.plot(tops, np.full(len(tops), 0.02), "|", color=MARK, markersize=9, transform=across, label="contexts shown")
    axes.set_xlabel("activation")
    axes.set_ylabel("rows (logarithmic)")
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _write(axes: "Axes", contexts: Sequence[Context]) -> None:
    """Write a line a context: activation, prompt and position, and the token in bold between its neighbours."""
    style: dict[str, Any] = {"fontsize": TEXT_SIZE, "family": fonts(MONOSPACE), "va": "center", **PLAIN}
    start = VALUE + PLACE + BEFORE
    for place, align, text in ((VALUE - 1, "right", "value"), (VALUE, "left", "prompt:pos"), (start, "left", "token")):
        axes.text(place, 0.5, text, ha=align, color="0.35", **style)
    for line, context in enumerate(contexts, start=1):
        y = line + 0.5
        axes.text(VALUE - 1, y, f"{context.value:#.3g}".rstrip("."), ha="right", **style)
        axes.text(VALUE, y, f"{context.prompt_id}:{context.pos}", **style)
        axes.text(start, y, context.before, ha="right", color="0.35", **style)
        axes.text(start, y, context.token, weight="bold", **style)
        axes.text(start + text_width(context.token), y, context.after, color="0.35", **style)
