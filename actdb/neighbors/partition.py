"""Rotations kept in a database, in the table `partitions`: orthonormal columns, ranges of which span subspaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.neighbors.map import check_rotation
from actdb.schema import digest

if TYPE_CHECKING:
    import pyarrow as pa

    from actdb.neighbors.result import Sql

PARTITIONS = "partitions"
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Partition:
    """A rotation [width, n] with orthonormal columns, cut into subspaces of `sizes` columns."""

    rotation: Floats
    sizes: tuple[int, ...]

    def columns(self, subspace: int) -> tuple[int, int]:
        """Return the range of columns of a subspace."""
        if not 0 <= subspace < len(self.sizes):
            raise SettingError(f"subspace {subspace}: the partition has subspaces 0 to {len(self.sizes) - 1}")
        begin = sum(self.sizes[:subspace])
        return begin, begin + self.sizes[subspace]


def partition_table(run: str, name: str, rotation: npt.ArrayLike, sizes: Sequence[int] | None) -> "pa.Table":
    """Return rows for the table `partitions`, one a subspace: run, partition, subspace, first, size, basis.

    `first` is the subspace's first column, `basis` its columns [width, size] row by row. Raises `SettingError` for a
    matrix whose columns are not orthonormal, and for sizes that do not add up to their number.
    """
    import pyarrow as pa

    matrix = check_rotation(rotation)
    cut = [matrix.shape[1]] if sizes is None else [int(size) for size in sizes]
    if not cut or min(cut) < 1 or sum(cut) != matrix.shape[1]:
        raise SettingError(f"sizes {cut}: they do not add up to the rotation's {matrix.shape[1]} columns")
    firsts = np.cumsum(cut) - cut
    bases = [matrix[:, first : first + size].reshape(-1) for first, size in zip(firsts.tolist(), cut, strict=True)]
    n = len(cut)
    return pa.table(
        {
            "run": pa.array([run] * n),
            "partition": pa.array([name] * n),
            "subspace": pa.array(range(n), pa.int32()),
            "first": pa.array(firsts, pa.int32()),
            "size": pa.array(cut, pa.int32()),
            "basis": pa.array(bases, pa.list_(pa.float32())),
        }
    )


def partition_stem(run: str, name: str) -> str:
    """Return the stem of the file that holds a partition."""
    return f"{run}--{digest(name)[:12]}"


def read_partition(sql: "Sql", run: str, name: str) -> Partition:
    """Return a stored partition of a run; raises `SettingError` with the names that there are."""
    tables = sql("SELECT count(*) FROM duckdb_tables() WHERE table_name = ?", [PARTITIONS]).fetchall()
    query = f"SELECT partition, size, basis FROM {PARTITIONS} WHERE run = ? ORDER BY partition, subspace"
    rows = sql(query, [run]).fetchall() if tables[0][0] else []
    found = [(int(size), basis) for held, size, basis in rows if held == name]
    if not found:
        names = ", ".join(dict.fromkeys(held for held, *_ in rows)) or "none: store one with db.add_partition"
        raise SettingError(f"run {run!r} has no partition {name!r}; it has {names}")
    blocks = [np.asarray(basis, np.float32).reshape(-1, size) for size, basis in found]
    return Partition(np.concatenate(blocks, axis=1), tuple(size for size, _ in found))
