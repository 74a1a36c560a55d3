"""A run as an xarray Dataset: every site a lazy variable over the same reader that selections use.

Indexing reads the chunks that hold the values asked for and nothing else; nothing is kept, except by xarray's `.load`.
The coordinates of rows and entries are computed when asked for, since a run has far more entries than prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.interchange.prompt_table import PromptTable
from actdb.schema import HEAD_DIMS, SiteSpec
from actdb.selection.plan import plan_reads
from actdb.selection.prompts import PromptIndex
from actdb.selection.reader import SiteReader

if TYPE_CHECKING:
    import pyarrow as pa
    import xarray

    from actdb.run import Run

Ints = npt.NDArray[np.int64]
MISSING = "run.dataset() needs xarray: pip install xarray, or the extra actdb[analyses]"


@dataclass(frozen=True)
class Ranges:
    """Where the rows (entries, prompts) of the stored prompts lie: `counts[i]` from array index `starts[i]` on."""

    starts: Ints
    counts: Ints
    firsts: Ints

    @classmethod
    def make(cls, starts: Ints, counts: Ints) -> "Ranges":
        """Number the ranges' places one after the other."""
        return cls(starts, counts, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def locate(self, places: Ints) -> tuple[Ints, Ints]:
        """Return the range of each place, and how far into it the place lies."""
        owner = np.searchsorted(self.firsts, places, side="right") - 1
        return owner, places - self.firsts[owner]

    def cut(self, key: slice | Ints) -> tuple[Ints, Ints]:
        """Return array starts and counts that hold the places of a slice or array, in its order."""
        if isinstance(key, slice) and key.step in (None, 1):
            begin, end, _ = key.indices(len(self))
            first = np.maximum(self.firsts[:-1], begin)
            counts = np.maximum(np.minimum(self.firsts[1:], end) - first, 0)
            return self.starts + first - self.firsts[:-1], counts
        places = np.arange(len(self))[key] if isinstance(key, slice) else np.asarray(key, np.int64)
        owner, within = self.locate(places)
        return self.starts[owner] + within, np.ones_like(places)


def open_dataset(run: "Run") -> "xarray.Dataset":
    """Return a run as a lazy Dataset; see `Run.dataset`."""
    try:
        import xarray
    except ImportError as exc:
        raise SettingError(MISSING) from exc
    index = run._prompts
    stored = index.stored_ids()
    axes = {
        "row": Ranges.make(index.row_start[stored], index.n_rows[stored]),
        "entry": Ranges.make(index.entry_start[stored], index.n_entries[stored]),
    }
    names = DimensionNames()
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for spec in run.info.sites:
        kind = spec.dims[spec.axis]
        places = axes[kind] if kind in axes else Ranges.make(index.prompt_rows(spec)[stored], np.ones_like(stored))
        variables[spec.name] = _site_variable(run, spec, places, names, coords)
        if kind in axes and kind not in coords:
            coords |= _place_coords(kind, index, stored, axes[kind], causal=run.info.causal)
    coords |= _prompt_coords(run, index, stored)
    return xarray.Dataset(variables, coords=coords, attrs=_attributes(run))


class DimensionNames:
    """Gives axes their names: the site's own, or `<site>_<dim>` where another site has other places under that name."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, ...]] = {}

    def name(self, site: str, dim: str, places: Sequence[int]) -> str:
        """Return the name of an axis with these places (layer numbers, heads, features)."""
        if self._places.setdefault(dim, tuple(places)) == tuple(places):
            return dim
        self._places[f"{site}_{dim}"] = tuple(places)
        return f"{site}_{dim}"


def _site_variable(
    run: "Run", spec: SiteSpec, places: Ranges, names: DimensionNames, coords: dict[str, Any]
) -> "xarray.Variable":
    dims = []
    for i, dim in enumerate(spec.dims):
        if i == spec.axis:
            dims.append("prompt_id" if dim == "prompt" else dim)
            continue
        numbers = spec.layers if dim == "layer" else tuple(range(spec.shape[i]))
        dims.append(names.name(spec.name, dim, numbers))
        if dim == "layer" or dim in HEAD_DIMS:
            coords[dims[-1]] = (dims[-1], np.asarray(numbers, np.int64))
    reader = run.source(spec.name).reader
    shape = (*spec.planes, len(places), *spec.feature)
    values = _lazy(shape, np.dtype(spec.dtype), lambda key: read_outer(reader, places, key))
    return _variable(dims, values, {"site": spec.name, "hook": spec.hook})


def read_outer(reader: SiteReader, places: Ranges, key: tuple[Any, ...]) -> npt.NDArray[Any]:
    """Read the outer product of an index an axis: each an int, which drops the axis, a slice or an array of ints."""
    spec = reader.spec
    chosen = [np.arange(n)[k] for n, k in zip(spec.planes, key, strict=False)]
    planes = np.zeros((), np.int64)
    for extent, indices in zip(spec.planes, chosen, strict=True):
        planes = planes[..., None] * extent + indices if indices.ndim else planes * extent + indices
    row = key[spec.axis]
    dropped = isinstance(row, int | np.integer)
    starts, counts = places.cut(np.array([row], np.int64) if dropped else row)
    feature = _feature(spec, key[spec.axis + 1 :])
    n_rows = int(counts.sum())
    if n_rows and planes.size:
        reads = plan_reads(spec, starts, counts)
        values = reader.read(planes.ravel().tolist(), reads, n_rows, feature)
    else:
        values = np.empty((planes.size, n_rows, *reader._feature_shape(feature)), spec.dtype)
    kept = values[:, 0] if dropped else values
    return kept.reshape((*planes.shape, *kept.shape[1:]))


def _feature(spec: SiteSpec, key: tuple[Any, ...]) -> Any:
    """Return what picks from the last axis; None for all of it, which is the fast way."""
    if not key or (isinstance(key[0], slice) and key[0] == slice(None)):
        return None
    if isinstance(key[0], slice):
        begin, end, step = key[0].indices(prod(spec.feature))
        return None if (begin, end, step) == (0, prod(spec.feature), 1) else key[0]
    return int(key[0]) if isinstance(key[0], int | np.integer) else np.asarray(key[0], np.int64)


def _place_coords(kind: str, index: PromptIndex, stored: Ints, places: Ranges, *, causal: bool) -> dict[str, Any]:
    """Return the lazy coordinates of rows (prompt, pos) or entries (entry_prompt, query, key)."""
    lengths = index.n_tokens[stored]

    def position(owner: Ints, within: Ints) -> Ints:
        return lengths[owner] - 1 if index.last_only else within

    def query(owner: Ints, within: Ints) -> Ints:
        if index.last_only:
            return lengths[owner] - 1
        return triangle_row(within) if causal else within // lengths[owner]

    def key(owner: Ints, within: Ints) -> Ints:
        if index.last_only:
            return within
        row = query(owner, within)
        return within - (row * (row + 1) // 2 if causal else row * lengths[owner])

    functions: dict[str, Callable[[Ints, Ints], Ints]] = (
        {"prompt": lambda owner, within: stored[owner], "pos": position}
        if kind == "row"
        else {"entry_prompt": lambda owner, within: stored[owner], "query": query, "key": key}
    )
    return {name: _variable([kind], _computed(places, function), {}) for name, function in functions.items()}


def triangle_row(entries: Ints) -> Ints:
    """Return the row q of each entry q(q+1)/2 + k of a packed lower triangle."""
    row = ((np.sqrt(8.0 * entries + 1) - 1) / 2).astype(np.int64)
    row -= row * (row + 1) // 2 > entries  # the root is rounded: one too high or too low beyond 2⁵³
    row += (row + 1) * (row + 2) // 2 <= entries
    return np.asarray(row, np.int64)


def _computed(places: Ranges, function: Callable[[Ints, Ints], Ints]) -> Any:
    def values(key: tuple[Any, ...]) -> npt.NDArray[Any]:
        wanted = key[0]
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(len(places)))
        return np.asarray(function(*places.locate(np.asarray(wanted, np.int64))), np.int64)

    return _lazy((len(places),), np.dtype(np.int64), values)


def _lazy(shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[tuple[Any, ...]], npt.NDArray[Any]]) -> Any:
    """Wrap a function of outer indices as a lazily indexed array that is copied before it is written to."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class SiteArray(BackendArray):
        """What xarray asks for shape, dtype and values."""

        def __init__(self) -> None:
            self.shape, self.dtype = shape, dtype

        def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
            return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, read)

    lazy: Any = indexing.LazilyIndexedArray(SiteArray())
    return indexing.CopyOnWriteArray(lazy)


def _variable(dims: Sequence[str], values: Any, attributes: dict[str, Any]) -> "xarray.Variable":
    import xarray

    return xarray.Variable(dims, values, attributes)


def _prompt_coords(run: "Run", index: PromptIndex, stored: Ints) -> dict[str, Any]:
    """Return what is known of each stored prompt: its id, tokens, and labels as `label_<name>`."""
    coords: dict[str, Any] = {"prompt_id": stored, "n_tokens": ("prompt_id", index.n_tokens[stored])}
    for name, column in PromptTable(run._folder, run.info).labels.items():
        coords[f"label_{name}"] = ("prompt_id", _label(column.take(stored)))
    return coords


def _label(column: "pa.ChunkedArray") -> npt.NDArray[Any]:
    """Return a label's values; where a prompt lacks it, NaN in numbers, else None, which xarray may turn into NaN."""
    import pyarrow as pa

    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or not column.null_count:
        return np.asarray(column.to_numpy())
    return np.array(column.to_pylist(), object)


def _attributes(run: "Run") -> dict[str, Any]:
    known = {"run": run.name, "model": run.info.model.get("model"), "step": run.step}
    known["prompt_set"] = run.info.plan.get("prompt_set")
    return {name: value for name, value in known.items() if value is not None}
