"""The logit lens of one prompt: what each layer would say next at each position, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError, SiteError
from actdb.output import text_width
from actdb.plots.source import Positions, choose, chosen_positions
from actdb.plots.style import (
    COLOURS,
    MARK,
    MONOSPACE,
    PLAIN,
    character_inches,
    cut,
    fonts,
    ink,
    label_tokens,
    run_title,
    visible,
)
from actdb.unembedding import BLOCK_VALUES, Readout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from actdb.database import Database
    from actdb.run import Run

RESIDUAL = "resid_post"
UNITS = {
    "probability": "probability of the token shown",
    "entropy": "entropy of the prediction, nats",
    "kl": "KL(model's output ‖ lens), nats",
}
MOST_CELLS = 32
"""Most positions with which cells hold their token; more are coloured only."""
CELL_HEIGHT, CELL_MARGIN = 0.34, 0.14
"""Inches: of a cell's height, and of its width around the text."""
CELL_TEXT, TEXT_SIZE = 8, 7.0
"""Characters of a cell's text, and their size in points."""
WIDEST, MOST_LABELS = 12.0, 60
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Lens:
    """The lens at positions of one prompt: the likeliest token and measures of the prediction, each [layer, pos].

    `likeliest` are token ids; `measures` have the names of `UNITS`, entropies and divergences in nats.
    """

    layers: tuple[int, ...]
    positions: list[int]
    likeliest: npt.NDArray[np.int32]
    measures: dict[str, Floats]


def lens(
    db: "Database", prompt: int, *, colour: str = "probability", pos: Positions = None, run: str | None = None
) -> "Figure":
    """Draw the logit lens of a prompt as layers × positions, the likeliest next token in each cell.

    `colour` is the "probability" of that token, the "entropy" of the prediction or "kl", its divergence from the
    model's output. A framed cell has the token that really comes next. `pos` chooses positions; above 32 of them cells
    hold no text. Reads `resid_post` at 2 · d_model · n_tokens operations a cell, or `lens_stats` where the run does not
    store it. Raises `SiteError` where it has neither, `SelectionError` as `read_lens` does, `SettingError` for
    an unknown colour.
    """
    choose("colour", colour, UNITS)
    chosen = db.run(run)
    if RESIDUAL in chosen:
        found = read_lens(chosen, prompt, pos=pos, divergence=colour == "kl")
    else:
        found = stored_lens(db, chosen, prompt, pos=pos)
    return _figure(f"{run_title(chosen)}: logit lens on prompt {prompt}", chosen, prompt, found, colour)


def read_lens(run: "Run", prompt: int, *, pos: Positions = None, divergence: bool = False) -> Lens:
    """Apply final norm and unembedding to the stored `resid_post` of a prompt (see `actdb.unembedding`).

    `divergence` adds KL(p ‖ lens), where p is the model's output: the lens at its last layer. Raises `SelectionError`
    for a prompt or position that is not stored, a run without unembedding or of a model that looks both ways, and
    where the divergence is asked for but the last layer is not stored.
    """
    site = run[RESIDUAL]
    last = int(run.info.model["n_layers"]) - 1
    if divergence and last not in site.layers:
        raise SelectionError(f"kl compares with layer {last}, the model's output; run {run.name!r} has {site.layers}")
    if pos is None and run.info.plan.get("positions") == "last":
        pos = -1
    positions = chosen_positions(len(run.tokens(prompt)), pos)
    residual = np.asarray(site.sel(prompt=prompt, pos=positions).numpy(), np.float32)
    readout = Readout.of_run(run)
    names = [name for name in UNITS if name != "kl" or divergence]
    likeliest = np.empty(residual.shape[:2], np.int32)
    measures = {name: np.empty(residual.shape[:2], np.float32) for name in names}
    size = max(1, BLOCK_VALUES // readout.n_tokens)
    for begin in range(0, len(positions), size):
        block = slice(begin, begin + size)
        final = _log_softmax(readout.logits(residual[-1, block])) if divergence else None
        for i, vectors in enumerate(residual[:, block]):
            log_p = _log_softmax(readout.logits(vectors))
            p = np.exp(log_p)
            likeliest[i, block] = log_p.argmax(-1)
            measures["probability"][i, block] = p.max(-1)
            measures["entropy"][i, block] = -(p * log_p).sum(-1)
            if final is not None:
                measures["kl"][i, block] = (np.exp(final) * (final - log_p)).sum(-1)
    return Lens(site.layers, positions, likeliest, measures)


def stored_lens(db: "Database", run: "Run", prompt: int, *, pos: Positions = None) -> Lens:
    """Return the lens of a prompt from `lens_stats`; raises `SiteError` naming both ways to get it."""
    positions = chosen_positions(len(run.tokens(prompt)), pos)
    query = (
        "SELECT layer, pos, top_token_id, top_probability, entropy, kl FROM lens_stats WHERE run = ? AND prompt_id = ?"
    )
    rows = db.sql(query, [run.name, int(prompt)]).fetchall()
    if not rows:
        raise SiteError(
            f"run {run.name!r} has neither site {RESIDUAL!r} nor lens statistics; harvest it with one, or --stats lens"
        )
    layers = sorted({row[0] for row in rows})
    values = np.full((len(UNITS), len(layers), 1 + max(row[1] for row in rows)), np.nan, np.float32)
    likeliest = np.zeros(values.shape[1:], np.int32)
    for layer, place, token, *measured in rows:
        likeliest[layers.index(layer), place] = token
        values[:, layers.index(layer), place] = measured
    measures = dict(zip(UNITS, values[:, :, positions], strict=True))
    return Lens(tuple(layers), positions, likeliest[:, positions], measures)


def _log_softmax(logits: Floats) -> Floats:
    logits = logits - logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), np.float32)


