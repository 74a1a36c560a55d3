"""Looking up stored vectors for SQL: a call's rows are grouped by array, planned at once, and each chunk decoded once.

DuckDB calls with some 2048 rows at a time. Neighbouring calls of a query share chunks, so the chunks used last are kept
decoded. What comes back are list views into one buffer that holds each wanted vector once.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actdb.catalog.documentation import SIGNATURES
from actdb.errors import RunError, SelectionError
from actdb.schema import HEAD_DIMS
from actdb.selection.plan import ChunkRead, expand, plan_reads
from actdb.selection.prompts import PromptIndex
from actdb.selection.reader import SiteReader
from actdb.selection.view import Source

if TYPE_CHECKING:
    from actdb.run import Run

CACHE_BYTES = 256 * 1024**2
"""Measured on 100,000 vectors of 768 in random order: 4 times as fast as decoding a chunk in each call that uses it."""
FEW_PIECES = 8
"""Up to so many pieces of a chunk are copied one by one; beyond, indexing with an array is faster."""
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Values = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Address:
    """One array of a run, of a layer and head where the site has those, and the SQL function that asks for it."""

    function: str
    run: str
    site: str
    layer: int
    head: int | None = None


@dataclass(frozen=True)
class Found:
    """Vectors of a call: `values` [place] flat, and where each row's begins in it and how long it is."""

    values: Floats
    offsets: Ints
    sizes: Ints


@dataclass(frozen=True)
class _Group:
    """The rows of a call that lie in one array: `starts` and `counts` of the distinct ranges, `place` of each row."""

    reader: SiteReader
    plane: int
    rows: Ints
    starts: Ints
    counts: Ints
    place: Ints

    @property
    def width(self) -> int:
        """Values of one row of the array; 1 for patterns."""
        return int(np.prod(self.reader.spec.feature, dtype=np.int64))


class Lookup:
    """Finds vectors in the runs of a snapshot; safe to use from several threads. `runs` are given oldest first."""

    def __init__(self, runs: dict[str, "Run"], cache_bytes: int = CACHE_BYTES) -> None:
        self._runs = runs
        self._cache = ChunkCache(cache_bytes)
        self._arrays: dict[Address, tuple[Source, int]] = {}

    def run(self, name: str) -> "Run":
        """Return a run by name, the newest for an empty one; raises `RunError` with the names that there are."""
        if not name and self._runs:
            return self._runs[next(reversed(self._runs))]
        if name not in self._runs:
            raise RunError(f"no run {name!r}; there are {', '.join(self._runs)}" if name else "there are no runs yet")
        return self._runs[name]

    def vectors(self, n_rows: int, wanted: Sequence[tuple[Address, Ints, Ints, Ints]]) -> Found:
        """Return the vectors of `n_rows` rows, of which each (address, rows, prompts, positions) tells some.

        Rows that are nowhere have length 0. Raises `SelectionError`, `SiteError` or `RunError` naming what there is.
        """
        groups = [self._group(*part) for part in wanted]
        bases = np.cumsum([0, *(int(group.counts.sum()) * group.width for group in groups)])
        values = np.empty(int(bases[-1]), np.float32)
        offsets, sizes = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64)
        for group, base, end in zip(groups, bases[:-1], bases[1:], strict=True):
            self._read(group, values[base:end])
            begins = (np.cumsum(group.counts) - group.counts) * group.width
            offsets[group.rows] = base + begins[group.place]
            sizes[group.rows] = group.counts[group.place] * group.width
        return Found(values, offsets, sizes)

    def _group(self, address: Address, rows: Ints, prompts: Ints, positions: Ints) -> _Group:
        source, plane = self._arrays.get(address) or self._array(address)
        index = source.prompts()
        chosen = _resolve(index, prompts, positions)
        if "prompt" in source.spec.dims:
            starts, counts = index.prompt_rows(source.spec)[prompts], np.ones_like(prompts)
        elif source.spec.dims[-1] == "entry":
            starts, counts = _entries(index, prompts, chosen, causal=source.causal)
        else:
            first = index.n_tokens[prompts] - 1 if index.last_only else 0
            starts, counts = index.row_start[prompts] + chosen - first, np.ones_like(prompts)
        # distinct and ascending: what rows share is read once, and neighbours become one range
        starts, unique, place = np.unique(starts, return_index=True, return_inverse=True)
        return _Group(source.reader, plane, rows, starts, counts[unique], place)

    def _array(self, address: Address) -> tuple[Source, int]:
        """Return the source of an address and the number of its plane, which is kept for the next call."""
        run = self.run(address.run)
        source = run.source(address.site)
        spec = source.spec
        _check_axes(spec.dims, address)
        layer = address.layer if "layer" in spec.dims else None
        _ = run[address.site].sel(layer=layer, head=address.head)  # raises where there is no such plane
        plane = 0 if layer is None else spec.layers.index(layer)
        if address.head is not None:
            plane = plane * spec.planes[-1] + address.head
        self._arrays[address] = source, plane
        return source, plane

    def _read(self, group: _Group, values: Floats) -> None:
        """Fill `values` with the ranges of a group, one after the other."""
        spec = group.reader.spec
        out = values.reshape(-1, *spec.feature)
        for read in plan_reads(spec, group.starts, group.counts):
            chunk = self._cache.read(group.reader, group.plane, read)
            if len(read.counts) <= FEW_PIECES:
                for source, target, count in zip(read.sources, read.targets, read.counts, strict=True):
                    out[target : target + count] = chunk[source : source + count]
            else:
                rows = expand(read.sources, read.counts)
                begin = read.targets[0]  # ranges ascend: what one chunk holds of them lies together
                out[begin : begin + len(rows)] = chunk[rows]


