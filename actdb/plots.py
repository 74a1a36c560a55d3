"""Pictures of stored activations, drawn with matplotlib's object interface: no global state, no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.storage.folder import temporary_path, write_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "cividis"  # perceptually even, and the same for colour-blind eyes
MAX_LABELS = 40
PICTURES = (".png", ".svg", ".pdf")


def patterns_figure(
    patterns: Sequence[npt.NDArray[Any]], *, titles: Sequence[str], tokens: Sequence[str], title: str
) -> "Figure":
    """Draw attention patterns [query, key] side by side, tokens on both axes, one colour scale from 0 to 1.

    What a causal pattern cannot reach stays white, so that it is told from weak attention.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps[COLOURS].with_extremes(bad="white")
    figure = Figure(figsize=(1.2 + 4.6 * len(patterns), 5.4), layout="constrained")
    image = None
    for i, (pattern, name) in enumerate(zip(patterns, titles, strict=True)):
        axes = figure.add_subplot(1, len(patterns), i + 1)
        ahead = np.triu(np.ones_like(pattern, dtype=bool), k=1)
        causal = not np.asarray(pattern)[ahead].any()
        shown = np.ma.masked_array(np.asarray(pattern, np.float32), ahead & causal)
        image = axes.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("key: attended token")
        axes.set_ylabel("query: token that attends" if i == 0 else "")
        _label(axes, tokens)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="attention weight")  # type: ignore[arg-type]
    figure.suptitle(title, fontsize=12)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, whole or not at all."""
    if path.suffix.lower() not in PICTURES:
        raise SettingError(f"{path}: choose a name that ends in {', '.join(PICTURES)}")
    temporary = temporary_path(path)
    try:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
        temporary.replace(path)
    except OSError as exc:
        raise write_error(exc, str(path)) from exc
    finally:
        temporary.unlink(missing_ok=True)


def _label(axes: Any, tokens: Sequence[str]) -> None:
    """Put tokens on both axes, every n-th where there are many."""
    step = -(-len(tokens) // MAX_LABELS)
    places = range(0, len(tokens), step)
    texts = [repr(tokens[place])[1:-1][:12] for place in places]
    size = 8 if len(places) <= 25 else 6
    axes.set_xticks(places, texts, rotation=90, fontsize=size)
    axes.set_yticks(places, texts, fontsize=size)
    axes.tick_params(length=2)