def _figure(title: str, run: "Run", prompt: int, found: Lens, colour: str) -> "Figure":
    from matplotlib.figure import Figure

    n_layers, n_positions = found.likeliest.shape
    cells = _cell_texts(run, found) if n_positions <= MOST_CELLS else []
    longest = max(3, *map(text_width, cells)) if cells else 0
    width = (CELL_MARGIN + character_inches(TEXT_SIZE) * longest) * n_positions if cells else WIDEST
    height = max(1.2, CELL_HEIGHT * n_layers)
    figure = Figure(figsize=(max(5.5, width + 2.2), height + 1.9), layout="constrained")
    axes = figure.add_subplot()
    values = found.measures[colour]
    most = 1.0 if colour == "probability" else float(values.max()) or 1.0
    image = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=most, aspect="auto", origin="lower", interpolation="nearest")
    _label(axes, run, prompt, found)
    _write(axes, cells, image.to_rgba(values))
    _frame(axes, found, run.tokens(prompt))
    figure.colorbar(image, ax=axes).set_label(UNITS[colour], fontsize=9)
    figure.suptitle(title, fontsize=12, wrap=True, **PLAIN)
    return figure


def _label(axes: "Axes", run: "Run", prompt: int, found: Lens) -> None:
    """Put layers, the prompt's tokens, and above them the tokens that come next, on the axes."""
    texts = run.token_texts(prompt)
    label_tokens(axes.xaxis, [texts[place] for place in found.positions], limit=MOST_LABELS, upright=True)
    axes.set_xlabel("token read")
    step = -(-len(found.layers) // 24)
    axes.set_yticks(range(0, len(found.layers), step), [str(layer) for layer in found.layers[::step]], fontsize=8)
    axes.set_ylabel("after layer")
    above = axes.secondary_xaxis("top")
    following = [*texts[1:], None]
    label_tokens(above.xaxis, [following[place] for place in found.positions], limit=MOST_LABELS, upright=True)
    above.set_xlabel("token that comes next; framed where it is the likeliest")


def _cell_texts(run: "Run", found: Lens) -> list[str]:
    """Return the text of each likeliest token, layer after layer; #id where the run's prompts do not hold it."""
    known = run.vocabulary()
    shown = [visible(known[token]) if token in known else f"#{token}" for token in found.likeliest.ravel().tolist()]
    return [cut(text, CELL_TEXT) for text in shown]


def _write(axes: "Axes", cells: Sequence[str], colours: npt.NDArray[Any]) -> None:
    """Write texts into the cells of `colours` [layer, pos, 4], none where there are none."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": TEXT_SIZE, "family": fonts(MONOSPACE), **PLAIN}
    for place, text in enumerate(cells):
        row, column = divmod(place, colours.shape[1])
        axes.text(column, row, text, color=ink(colours[row, column]), **style)


def _frame(axes: "Axes", found: Lens, tokens: npt.NDArray[np.int32]) -> None:
    """Frame the cells whose likeliest token is the one that comes next."""
    from matplotlib.patches import Rectangle

    width = 1.5 if len(found.positions) <= MOST_CELLS else 0.7

    for column, place in enumerate(found.positions):
        for row in range(len(found.layers)):
            if place + 1 < len(tokens) and found.likeliest[row, column] == tokens[place + 1]:
                frame = Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=MARK, linewidth=width)
                axes.add_patch(frame)
