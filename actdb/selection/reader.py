"""Carrying a read plan out: shards opened once, chunks decoded into place, many chunks in threads."""

import itertools
import os
import resource
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.schema import RunInfo, SiteSpec
from actdb.selection.plan import ChunkRead, expand, plan_reads
from actdb.storage import arrays
from actdb.storage.folder import Folder
from actdb.storage.shards import ShardReader

MAX_OPEN_SHARDS = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
THREADED_BYTES = 1024**2
Feature = int | npt.NDArray[np.int64] | slice | None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 2), "actdb-read")


_opening = threading.Lock()
_opened: deque[tuple["weakref.ref[SiteReader]", int]] = deque()
"""The shards that this process has open, of all readers, in the order of opening: files are a limited good."""


def _renew() -> None:
    """Give a forked process a pool and a lock of its own: the parent's threads do not exist in it."""
    global _opening
    _pool.cache_clear()
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_renew)


def _close_oldest() -> None:
    while len(_opened) >= MAX_OPEN_SHARDS:
        owner, part = _opened.popleft()
        reader = owner()
        if reader is not None:
            reader._shards.pop(part, None)


class SiteReader:
    """Reads one site of one run, from shards that stay open. `n_reads` counts the chunks read so far."""

    def __init__(self, folder: Folder, info: RunInfo, spec: SiteSpec) -> None:
        self.spec = spec
        self.n_reads = 0
        self.whole: tuple[Sequence[ChunkRead], int] | None = None  # the plan of all rows, once it was made
        self._folder, self._run = folder, info.name
        self._shards: dict[int, ShardReader] = {}
        self._dtype = np.dtype(spec.dtype)
        self._chunk_rows = spec.chunk_shape[spec.axis]
        self._chunks_a_plane = spec.chunk_grid[spec.axis]
        self._capacity = spec.capacity
        self.n_plane_axes = spec.axis
        self.plane_places = tuple(
            ("layer", {layer: i for i, layer in enumerate(spec.layers)})
            if dim == "layer"
            else ("head", {head: head for head in range(extent)})
            for dim, extent in zip(spec.dims, spec.planes, strict=False)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave open shards behind: another process opens its own."""
        return {**self.__dict__, "_shards": {}, "n_reads": 0}

    def read_range(self, plane: int, start: int, count: int) -> npt.NDArray[np.generic]:
        """Return rows of one plane that lie in one part, [row, feature]; within a raw chunk a read-only view of it."""
        if self.spec.codec == "raw":
            pieces = [piece for piece in self._views(plane, start, count) if piece is not None]
            if sum(map(len, pieces)) == count > 0:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        values: npt.NDArray[np.generic] = self.read((plane,), plan_reads(self.spec, (start,), (count,)), count)[0]
        return values

    def _views(self, plane: int, start: int, count: int) -> Iterator[npt.NDArray[np.generic] | None]:
        """Yield views of the raw chunks that hold a range, None for one that is absent."""
        part, within = divmod(start, self._capacity)
        row_chunk, source = divmod(within, self._chunk_rows)
        shard = self._shards.get(part) or self._shard(part)
        while count > 0:
            take = min(count, self._chunk_rows - source)
            self.n_reads += 1
            yield shard.rows(plane * self._chunks_a_plane + row_chunk, source, take)
            row_chunk, source, count = row_chunk + 1, 0, count - take

    def read(
        self, planes: Sequence[int], reads: Sequence[ChunkRead], n_rows: int, feature: Feature = None
    ) -> npt.NDArray[np.generic]:
        """Return [plane, row, …] for plane numbers and planned reads; `feature` picks from the last axis.

        A single raw chunk comes as a read-only view of the mapped file. Raises `DamageError` naming the file.
        """
        if len(planes) == 1 and len(reads) == 1 and self.spec.codec == "raw":
            view = self._view(planes[0], reads[0], feature)
            if view is not None:
                return view
        for read in reads:  # before memory is asked for: a shard that is there bounds what it can hold
            self._shard(read.part)
        out = np.empty((len(planes), n_rows, *self._feature_shape(feature)), self._dtype)
        self.read_into(out, planes, reads, feature)
        return out

    def read_into(
        self, out: npt.NDArray[np.generic], planes: Sequence[int], reads: Sequence[ChunkRead], feature: Feature = None
    ) -> None:
        """Fill `out` [plane, row, …] as planned; large reads decode in threads, raw chunks copy faster alone."""
        if self.spec.codec == "raw" and feature is None and _in_order(reads):
            for i, plane in enumerate(planes):
                self._join(out[i], plane, reads)
            return
        tasks = [(i, plane, read) for i, plane in enumerate(planes) for read in reads]
        if len(tasks) < 4 or out.nbytes < THREADED_BYTES or self.spec.codec == "raw":
            scratch = self._scratch()
            for i, plane, read in tasks:
                self._read_chunk(out[i], plane, read, feature, scratch)
            return

        def run(share: list[tuple[int, int, ChunkRead]]) -> None:
            scratch = self._scratch()
            for i, plane, read in share:
                self._read_chunk(out[i], plane, read, feature, scratch)

        step = max(1, len(tasks) // (4 * _pool()._max_workers))
        futures = [_pool().submit(run, tasks[i : i + step]) for i in range(0, len(tasks), step)]
        for future in futures:
            future.result()

    def _join(self, out: npt.NDArray[np.generic], plane: int, reads: Sequence[ChunkRead]) -> None:
        """Fill `out` [row, …] with pieces of raw chunks that follow one another; whole ones of a part together."""
        begin, place = 0, 0
        while place < len(reads):
            read = reads[place]
            shard = self._shards.get(read.part) or self._shard(read.part)
            chunk, n_whole = plane * self._chunks_a_plane + read.row_chunk, self._n_whole(reads, place)
            if n_whole > 1 and shard.copy_whole(chunk, out[begin : begin + n_whole * self._chunk_rows]):
                begin, place = begin + n_whole * self._chunk_rows, place + n_whole
                continue
            end = begin + read.counts[0]
            shard.copy(chunk, read.sources[0], out[begin:end])
            begin, place = end, place + 1
        self.n_reads += len(reads)

    def _n_whole(self, reads: Sequence[ChunkRead], begin: int) -> int:
        """Return how many of the reads from `begin` on are whole chunks of one part that follow one another."""
        first = reads[begin]
        for n, read in enumerate(itertools.islice(reads, begin, None)):
            if read.counts[0] != self._chunk_rows or read.row_chunk != first.row_chunk + n or read.part != first.part:
                return n
        return len(reads) - begin

    def _read_chunk(
        self,
        out: npt.NDArray[np.generic],
        plane: int,
        read: ChunkRead,
        feature: Feature,
        scratch: npt.NDArray[np.generic],
    ) -> None:
        shard = self._shards.get(read.part) or self._shard(read.part)
        chunk = plane * self._chunks_a_plane + read.row_chunk
        self.n_reads += 1
        if feature is None and len(read.counts) == 1 and read.counts[0] == self._chunk_rows:
            target = read.targets[0]
            shard.read(chunk, out[target : target + self._chunk_rows])
            return
        values = shard.view(chunk)
        if values is None:
            shard.read(chunk, scratch)
            values = scratch
        if feature is not None:
            values = values[..., feature]
        if len(read.counts) > 8:
            out[expand(read.targets, read.counts)] = values[expand(read.sources, read.counts)]
            return
        for source, target, count in zip(read.sources, read.targets, read.counts, strict=True):
            out[target : target + count] = values[source : source + count]

    def _view(self, plane: int, read: ChunkRead, feature: Feature) -> npt.NDArray[np.generic] | None:
        if len(read.counts) != 1:
            return None
        chunk = plane * self._chunks_a_plane + read.row_chunk
        rows = self._shard(read.part).rows(chunk, read.sources[0], read.counts[0])
        if rows is None:
            return None
        self.n_reads += 1
        return (rows if feature is None else rows[..., feature])[None]

    def _scratch(self) -> npt.NDArray[np.generic]:
        return np.empty((self._chunk_rows, *self.spec.feature), self._dtype)

    def _feature_shape(self, feature: Feature) -> tuple[int, ...]:
        if feature is None:
            return self.spec.feature
        return np.empty(self.spec.feature, np.bool_)[..., feature].shape

    def _shard(self, part: int) -> ShardReader:
        with _opening:
            shard = self._shards.get(part)
            if shard is None:
                _close_oldest()
                shard = ShardReader(self._folder.inside(arrays.shard_name(self._run, self.spec, part)), self.spec)
                self._shards[part] = shard
                _opened.append((weakref.ref(self), part))
            return shard


def _in_order(reads: Sequence[ChunkRead]) -> bool:
    """Whether reads are one piece each, and their targets follow one another."""
    end = 0
    for read in reads:
        if len(read.counts) != 1 or read.targets[0] != end:
            return False
        end += read.counts[0]
    return True
