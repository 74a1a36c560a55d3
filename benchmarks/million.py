"""A million rows 768 wide: exact search reading the store against FAISS in memory, and actdb's graph against exact.

Rows are made up, near a plane of 32 dimensions; queries are rows of their own, asked all at once; k is 10, by l2. An
index is streamed from the store, and searches as narrowly as recall 0.95 allows on these queries; its MB are those of
its file. It runs where it is named only: a graph of so many rows takes more than ten minutes to build.
"""

from pathlib import Path
from typing import Any

from benchmarks.harness import Goal, Table, missing, note, peers
from benchmarks.indexes import RECALL, exact_search, own
from benchmarks.neighbors import DECODED, made_rows, take_queries, time_queries

SCALE = {"full": (1_000_000, 2_000), "quick": (100_000, 1_000), "tiny": (600, 20)}
"""Rows, queries."""
WAITS = "all queries at once are one product a block, near what the cores can do; a graph waits for memory at every row"


def run(size: str, folder: Path) -> Table:
    """Return queries a second of exact search and of the graph, with build time, file and recall."""
    n_rows, n_queries = SCALE[size]
    header = ("way", "build s", "MB", "recall@10", "queries/s")
    if "faiss" not in peers("faiss"):
        return Table(
            "A million rows", note(__doc__) + missing("faiss"), header, [("not run: no FAISS", "", "", "", "")] * 3
        )
    path = folder / "rows.actdb"
    rows = made_rows(path, n_rows)
    speeds = time_queries(rows, n_queries, beside=("faiss",))
    table: list[tuple[Any, ...]] = [
        ("actdb, exact", "", "", 1.0, speeds["actdb"]),
        ("faiss flat, in memory", "", "", 1.0, speeds["faiss flat"]),
    ]
    queries = take_queries(rows, n_queries, seed=2)
    truth = exact_search(rows, queries)
    graph = own(path, rows, "hnsw", queries, truth)
    table.append(("actdb, hnsw", *graph))
    goals = [
        Goal(f"exact search of {n_rows:,} rows ÷ faiss flat", speeds["actdb"] / speeds["faiss flat"], 0.9, why=DECODED)
    ]
    if graph[2] >= RECALL:
        goals.append(
            Goal(
                f"graph of {n_rows:,} rows at recall {RECALL} ÷ exact search", graph[3] / speeds["actdb"], 20, why=WAITS
            )
        )
    return Table("A million rows", note(__doc__), header, table, goals, "queries/s")