class ChunkCache:
    """The decoded chunks used last, up to a number of bytes; safe to use from several threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._chunks: OrderedDict[tuple[SiteReader, int, int, int], Values] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, reader: SiteReader, plane: int, read: ChunkRead) -> Values:
        """Return a whole chunk [row, …] in the stored dtype, decoded unless it is still there."""
        key = (reader, plane, read.part, read.row_chunk)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
                return chunk
        n_rows = reader.spec.chunk_shape[reader.spec.axis]
        whole = ChunkRead(read.part, read.row_chunk, [0], [0], [n_rows])
        chunk = np.asarray(reader.read([plane], [whole], n_rows)[0])
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = chunk
                self._bytes += chunk.nbytes
            while self._bytes > self._capacity:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return chunk


def _check_axes(dims: Sequence[str], address: Address) -> None:
    """Raise `SelectionError` naming the function that fits, where a site has other axes than the one called wants."""
    site = address.site
    fitting = "attention" if "entry" in dims else "head_activation" if set(dims) & set(HEAD_DIMS) else "activation"
    if address.function == "interaction":
        return  # whose axes are known
    if "prompt" in dims:
        raise SelectionError(
            f"site {site!r} has one vector a prompt and no positions; read it in Python: run[{site!r}].sel(prompt=...)"
        )
    if address.function != fitting:
        raise SelectionError(f"site {site!r} is read by {SIGNATURES[fitting]}, not by {address.function}()")
    if "layer" not in dims and address.layer != 0:
        raise SelectionError(f"layer {address.layer}: site {site!r} has no layers; give 0")


def groups_of(keys: Sequence[Ints]) -> Iterator[tuple[tuple[int, ...], Ints]]:
    """Yield each distinct combination of several keys of the same rows, with the places of the rows that have it."""
    table = np.stack(keys)
    if not table.size:
        return
    if (table == table[:, :1]).all():
        yield tuple(table[:, 0].tolist()), np.arange(table.shape[1])
        return
    distinct, group = np.unique(table, axis=1, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    borders = np.cumsum(np.bincount(group.reshape(-1)))[:-1]
    for key, rows in zip(distinct.T.tolist(), np.split(order, borders), strict=True):
        yield tuple(key), rows


def _resolve(index: PromptIndex, prompts: Ints, positions: Ints) -> Ints:
    """Return positions counted from each prompt's start; raises `SelectionError` for one that is not stored."""
    outside = (prompts < 0) | (prompts >= len(index))
    outside[~outside] = ~index.stored[prompts[~outside]]
    if outside.any():
        index.check(int(prompts[outside][0]))
    lengths = index.n_tokens[prompts]
    chosen = np.where(positions < 0, positions + lengths, positions)
    outside = (chosen < 0) | (chosen >= lengths)
    if outside.any():
        pos, prompt, n = (int(column[outside][0]) for column in (positions, prompts, lengths))
        raise SelectionError(f"pos {pos}: prompt {prompt} has positions 0 to {n - 1}")
    if index.last_only and (chosen != lengths - 1).any():
        pos = int(positions[chosen != lengths - 1][0])
        raise SelectionError(f"pos {pos}: run {index.run!r} stores the last position of each prompt only (pos -1)")
    return chosen


def _entries(index: PromptIndex, prompts: Ints, queries: Ints, *, causal: bool) -> tuple[Ints, Ints]:
    """Return where each query's weights begin among the entries, and how many there are."""
    starts = index.entry_start[prompts]
    if index.last_only:
        return starts, index.n_entries[prompts]
    if causal:
        return starts + queries * (queries + 1) // 2, queries + 1
    return starts + queries * index.n_tokens[prompts], index.n_tokens[prompts]
