"""A prompt's text with each token coloured by how the model predicted it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actdb.errors import SelectionError
from actdb.output import text_width
from actdb.plots.picture import colour_table, fill_page
from actdb.plots.source import Positions, choose, chosen_positions, statistic_rows
from actdb.plots.style import (
    COLOURS,
    MONOSPACE,
    PLAIN,
    character_inches,
    cut,
    fonts,
    ink,
    line_inches,
    run_title,
    text_axes,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from actdb.database import Database
    from actdb.run import Run

UNITS = {
    "loss": "loss of the token after those before it, nats",
    "entropy": "entropy of the prediction before the token, nats",
    "rank": "rank of the token in the prediction, 0 the likeliest",
}
LINE = 96
"""Characters of a line."""
TEXT_SIZE = 9.0
MAX_TOKENS = 1024
MARGIN, HEADER, FOOTER = 0.3, 0.5, 0.85
"""Inches at the sides, above and below the text."""


@dataclass(frozen=True)
class Predicted:
    """Tokens of a prompt in visible signs, and how each was predicted at the position before it; None for the first.

    `breaks` says which tokens end in a newline; `values` have the names of `UNITS`.
    """

    positions: list[int]
    tokens: list[str]
    breaks: list[bool]
    values: dict[str, list[float | None]]


def tokens(
    db: "Database", prompt: int, *, column: str = "loss", pos: Positions = None, run: str | None = None
) -> "Figure":
    """Draw the text of a prompt, each token on a colour: how well the model predicted it from those before it.

    `column` is "loss", "entropy" or "rank" of `token_stats` at the position before (a logarithmic scale for ranks); the
    first token, which nothing predicts, has no colour. Raises `SettingError` for an unknown column, or where the run
    has no token statistics; `SelectionError` for a prompt or position that there is not, and beyond 1,024 tokens.
    """
    choose("token statistic", column, UNITS)
    chosen = db.run(run)
    found = read_predicted(db, chosen, prompt, pos=pos)
    if len(found.tokens) > MAX_TOKENS:
        raise SelectionError(
            f"prompt {prompt} has {len(found.tokens):,} tokens, more than {MAX_TOKENS:,}:"
            f" choose some, such as pos 0:{MAX_TOKENS}, or make an .html page"
        )
    return _figure(f"{run_title(chosen)}: {column} on prompt {prompt}", found, column)


def tokens_page(
    db: "Database", prompt: int, *, column: str = "loss", pos: Positions = None, run: str | None = None
) -> str:
    """Return an HTML page of a prompt's text coloured by loss, entropy or rank, `column` first.

    Pointing at a token shows its three values. The page is one file without any reference to another. Raises as
    `tokens` does, for any number of tokens.
    """
    choose("token statistic", column, UNITS)
    chosen = db.run(run)
    found = read_predicted(db, chosen, prompt, pos=pos)
    title = f"{run_title(chosen)}: how prompt {prompt} is predicted"
    data = {
        "positions": found.positions,
        "tokens": found.tokens,
        "breaks": found.breaks,
        "values": found.values,
        "units": UNITS,
        "column": column,
        "colours": colour_table(COLOURS),
    }
    return fill_page("tokens.html", title, data)


def read_predicted(db: "Database", run: "Run", prompt: int, *, pos: Positions = None) -> Predicted:
    """Return a prompt's tokens, or those at some positions, each with the statistics of its prediction."""
    texts = run.token_texts(prompt)
    names = tuple(UNITS)
    query = f"SELECT pos, {', '.join(names)} FROM token_stats WHERE run = ? AND prompt_id = ?"
    rows = statistic_rows(db, query, [run.name, int(prompt)], run=run, statistic="tokens")
    before = {place + 1: values for place, *values in rows}
    positions = chosen_positions(len(texts), pos)
    return Predicted(
        positions=positions,
        tokens=[visible(texts[place]) for place in positions],
        breaks=[texts[place].endswith("\n") for place in positions],
        values={
            name: [before[place][i] if place in before else None for place in positions] for i, name in enumerate(names)
        },
    )


def place_tokens(tokens: Sequence[str], breaks: Sequence[bool], width: int) -> list[tuple[int, int, str]]:
    """Return the line, column and text of each token, set in lines of `width` characters.

    A token is never divided: one that does not fit goes to the next line, and one wider than a line is cut.
    """
    places, line, column = [], 0, 0
    for token, ends in zip(tokens, breaks, strict=True):
        text = cut(token, width)
        if column + text_width(text) > width:
            line, column = line + 1, 0
        places.append((line, column, text))
        line, column = (line + 1, 0) if ends else (line, column + text_width(text))
    return places


def _figure(title: str, found: Predicted, column: str) -> "Figure":
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    places = place_tokens(found.tokens, found.breaks, LINE)
    lines = places[-1][0] + 1
    width, height = LINE * character_inches(TEXT_SIZE), lines * line_inches(TEXT_SIZE)
    size = (width + 2 * MARGIN, height + HEADER + FOOTER)
    figure = Figure(figsize=size)
    axes = text_axes(figure, left=MARGIN, bottom=FOOTER, columns=LINE, lines=lines, size=TEXT_SIZE)
    scale = ScalarMappable(_norm(column, [value for value in found.values[column] if value is not None]), COLOURS)
    _write(axes, places, found.values[column], scale)
    bar = figure.add_axes((MARGIN / size[0], (FOOTER - 0.35) / size[1], width / 2 / size[0], 0.12 / size[1]))
    drawn = figure.colorbar(scale, cax=bar, orientation="horizontal")
    drawn.set_label(UNITS[column], fontsize=8)
    if column == "rank":
        ranks = [0, *(10**i for i in range(8) if 10**i <= scale.norm.vmax)]
        drawn.set_ticks(ranks, labels=[f"{rank:,}" for rank in ranks], minor=False)
        drawn.minorticks_off()
    bar.tick_params(labelsize=8)
    figure.suptitle(title, x=MARGIN / size[0], y=1 - 0.12 / size[1], ha="left", va="top", fontsize=12, **PLAIN)
    return figure


def _norm(column: str, values: Sequence[float]) -> Any:
    """Return the scale of a column: from 0, logarithmic above 1 for ranks."""
    from matplotlib.colors import Normalize, SymLogNorm

    most = max(values, default=1.0) or 1.0
    return SymLogNorm(linthresh=1, vmin=0, vmax=most) if column == "rank" else Normalize(0, most)


def _write(
    axes: "Axes", places: Sequence[tuple[int, int, str]], values: Sequence[float | None], scale: "ScalarMappable"
) -> None:
    """Write each token on a box of its colour; one without a value on an empty box."""
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"fontsize": TEXT_SIZE, "family": fonts(MONOSPACE), "va": "center", **PLAIN}
    colours = scale.to_rgba(np.array([0.0 if value is None else value for value in values]))
    for (line, column, text), value, known in zip(places, values, colours, strict=True):
        colour = "white" if value is None else known
        edge = "0.6" if value is None else "white"
        box = Rectangle((column, line + 0.06), text_width(text), 0.88, facecolor=colour, edgecolor=edge, linewidth=0.7)
        axes.add_patch(box)
        axes.text(column, line + 0.5, text, color="black" if value is None else ink(known), **style)
