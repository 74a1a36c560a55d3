"""How pictures look: colours, fonts, special characters made visible, and what every title says first."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from actdb.output import text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from actdb.run import Run

COLOURS = "cividis"
"""Perceptually even, and the same for colour-blind eyes."""
DIVERGING = "PuOr"
"""For values on both sides of 0; told apart by colour-blind eyes."""
MARK = "#d55e00"
"""Vermilion of the Okabe–Ito palette: stands out from every colour of `COLOURS`."""
MAX_LABELS = 40
MAX_LABEL = 12
PLAIN: dict[str, Any] = {"parse_math": False}
"""Arguments for texts from users: two dollar signs would else begin a formula."""
FAMILY, MONOSPACE = "DejaVu Sans", "DejaVu Sans Mono"
FURTHER_FAMILIES = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans", "Noto Emoji")
"""Used for characters that DejaVu lacks, where they are installed."""
CHARACTER_EM, LINE_EM = 0.602, 1.75
"""Width of a character of `MONOSPACE`, and the distance of lines, in ems."""
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥"}
NOTHING = "∅"
SIGNS = frozenset((*VISIBLE.values(), NOTHING, "\\"))


def visible(text: str) -> str:
    """Return a token's text in one line: a space as ·, a newline as ↵, a tab as ⇥, what no font has as its escape.

    One of those signs itself, and a backslash, is escaped, so that no two texts look the same; no text at all is ∅.
    """
    return "".join(VISIBLE.get(character) or _shown(character) for character in text) or NOTHING


def cut(text: str, width: int = MAX_LABEL) -> str:
    """Return a text of at most `width` columns, the last one … where it was longer."""
    if text_width(text) <= width:
        return text
    while text_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def run_title(run: "Run") -> str:
    """Return what every title begins with: the model, the run where its name says more, the training step."""
    model = run.info.model.get("model")
    names = [str(model)] if model and str(model) != run.name else []
    names.append(f"run {run.name}" if names else run.name)
    if run.step is not None and f"step{run.step}" not in run.name:
        names.append(f"step {run.step}")
    return ", ".join(names)


def fonts(family: str = FAMILY) -> list[str]:
    """Return a family and those behind it that are installed, in the order in which characters are looked for."""
    return [family, *_installed()]


def label_tokens(axis: Any, tokens: Sequence[str | None], *, limit: int = MAX_LABELS, upright: bool = False) -> None:
    """Put tokens on an axis, every n-th where there are more than `limit`; `axis` is an Axes' xaxis or yaxis.

    None leaves a place without label.
    """
    step = max(1, -(-len(tokens) // limit))
    places = list(range(0, len(tokens), step))
    texts = ["" if (token := tokens[place]) is None else cut(visible(token)) for place in places]
    size = 8 if len(places) <= limit * 0.6 else 6
    axis.set_ticks(places, texts, fontsize=size, family=fonts(), rotation=90 if upright else 0, **PLAIN)
    axis.set_tick_params(length=2)


def ink(colour: Any) -> str:
    """Return the colour of text on a background (red, green, blue from 0 to 1): black or white, what is read best."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # WCAG 2.1, relative luminance
    return "black" if luminance > 0.179 else "white"


def text_axes(figure: "Figure", *, left: float, bottom: float, columns: int, lines: int, size: float) -> "Axes":
    """Add axes of which one unit across is a character of monospace text of `size` points, and one unit down a line.

    `left` and `bottom` are inches from the figure's corner.
    """
    width, height = figure.get_size_inches()
    across, down = columns * character_inches(size), lines * line_inches(size)
    axes = figure.add_axes((left / width, bottom / height, across / width, down / height))
    axes.set(xlim=(0, columns), ylim=(lines, 0), xticks=[], yticks=[])
    axes.axis("off")
    return axes


def character_inches(size: float) -> float:
    """Return the width of a monospace character of `size` points, in inches."""
    return CHARACTER_EM * size / 72


def line_inches(size: float) -> float:
    """Return the distance of lines of `size` points, in inches."""
    return LINE_EM * size / 72


def _shown(character: str) -> str:
    if character.isprintable() and ord(character) in _characters() and character not in SIGNS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    names = {entry.name for entry in fontManager.ttflist}
    return tuple(family for family in FURTHER_FAMILIES if family in names)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """Return the characters that both families have, or one of those behind them."""
    from matplotlib.font_manager import findfont, get_font

    families = (FAMILY, MONOSPACE, *_installed())
    sans, monospace, *further = (frozenset(get_font(findfont(family)).get_charmap()) for family in families)
    return (sans & monospace).union(*further)
