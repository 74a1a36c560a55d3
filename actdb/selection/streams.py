"""Streams of rows: full scans and shuffled epochs, each chunk read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError
from actdb.scratch import Scratch
from actdb.selection.plan import ChunkRead, plan_reads, split_reads
from actdb.selection.reader import Feature, SiteReader

BUFFER_BYTES = 64 * 1024**2
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Some rows: `values` [layer, head, row, feature] with dropped axes absent, and each row's prompt and position.

    `pos` is None for sites without positions.
    """

    values: Any
    prompt: Ints
    pos: Ints | None = None

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Stream:
    """Rows to stream: ranges of the array, and the prompt and position of each row in the order of the ranges."""

    reader: SiteReader
    planes: Sequence[int]
    plane_shape: tuple[int, ...]
    feature: Feature
    starts: Ints
    counts: Ints
    prompt: Ints
    pos: Ints | None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all selected planes."""
        spec = self.reader.spec
        return (
            int(np.prod(self.reader._feature_shape(self.feature), initial=1))
            * len(self.planes)
            * np.dtype(spec.dtype).itemsize
        )

    def plan(self) -> list[ChunkRead]:
        """Plan all rows, in storage order."""
        return plan_reads(self.reader.spec, self.starts, self.counts) if len(self.starts) else []

    def load(
        self, reads: Sequence[ChunkRead], n_rows: int, rest: Block | None = None, scratch: Scratch | None = None
    ) -> Block:
        """Read some chunks into a block, after the rows of `rest`; rows come chunk by chunk.

        The block lies in `scratch`, if given: it is valid until the next one.
        """
        packed, origin, offset, kept = [], [], 0, 0 if rest is None else len(rest)
        for read in reads:
            ends = np.cumsum(read.counts) + offset
            packed.append(
                ChunkRead(read.part, read.row_chunk, read.sources, (ends - read.counts).tolist(), read.counts)
            )
            origin += [np.arange(t, t + c) for t, c in zip(read.targets, read.counts, strict=True)]
            offset = int(ends[-1])
        rows = np.concatenate(origin)
        feature = self.reader._feature_shape(self.feature)
        shape = (len(self.planes), kept + n_rows, *feature)
        values = (scratch or Scratch()).array(shape, self.reader.spec.dtype)
        self.reader.read_into(values[:, kept:], self.planes, packed, self.feature)
        block = Block(values, self.prompt[rows], None if self.pos is None else self.pos[rows])
        if rest is None:
            return block
        values[:, :kept] = rest.values
        return Block(values, _join(rest.prompt, block.prompt), _join(rest.pos, block.pos))

    def shape(self, block: Block) -> Block:
        """Give a block [plane, row, …] the axes that the selection keeps."""
        values = block.values.reshape(*self.plane_shape, *block.values.shape[1:])
        return Block(values, block.prompt, block.pos)


def scan(stream: Stream, size: int) -> Iterator[Block]:
    """Yield all rows in storage order, `size` at a time (the last block may be short)."""
    rest: Block | None = None
    for reads, n_rows in split_reads(stream.plan(), size):
        block = stream.load(reads, n_rows, rest)
        begin = 0
        while len(block) - begin >= size:
            yield stream.shape(_rows(block, slice(begin, begin + size)))
            begin += size
        rest = _rows(block, slice(begin, None)) if begin < len(block) else None
    if rest is not None:
        yield stream.shape(rest)


def shuffle(stream: Stream, size: int, *, seed: int, epochs: int, worker: tuple[int, int] | None) -> Iterator[Block]:
    """Yield all rows in random order, `epochs` times; see `Selection.shuffled`."""
    index, n_workers = worker or (0, 1)
    if not 0 <= index < n_workers:
        raise SelectionError(f"shuffled(worker={worker}): the index counts from 0 and stays below the number")
    plan = stream.plan()
    buffer_rows = max(size, BUFFER_BYTES // max(stream.row_bytes, 1))
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(plan))
        share = [plan[i] for i in order[index::n_workers].tolist()]
        yield from _shuffle_epoch(stream, share, size, buffer_rows, np.random.default_rng((seed, epoch, index)))


def _shuffle_epoch(
    stream: Stream, reads: Sequence[ChunkRead], size: int, buffer_rows: int, generator: np.random.Generator
) -> Iterator[Block]:
    rest, scratch = None, Scratch()
    for group, n_rows in split_reads(reads, buffer_rows):
        block = stream.load(group, n_rows, rest, scratch)
        order = generator.permutation(len(block))
        begin = 0
        while len(block) - begin >= size:
            yield stream.shape(_rows(block, order[begin : begin + size]))
            begin += size
        rest = _rows(block, order[begin:]) if begin < len(block) else None
    if rest is not None:
        yield stream.shape(rest)


def _rows(block: Block, rows: slice | Ints) -> Block:
    values = block.values[:, rows] if isinstance(rows, slice) else np.take(block.values, rows, axis=1)
    return Block(values, block.prompt[rows], None if block.pos is None else block.pos[rows])


def _join(first: Any, second: Any) -> Any:
    return None if first is None else np.concatenate([first, second])
