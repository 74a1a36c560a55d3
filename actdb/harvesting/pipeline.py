"""From packed blocks to committed parts: staged into chunks, encoded in threads, written in order by one thread.

Blocks arrive on the caller's thread and are copied into chunk buffers. A full buffer goes to the encoder threads; one
writer thread takes the results in the order of submission, so that files do not depend on which thread was first. The
number of buffers under way is bounded, whatever the length of the corpus: a caller that is faster than the disk waits.
"""

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import OverflowingError
from actdb.schema import Commit, FileRecord, RunInfo, SiteSpec, SiteTally
from actdb.storage import arrays, codecs, commits
from actdb.storage.folder import Folder, file_record, temporary_path, write_error
from actdb.storage.shards import ShardWriter

PENDING_BYTES = 128 * 1024**2
PENDING_PARTS = 4


@dataclass(frozen=True)
class EncodedChunk:
    """An encoded chunk with what was measured while encoding it."""

    payload: bytes
    crc: bytes
    max_abs: float
    max_abs_error: float


def encode_chunk(values: npt.NDArray[Any], spec: SiteSpec, plane: int) -> EncodedChunk:
    """Check the range, round where asked, encode; raises `OverflowingError` for a value that is not finite."""
    max_abs = error = 0.0
    if spec.dtype.startswith("float"):
        max_abs = codecs.largest_magnitude(values)
        if not np.isfinite(max_abs):
            raise _not_finite(values, spec, plane)
        if spec.precision is not None:
            error = codecs.round_mantissas(values, spec.precision)
    payload, crc = codecs.encode(values, spec.codec)
    return EncodedChunk(payload, crc, max_abs, error)


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
        self.stored_bytes = 0
        self.max_abs = 0.0
        self.max_abs_error = 0.0

    @property
    def used(self) -> int:
        """Rows or entries taken so far of the first plane; equal in all planes between batches."""
        return self._filled[0] if self._filled else 0

    def append(self, layer_index: int, block: npt.NDArray[Any]) -> None:
        """Take one layer's block of a batch: [head, row or entry, …], or [row, …] where the site has no heads."""
        n_heads = 1 if block.ndim == 1 + len(self.spec.feature) else len(block)
        for head, rows in enumerate(block if n_heads > 1 or block.ndim > 1 + len(self.spec.feature) else block[None]):
            self._append_plane(layer_index * n_heads + head, rows)

    def flush(self) -> None:
        """Send the partly filled buffers, padded with zeros."""
        for plane, buffer in enumerate(self._buffers):
            if buffer is not None:
                buffer[self._filled[plane] % self._length :] = 0
                self._send(plane, self._filled[plane] // self._length, buffer)

    def write(self, chunk: int, encoded: EncodedChunk) -> None:
        """Append an encoded chunk to the file; called by the writer thread."""
        try:
            self.writer.write(chunk, encoded.payload, encoded.crc)
        except OSError as exc:
            raise write_error(exc, str(self.writer.path.parent)) from exc
        self.max_abs = max(self.max_abs, encoded.max_abs)
        self.max_abs_error = max(self.max_abs_error, encoded.max_abs_error)

    def _append_plane(self, plane: int, rows: npt.NDArray[Any]) -> None:
        start, taken = self._filled[plane], 0
        while taken < len(rows):
            offset = start % self._length
            take = min(len(rows) - taken, self._length - offset)
            buffer = self._buffers[plane]
            if buffer is None:
                buffer = self._buffers[plane] = np.empty((self._length, *self.spec.feature), self.spec.dtype)
            buffer[offset : offset + take] = rows[taken : taken + take]
            start, taken = start + take, taken + take
            if start % self._length == 0:
                self._send(plane, start // self._length - 1, buffer)
        self._filled[plane] = start

    def _send(self, plane: int, chunk: int, buffer: npt.NDArray[Any]) -> None:
        self._buffers[plane] = None
        self._writers.submit(self, plane, plane * self._chunks_a_plane + chunk, buffer)


class Writers:
    """Encoder threads and the one writer thread behind them.

    An error in either is raised again on the caller's thread by the next call.
    """

    def __init__(self, n_threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(n_threads or max(2, min(8, os.cpu_count() or 2)), "actdb-encode")
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._pending = 0
        self._pending_parts = 0
        self._room = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="actdb-write", daemon=True)
        self._thread.start()

    def submit(self, shard: SiteShard, plane: int, chunk: int, values: npt.NDArray[Any]) -> None:
        """Encode and write a chunk, waiting while too many bytes are under way."""
        size = values.nbytes
        with self._room:
            self._room.wait_for(lambda: self._pending < PENDING_BYTES or self._error is not None)
            self._raise()
            self._pending += size
        future = self._pool.submit(encode_chunk, values, shard.spec, plane)
        self._queue.put(lambda: self._write_chunk(shard, chunk, future, size))

    def finish(self, part: "PartFinish") -> None:
        """End a part after everything submitted before, waiting while too many are open, each with its files."""
        with self._room:
            self._room.wait_for(lambda: self._pending_parts < PENDING_PARTS or self._error is not None)
            self._raise()
            self._pending_parts += 1
        self._queue.put(lambda: self._finish_part(part))

    def close(self) -> None:
        """Wait for everything and stop the threads; raises what went wrong."""
        self.abort()
        self._raise()

    def abort(self) -> None:
        """Stop the threads after what is under way."""
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()

    def _write_chunk(self, shard: SiteShard, chunk: int, future: "Future[EncodedChunk]", size: int) -> None:
        try:
            encoded = future.result()
            if self._error is None:
                shard.write(chunk, encoded)
        finally:
            with self._room:
                self._pending -= size
                self._room.notify()

    def _finish_part(self, part: "PartFinish") -> None:
        try:
            if self._error is None:
                part()
        finally:
            with self._room:
                self._pending_parts -= 1
                self._room.notify()

    def _write(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except BaseException as exc:
                with self._room:
                    self._error = self._error or exc
                    self._room.notify()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class PartFinish:
    """The end of a part, run by the writer thread: indexes, syncs, renames, and the commit last."""

    part: "PartWriter"
    table: Callable[[], Mapping[str, Any]]
    replace: bool
    done: Callable[[Commit], None]

    def __call__(self) -> None:
        self.done(self.part.commit(self.table(), replace=self.replace))


class PartWriter:
    """Collects the blocks of one part and commits it."""

    def __init__(self, folder: Folder, info: RunInfo, part: int, writers: Writers, *, computed_dtype: str) -> None:
        self.part = part
        self._folder, self._info, self._writers, self._computed_dtype = folder, info, writers, computed_dtype
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

    def append(self, site: str, layer_index: int, block: npt.NDArray[Any]) -> None:
        """Take one layer's block of a batch."""
        self._shards[site].append(layer_index, block)

    def finish(self, table: Callable[[], Mapping[str, Any]], *, replace: bool, done: Callable[[Commit], None]) -> None:
        """Flush, and let the writer thread commit the part with its statistics tables."""
        for shard in self._shards.values():
            shard.flush()
        self._writers.finish(PartFinish(self, table, replace, done))

    def abandon(self) -> None:
        """Close and remove what was written of a part that will not be committed."""
        for shard in self._shards.values():
            shard.writer.abandon()

    def commit(self, tables: Mapping[str, Any], *, replace: bool) -> Commit:
        """Make every file durable under its final name, then the commit; `replace` a damaged commit."""
        try:
            files = [self._finish_shard(name, shard) for name, shard in self._shards.items()]
            files += [self._write_table(name, table) for name, table in tables.items()]
            commit = self._commit(tuple(files))
            name = commits.commit_name(self._info.name, self.part)
            if replace:
                self._folder.path(name).unlink(missing_ok=True)
            commits.write_commit(self._folder, self._info.name, commit)
        except OSError as exc:
            raise write_error(exc, str(self._folder.root)) from exc
        return commit

    def _finish_shard(self, site: str, shard: SiteShard) -> FileRecord:
        record = shard.writer.finish(self._names[site])
        shard.stored_bytes = record.stored_bytes
        self._folder.adopt(shard.writer.path, record.path)
        return record

    def _write_table(self, table: str, content: Any) -> FileRecord:
        import pyarrow.parquet as pq

        name = commits.table_name(self._info.name, self.part, table)
        self._folder.make_parent(name)
        with self._folder.temporary(name) as path:
            pq.write_table(content, path, compression="zstd")
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            record = file_record(path, name)
            self._folder.adopt(path, name)
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
