"""The page of the concept graphs: one HTML file that opens from disk and loads nothing, with plotly.js inside."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from actdb import plots
from analyses.modular_arithmetic.layout import LAYOUTS

TEMPLATE = "topology.html"
CYCLIC = "twilight_shifted"
N_COLOURS = 16


def fill_page(title: str, models: list[Mapping[str, Any]]) -> str:
    """Return the page of some models: `models` as `graph.draw_subject` describes them, the first two side by side.

    Some 5 MB, nearly all of them plotly.js.
    """
    from plotly.offline import get_plotlyjs

    template = resources.files("analyses.modular_arithmetic").joinpath(TEMPLATE).read_text(encoding="utf-8")
    data = {"layouts": list(LAYOUTS), "cyclic": _scale(), "models": models}
    head, _, tail = template.rpartition("{{library}}")
    return f"{plots.fill_template(head, title, data)}{get_plotlyjs()}{tail}"


def write_page(title: str, models: list[Mapping[str, Any]], path: Path) -> None:
    """Write the page, whole or not at all."""
    plots.save_page(fill_page(title, models), path)


def _scale() -> list[tuple[float, str]]:
    """A colour scale whose ends meet, as plotly.js takes it."""
    colours = [to_hex(colormaps[CYCLIC](i / N_COLOURS)) for i in range(N_COLOURS)]
    return [(i / N_COLOURS, colour) for i, colour in enumerate([*colours, colours[0]])]
