"""Exact nearest neighbours: blocks of rows streamed from the store, each compared by one matrix product.

Memory stays bounded: some blocks, and what is kept of each query. The join of all rows with all computes each pair
once, since one product serves both rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.neighbors.device import Kept, Processor
from actdb.neighbors.metric import Space, distances_between
from actdb.neighbors.row import Rows
from actdb.selection.plan import expand

BLOCK_ROWS = 4096
PANEL_BYTES = 1024**3
SPARE = 6
"""Candidates kept beyond k: their distances are computed anew from differences, which may order them otherwise."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


@dataclass(frozen=True)
class Found:
    """Numbers of rows and their distances [query, k], ascending; −1 and ∞ where there were fewer."""

    numbers: Ints
    distances: Floats


@dataclass(frozen=True)
class Excluded:
    """What each query shall not find: rows from `begins` up to `ends` [query], and any row of the mask `rows`."""

    begins: Ints
    ends: Ints
    rows: npt.NDArray[np.bool_] | None = None

    def counts(self) -> Ints:
        """Return how many rows each query shall not find."""
        within = self.ends - self.begins
        if self.rows is None:
            return within
        before = np.concatenate([[0], np.cumsum(self.rows)])
        return np.asarray(within + before[-1] - (before[self.ends] - before[self.begins]))

    def places(self, queries: slice, begin: int, end: int) -> tuple[Ints, Ints]:
        """Return the places (query, row) of a block of products, rows from `begin` up to `end`, that do not count."""
        first = np.maximum(self.begins[queries], begin)
        counts = np.maximum(np.minimum(self.ends[queries], end) - first, 0)
        rows, columns = np.empty(0, np.int64), np.empty(0, np.int64)
        if counts.any():
            rows, columns = np.repeat(np.arange(len(counts)), counts), expand(first - begin, counts)  # type: ignore[arg-type]
        if self.rows is not None and self.rows[begin:end].any():
            masked = np.flatnonzero(self.rows[begin:end])
            rows = np.concatenate([rows, np.repeat(np.arange(len(counts)), len(masked))])
            columns = np.concatenate([columns, np.tile(masked, len(counts))])
        return rows, columns


def nothing_excluded(n: int) -> Excluded:
    """Return exclusions of `n` queries that may find every row."""
    return Excluded(np.zeros(n, np.int64), np.zeros(n, np.int64))


def search(rows: Rows, queries: Floats, k: int, excluded: Excluded, processor: Processor) -> Found:
    """Return the `k` nearest rows of each query [query, width], which is prepared as the rows are.

    Reads every row once. Costs 2 · width operations a pair and BLOCK_ROWS · (width + queries) values of memory. Raises
    `SettingError` where a query has fewer than `k` rows to find.
    """
    check_k(k, len(rows), excluded)
    space = Space(rows.metric, queries.mean(axis=0))
    left = space.turn(space.extend(queries))
    groups = [slice(begin, begin + BLOCK_ROWS) for begin in range(0, len(left), BLOCK_ROWS)]
    sent = [processor.send(left[group]) for group in groups]
    best = processor.best(len(left), k)
    for begin, block in _blocks(rows, 0, space):
        right = processor.send(block)
        for group, part in zip(groups, sent, strict=True):
            products = processor.product(part, right)
            _hide(products, excluded, group, begin, processor)
            best.offer(group.start, products, begin, axis=1)
    numbers, products = best.found()
    return Found(numbers, space.distances(products))


def search_within(rows: Rows, query: Floats, radius: float, excluded: Excluded, processor: Processor) -> Found:
    """Return the rows within a distance of one query [1, width], that distance included, nearest first."""
    space = Space(rows.metric, query[0])
    left = processor.send(space.turn(space.extend(query)))
    numbers, distances = [], []
    bound = np.nextafter(np.float32(space.product(radius)), np.float32(-np.inf))
    for begin, block in _blocks(rows, 0, space):
        products = processor.product(left, processor.send(block))
        _hide(products, excluded, slice(0, 1), begin, processor)
        (_, columns), values = processor.above(products, float(bound))
        reached = space.distances(values)
        near = reached <= np.float32(radius)
        numbers.append(columns[near] + begin)
        distances.append(reached[near])
    found, distance = np.concatenate(numbers), np.concatenate(distances)
    order = np.lexsort((found, distance))
    return Found(found[None, order], distance[None, order])


