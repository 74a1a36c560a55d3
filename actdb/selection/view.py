"""Lazy selections: shape, dims and size are known at once, data is read when asked for."""

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError, SiteError
from actdb.schema import HEAD_DIMS, SiteSpec
from actdb.selection import streams
from actdb.selection.plan import ChunkRead, plan_reads
from actdb.selection.prompts import PromptIndex
from actdb.selection.reader import SiteReader

if TYPE_CHECKING:
    import torch
    import xarray

    from actdb.interchange.stream import TorchStream

Ints = npt.NDArray[np.int64]
KEPT_READS = 4096
"""Chunks of a plan that is kept: beyond, planning takes little beside reading."""
Index = SupportsIndex | slice | Sequence[int] | npt.NDArray[Any] | None


@dataclass(frozen=True)
class Source:
    """What a selection reads from: a site's reader, the run's prompts, and how to evaluate `where`."""

    reader: SiteReader
    prompts: Callable[[], PromptIndex]
    matching: Callable[[str], Sequence[int]]
    causal: bool

    @property
    def spec(self) -> SiteSpec:
        """The site's array."""
        return self.reader.spec

    def plan_whole(self) -> tuple[Sequence[ChunkRead], int]:
        """Return the reads of all stored rows in prompt order, and their number; a short plan is kept."""
        if self.reader.whole is not None:
            return self.reader.whole
        reads, n_rows = Selection(self)._plan()
        if len(reads) <= KEPT_READS:
            self.reader.whole = reads, n_rows
        return reads, n_rows


@dataclass(frozen=True)
class Axis:
    """A selection along one axis: array indices, the numbers users know them by, and whether an int dropped it."""

    indices: tuple[int, ...]
    numbers: tuple[int, ...]
    dropped: bool


@dataclass(frozen=True)
class Rows:
    """Selected rows: ranges along the array's row axis with the prompt and positions that each stands for."""

    starts: Ints
    counts: Ints
    prompt_ids: Ints
    first_pos: Ints
    dropped: bool

    def in_storage_order(self) -> "Rows":
        """Return the same rows in the order in which they are stored."""
        order = np.argsort(self.starts, kind="stable")
        starts, counts = self.starts[order], self.counts[order]
        return Rows(starts, counts, self.prompt_ids[order], self.first_pos[order], self.dropped)

    def prompts(self) -> Ints:
        """Return the prompt id of each row."""
        return np.repeat(self.prompt_ids, self.counts)

    def positions(self) -> Ints:
        """Return the position of each row within its prompt."""
        ends = np.cumsum(self.counts)
        places = np.arange(int(self.counts.sum())) + np.repeat(self.first_pos - (ends - self.counts), self.counts)
        return np.asarray(places, np.int64)


