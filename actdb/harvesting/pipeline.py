"""From packed blocks to committed parts: cut into chunks, encoded in threads, written in order by one thread.

Blocks arrive on the caller's thread. A chunk that lies whole within a block is taken as it lies; the ends of blocks are
copied into chunk buffers. Full chunks go to the encoder threads in groups; one writer thread takes the results in the
order of submission, so that files do not depend on which thread was first. The number of bytes under way is bounded,
whatever the length of the corpus: a caller that is faster than the disk waits.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import OverflowingError
from actdb.harvesting.backlog import Backlog
from actdb.schema import Commit, FileRecord, RunInfo, SiteSpec, SiteTally
from actdb.storage import arrays, codecs, commits
from actdb.storage.folder import Folder, temporary_path, write_error
from actdb.storage.shards import ShardWriter

PENDING_BYTES = 128 * 1024**2
PENDING_PARTS = 4
GROUP_BYTES = 1024**2


@dataclass(frozen=True)
class Chunk:
    """A full chunk on its way: its C-order number in the shard, the plane that it belongs to, and its values."""

    number: int
    plane: int
    values: npt.NDArray[Any]


@dataclass(frozen=True)
class EncodedChunks:
    """Encoded chunks (number, payload, checksum) with what was measured while encoding them."""

    chunks: Sequence[tuple[int, codecs.Buffer, bytes]]
    max_abs: float
    max_abs_error: float


def encode_chunks(chunks: Sequence[Chunk], spec: SiteSpec) -> EncodedChunks:
    """Check the range, round where asked, encode; raises `OverflowingError` for a value that is not finite."""
    largest = largest_error = 0.0
    encoded = []
    for chunk in chunks:
        values = chunk.values
        if spec.dtype.startswith("float"):
            max_abs = codecs.largest_magnitude(values)
            if not np.isfinite(max_abs):
                raise _not_finite(values, spec, chunk.plane)
            largest = max(largest, max_abs)
            if spec.precision is not None:
                values, error = codecs.round_mantissas(values, spec.precision)
                largest_error = max(largest_error, error)
        encoded.append((chunk.number, *codecs.encode(values, spec.codec)))
    return EncodedChunks(encoded, largest, largest_error)


def cast_error(max_abs: float, spec: SiteSpec, computed_dtype: str) -> float:
    """Return the largest error of the cast to the stored dtype: half the spacing at the largest magnitude.

    0 where the stored dtype holds the computed one exactly.
    """
    if not spec.dtype.startswith("float") or computed_dtype == spec.dtype or spec.dtype == "float64":
        return 0.0
    if spec.dtype == "float32" and computed_dtype in ("bfloat16", "float16"):
        return 0.0
    return float(np.spacing(np.array(max_abs, spec.dtype))) / 2


class SiteShard:
    """One site's shard of one part: a chunk buffer for each plane, and the running tally."""

    def __init__(self, spec: SiteSpec, path: Path, writers: "Writers") -> None:
        self.spec = spec
        self.writer = ShardWriter(path, spec.n_chunks)
        self._writers = writers
        self._length = spec.chunk_shape[spec.axis]
        self._chunks_a_plane = spec.chunk_grid[spec.axis]
        n_planes = prod(spec.planes)
        self._filled = [0] * n_planes
        self._buffers: list[npt.NDArray[Any] | None] = [None] * n_planes
        self._group: list[Chunk] = []
        self.stored_bytes = 0
        self.max_abs = 0.0
        self.max_abs_error = 0.0

    @property
    def used(self) -> int:
        """Rows or entries taken so far of the first plane; equal in all planes between batches."""
        return self._filled[0] if self._filled else 0

    def append(self, layer_index: int, block: npt.NDArray[Any]) -> None:
        """Take one layer's block of a batch: [head, row or entry, …], or [row, …] where the site has no heads.

        The block is given away: other threads read it after the call.
        """
        with_heads = block.ndim > 1 + len(self.spec.feature)
        planes = block if with_heads else block[None]
        for head, rows in enumerate(planes):
            self._append_plane(layer_index * len(planes) + head, rows)
        self._send()

    def flush(self) -> None:
        """Send the partly filled buffers, padded with zeros."""
        for plane, buffer in enumerate(self._buffers):
            if buffer is not None:
                buffer[self._filled[plane] % self._length :] = 0
                self._buffers[plane] = None
                self._take(plane, self._filled[plane] // self._length, buffer)
        self._send()

    def write(self, encoded: EncodedChunks) -> None:
        """Append encoded chunks to the file; called by the writer thread."""
        try:
            for chunk, payload, crc in encoded.chunks:
                self.writer.write(chunk, payload, crc)
        except OSError as exc:
            raise write_error(exc, str(self.writer.path.parent)) from exc
        self.max_abs = max(self.max_abs, encoded.max_abs)
        self.max_abs_error = max(self.max_abs_error, encoded.max_abs_error)

    def _append_plane(self, plane: int, rows: npt.NDArray[Any]) -> None:
        start, taken = self._filled[plane], 0
        while taken < len(rows):
            chunk, offset = divmod(start, self._length)
            take = min(len(rows) - taken, self._length - offset)
            piece = rows[taken : taken + take]
            if take == self._length:
                self._take(plane, chunk, piece)
            else:
                self._fill(plane, chunk, offset, piece)
            start, taken = start + take, taken + take
        self._filled[plane] = start

    def _fill(self, plane: int, chunk: int, offset: int, piece: npt.NDArray[Any]) -> None:
        buffer = self._buffers[plane]
        if buffer is None:
            buffer = self._buffers[plane] = np.empty((self._length, *self.spec.feature), self.spec.dtype)
        buffer[offset : offset + len(piece)] = piece
        if offset + len(piece) == self._length:
            self._buffers[plane] = None
            self._take(plane, chunk, buffer)

    def _take(self, plane: int, chunk: int, values: npt.NDArray[Any]) -> None:
        self._group.append(Chunk(plane * self._chunks_a_plane + chunk, plane, values))
        if len(self._group) * values.nbytes >= GROUP_BYTES:
            self._send()

    def _send(self) -> None:
        if self._group:
            group, self._group = self._group, []
            self._writers.submit(self, group)


class Writers:
    """Encoder threads and the one writer thread behind them.

    In `lockstep`, chunks are held until `settle`, which waits until they are encoded. On a CPU this is the faster way:
    an encoder that shares a core with one of the model's threads slows all of them, since each parallel region waits
    for its slowest thread, while encoding on all cores at once costs its share and no more. An error in a thread is
    raised again on the caller's thread by the next call.
    """

    def __init__(
        self, n_threads: int | None = None, *, lockstep: bool = False, pending_bytes: int = PENDING_BYTES
    ) -> None:
        self.pending_bytes = pending_bytes
        self._pool = ThreadPoolExecutor(n_threads or max(2, min(8, os.cpu_count() or 2)), "actdb-encode")
        self._lockstep = lockstep
        self._held: list[tuple[SiteShard, Sequence[Chunk]]] = []
        self._held_bytes = 0
        self.open_parts: set[PartWriter] = set()  # those that are begun and not committed
        self._backlog = Backlog("actdb-write")

    def submit(self, shard: SiteShard, chunks: Sequence[Chunk]) -> None:
        """Encode and write chunks, waiting while too many bytes are under way; in lockstep hold them."""
        if self._lockstep:
            self._held.append((shard, chunks))
            self._held_bytes += sum(chunk.values.nbytes for chunk in chunks)
        else:
            self._start(shard, chunks)

    def settle(self, *, least_bytes: int = 0) -> None:
        """Encode what is held, if it is `least_bytes` or more, and wait until it is done."""
        if not self._held or self._held_bytes < least_bytes:
            return
        held, self._held, self._held_bytes = self._held, [], 0
        futures = [self._start(shard, chunks) for shard, chunks in held]
        wait(futures)
        self._backlog.check()

    def finish(self, part: "PartFinish") -> None:
        """End a part after everything submitted before, waiting while too many are open, each with its files."""
        self.settle()
        self._backlog.reserve("parts", 1, limit=PENDING_PARTS)
        self._backlog.put(part, kind="parts", size=1)

    def close(self) -> None:
        """Wait for everything and stop the threads; raises what went wrong."""
        self.settle()
        self.abort()
        self._backlog.check()

    def abort(self) -> None:
        """Stop the threads after what is under way, and remove what was written of parts that are not committed."""
        self._held.clear()
        self._backlog.stop()
        self._pool.shutdown()
        while self.open_parts:
            self.open_parts.pop().abandon()

    def _start(self, shard: SiteShard, chunks: Sequence[Chunk]) -> "Future[EncodedChunks]":
        size = sum(chunk.values.nbytes for chunk in chunks)
        self._backlog.reserve("bytes", size, limit=self.pending_bytes)
        future = self._pool.submit(encode_chunks, chunks, shard.spec)
        self._backlog.put(lambda: shard.write(future.result()), kind="bytes", size=size)
        return future


@dataclass(frozen=True)
class PartFinish:
    """The end of a part, run by the writer thread: indexes, syncs, renames, and the commit last."""

    part: "PartWriter"
    table: Callable[[], Mapping[str, Any]]
    replace: bool
    done: Callable[[Commit], None]

    def __call__(self) -> None:
        commit = self.part.commit(self.table(), replace=self.replace)
        self.part.writers.open_parts.discard(self.part)
        self.done(commit)


class PartWriter:
    """Collects the blocks of one part and commits it."""

    def __init__(self, folder: Folder, info: RunInfo, part: int, writers: Writers, *, computed_dtype: str) -> None:
        self.part = part
        self.writers = writers
        self._folder, self._info, self._computed_dtype = folder, info, computed_dtype
        self._shards: dict[str, SiteShard] = {}
        self._names: dict[str, str] = {}
        try:
            for spec in info.sites:
                name = arrays.shard_name(info.name, spec, part)
                folder.make_parent(name)
                self._names[spec.name] = name
                self._shards[spec.name] = SiteShard(spec, temporary_path(folder.path(name)), writers)
        except OSError as exc:
            self.abandon()
            raise write_error(exc, str(folder.root)) from exc
        writers.open_parts.add(self)

    def append(self, site: str, layer_index: int, block: npt.NDArray[Any]) -> None:
        """Take one layer's block of a batch."""
        self._shards[site].append(layer_index, block)

    def finish(self, table: Callable[[], Mapping[str, Any]], *, replace: bool, done: Callable[[Commit], None]) -> None:
        """Flush, and let the writer thread commit the part with its statistics tables."""
        for shard in self._shards.values():
            shard.flush()
        self.writers.finish(PartFinish(self, table, replace, done))

    def abandon(self) -> None:
        """Close and remove what was written of a part that will not be committed."""
        for shard in self._shards.values():
            shard.writer.abandon()

    def commit(self, tables: Mapping[str, Any], *, replace: bool) -> Commit:
        """Make every file durable under its final name, then the commit; `replace` a damaged commit."""
        try:
            files = [self._finish_shard(name, shard) for name, shard in self._shards.items()]
            files += [
                commits.write_table(self._folder, self._info.name, self.part, name, table)
                for name, table in tables.items()
            ]
            commit = self._commit(tuple(files))
            self._publish(commit, replace=replace)
        except OSError as exc:
            raise write_error(exc, str(self._folder.root)) from exc
        return commit

    def _publish(self, commit: Commit, *, replace: bool) -> None:
        name = commits.commit_name(self._info.name, self.part)
        if replace:
            self._folder.path(name).unlink(missing_ok=True)
        commits.write_commit(self._folder, self._info.name, commit)

    def _finish_shard(self, site: str, shard: SiteShard) -> FileRecord:
        record = shard.writer.finish(self._names[site])
        shard.stored_bytes = record.stored_bytes
        self._folder.adopt(shard.writer.path, record.path)
        return record

    def _commit(self, files: tuple[FileRecord, ...]) -> Commit:
        tallies = {}
        for name, shard in self._shards.items():
            used = shard.used * prod(shard.spec.planes) * prod(shard.spec.feature)
            tallies[name] = SiteTally(
                raw_bytes=used * np.dtype(shard.spec.dtype).itemsize,
                stored_bytes=shard.stored_bytes,
                max_abs=shard.max_abs,
                max_abs_error=shard.max_abs_error + cast_error(shard.max_abs, shard.spec, self._computed_dtype),
            )
        return Commit(self.part, self._info.plan_hash, files, tallies)


def range_error(site: str, layer: int | None, dtype: str, value: float) -> OverflowingError:
    """Return the error for an activation that the stored dtype cannot hold."""
    where = site if layer is None else f"{site} of layer {layer}"
    if not np.isfinite(value):
        return OverflowingError(f"{where} is not finite ({value}): the model itself overflows; try --dtype float32")
    return OverflowingError(f"{where} reaches {value:.6g}, beyond what {dtype} holds; use --store float32")


def _not_finite(values: npt.NDArray[Any], spec: SiteSpec, plane: int) -> OverflowingError:
    heads = prod(spec.planes[1:]) if spec.layers else 1
    layer = spec.layers[plane // heads] if spec.layers else None
    where = spec.name if layer is None else f"{spec.name} of layer {layer}"
    if np.isnan(values).any():
        return OverflowingError(f"{where} is not a number in places: the model itself overflows; try --dtype float32")
    return OverflowingError(f"{where} is beyond what {spec.dtype} holds; use --store float32")


def planned_parts(n_parts: int, worker: tuple[int, int] | None) -> Sequence[int]:
    """Return the parts that a worker takes: every N-th from the I-th."""
    return range(n_parts) if worker is None else range(worker[0], n_parts, worker[1])
