"""Neighbours of one query, and of every row: what `db.nearest` and `db.neighbors` do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.neighbors import exact
from actdb.neighbors.device import choose_processor
from actdb.neighbors.exact import Excluded, Found
from actdb.neighbors.index import Index, open_index
from actdb.neighbors.map import make_map
from actdb.neighbors.partition import read_partition
from actdb.neighbors.query import Query, make_query
from actdb.neighbors.result import Nearest, Neighbors, Sql, nearest_table
from actdb.neighbors.row import Plane, Rows, make_plane
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    from actdb.run import Run

DEFAULT_K = 10


@dataclass(frozen=True)
class Comparison:
    """How rows are compared: the metric, the maps before it, and the prompts that count."""

    metric: str = "cosine"
    map: str | Sequence[str] | None = None
    partition: npt.ArrayLike | None = None
    subspace: int | slice | tuple[int, int] | None = None
    where: str | None = None

    def rows(self, plane: Plane, sql: Sql) -> Rows:
        """Return the rows of a plane, made ready to be compared so; `sql` finds a partition that is named."""
        names = self.map.split(",") if isinstance(self.map, str) else list(self.map or ())
        rotation, columns = self._subspace(plane, sql)
        names = [name.strip() for name in names]
        partition = self.partition if isinstance(self.partition, str) else None
        row_map = make_map(plane.run, plane.width, names=names, rotation=rotation, columns=columns, partition=partition)
        return Rows(plane, row_map, self.metric, self.where)

    def _subspace(self, plane: Plane, sql: Sql) -> tuple[npt.ArrayLike | None, tuple[int, int] | None]:
        """Return the rotation, and the range of its columns."""
        rotation, subspace = self.partition, self.subspace
        if isinstance(rotation, str):
            stored = read_partition(sql, plane.run.name, rotation)
            rotation = stored.rotation
            if isinstance(subspace, int):
                subspace = stored.columns(subspace)
        if subspace is None:
            return rotation, None
        if isinstance(subspace, slice) and subspace.step in (None, 1):
            subspace = (subspace.start or 0, subspace.stop)
        if not isinstance(subspace, tuple) or len(subspace) != 2 or not all(isinstance(n, int) for n in subspace):
            raise SettingError(
                f"subspace {subspace!r}: give a range of columns such as (0, 64), or a stored partition's subspace"
            )
        return rotation, subspace


def find_nearest(
    folder: Folder,
    sql: Sql,
    run: "Run",
    site: str,
    comparison: Comparison,
    *,
    layer: int | None,
    head: int | None,
    query: dict[str, Any],
    k: int | None,
    radius: float | None,
    exclude_prompt: bool,
    exclude_within: int,
    use_index: bool,
    device: str | None,
) -> Nearest:
    """Return the rows nearest to a query; see `Database.nearest`."""
    plane = make_plane(run, site, layer=layer, head=head)
    asked = make_query(plane, **query)
    rows = comparison.rows(plane, sql)
    vector = rows.prepare(asked.vector, asked.what)
    excluded = _exclusions(rows, asked, exclude_prompt=exclude_prompt, exclude_within=exclude_within)
    index = open_index(folder, rows) if use_index and radius is None else None
    if radius is not None:
        within = exact.search_within(rows, vector, _checked_radius(radius), excluded, choose_processor(device))
        found = within if k is None else _cut(within, k)
    elif index is not None:
        found = index.search(vector, DEFAULT_K if k is None else k, excluded)
    else:
        found = exact.search(rows, vector, DEFAULT_K if k is None else k, excluded, choose_processor(device))
    recall = None if index is None else index.record.recall
    return nearest_table(sql, rows, found.numbers[0], found.distances[0], recall)


def find_neighbors(
    folder: Folder,
    sql: Sql,
    run: "Run",
    site: str,
    comparison: Comparison,
    *,
    layer: int | None,
    head: int | None,
    k: int,
    exclude_prompt: bool,
    exclude_within: int,
    use_index: bool,
    device: str | None,
    progress: exact.Progress | None,
) -> Neighbors:
    """Return the nearest rows of every row; see `Database.neighbors`."""
    plane = make_plane(run, site, layer=layer, head=head)
    rows = comparison.rows(plane, sql)
    numbers = np.arange(len(rows))
    begins, ends = rows.around(numbers, exclude_prompt=exclude_prompt, exclude_within=exclude_within)
    excluded = Excluded(begins, ends)
    index = open_index(folder, rows) if use_index else None
    if index is None:
        found = exact.join(rows, k, excluded, choose_processor(device), progress=progress)
    else:
        found = _join_by_index(index, k, excluded, progress)
    recall = None if index is None else index.record.recall
    return Neighbors(rows.prompt, rows.pos, found.numbers, found.distances, rows.key, recall)


def _join_by_index(index: Index, k: int, excluded: Excluded, progress: exact.Progress | None) -> Found:
    """Ask an index for the neighbours of every row."""
    rows = index.rows
    exact.check_k(k, len(rows), excluded)
    numbers = []
    for begin in range(0, len(rows), exact.BLOCK_ROWS):
        block = slice(begin, begin + exact.BLOCK_ROWS)
        part = Excluded(excluded.begins[block], excluded.ends[block])
        numbers.append(index.find(rows.read(block.start, block.stop), k, part))
        if progress is not None:
            progress(min(block.stop, len(rows)), len(rows))
    return exact.measure_pairs(rows, np.concatenate(numbers), k)


def _exclusions(rows: Rows, query: Query, *, exclude_prompt: bool, exclude_within: int) -> Excluded:
    """Return what a query shall not find: its own row always."""
    if query.prompt is None:
        if exclude_prompt or exclude_within:
            raise SettingError("exclude_prompt and exclude_within go with a query by prompt and pos")
        return exact.nothing_excluded(1)
    number = query.number(rows)
    if number is None:  # a prompt that `where` leaves out finds nothing of itself
        return exact.nothing_excluded(1)
    begins, ends = rows.around(np.array([number]), exclude_prompt=exclude_prompt, exclude_within=exclude_within)
    return Excluded(begins, ends)


def _checked_radius(radius: float) -> float:
    if not np.isfinite(radius):
        raise SettingError(f"radius {radius}: give a finite distance")
    return float(radius)


def _cut(found: Found, k: int) -> Found:
    if k < 1:
        raise SettingError(f"k {k}: must be at least 1")
    return Found(found.numbers[:, :k], found.distances[:, :k])