class Selection:
    """Stored activations chosen by layer, head, neuron, prompt and position; nothing is read before it is asked for.

    Values have the axes `dims`, in the stored dtype. Row sites: [layer, head, row, feature] with the rows of many
    prompts concatenated in prompt order (`prompt` and `pos` tell them apart), an axis absent where an int selected it.
    Patterns: see `numpy`. Selecting again narrows by the arguments given and keeps the others.
    """

    def __init__(self, source: Source, given: Mapping[str, Any] | None = None) -> None:
        self._source = source
        self._given = dict(given or {})

    def sel(
        self,
        *,
        layer: Index = None,
        head: Index = None,
        neuron: Index = None,
        prompt: Index = None,
        pos: Index = None,
        where: str | None = None,
    ) -> "Selection":
        """Narrow the selection: an int drops the axis, a slice, list or array keeps it.

        `layer` takes the model's layer numbers, `head` the kv head for `k` and `v`, `neuron` places of the last axis. A
        negative `pos` counts from each prompt's end; a slice of positions clips, any other that a selected prompt lacks
        raises. `where` is an SQL condition over label columns and `run_prompts`. Raises `SelectionError` with the valid
        range. Reads nothing but the prompt table.
        """
        chosen: dict[str, Any] = {"layer": layer, "head": head, "neuron": neuron, "prompt": prompt, "pos": pos}
        chosen["where"] = where
        given = {**self._given, **{name: value for name, value in chosen.items() if value is not None}}
        selection = Selection(self._source, given)
        if selection._place is None:
            selection._check(**chosen)
        return selection

    def _check(self, *, layer: Index, head: Index, neuron: Index, prompt: Index, pos: Index, where: str | None) -> None:
        """Refuse what the site does not have; called with what was given last."""
        spec = self._source.spec
        dims = set(spec.dims)
        if head is not None and not dims & set(HEAD_DIMS):
            raise SelectionError(f"site {spec.name!r} has no heads; its axes are {', '.join(spec.dims)}")
        if layer is not None and "layer" not in dims:
            raise SelectionError(f"site {spec.name!r} has no layers; its axes are {', '.join(spec.dims)}")
        if neuron is not None and not spec.feature:
            raise SelectionError(f"site {spec.name!r} has no neurons; its axes are {', '.join(spec.dims)}")
        if pos is not None and "prompt" in dims:
            raise SelectionError(f"site {spec.name!r} has no positions; its axes are {', '.join(spec.dims)}")
        if pos is not None and self._is_pattern and not _is_int(pos):
            raise SelectionError("pos of a pattern is one query; select it by an int, or slice the square")
        if layer is not None or head is not None:
            _ = self._axes
        if neuron is not None:
            _ = self._feature

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of `numpy()`; a pattern has query and key, and prompt first where several are selected."""
        spec = self._source.spec
        kept = [dim for dim, axis in zip(spec.dims, self._axes, strict=False) if not axis.dropped]
        if self._is_pattern:
            kept += [] if self._single else ["prompt"]
            return (*kept, *(() if self._one_query else ("query",)), "key")
        if not self._rows.dropped:
            kept.append(spec.dims[spec.axis])
        feature = self._feature
        return (*kept, *(() if isinstance(feature, int) else spec.dims[spec.axis + 1 :]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `numpy()`; for patterns of several prompts that of `pad=True`."""
        planes = tuple(len(axis.indices) for axis in self._axes if not axis.dropped)
        if self._is_pattern:
            longest = int(self._lengths.max(initial=0))
            queries = () if self._one_query else (1 if self._prompts.last_only else longest,)
            return (*planes, *(() if self._single else (len(self._lengths),)), *queries, longest)
        rows = () if self._rows.dropped else (self.n_rows,)
        return (*planes, *rows, *self._source.reader._feature_shape(self._feature))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return np.dtype(self._source.spec.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of `numpy()`."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def n_rows(self) -> int:
        """Selected rows (entries for patterns, prompts for prompt-level sites)."""
        return int(self._rows.counts.sum())

    @property
    def prompt(self) -> Ints:
        """The prompt id of each row (of each pattern)."""
        return self._rows.prompt_ids if self._is_pattern else self._rows.prompts()

    @property
    def pos(self) -> Ints:
        """The position of each row within its prompt."""
        if self._is_pattern or "prompt" in self._source.spec.dims:
            raise SelectionError(f"site {self._source.spec.name!r} has no position of each row; see dims")
        return self._rows.positions()

    @property
    def layers(self) -> tuple[int, ...]:
        """The selected layers, by the model's numbers."""
        return self._axes[0].numbers if "layer" in self._source.spec.dims else ()

    def numpy(self, *, pad: bool = False) -> Any:
        """Read the values, in the stored dtype.

        Row sites: one array, see the class. Patterns of one prompt: a square [query, key], zero above the diagonal in
        causal models ([1, n] with `--positions last`; [key] for one `pos`); of several prompts: a list of them, or with
        `pad` one array [prompt, query, key] with NaN beyond each prompt. Layers and heads come before. Each chunk that
        holds selected values is read once, nothing else; a raw chunk alone comes as a read-only view. Raises
        `DamageError` where a checksum does not fit.
        """
        if self._place is not None:
            return self._source.reader.read_range(*self._place)
        if self._is_pattern:
            return self._patterns(pad=pad)
        whole = not self._given.keys() & {"prompt", "pos", "where"}
        reads, n_rows = self._source.plan_whole() if whole else self._plan()
        values = self._source.reader.read(self._planes, reads, n_rows, self._feature)
        planes = tuple(len(axis.indices) for axis in self._axes if not axis.dropped)
        return values.reshape(planes + values.shape[1 if whole or not self._rows.dropped else 2 :])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.numpy(pad=self._is_pattern and not self._single)
        return np.array(values, dtype, copy=True if copy and not values.flags.writeable else None)

    def torch(self, *, pad: bool = False) -> "torch.Tensor | list[torch.Tensor]":
        """Read the values as CPU tensors that own their memory; as `numpy` otherwise."""
        import torch

        values = self.numpy(pad=pad)
        if isinstance(values, list):
            return [torch.from_numpy(value if value.flags.writeable else value.copy()) for value in values]
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def xarray(self) -> "xarray.DataArray":
        """Read the values as an xarray DataArray with layer, head, prompt and pos as coordinates (patterns padded)."""
        import xarray

        spec = self._source.spec
        coords: dict[str, Any] = {}
        for dim, axis in zip(spec.dims, self._axes, strict=False):
            coords[dim] = axis.numbers[0] if axis.dropped else list(axis.numbers)
        if self._is_pattern:
            coords["prompt"] = int(self.prompt[0]) if self._single else self.prompt
        elif "prompt" in spec.dims:
            coords["prompt"] = int(self.prompt[0]) if self._rows.dropped else self.prompt
        elif self._rows.dropped:
            coords |= {"prompt": int(self.prompt[0]), "pos": int(self.pos[0])}
        else:
            coords |= {"prompt": ("row", self.prompt), "pos": ("row", self.pos)}
        values = self.numpy(pad=self._is_pattern and not self._single)
        return xarray.DataArray(values, dims=self.dims, coords=coords, name=spec.name)

    def batches(self, size: int) -> Iterator[streams.Block]:
        """Yield blocks of up to `size` rows in storage order, each chunk read once: a full scan in bounded memory.

        `block.values` is [layer, head, row, feature] with dropped axes absent, `block.prompt` and `block.pos` have one
        entry a row. For patterns `size` counts prompts and `block.values` is a list of squares.
        """
        if size < 1:
            raise SelectionError(f"batches({size}): the size must be at least 1")
        if self._is_pattern:
            return self._pattern_batches(size)
        return streams.scan(self._stream(), size)

    def shuffled(
        self, size: int, *, seed: int = 0, epochs: int = 1, worker: tuple[int, int] | None = None
    ) -> Iterator[streams.Block]:
        """Yield batches of `size` rows in random order, each row exactly once an epoch (the last batch may be short).

        Chunks are drawn in random order into a buffer of some 64 MiB, whose rows are shuffled: reading stays sequential
        within chunks. The order depends on `seed` and epoch alone; `worker=(i, n)` takes every n-th chunk.
        """
        if self._is_pattern:
            raise SelectionError("shuffled() needs a row site; patterns differ in shape: use batches()")
        if size < 1:
            raise SelectionError(f"shuffled({size}): the size must be at least 1")
        return streams.shuffle(self._stream(), size, seed=seed, epochs=epochs, worker=worker)

    def torch_dataset(self, *, size: int, seed: int = 0, epochs: int = 1) -> "TorchStream":
        """Return `shuffled` as a torch `IterableDataset`: dicts of `values`, `prompt` and `pos` tensors.

        For `DataLoader(dataset, batch_size=None, num_workers=N)`: the batches are made here. Chunks are shared out over
        workers, and over ranks where torch.distributed is initialised, so that together they yield each row once an
        epoch; shares differ by up to a chunk, and so does the number of batches. Raises `SelectionError` for patterns.
        """
        from actdb.interchange.stream import TorchStream

        return TorchStream(self, size, seed=seed, epochs=epochs)

    def export(self, path: str | os.PathLike[str], *, format: str | None = None, overwrite: bool = False) -> Path:
        """Write the selection for other tools as `parquet`, `npz`, `safetensors` or `hf`; returns the path.

        parquet and hf hold a record a layer, head and row (patterns: a query) in storage order, with prompt_id, pos,
        token and labels beside `activation`; npz and safetensors hold arrays in the order of `numpy()` (see
        `actdb.interchange.record` and `array`). Values keep the stored dtype, float16 too. `format` defaults to the
        path's suffix; hf is a folder for `datasets.load_from_disk`. Memory stays bounded by some batches of 16 MiB and
        8 bytes a token of the run; npz and safetensors take the size of the values on disk a second time meanwhile.

        Raises `SettingError` for a format or suffix that is not known, and where the path exists without `overwrite`.
        """
        from actdb.interchange.export import export_selection

        return export_selection(self, path, format=format, overwrite=overwrite)

    def __len__(self) -> int:
        shape = self.shape
        if not shape:
            raise TypeError("a selection of a single value has no length")
        return shape[0]

    def __repr__(self) -> str:
        axes = ", ".join(f"{dim} {size}" for dim, size in zip(self.dims, self.shape, strict=True))
        return f"<Selection {self._source.spec.name} [{axes}] {self.dtype} {self.nbytes:,} bytes>"

    @cached_property
    def _place(self) -> tuple[int, int, int] | None:
        """Plane, first row and rows of the commonest selection: ints for one layer, head and prompt of a row site.

        None for any other, and for ints out of range: the general path takes three times as long, and says what is
        wrong.
        """
        given, reader = self._given, self._source.reader
        if len(given) != reader.n_plane_axes + 1 or reader.spec.dims[reader.n_plane_axes] != "row":
            return None
        plane = 0
        for name, places in reader.plane_places:
            index = given.get(name)
            if type(index) is not int or index not in places:
                return None
            plane = plane * len(places) + places[index]
        prompt, prompts = given.get("prompt"), self._prompts
        if type(prompt) is not int or not 0 <= prompt < len(prompts) or not prompts.stored[prompt]:
            return None
        return plane, int(prompts.row_start[prompt]), int(prompts.n_rows[prompt])

    @property
    def _is_pattern(self) -> bool:
        return self._source.spec.dims[-1] == "entry"

    @property
    def _single(self) -> bool:
        return self._rows.dropped

    @property
    def _one_query(self) -> bool:
        pos = self._given.get("pos")
        return pos is not None and _is_int(pos)

    @cached_property
    def _prompts(self) -> PromptIndex:
        return self._source.prompts()

    @cached_property
    def _axes(self) -> tuple[Axis, ...]:
        """The selections along the axes before the rows: layer, head."""
        spec = self._source.spec
        axes = []
        for dim, extent in zip(spec.dims, spec.planes, strict=False):
            numbers = spec.layers if dim == "layer" else tuple(range(extent))
            axes.append(
                _axis(
                    "layer" if dim == "layer" else "head",
                    self._given.get("layer" if dim == "layer" else "head"),
                    numbers,
                )
            )
        return tuple(axes)

    @cached_property
    def _planes(self) -> list[int]:
        spec = self._source.spec
        planes = [0]
        for axis, extent in zip(self._axes, spec.planes, strict=True):
            planes = [plane * extent + index for plane in planes for index in axis.indices]
        return planes

    @cached_property
    def _feature(self) -> Any:
        neuron = self._given.get("neuron")
        if neuron is None:
            return None
        axis = _axis("neuron", neuron, range(self._source.spec.feature[-1]))
        return axis.indices[0] if axis.dropped else np.asarray(axis.indices, np.int64)

    @cached_property
    def _chosen(self) -> tuple[Ints, bool]:
        """The selected prompt ids in order, and whether an int selected one."""
        prompts, given, where = self._prompts, self._given.get("prompt"), self._given.get("where")
        if given is not None and _is_int(given):
            ids, single = np.array([prompts.check(operator.index(given))], np.int64), True
        elif isinstance(given, slice):
            ids, single = np.array(_sliced("prompt", given, len(prompts)), np.int64), False
            ids = ids[prompts.stored[ids]]
        elif given is not None:
            chosen = _whole("prompt", given, range(len(prompts)))
            ids, single = np.array([prompts.check(i) for i in chosen], np.int64), False
        else:
            ids, single = prompts.stored_ids(), False
        if where is not None:
            matching = np.asarray(self._source.matching(where), np.int64)
            ids = ids[np.isin(ids, matching)]
            if single and len(ids) == 0:
                raise SelectionError(f"prompt {given} does not satisfy {where!r}")
        return ids, single

    @cached_property
    def _lengths(self) -> Ints:
        return self._prompts.n_tokens[self._chosen[0]]

    @cached_property
    def _rows(self) -> Rows:
        ids, single = self._chosen
        prompts, spec = self._prompts, self._source.spec
        if "prompt" in spec.dims:
            return Rows(prompts.prompt_rows(spec)[ids], np.ones_like(ids), ids, np.zeros_like(ids), single)
        if self._is_pattern:
            return Rows(prompts.entry_start[ids], prompts.n_entries[ids], ids, np.zeros_like(ids), single)
        starts, counts = prompts.row_start[ids], prompts.n_rows[ids]
        first = prompts.n_tokens[ids] - 1 if prompts.last_only else np.zeros_like(ids)
        pos = self._given.get("pos")
        if pos is None:
            return Rows(starts, counts, ids, first, False)
        if _is_int(pos):
            chosen = self._positions([operator.index(pos)])[:, 0]
            return Rows(starts + chosen - first, np.ones_like(ids), ids, chosen, single)
        if isinstance(pos, slice):
            spans = zip(self._lengths.tolist(), first.tolist(), strict=True)
            sliced = [(_sliced("pos", pos, n), begin) for n, begin in spans]
            if pos.step is None or pos.step == 1:
                begins = np.array([max(r.start, begin) for r, begin in sliced], np.int64)
                ends = np.array([r.stop for r, _ in sliced], np.int64)
                return Rows(starts + begins - first, np.maximum(ends - begins, 0), ids, begins, False)
            wanted = [[p for p in r if p >= begin] for r, begin in sliced]
        else:
            wanted = self._positions(self._whole_positions(pos)).tolist()
        owner = np.repeat(np.arange(len(ids)), [len(w) for w in wanted])
        flat = np.array([p for w in wanted for p in w], np.int64)
        return Rows(starts[owner] + flat - first[owner], np.ones_like(flat), ids[owner], flat, False)

    def _whole_positions(self, pos: Any) -> list[int]:
        """Return a list or array of positions as a list; a boolean mask must fit every selected prompt."""
        wanted: list[int] = []
        for n in np.unique(self._lengths)[[0, -1]].tolist() if len(self._lengths) else ():
            wanted = _whole("pos", pos, range(n))
        return wanted

    def _positions(self, wanted: Sequence[int]) -> Ints:
        """Resolve positions for every selected prompt: [prompt, position]; raises where one lacks it."""
        ids, lengths = self._chosen[0], self._lengths
        try:
            given = np.asarray(wanted, np.int64)
        except OverflowError as exc:
            raise SelectionError(f"pos {max(wanted, key=abs)}: no prompt is that long") from exc
        positions = given[None] + np.zeros_like(lengths)[:, None]
        positions = np.where(positions < 0, positions + lengths[:, None], positions)
        outside = (positions < 0) | (positions >= lengths[:, None])
        if outside.any():
            i, j = (int(n[0]) for n in np.nonzero(outside))
            raise SelectionError(f"pos {wanted[j]}: prompt {ids[i]} has positions 0 to {lengths[i] - 1}")
        if self._prompts.last_only and (positions != lengths[:, None] - 1).any():
            raise SelectionError(
                f"pos: run {self._prompts.run!r} stores the last position of each prompt only (pos=-1)"
            )
        return positions

    def _plan(self) -> tuple[list[ChunkRead], int]:
        rows = self._rows
        return plan_reads(self._source.spec, rows.starts, rows.counts), int(rows.counts.sum())

    def _stream(self) -> streams.Stream:
        shape = tuple(len(axis.indices) for axis in self._axes if not axis.dropped)
        rows = self._rows.in_storage_order()
        positions = None if "prompt" in self._source.spec.dims else rows.positions()
        return streams.Stream(
            self._source.reader, self._planes, shape, self._feature, rows.starts, rows.counts, rows.prompts(), positions
        )

    def _patterns(self, *, pad: bool) -> Any:
        """Read entries of the selected prompts in one plan and unpack them."""
        _, single = self._chosen
        lengths = self._lengths.tolist()
        starts, counts, queries = self._pattern_ranges()
        reads = plan_reads(self._source.spec, starts, counts)
        values = self._source.reader.read(self._planes, reads, int(counts.sum()))
        planes = tuple(len(axis.indices) for axis in self._axes if not axis.dropped)
        out, offset = [], 0
        for n, count, query in zip(lengths, counts.tolist(), queries, strict=True):
            packed = values[:, offset : offset + count]
            square = self._unpack(packed, n, query)
            out.append(square.reshape(*planes, *square.shape[1:]))
            offset += count
        if single:
            return out[0]
        return _padded(out, self.shape, len(planes), self.dtype) if pad else out

    def _pattern_ranges(self) -> tuple[Ints, Ints, list[int | None]]:
        """Return the entry ranges to read, and the query that each is (None: all of the prompt)."""
        rows, pos = self._rows, self._given.get("pos")
        if pos is None:
            return rows.starts, rows.counts, [None] * len(rows.starts)
        query = self._positions([operator.index(pos)])[:, 0]
        if self._prompts.last_only:
            return rows.starts, rows.counts, query.tolist()
        if self._source.causal:
            return rows.starts + query * (query + 1) // 2, query + 1, query.tolist()
        return rows.starts + query * self._lengths, self._lengths, query.tolist()

    def _unpack(self, packed: npt.NDArray[Any], n: int, query: int | None) -> npt.NDArray[Any]:
        """[plane, entry] → [plane, query, key], or [plane, key] for one query (keys after it are zero)."""
        n_planes = len(packed)
        if query is not None:
            row = np.zeros((n_planes, n), packed.dtype)
            row[:, : packed.shape[1]] = packed
            return row
        if self._prompts.last_only:
            return packed.reshape(n_planes, 1, n)
        if not self._source.causal:
            return packed.reshape(n_planes, n, n)
        square = np.zeros((n_planes, n * n), packed.dtype)
        square[:, _triangle(n)] = packed
        return square.reshape(n_planes, n, n)

    def _pattern_batches(self, size: int) -> Iterator[streams.Block]:
        ids = self._chosen[0]
        in_storage_order = ids[np.argsort(self._prompts.entry_start[ids], kind="stable")]
        given = {name: value for name, value in self._given.items() if name not in ("prompt", "where")}
        for begin in range(0, len(ids), size):
            chosen = in_storage_order[begin : begin + size]
            block = Selection(self._source, {**given, "prompt": chosen})
            yield streams.Block(block.numpy(), chosen, None)


@lru_cache(maxsize=64)
def _triangle(n: int) -> Ints:
    """Flat indices of the lower triangle of [n, n], row by row."""
    query, key = np.tril_indices(n)
    return query * n + key


def _padded(
    squares: list[npt.NDArray[Any]], shape: tuple[int, ...], n_planes: int, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Stack patterns of several lengths into [planes…, prompt, (query,) key], NaN beyond each."""
    out = np.full(shape, np.nan, dtype)
    for i, square in enumerate(squares):
        inner = [slice(extent) for extent in square.shape[n_planes:]]
        place: tuple[Any, ...] = (*[slice(None)] * n_planes, i, *inner)
        out[place] = square
    return out


def _axis(name: str, index: Any, numbers: Sequence[int]) -> Axis:
    """Resolve an index along an axis whose places are known by `numbers` (layers need not start at 0)."""
    places = {number: place for place, number in enumerate(numbers)} if not isinstance(numbers, range) else None
    if index is None:
        return Axis(tuple(range(len(numbers))), tuple(numbers), False)
    if isinstance(index, slice):
        bounds = _sliced(name, index, max(numbers, default=-1) + 1)
        chosen = [number for number in bounds if places is None or number in places]
        return Axis(tuple(n if places is None else places[n] for n in chosen), tuple(chosen), False)
    dropped = _is_int(index)
    wanted = [operator.index(index)] if dropped else _whole(name, index, numbers)
    for number in wanted:
        if (number not in places) if places is not None else not 0 <= number < len(numbers):
            raise SelectionError(f"{name} {number}: there are {name}s {_range_text(numbers)}")
    return Axis(tuple(n if places is None else places[n] for n in wanted), tuple(wanted), dropped)


def _range_text(numbers: Sequence[int]) -> str:
    if len(numbers) and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


def _is_int(index: Any) -> bool:
    return not isinstance(index, bool | np.bool_) and hasattr(index, "__index__") and not getattr(index, "shape", ())


def _sliced(name: str, index: slice, n: int) -> range:
    try:
        return range(n)[index]
    except (TypeError, ValueError) as exc:
        raise SelectionError(f"{name}={index!r}: {exc}") from exc


def _whole(name: str, index: Any, numbers: Sequence[int]) -> list[int]:
    """Return a list or array of whole numbers as a list; a boolean mask picks from `numbers` and has their length."""
    try:
        array = np.asarray(index)
        if array.dtype == bool and array.ndim == 1:
            if len(array) != len(numbers):
                raise SelectionError(f"{name}: the mask has {len(array)} places instead of {len(numbers)}")
            return [numbers[i] for i in np.flatnonzero(array).tolist()]
        if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
            raise TypeError
    except (TypeError, ValueError) as exc:
        raise SelectionError(f"{name}={index!r}: give an int, a slice, or a list of ints") from exc
    return [int(i) for i in array]


def site_error(run: str, name: str, available: Sequence[str]) -> SiteError:
    """Return the error for a site that a run does not hold."""
    held = ", ".join(available) or "none (statistics only)"
    return SiteError(f"run {run!r} has no site {name!r}; it holds {held}")
