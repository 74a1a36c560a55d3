"""Indexes of nearest neighbours by l2: actdb's, streamed from its store, against other libraries from rows in memory.

k is 10; queries are rows of their own, asked all at once; recall counts those at the 10th true distance or nearer.
Every way searches as narrowly as recall 0.95 allows on these queries (an index that `actdb index` made looks wider: it
reaches that for rows held out of it); the graphs have 32 links a node and look 100 wide for them.
`trained` rows are the last residual stream of the model that the demo ships, or of the folder named by
ACTDB_BENCH_MODEL over the prompts in ACTDB_BENCH_PROMPTS; `768 wide` rows are made up, near a plane of 32 dimensions.
Exact search reads the store. The memory is what the index takes in its file.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import actdb
from actdb.neighbors import exact
from actdb.neighbors.build import build_index
from actdb.neighbors.device import choose_processor
from actdb.neighbors.exact import Found
from actdb.neighbors.index import measure, open_index
from actdb.neighbors.row import Rows
from benchmarks.harness import Table, missing, note, peers
from benchmarks.neighbors import TRAINED, Floats, Ints, made_rows, take_queries, trained_rows

SCALE = {"full": ((10_000, 100_000), 1_000), "quick": ((20_000,), 500), "tiny": ((600,), 20)}
"""Rows 768 wide, queries."""
KINDS = ("flat", "ivf", "hnsw")
PEERS = ("faiss", "hnswlib", "usearch")
K, LINKS, CONSTRUCTION, RECALL = 10, 32, 100, 0.95
BREADTHS = tuple(sorted({size << i for size in (16, 24) for i in range(8)}))
Search = Callable[[Floats, int], Ints]


def run(size: str, folder: Path) -> Table:
    """Return build time, file, recall and queries a second of each index."""
    counts, n_queries = SCALE[size]
    header = ("rows", "way", "build s", "MB", "recall@10", "queries/s")
    if "faiss" not in peers("faiss"):
        return Table(
            "Indexes", note(__doc__) + missing(*PEERS), header, [("", "not run: no FAISS", "", "", "", "")] * 3
        )
    places = [("trained", folder / "trained.actdb", trained_rows(folder / "trained.actdb", TRAINED[size]))]
    places += [("768 wide", folder / f"{n}.actdb", made_rows(folder / f"{n}.actdb", n)) for n in counts]
    table: list[tuple[Any, ...]] = []
    for name, path, rows in places:
        what = f"{len(rows):,} rows, {name}"
        queries = take_queries(rows, n_queries, seed=2)
        truth, seconds = timed(partial(exact_search, rows, queries))
        table.append((what, "actdb, exact", 0.0, 0.0, 1.0, len(queries) / seconds))
        table += [(what, f"actdb, {kind}", *own(path, rows, kind, queries, truth)) for kind in KINDS]
        table += [(what, way, *found) for way, found in others(rows, queries, truth).items()]
    return Table("Indexes", note(__doc__) + missing(*PEERS), header, table)


def own(path: Path, rows: Rows, kind: str, queries: Floats, truth: Found) -> tuple[float, float, float, float]:
    """Build actdb's index; returns build seconds, MB, recall and queries a second."""
    folder = actdb.open(path)._folder
    record, build_s = timed(partial(build_index, folder, rows, kind=kind, recall=RECALL))
    index = open_index(folder, rows)
    assert index is not None

    def search(queries: Floats, breadth: int) -> Ints:
        narrowed = replace(index, record=replace(record, breadth=breadth))
        return narrowed.find(queries, K, exact.nothing_excluded(len(queries)))

    return build_s, record.file.stored_bytes / 1e6, *narrowest(search, record.design.breadths, rows, queries, truth)


def others(rows: Rows, queries: Floats, truth: Found) -> dict[str, tuple[float, float, float, float]]:
    """Build and time the other libraries' graphs; returns for each what `own` does."""
    values = rows.read(0, len(rows))
    found = {}
    for way, build in (("faiss HNSW", build_faiss), ("hnswlib", build_hnswlib), ("usearch", build_usearch)):
        if way.split()[0] in peers(*PEERS):
            (search, n_bytes), build_s = timed(partial(build, values))
            found[way] = (build_s, n_bytes / 1e6, *narrowest(search, BREADTHS, rows, queries, truth))
    return found


def narrowest(
    search: Search, breadths: Sequence[int], rows: Rows, queries: Floats, truth: Found
) -> tuple[float, float]:
    """Return recall and queries a second of the narrowest search that reaches the recall, or of the widest."""
    recall = speed = 0.0
    for breadth in breadths or (0,):
        search(queries[:1], breadth)
        numbers, seconds = timed(partial(search, queries, breadth))
        recall, speed = recall_at(rows, queries, numbers, truth), len(queries) / seconds
        if recall >= RECALL:
            break
    return recall, speed


def build_faiss(values: Floats) -> tuple[Search, int]:
    """Build FAISS's graph; returns its search, and its bytes."""
    import faiss

    index = faiss.IndexHNSWFlat(values.shape[1], LINKS, faiss.METRIC_L2)
    index.hnsw.efConstruction = CONSTRUCTION
    index.add(values)

    def search(queries: Floats, breadth: int) -> Ints:
        index.hnsw.efSearch = breadth
        return np.asarray(index.search(queries, K)[1])

    return search, len(faiss.serialize_index(index))


def build_hnswlib(values: Floats) -> tuple[Search, int]:
    """Build hnswlib's graph; returns its search, and its bytes."""
    import hnswlib

    index = hnswlib.Index("l2", values.shape[1])
    index.init_index(len(values), ef_construction=CONSTRUCTION, M=LINKS)
    index.add_items(values)

    def search(queries: Floats, breadth: int) -> Ints:
        index.set_ef(breadth)
        return np.asarray(index.knn_query(queries, K)[0], np.int64)

    return search, int(index.index_file_size())


def build_usearch(values: Floats) -> tuple[Search, int]:
    """Build usearch's graph; returns its search, and its bytes."""
    from usearch.index import Index

    index = Index(ndim=values.shape[1], metric="l2sq", dtype="f32", connectivity=LINKS, expansion_add=CONSTRUCTION)
    index.add(np.arange(len(values)), values)

    def search(queries: Floats, breadth: int) -> Ints:
        index.expansion_search = breadth
        keys = np.asarray(index.search(queries, K).keys).astype(np.int64)
        return keys.reshape(len(queries), -1)

    return search, int(index.serialized_length)


def exact_search(rows: Rows, queries: Floats) -> Found:
    """Return the true neighbours, by a scan of the store."""
    return exact.search(rows, queries, K, exact.nothing_excluded(len(queries)), choose_processor("cpu"))


def recall_at(rows: Rows, queries: Floats, numbers: Ints, truth: Found) -> float:
    """Return the share of neighbours found that are no further than the last true one."""
    found = measure(rows, queries, numbers, K)
    last = truth.distances[:, -1:]
    return float((found.distances <= last * (1 + 1e-4) + 1e-3).mean())


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the seconds that it took."""
    began = time.perf_counter()
    value = function()
    return value, time.perf_counter() - began
