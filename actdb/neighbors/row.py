"""The rows to compare: one layer (and head) of a site in storage order, read by range, mapped and made ready."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError, SettingError
from actdb.neighbors.map import RowMap
from actdb.neighbors.metric import check_metric, unit, widen, zero_rows
from actdb.schema import HEAD_DIMS
from actdb.selection.plan import expand, plan_reads
from actdb.selection.view import Source

if TYPE_CHECKING:
    from actdb.run import Run

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plane:
    """One layer and head of a site, where it has those: what an index or a search is about."""

    run: "Run"
    site: str
    layer: int | None
    head: int | None

    @property
    def source(self) -> Source:
        """What its rows are read from."""
        return self.run.source(self.site)

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.source.spec.feature[-1]

    @cached_property
    def number(self) -> int:
        """The plane's place in the site's array."""
        spec = self.source.spec
        place = 0 if self.layer is None else spec.layers.index(self.layer)
        return place if self.head is None else place * spec.planes[-1] + self.head

    @property
    def key(self) -> Mapping[str, Any]:
        """What tells planes apart."""
        return {"run": self.run.name, "site": self.site, "layer": self.layer, "head": self.head}

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" layer {self.layer}"
        return f"{self.site}{layer}" + ("" if self.head is None else f" head {self.head}")


def make_plane(run: "Run", site: str, *, layer: int | None, head: int | None) -> Plane:
    """Return one layer and head of a site; raises `SelectionError` unless both are given where the site has them."""
    spec = run.source(site).spec
    if not spec.feature:
        raise SelectionError(f"site {site!r} holds attention patterns, which differ in length: choose a site of rows")
    if len(spec.feature) != 1:
        raise SelectionError(f"site {site!r} has rows of shape {list(spec.feature)}: choose a site of vectors")
    for name, given, has in (
        ("layer", layer, "layer" in spec.dims),
        ("head", head, bool(set(spec.dims) & set(HEAD_DIMS))),
    ):
        if has and given is None:
            raise SelectionError(f"site {site!r} has {name}s: choose one with {name}=")
        if given is not None and not isinstance(given, int | np.integer):
            raise SelectionError(f"{name}={given!r}: choose one {name} by its number")
    _ = run[site].sel(layer=layer, head=head)  # raises where the site lacks it
    return Plane(run, site, layer, head)


class Rows:
    """Rows [row, width] of one plane in storage order, mapped, and for cosine of unit length.

    `prompt` and `pos` [row] tell where each comes from (`pos` is 0 throughout for sites without positions).
    `where` is an SQL condition over labels and run_prompts. Raises `SelectionError` where no row is left.
    """

    def __init__(self, plane: Plane, row_map: RowMap, metric: str, where: str | None = None) -> None:
        self.plane, self.map, self.metric, self.where = plane, row_map, check_metric(metric), where
        source, index = plane.source, plane.source.prompts()
        ids = index.stored_ids()
        if where is not None:
            ids = ids[np.isin(ids, np.asarray(source.matching(where), np.int64))]
        if len(ids) == 0:
            reason = "holds no rows yet" if where is None else f"has no stored prompt with {where!r}"
            raise SelectionError(f"run {plane.run.name!r} {reason}")
        self.has_positions = "prompt" not in source.spec.dims
        if self.has_positions:
            ids = index.in_storage_order(ids)
            starts, counts = index.row_start[ids], index.n_rows[ids]
        else:
            starts = index.prompt_rows(source.spec)[ids]
            order = np.argsort(starts, kind="stable")
            ids, starts, counts = ids[order], starts[order], np.ones_like(ids)
        first = index.n_tokens[ids] - 1 if index.last_only and self.has_positions else np.zeros_like(ids)
        self._places = expand(starts, counts)  # type: ignore[arg-type]
        self._ends = np.cumsum(counts)
        self._ids = ids
        self.prompt = np.repeat(ids, counts)
        self._begins = np.repeat(self._ends - counts, counts)
        self.pos = np.arange(len(self.prompt)) - self._begins + np.repeat(first, counts)
        self._prompt_ends = np.repeat(self._ends, counts)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def key(self) -> dict[str, Any]:
        """What is compared and how: run, site, layer, head, metric, map."""
        return {**self.plane.key, "metric": self.metric, "map": dict(self.map.key)}

    @property
    def width(self) -> int:
        """Values of a mapped row."""
        return self.map.width

    def read(self, begin: int, end: int) -> Floats:
        """Return the rows from `begin` up to `end`, float32. Reads the chunks that hold them."""
        return self._read(self._places[begin:end], np.arange(begin, min(end, len(self))))

    def take(self, numbers: Ints) -> Floats:
        """Return rows by their numbers, in that order; each chunk that holds some is read once."""
        distinct, place = np.unique(numbers, return_inverse=True)
        return self._read(self._places[distinct], distinct)[place]

    def prepare(self, vectors: Floats, what: str) -> Floats:
        """Return vectors [row, d] mapped, and for cosine of unit length; raises `SettingError` for zeros."""
        mapped = self.map.apply(vectors)
        if self.metric != "cosine":
            return mapped
        if len(zero_rows(mapped)):
            raise SettingError(f"{what} is zero and has no direction: choose metric l2 or ip")
        return unit(mapped)

    def number(self, prompt: int, pos: int) -> int | None:
        """Return the number of a row, or None where it is not among these."""
        found = np.flatnonzero(self._ids == prompt)
        if len(found) == 0:
            return None
        begin = int(self._ends[found[0] - 1]) if found[0] else 0
        number = begin + pos - int(self.pos[begin])
        return number if begin <= number < int(self._ends[found[0]]) else None

    def around(self, numbers: Ints, *, exclude_prompt: bool, exclude_within: int) -> tuple[Ints, Ints]:
        """Return the range of rows that each row shall not find: itself, near positions, or its whole prompt."""
        if exclude_within < 0:
            raise SettingError(f"exclude_within {exclude_within}: must not be negative")
        begins, ends = self._begins[numbers], self._prompt_ends[numbers]
        if exclude_prompt:
            return begins, ends
        return np.maximum(numbers - exclude_within, begins), np.minimum(numbers + exclude_within + 1, ends)

    @cached_property
    def digest(self) -> str:
        """A digest of which rows these are."""
        return hashlib.sha256(self._places.astype("<i8").tobytes()).hexdigest()

    def _read(self, places: Ints, numbers: Ints) -> Floats:
        source = self.plane.source
        reads = plan_reads(source.spec, places, np.ones_like(places))
        values = source.reader.read([self.plane.number], reads, len(places))[0]
        mapped = self.map.apply(widen(values))
        if self.metric != "cosine":
            return mapped
        zeros = zero_rows(mapped)
        if len(zeros):
            row = int(numbers[zeros[0]])
            raise SettingError(
                f"{self.plane} at prompt {self.prompt[row]}, pos {self.pos[row]} is zero and has no direction:"
                " choose metric l2 or ip, or leave its prompt out with where"
            )
        return unit(mapped)
