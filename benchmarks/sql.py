"""SQL over 9 million rows of head statistics: a group-by, the top 100, and the row of one key.

Made-up statistics of 62,500 prompts × 12 layers × 12 heads, through `db.sql(...).fetchall()` on an open database; the
first query of a process copies nothing, since the catalog is built before. Beside pandas on the Parquet file of the
part (each query reads the columns that it needs) and SQLite with an index on the key.
"""

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import actdb
from actdb.harvesting.pipeline import PartWriter, Writers
from actdb.harvesting.statistics.heads import NORM_COLUMNS, PATTERN_COLUMNS
from benchmarks import data
from benchmarks.harness import Goal, Table, note, take_turns

SCALE = {"full": (62_500, 7), "quick": (6250, 3), "tiny": (20, 1)}  # prompts, rounds
LAYERS = HEADS = 12
KEYS = ("prompt_id", "layer", "head")
COLUMNS = (*PATTERN_COLUMNS, *NORM_COLUMNS)
QUERIES = {
    "group-by": "SELECT layer, head, avg(entropy) FROM head_stats GROUP BY layer, head ORDER BY layer, head",
    "top 100": "SELECT prompt_id, layer, head, entropy FROM head_stats ORDER BY entropy DESC, prompt_id LIMIT 100",
    "point lookup": "SELECT entropy FROM head_stats WHERE prompt_id = 17 AND layer = 3 AND head = 5",
}


def run(size: str, folder: Path) -> Table:
    """Return milliseconds of each query and engine."""
    n_prompts, rounds = SCALE[size]
    table = statistics(n_prompts)
    write(folder / "x.actdb", table, n_prompts)
    parquet = next((folder / "x.actdb").rglob("*.head_stats.parquet"))
    lite = sqlite3.connect(folder / "x.sqlite")
    table.to_pandas().to_sql("head_stats", lite, index=False, chunksize=100_000)
    lite.execute("CREATE INDEX by_key ON head_stats (prompt_id, layer, head)")
    rows, goals = [], []
    with actdb.open(folder / "x.actdb") as db:
        db.sql("SELECT 1")
        for (name, query), bound in zip(QUERIES.items(), (100, 50, 5), strict=True):
            ways = {
                "actdb": lambda query=query: db.sql(query).fetchall(),
                "pandas on Parquet": lambda name=name: in_pandas(name, parquet),
                "SQLite": lambda query=query: lite.execute(query).fetchall(),
            }
            answers = [np.array(way(), float) for way in ways.values()]
            assert all(np.allclose(answers[0][:, -1], other[:, -1]) for other in answers[1:]), name
            medians = take_turns(ways, rounds=rounds)
            rows += [(name, way, t * 1000, t / medians["actdb"]) for way, t in medians.items()]
            goals.append(
                Goal(f"SQL, {name}, {table.num_rows:,} rows", medians["actdb"] * 1000, bound, "ms", at_least=False)
            )
    lite.close()
    return Table("SQL", note(__doc__), ("query", "engine", "ms", "÷ actdb"), rows, goals, "ms")


def statistics(n_prompts: int) -> pa.Table:
    """Return random statistics in the order of a part's file."""
    generator, n = np.random.default_rng(0), n_prompts * LAYERS * HEADS
    keys = {
        "prompt_id": np.repeat(np.arange(n_prompts, dtype=np.int32), LAYERS * HEADS),
        "layer": np.tile(np.repeat(np.arange(LAYERS, dtype=np.int32), HEADS), n_prompts),
        "head": np.tile(np.arange(HEADS, dtype=np.int32), n_prompts * LAYERS),
    }
    return pa.table({**keys, **{name: generator.random(n, np.float32) for name in COLUMNS}})


def write(path: Path, table: pa.Table, n_prompts: int) -> None:
    """Write a run that holds the statistics alone."""
    folder, info = data.claim(path, (), np.full(n_prompts, 1), ("heads",))
    writers = Writers()
    writer = PartWriter(folder, info, 0, writers, computed_dtype="float32")
    writer.finish(lambda: {"head_stats": table}, replace=False, done=lambda commit: None)
    writers.close()


def in_pandas(name: str, parquet: Path) -> list[Any]:
    """Answer a query with pandas."""
    columns = {"group-by": ["layer", "head", "entropy"], "top 100": [*KEYS, "entropy"]}.get(name)
    if columns is None:
        chosen = [("prompt_id", "=", 17), ("layer", "=", 3), ("head", "=", 5)]
        return pq.read_table(parquet, columns=["entropy"], filters=chosen).to_pandas().to_numpy().tolist()
    frame = pd.read_parquet(parquet, columns=columns)
    if name == "group-by":
        return frame.groupby(["layer", "head"])["entropy"].mean().reset_index().to_numpy().tolist()
    return frame.nlargest(100, "entropy").to_numpy().tolist()
