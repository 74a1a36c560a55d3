"""A rotation of activation space cut into blocks of columns, each of which spans a subspace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import parametrizations

import actdb

Floats = npt.NDArray[np.float32]
SOURCES = "partition_sources"
FLAGS = ("fold_ln", "center_writing_weights", "center_unembed")


@dataclass(frozen=True)
class Partition:
    """An orthogonal matrix [width, width] whose first `sizes[0]` columns span subspace 0, the next the next one."""

    rotation: Floats
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(self.sizes, self.rotation.shape[0])

    @property
    def n_subspaces(self) -> int:
        """Number of subspaces."""
        return len(self.sizes)

    def columns(self) -> list[slice]:
        """Return the columns of each subspace."""
        return list(column_ranges(self.sizes))

    def basis(self, subspace: int) -> Floats:
        """Return an orthonormal basis [width, size] of a subspace."""
        return self.rotation[:, self.columns()[subspace]]

    def project(self, rows: npt.NDArray[Any]) -> list[Floats]:
        """Return the coordinates [row, size] of rows [row, width] in each subspace."""
        rotated = np.asarray(rows, np.float32) @ self.rotation
        return [rotated[:, columns] for columns in self.columns()]

    @classmethod
    def read(cls, db: actdb.Database, run: actdb.Run | str, name: str) -> "Partition":
        """Read a partition that `store_partition` or `db.add_partition` kept; raises `SettingError` if there is none.

        Raises `SettingError` too where the stored columns are fewer than the width: subspaces that leave a rest.
        """
        run_name = run if isinstance(run, str) else run.name
        query = "SELECT size, basis FROM partitions WHERE run = ? AND partition = ? ORDER BY subspace"
        tables = {name for (name,) in db.sql("SELECT table_name FROM duckdb_tables()").fetchall()}
        rows = db.sql(query, [run_name, name]).fetchall() if "partitions" in tables else []
        if not rows:
            raise actdb.SettingError(f"run {run_name!r} has no partition {name!r}; see `SELECT * FROM partitions`")
        blocks = [np.asarray(basis, np.float32).reshape(-1, size) for size, basis in rows]
        rotation = np.concatenate(blocks, axis=1)
        if rotation.shape[0] != rotation.shape[1]:
            shape = list(rotation.shape)
            raise actdb.SettingError(f"partition {name!r} {shape} of {run_name!r} does not span the whole space")
        return cls(rotation, tuple(int(size) for size, _ in rows))


class Rotation(nn.Module):
    """A trainable orthogonal matrix with its block sizes: h' = h R, by torch's `parametrizations.orthogonal`.

    The matrix is base · exp(A) of a skew-symmetric A that begins as 0 (a "trivialisation"), so that every step is a
    rotation of the base: the identity, or what `start` gives [width, width].
    """

    basis: torch.Tensor

    def __init__(self, width: int, sizes: Sequence[int], *, start: torch.Tensor | None = None) -> None:
        super().__init__()
        _check_sizes(sizes, width)
        self.sizes = tuple(int(size) for size in sizes)
        begin = torch.eye(width) if start is None else start.detach().to(torch.float32).clone()
        self.basis = nn.Parameter(begin)
        parametrizations.orthogonal(self, "basis", orthogonal_map="matrix_exp")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, width] → rotated rows [row, width], blocks side by side."""
        return rows @ self.basis

    def frozen(self) -> Partition:
        """Return the partition as it stands, its columns orthonormal to float32."""
        with torch.no_grad():
            exact, triangle = torch.linalg.qr(self.basis.detach().double().cpu())
            exact = exact * triangle.diagonal().sign()  # QR leaves signs open: keep those of the columns
        return Partition(exact.float().numpy(), self.sizes)


def unit_sizes(width: int, unit: int) -> tuple[int, ...]:
    """Return the sizes to begin with, blocks of `unit` columns; raises `SettingError` where they leave a rest."""
    if unit < 1 or width % unit:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise actdb.SettingError(f"unit {unit}: it does not divide the width {width}; choose one of {divisors}")
    return (unit,) * (width // unit)


def column_ranges(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield the columns of each block."""
    begin = 0
    for size in sizes:
        yield slice(begin, begin + size)
        begin += size


def store_partition(db: actdb.Database, run: actdb.Run, name: str, partition: Partition, **about: Any) -> None:
    """Keep a partition in the database: `nearest`, `index` and SQL then know its subspaces by name and number.

    Beside R and the sizes (table `partitions`), the table `partition_sources` gets what it was trained on: the run and
    its processing flags, and what `about` adds (site, layer, step, …), a row a partition. Needs `mode="a"`.
    """
    import pyarrow as pa

    db.add_partition(run, name, partition.rotation, list(partition.sizes))
    found = db.sql(f"SELECT {', '.join(FLAGS)} FROM runs WHERE run = ?", [run.name]).fetchone() or ()
    row = {"run": run.name, "partition": name, **dict(zip(FLAGS, found, strict=True)), **about}
    row["sizes"] = list(partition.sizes)
    kept: list[dict[str, Any]] = []
    tables = {table for (table,) in db.sql("SELECT table_name FROM duckdb_tables()").fetchall()}
    if SOURCES in tables:
        held = db.sql(f"SELECT * FROM {SOURCES}").arrow().to_pylist()
        kept = [old for old in held if (old["run"], old["partition"]) != (run.name, name)]
    db.add_table(SOURCES, pa.Table.from_pylist([*kept, row]), replace=True)


def span_overlap(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return the mean squared cosine of the principal angles between the spans of orthonormal columns [width, n].

    1 where the smaller span lies in the larger one, 0 where they are orthogonal; min(n_a, n_b) angles. Random spans
    have max(n_a, n_b) / width.
    """
    return float(np.sum((np.asarray(a).T @ np.asarray(b)) ** 2) / min(a.shape[1], b.shape[1]))


def _check_sizes(sizes: Sequence[int], width: int) -> None:
    if not sizes or min(sizes) < 1 or sum(sizes) != width:
        raise actdb.SettingError(f"sizes {list(sizes)}: they do not add up to the width {width}")
