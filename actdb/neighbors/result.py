"""What was found, as tables: neighbours with their tokens in context and labels, and the edges of a k-NN graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.catalog import QueryResult
from actdb.neighbors.map import map_label
from actdb.neighbors.row import Rows
from actdb.schema import digest

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Sql = Callable[..., QueryResult]


@dataclass(frozen=True)
class Nearest(QueryResult):
    """Found rows, nearest first: run, rank, prompt_id, pos, distance, token, context, then labels.

    `recall` is the measured recall@10 of the index that found them, None for an exact search.
    """

    recall: float | None = None


def nearest_table(sql: Sql, rows: Rows, numbers: Ints, distances: Floats, recall: float | None) -> Nearest:
    """Return found rows with their tokens in context and labels."""
    from actdb.catalog.context import rows_in_context

    positions: Sequence[int | None] = rows.pos[numbers].tolist() if rows.has_positions else [None] * len(numbers)
    values = {"distance": ("FLOAT", distances.tolist())}
    found = rows_in_context(sql, rows.plane.run.name, rows.prompt[numbers].tolist(), positions, values)
    return Nearest(found.columns, found.types, found._relation, recall=recall)


@dataclass(frozen=True)
class Neighbors:
    """The k nearest rows of every row of one layer (and head): a k-NN graph.

    `prompt` and `pos` [row] tell what each row is; `numbers` [row, k] are its neighbours, nearest first, as indices of
    these arrays, and `distances` [row, k] theirs. `key` says what was compared and how. `recall` is the measured
    recall@10 of the index that found them, None for an exact search.
    """

    prompt: Ints
    pos: Ints
    numbers: Ints
    distances: Floats
    key: dict[str, Any]
    recall: float | None = None

    @property
    def stem(self) -> str:
        """A name of what was compared, and how: the same for graphs of other k and other prompts."""
        return f"{self.key['run']}--{self.key['site']}--{digest(self.key)[:12]}"

    def __len__(self) -> int:
        return len(self.prompt)

    def edges(self) -> "pa.Table":
        """Return the graph as the table `neighbor_edges`: a row an edge, from each row to each of its neighbours.

        Columns: run, site, layer, head, metric, map (null for none), prompt_id, pos, rank (from 0),
        neighbor_prompt_id, neighbor_pos, distance.
        """
        import pyarrow as pa

        n, k = self.numbers.shape
        other = self.numbers.reshape(-1)

        def constant(value: Any, kind: Any) -> Any:
            return pa.repeat(pa.scalar(value, kind), n * k)

        def integers(values: Ints) -> Any:
            return pa.array(values.astype(np.int32))

        return pa.table(
            {
                "run": constant(self.key["run"], pa.string()),
                "site": constant(self.key["site"], pa.string()),
                "layer": constant(self.key["layer"], pa.int32()),
                "head": constant(self.key["head"], pa.int32()),
                "metric": constant(self.key["metric"], pa.string()),
                "map": constant(map_label(self.key["map"]) or None, pa.string()),
                "prompt_id": integers(np.repeat(self.prompt, k)),
                "pos": integers(np.repeat(self.pos, k)),
                "rank": integers(np.tile(np.arange(k), n)),
                "neighbor_prompt_id": integers(self.prompt[other]),
                "neighbor_pos": integers(self.pos[other]),
                "distance": pa.array(self.distances.reshape(-1)),
            }
        )

    def __repr__(self) -> str:
        how = "exact" if self.recall is None else f"recall@10 {self.recall:.3f}"
        what = f"{self.key['run']} {self.key['site']} {len(self):,} rows, k {self.numbers.shape[1]}"
        return f"<Neighbors {what}, {self.key['metric']}, {how}>"
