"""Sites that are added to a run after its harvest, by the writers, codecs and parts of a harvest.

Parts are those of the run, so that a prompt's rows are found as those of any site. One commit for all parts is written
last, in a file of its own: `run.json` stays as it is, and a call that was killed leaves no site.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import RunError, SettingError
from actdb.harvesting.pipeline import PartWriter, Writers
from actdb.harvesting.plan import chunk_length
from actdb.schema import SITE_NAME, STORED_DTYPES, AddedSite, Commit, RunInfo, SiteSpec
from actdb.selection.prompts import PromptIndex
from actdb.selection.streams import Block
from actdb.storage import arrays, commits, verify
from actdb.storage.commits import OUTER_DIMS, RunSnapshot
from actdb.storage.folder import Folder

AXES = ("prompt", "row")
Ints = npt.NDArray[np.int64]


def add_site(
    folder: Folder,
    snapshot: RunSnapshot,
    index: PromptIndex,
    name: str,
    dims: Sequence[str],
    blocks: Iterable[Block],
    *,
    replace_whole: bool,
) -> None:
    """Write a site of a complete run and commit it; see `Run.add_site`."""
    info = snapshot.info
    check_name(snapshot, name, replace_whole=replace_whole)
    if not snapshot.complete:
        raise RunError(f"run {info.name!r} is partial: finish its harvest, then add {name!r}")
    axis = check_dims(name, dims)
    order = Order.make(index, dims[axis])
    taken = iter(blocks)
    first = next(taken, None)
    if first is None:
        raise SettingError(f"site {name!r}: there are no blocks")
    spec = make_spec(info, index, name, tuple(dims), axis, first)
    _clear(folder, info.name, name)
    own = replace(info, sites=(spec,))
    try:
        for path, content in verify.metadata_files(own).items():
            if not folder.exists(path):
                folder.publish(path, content)
        written = _write(folder, own, order, _chained(first, taken))
        commits.write_added(folder, info.name, AddedSite(info.plan_hash, spec, tuple(written)))
    except BaseException:
        _clear(folder, info.name, name)
        raise


def check_name(snapshot: RunSnapshot, name: str, *, replace_whole: bool) -> None:
    """Raise `SettingError` for a name that cannot be used, or is taken."""
    if not SITE_NAME.fullmatch(name):
        raise SettingError(f"site {name!r} is not usable as a name: letters, digits and _, parts joined by dots")
    if name in snapshot.added and not replace_whole:
        raise SettingError(f"run {snapshot.info.name!r} has an added site {name!r}; replace it with replace=True")
    if name not in snapshot.added and snapshot.info.site(name) is not None:
        raise SettingError(f"run {snapshot.info.name!r} has harvested site {name!r}; choose another name")


def check_dims(name: str, dims: Sequence[str]) -> int:
    """Return which axis the rows are on; raises `SettingError` for axes that no site can have."""
    found = [i for i, dim in enumerate(dims) if dim in AXES]
    outer = tuple(dims[: found[0]]) if len(found) == 1 else None
    features = dims[found[0] + 1 :] if found else ()
    if outer not in OUTER_DIMS or len({*dims}) != len(dims) or len(features) > 1 or "entry" in dims:
        raise SettingError(
            f"site {name!r}: dims {tuple(dims)}: give one of prompt and row, before it none, layer, head or both, and "
            "after it none or one of your own"
        )
    return found[0]


def make_spec(info: RunInfo, index: PromptIndex, name: str, dims: tuple[str, ...], axis: int, first: Block) -> SiteSpec:
    """Return the array of a site, its extents and dtype those of its first block."""
    shape, dtype = np.shape(first.values), np.asarray(first.values).dtype
    layers = tuple(sorted({layer for spec in info.sites for layer in spec.layers}))
    if len(shape) != len(dims):
        raise SettingError(f"site {name!r}: a block of shape {list(shape)} does not have the axes {', '.join(dims)}")
    if str(dtype) not in STORED_DTYPES:
        raise SettingError(f"site {name!r}: dtype {dtype} cannot be stored; choose {', '.join(STORED_DTYPES)}")
    if "layer" in dims and shape[0] != len(layers):
        raise SettingError(f"site {name!r}: {shape[0]} layers instead of the run's {len(layers)}")
    planes, feature = shape[:axis], shape[axis + 1 :]
    if 0 in planes + feature:
        raise SettingError(f"site {name!r}: a block of shape {list(shape)} has an axis without places")
    chunk, capacity, end = _extent(info, index, dims[axis], prod(planes), prod(feature) * dtype.itemsize)
    return SiteSpec(
        name=name,
        hook="",
        dims=dims,
        shape=(*planes, end, *feature),
        shard_shape=(*planes, capacity, *feature),
        chunk_shape=(*(1 for _ in planes), chunk, *feature),
        dtype=str(dtype),
        codec=next((spec.codec for spec in info.sites), "lz4"),
        layers=layers if "layer" in dims else (),
    )


def _extent(info: RunInfo, index: PromptIndex, axis: str, n_planes: int, row_bytes: int) -> tuple[int, int, int]:
    """Return the rows of a chunk, the rows that a part has room for, and the end of the array."""
    if axis == "row":
        rows = next((spec.capacity for spec in info.sites if spec.dims[spec.axis] == "row"), None)
        if rows is None:
            raise SettingError(f"run {info.name!r} stores no rows that a site of rows could lie beside")
        chunk = gcd(chunk_length(row_bytes, n_planes, rows), rows)
        return chunk, rows, int((index.row_start + index.n_rows).max())
    counts = np.bincount(index.part)
    chunk = chunk_length(row_bytes, n_planes, int(counts.max()))
    capacity = -(-int(counts.max()) // chunk) * chunk
    last = np.flatnonzero(counts)[-1]
    return chunk, capacity, int(last * capacity + counts[last])


@dataclass(frozen=True)
class Order:
    """Prompt, position (None for sites of prompts) and part of every row, in the order in which they are stored."""

    prompt: Ints
    pos: Ints | None
    part: Ints

    @classmethod
    def make(cls, index: PromptIndex, axis: str) -> "Order":
        """Take the order from a run's prompts."""
        prompts = index.in_storage_order()
        if axis == "prompt":
            return cls(prompts, None, index.part[prompts])
        counts = index.n_rows[prompts]
        pos = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        if index.last_only:
            pos += np.repeat(index.n_tokens[prompts] - 1, counts)
        return cls(np.repeat(prompts, counts), pos, np.repeat(index.part[prompts], counts))

    def check(self, name: str, block: Block, begin: int) -> None:
        """Raise `SettingError` unless a block's rows are the next ones."""
        end = begin + len(block.prompt)
        if end > len(self.prompt):
            raise SettingError(f"site {name!r}: the blocks hold more than the run's {len(self.prompt)} rows")
        wrong = np.asarray(block.prompt) != self.prompt[begin:end]
        if self.pos is not None:
            if block.pos is None:
                raise SettingError(f"site {name!r}: a block of rows must tell each row's pos")
            wrong |= np.asarray(block.pos) != self.pos[begin:end]
        if wrong.any():
            place = int(np.argmax(wrong))
            raise SettingError(
                f"site {name!r}: row {begin + place} is of prompt {block.prompt[place]}, but next comes "
                f"{self._text(begin + place)}; give blocks in the order of prompt_ids(order='stored')"
            )

    def _text(self, row: int) -> str:
        return f"prompt {self.prompt[row]}" + ("" if self.pos is None else f" pos {self.pos[row]}")


