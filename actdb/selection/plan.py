"""Planning a read: from ranges along a site's row axis to pieces of chunks. Pure; no I/O."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actdb.schema import SiteSpec

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """One chunk of one plane and the pieces wanted of it: `counts[i]` rows from `sources[i]` go to `targets[i]`.

    `part` is the shard, `row_chunk` the chunk's number within the shard along the row axis.
    """

    part: int
    row_chunk: int
    sources: Sequence[int]
    targets: Sequence[int]
    counts: Sequence[int]


def plan_reads(spec: SiteSpec, starts: Sequence[int] | Ints, counts: Sequence[int] | Ints) -> list[ChunkRead]:
    """Plan the reads of ranges of array rows, concatenated in the order given; every chunk is read once.

    `starts` are indices along the site's row axis and `counts` lengths; a range stays within one part. The reads come
    in storage order. Cost: linear in the ranges, no I/O.
    """
    if len(starts) == 1:
        return _plan_range(spec, int(starts[0]), int(counts[0]))
    first = np.asarray(starts, np.int64)
    length = np.asarray(counts, np.int64)
    first, length, targets = _coalesce(first, length)
    return _group(spec, *_split(first, length, targets, spec.chunk_shape[spec.axis]))


def _plan_range(spec: SiteSpec, start: int, count: int) -> list[ChunkRead]:
    """The plan of one range, without NumPy: this is the path of a single slice, where microseconds count."""
    chunk, capacity = spec.chunk_shape[spec.axis], spec.shard_shape[spec.axis]
    reads, target = [], 0
    while count > 0:
        part, within = divmod(start, capacity)
        row_chunk, source = divmod(within, chunk)
        take = min(count, chunk - source)
        reads.append(ChunkRead(part, row_chunk, [source], [target], [take]))
        start, target, count = start + take, target + take, count - take
    return reads


def _coalesce(starts: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Join ranges that follow one another; returns starts, counts and targets without empty ranges."""
    keep = counts > 0
    starts, counts = starts[keep], counts[keep]
    if len(starts) == 0:
        return starts, counts, starts
    heads = np.flatnonzero(np.concatenate([[True], starts[1:] != starts[:-1] + counts[:-1]]))
    merged = np.add.reduceat(counts, heads)
    return starts[heads], merged, np.cumsum(merged) - merged


def _split(starts: Ints, counts: Ints, targets: Ints, chunk: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Cut ranges at chunk borders; returns each piece's chunk number along the axis, source, target and length."""
    first, last = starts // chunk, (starts + counts - 1) // chunk
    pieces = last - first + 1
    owner = np.repeat(np.arange(len(starts)), pieces)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces) + first[owner]
    begin = np.maximum(number * chunk, starts[owner])
    end = np.minimum((number + 1) * chunk, (starts + counts)[owner])
    return number, begin - number * chunk, targets[owner] + begin - starts[owner], end - begin


def _group(spec: SiteSpec, number: Ints, sources: Ints, targets: Ints, counts: Ints) -> list[ChunkRead]:
    order = np.lexsort((targets, number))
    number, sources, targets, counts = number[order], sources[order], targets[order], counts[order]
    borders = np.flatnonzero(np.diff(number)) + 1
    chunks_a_part = spec.chunk_grid[spec.axis]
    reads = []
    for begin, end in zip([0, *borders.tolist()], [*borders.tolist(), len(number)], strict=True):
        if begin == end:
            continue
        part, row_chunk = divmod(int(number[begin]), chunks_a_part)
        piece = slice(begin, end)
        reads.append(
            ChunkRead(part, row_chunk, sources[piece].tolist(), targets[piece].tolist(), counts[piece].tolist())
        )
    return reads


def split_reads(reads: Sequence[ChunkRead], limit: int) -> Iterator[tuple[list[ChunkRead], int]]:
    """Cut reads into groups of at least `limit` rows (the last may be less), each with its rows; targets are kept."""
    group: list[ChunkRead] = []
    rows = 0
    for read in reads:
        group.append(read)
        rows += sum(read.counts)
        if rows >= limit:
            yield group, rows
            group, rows = [], 0
    if group:
        yield group, rows


def expand(starts: Sequence[int], counts: Sequence[int]) -> Ints:
    """Return the indices of several ranges, one after the other."""
    first, length = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    ends = np.cumsum(length)
    return np.asarray(np.arange(int(ends[-1])) + np.repeat(first - (ends - length), length), np.int64)