def join(
    rows: Rows,
    k: int,
    excluded: Excluded,
    processor: Processor,
    *,
    panel_bytes: int = PANEL_BYTES,
    progress: Progress | None = None,
) -> Found:
    """Return the `k` nearest rows of every row.

    As many rows as fit `panel_bytes` are held at once, compared with each other and with all that come after: a panel
    read twice and a stream of the rest a panel. Costs width operations a pair (each pair of rows once), and beside the
    panel 12 · (k + SPARE) bytes a row. Distances are computed from differences in the end. Raises `SettingError` where
    a row has fewer than `k` others to find.
    """
    check_k(k, len(rows), excluded)
    n = len(rows)
    kept = min(k + SPARE, n)
    space = Space(rows.metric, rows.read(0, min(n, BLOCK_ROWS)).mean(axis=0))
    size = panel_rows(rows, panel_bytes)
    best = processor.best(n, kept)
    n_blocks = -(-n // BLOCK_ROWS)
    done, total = 0, n_blocks * (n_blocks + 1) // 2
    for begin in range(0, n, size):
        panel: list[tuple[int, Any]] = []
        for start, block in _blocks(rows, begin, space):
            if start < begin + size:
                panel.append((start, processor.send(space.turn(block))))
            _compare(panel, start, processor.send(block), best, excluded, processor)
            done += len(panel)
            if progress is not None:
                progress(done, total)
    numbers, _ = best.found()
    return measure_pairs(rows, numbers, k, panel_bytes=panel_bytes)


def panel_rows(rows: Rows, panel_bytes: int) -> int:
    """Return how many rows fit so many bytes, in whole blocks, one at least."""
    return max(panel_bytes // (4 * (rows.width + 2)) // BLOCK_ROWS, 1) * BLOCK_ROWS


def check_k(k: int, n_rows: int, excluded: Excluded) -> None:
    """Raise `SettingError` unless every query has `k` rows to find, and at least one is asked for."""
    if k < 1:
        raise SettingError(f"k {k}: must be at least 1")
    fewest = n_rows - int(excluded.counts().max(initial=0))
    if k > fewest:
        raise SettingError(f"k {k}: there are {fewest} rows to find among {n_rows}, without those excluded")


def _blocks(rows: Rows, begin: int, space: Space) -> Iterator[tuple[int, Floats]]:
    """Yield blocks of rows from `begin` on, extended, with the number of each one's first row; all in the same memory.

    The products wait for the reading. To read ahead of them would be slower: a product is as late as its slowest core,
    and a core that also reads is late by all of it.
    """
    block = np.empty((min(len(rows) - begin, BLOCK_ROWS), space.width(rows.width)), np.float32)
    for start in range(begin, len(rows), BLOCK_ROWS):
        values = rows.read(start, start + BLOCK_ROWS)
        yield start, space.extend(values, block[: len(values)])


def _hide(products: Any, excluded: Excluded, queries: slice, begin: int, processor: Processor) -> None:
    places = excluded.places(queries, begin, begin + products.shape[1])
    if len(places[0]):
        processor.hide(products, *places)


def _compare(
    panel: Sequence[tuple[int, Any]], start: int, block: Any, best: Kept, excluded: Excluded, processor: Processor
) -> None:
    """Compare a block with every block of a panel; their pairs are new to both sides."""
    for begin, left in panel:
        products = processor.product(left, block)
        _hide(products, excluded, slice(begin, begin + len(left)), start, processor)
        best.offer(begin, products, start, axis=1)
        if begin != start:
            best.offer(start, products, begin, axis=0)


def measure_pairs(rows: Rows, numbers: Ints, k: int, *, panel_bytes: int = PANEL_BYTES) -> Found:
    """Compute the distances of every row to its candidates [row, candidate] (−1: none), and keep the `k` nearest.

    Holds as many rows as fit `panel_bytes` at once, and reads the others anew for each panel.
    """
    size = panel_rows(rows, panel_bytes)
    distances = np.full(numbers.shape, np.inf, np.float32)
    for begin in range(0, len(rows), size):
        panel = rows.read(begin, begin + size)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            within = (numbers[block] >= begin) & (numbers[block] < begin + len(panel))
            if not within.any():
                continue
            held = begin <= start < begin + len(panel)
            mine = panel[start - begin :][:BLOCK_ROWS] if held else rows.read(start, start + BLOCK_ROWS)
            for column in range(numbers.shape[1]):
                members = np.flatnonzero(within[:, column])
                other = panel[numbers[start + members, column] - begin]
                distances[start + members, column] = distances_between(rows.metric, mine[members], other)
    order = np.lexsort((numbers, distances))[:, :k]
    return Found(np.take_along_axis(numbers, order, 1), np.take_along_axis(distances, order, 1))