class _AddedPart(PartWriter):
    """A part whose commit waits for those of all others."""

    def _publish(self, commit: Commit, *, replace: bool) -> None:
        """Publish nothing yet."""


def _write(folder: Folder, info: RunInfo, order: Order, blocks: Iterator[Block]) -> list[Commit]:
    """Write the blocks part after part; returns what to commit."""
    (spec,) = info.sites
    written: list[Commit] = []
    writers = Writers()
    part: _AddedPart | None = None
    done = 0
    try:
        for block in blocks:
            order.check(spec.name, block, done)
            values = _checked(spec, block)
            numbers = order.part[done : done + len(block.prompt)]
            borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for begin, end in pairwise(borders):
                if begin == end:
                    continue
                if part is None or part.part != numbers[begin]:
                    _finish(part, written)
                    part = _AddedPart(folder, info, int(numbers[begin]), writers, computed_dtype=spec.dtype)
                _append(part, spec, values[(slice(None),) * spec.axis + (slice(begin, end),)])
            done += len(block.prompt)
        if done < len(order.prompt):
            raise SettingError(f"site {spec.name!r}: the blocks hold {done} rows, the run {len(order.prompt)}")
        _finish(part, written)
        writers.close()
    except BaseException:
        writers.abort()
        raise
    return written


def _finish(part: _AddedPart | None, written: list[Commit]) -> None:
    if part is not None:
        part.finish(dict, replace=False, done=written.append)


def _append(part: PartWriter, spec: SiteSpec, rows: npt.NDArray[Any]) -> None:
    """Hand rows [layer, head, row, …] over, layer after layer, as copies: the writers keep them."""
    with_layers = bool(spec.layers)
    for i in range(len(spec.layers) or 1):
        part.append(spec.name, i, np.array(rows[i] if with_layers else rows, order="C"))


def _checked(spec: SiteSpec, block: Block) -> npt.NDArray[Any]:
    values = np.asarray(block.values)
    expected = (*spec.planes, len(block.prompt), *spec.feature)
    if values.shape != expected or str(values.dtype) != spec.dtype:
        raise SettingError(
            f"site {spec.name!r}: a block of {values.dtype} {list(values.shape)} for {len(block.prompt)} rows; the "
            f"first block asks for {spec.dtype} {list(expected)}"
        )
    return values


def _clear(folder: Folder, run: str, name: str) -> None:
    """Remove what there is of an added site, the commit first."""
    folder.path(commits.added_name(run, name)).unlink(missing_ok=True)
    path = folder.inside(f"{arrays.ARRAYS}/{run}/{name}")
    shutil.rmtree(path, ignore_errors=True)


def _chained(first: Block, rest: Iterator[Block]) -> Iterator[Block]:
    yield first
    yield from rest
