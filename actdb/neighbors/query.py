"""The vector that is asked about: a stored row, a vector given, or the last position of a text."""

import operator
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError, SettingError
from actdb.neighbors.row import Plane, Rows
from actdb.neighbors.text import text_rows

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Query:
    """A vector [1, width] of a site, float32, and the stored row that it is, if it is one."""

    vector: Floats
    what: str
    prompt: int | None = None
    pos: int = 0

    def number(self, rows: Rows) -> int | None:
        """Return its number among rows, None where it is not one of them."""
        return None if self.prompt is None else rows.number(self.prompt, self.pos)


def make_query(
    plane: Plane,
    *,
    prompt: int | None = None,
    pos: int | None = None,
    vector: npt.ArrayLike | str | os.PathLike[str] | None = None,
    text: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
) -> Query:
    """Return the query by one of: a stored row (prompt and pos), a vector [width], a text (at pos, default the last).

    `vector` may be the path of a .npy file. Raises `SettingError` unless exactly one is given and fits,
    `SelectionError` for a row that is not stored.
    """
    given = [name for name, value in (("prompt", prompt), ("vector", vector), ("text", text)) if value is not None]
    if len(given) != 1:
        raise SettingError(f"give one of prompt (with pos), vector or text; given: {', '.join(given) or 'none'}")
    if vector is not None:
        if pos is not None:
            raise SettingError("pos goes with prompt or text, not with vector")
        return Query(_vector(plane, vector), "the vector")
    if text is not None:
        rows = text_rows(plane, text, model=model, tokenizer=tokenizer)
        place = -1 if pos is None else operator.index(pos)
        if not -len(rows) <= place < len(rows):
            raise SelectionError(f"pos {place}: the text has positions 0 to {len(rows) - 1}")
        return Query(rows[place][None], f"{plane} of the text at pos {place}")
    return _stored(plane, operator.index(prompt), pos)  # type: ignore[arg-type]


def _vector(plane: Plane, given: npt.ArrayLike | str | os.PathLike[str]) -> Floats:
    try:
        held = np.load(given, allow_pickle=False) if isinstance(given, str | os.PathLike) else given
        vector = np.asarray(held, np.float32)
    except (OSError, TypeError, ValueError) as exc:
        raise SettingError(f"vector: give an array of numbers, or a .npy file of one ({exc})") from exc
    if vector.shape != (plane.width,):
        raise SettingError(f"vector: {plane} has vectors of {plane.width} values, not {list(vector.shape)}")
    if not np.isfinite(vector).all():
        place = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise SettingError(f"vector: value {place} is {vector[place]}; give finite numbers")
    return vector[None]


def _stored(plane: Plane, prompt: int, pos: int | None) -> Query:
    source = plane.source
    index = source.prompts()
    index.check(prompt)
    selection = plane.run[plane.site].sel(layer=plane.layer, head=plane.head, prompt=prompt)
    if "prompt" in source.spec.dims:
        if pos is not None:
            raise SelectionError(f"site {plane.site!r} has no positions: leave pos out")
        return Query(np.asarray(selection.numpy(), np.float32)[None], f"{plane} of prompt {prompt}", prompt)
    if pos is None and not index.last_only:
        raise SelectionError(f"prompt {prompt}: choose a position with pos, such as -1 for its last")
    place = -1 if pos is None else operator.index(pos)
    vector = np.asarray(selection.sel(pos=place).numpy(), np.float32)[None]
    place += int(index.n_tokens[prompt]) if place < 0 else 0
    return Query(vector, f"{plane} at prompt {prompt}, pos {place}", prompt, place)
