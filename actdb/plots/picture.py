"""Writing pictures: a figure as PNG, SVG or PDF, a page as HTML, whole or not at all."""

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actdb.errors import SettingError
from actdb.storage.folder import temporary_path, write_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".svg", ".pdf")
PAGE = ".html"
DPI = 150
UNDATED: Mapping[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Metadata left out, so that the same picture is the same file."""


def save(path: Path, figure: Callable[[], "Figure"], *, page: Callable[[], str] | None = None) -> None:
    """Draw a picture and write it as its path's suffix says: `figure` for .png, .svg, .pdf and `page` for .html.

    Nothing is read or drawn where the suffix is not among them: `SettingError` lists those that are.
    """
    suffix = path.suffix.lower()
    valid = (*FIGURES, PAGE) if page else FIGURES
    if suffix not in valid:
        raise SettingError(f"{path}: choose a name that ends in {', '.join(valid)}")
    if page and suffix == PAGE:
        save_page(page(), path)
    else:
        save_figure(figure(), path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, whole or not at all; raises `SettingError` for another suffix."""
    from matplotlib import rc_context

    suffix = path.suffix.lower()
    if suffix not in FIGURES:
        raise SettingError(f"{path}: choose a name that ends in {', '.join(FIGURES)}")

    def write(temporary: Path) -> None:
        with rc_context({"svg.hashsalt": "actdb"}):
            figure.savefig(temporary, dpi=DPI, format=suffix[1:], metadata=UNDATED.get(suffix))

    _publish(path, write)


def save_page(page: str, path: Path) -> None:
    """Write an HTML page, whole or not at all."""
    _publish(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def fill_page(name: str, title: str, data: Mapping[str, Any]) -> str:
    """Return a page of this package with a title and data filled in; it refers to nothing outside itself."""
    return fill_template(resources.files("actdb.plots").joinpath(name).read_text(encoding="utf-8"), title, data)


def fill_template(template: str, title: str, data: Mapping[str, Any]) -> str:
    """Return a page's text with `{{title}}` and, once, `{{data}}` filled in.

    The data is JSON in a script element that is not run, with `<` escaped: no text can close it.
    """
    from html import escape

    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head, _, tail = template.partition("{{data}}")
    return head.replace("{{title}}", escape(title)) + content + tail.replace("{{title}}", escape(title))


def colour_table(name: str) -> str:
    """Return 256 colours of a colour map as hexadecimal digits, six a colour."""
    from matplotlib import colormaps

    colours = colormaps[name].resampled(256)(range(256), bytes=True)
    return "".join(f"{red:02x}{green:02x}{blue:02x}" for red, green, blue, _ in colours.tolist())


def _publish(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = temporary_path(path)
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as exc:
        raise write_error(exc, str(path)) from exc
    finally:
        temporary.unlink(missing_ok=True)
