"""Exact nearest neighbours by l2: actdb reading its store, against libraries that hold the rows as float32 in memory.

k is 10. `trained` rows are the last residual stream of the model that the demo ships, or of the folder named by
ACTDB_BENCH_MODEL over the prompts in ACTDB_BENCH_PROMPTS; `768 wide` rows are made up, near a plane of 32 dimensions.
Queries are rows of their own. The graph is the neighbours of every row. float16, lz4, in the page cache; the memory is
what the process grows by at its peak, rows in memory included.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from actdb.demo import MODEL, PROMPTS
from actdb.neighbors import exact
from actdb.neighbors.device import choose_processor
from actdb.neighbors.map import make_map
from actdb.neighbors.row import Rows, make_plane
from benchmarks import data
from benchmarks.harness import Goal, Table, missing, note, peers, take_turns
from benchmarks.memory import resident_mb

SCALE: dict[str, tuple[tuple[int, ...], int, int]] = {  # rows 768 wide, rows of the graph, queries
    "full": ((10_000, 100_000), 100_000, 2_000),
    "quick": ((10_000, 50_000), 10_000, 1_000),
    "tiny": ((600,), 600, 20),
}
TRAINED = {"full": 100_000, "quick": 10_000, "tiny": 300}
PEERS = ("faiss", "sklearn")
DECODED = "each search decodes and widens the rows that FAISS holds; among few, the first selection tells too"
WIDTH, INNER, TOKENS, K, SAMPLE = 768, 32, 100, 10, 8192
TORCH_QUERIES = 256
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def run(size: str, folder: Path) -> Table:
    """Return queries a second of each way, and seconds of the graph."""
    counts, n_graph, n_queries = SCALE[size]
    places = [("trained", trained_rows(folder / "trained.actdb", TRAINED[size]))]
    places += [("768 wide", made_rows(folder / f"{n}.actdb", n)) for n in counts]
    rows: list[tuple[Any, ...]] = []
    goals: list[Goal] = []
    for name, opened in places:
        speeds = time_queries(opened, n_queries, beside=("torch", *PEERS))
        what = f"{len(opened):,} rows, {name}"
        rows += [(what, way, f"{speed:,.0f} queries/s", speed) for way, speed in speeds.items()]
        for peer, bound in (("faiss flat", 0.9), ("torch cdist + topk", 1.5)):
            if peer in speeds and size != "tiny":
                goals.append(
                    Goal(f"exact search of {what} ÷ {peer}", speeds["actdb"] / speeds[peer], bound, why=DECODED)
                )
    graph = next(opened for name, opened in places if name == "768 wide" and len(opened) == n_graph)
    costs, what = measure_graph(graph, folder, size), f"graph of {n_graph:,} rows"
    rows += [(what, way, f"{seconds:,.3g} s", n_graph / seconds) for way, (seconds, _) in costs.items()]
    rows += [(what, f"{way}, memory", f"{grown:,.0f} MiB", "") for way, (_, grown) in costs.items()]
    if "faiss flat" in costs:
        ratio = costs["actdb"][0] / costs["faiss flat"][0]
        goals.append(Goal(f"time of the {what} ÷ faiss flat", ratio, 1.1, at_least=False))
    header = ("what", "way", "measured", "rows/s")
    return Table("Exact neighbours", note(__doc__) + missing(*PEERS), header, rows, goals, "rows/s")


def time_queries(rows: Rows, n_queries: int, *, beside: Sequence[str]) -> dict[str, float]:
    """Return queries a second of actdb and of libraries beside it, after all gave the same distances."""
    queries, values = take_queries(rows, n_queries, seed=1), rows.read(0, len(rows))
    ways: dict[str, Callable[[], Floats]] = {"actdb": partial(search, rows, queries)}
    found = peers(*beside)
    if "faiss" in found:
        ways["faiss flat"] = partial(faiss_search, faiss_index(values), queries)
    if "torch" in found:
        ways["torch cdist + topk"] = partial(torch_search, values, queries)
    if "sklearn" in found:
        ways["scikit-learn brute"] = partial(sklearn_search, values, queries)
    truth = np.sqrt(((queries[0].astype(np.float64) - values.astype(np.float64)) ** 2).sum(1))
    for name, way in ways.items():
        found_distances = way()[0]  # the first is the query itself, at a distance that is all rounding
        assert np.allclose(found_distances[1:], np.sort(truth)[1:K], rtol=1e-3), name
    return {name: len(queries) / seconds for name, seconds in take_turns(ways, rounds=3).items()}


def take_queries(rows: Rows, n: int, *, seed: int) -> Floats:
    """Return some of the rows, at most half, in storage order."""
    chosen = np.random.default_rng(seed).choice(len(rows), min(n, len(rows) // 2), replace=False)
    return rows.take(np.sort(chosen))


def measure_graph(rows: Rows, folder: Path, size: str) -> dict[str, tuple[float, float]]:
    """Return the seconds of each way to every row's neighbours, and the MiB that its process grows by.

    Each has a process of its own; the tiny size, which tests that it runs, has this one.
    """
    path, costs, found = rows.plane.run.source("resid_post").reader._folder.root, {}, {}
    for way in ("actdb", *(("faiss flat",) if "faiss" in peers("faiss") else ())):
        out = folder / f"{way}.npz"
        if size == "tiny":
            make_graph(way, path, out)
        else:
            subprocess.run([sys.executable, "-m", "benchmarks.neighbors", way, str(path), str(out)], check=True)
        with np.load(out) as held:
            costs[way], found[way] = (float(held["seconds"]), float(held["grown"])), held["distances"]
    for distances in found.values():  # equal rows are at a distance of rounding
        assert np.allclose(distances, found["actdb"], rtol=1e-3, atol=0.05)
    return costs


def make_graph(way: str, path: Path, out: Path) -> None:
    """Find the neighbours of every row; keeps some distances, the seconds, and what this process grew by at its peak.

    FAISS gets its rows in memory before the clock starts; their memory counts.
    """
    rows = open_rows(path, 0)
    rows.read(0, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage would tell the parent's too
    before = resident_mb()
    values = rows.read(0, len(rows)) if way == "faiss flat" else None
    began = time.perf_counter()
    distances = join(rows) if values is None else faiss_join(values)
    seconds = time.perf_counter() - began
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    np.savez(out, distances=distances[:SAMPLE], seconds=seconds, grown=max(peak_kb / 1024 - before, 0.1))


def search(rows: Rows, queries: Floats) -> Floats:
    """Return distances [query, k] by actdb, from the store."""
    nobody = exact.nothing_excluded(len(queries))
    return exact.search(rows, queries, K, nobody, choose_processor("cpu")).distances


def join(rows: Rows) -> Floats:
    """Return distances [row, k] of every row's neighbours by actdb, from the store."""
    numbers = np.arange(len(rows))
    excluded = exact.Excluded(*rows.around(numbers, exclude_prompt=False, exclude_within=0))
    return exact.join(rows, K, excluded, choose_processor("cpu")).distances


def faiss_index(values: Floats) -> Any:
    """Return a flat index of rows in memory."""
    import faiss

    index = faiss.IndexFlatL2(values.shape[1])
    index.add(values)
    return index


def faiss_search(index: Any, queries: Floats) -> Floats:
    """Return distances [query, k] by FAISS."""
    return np.asarray(np.sqrt(index.search(queries, K)[0]), np.float32)


def faiss_join(values: Floats) -> Floats:
    """Return distances [row, k] of rows' neighbours by FAISS, themselves left out."""
    return np.asarray(np.sqrt(faiss_index(values).search(values, K + 1)[0][:, 1:]), np.float32)


def torch_search(values: Floats, queries: Floats) -> Floats:
    """Return distances [query, k] by torch, some queries at once."""
    import torch

    held = torch.from_numpy(values)
    blocks = torch.from_numpy(queries).split(TORCH_QUERIES)
    found = [torch.cdist(block, held).topk(K, largest=False).values for block in blocks]
    return np.asarray(torch.cat(found).numpy())


def sklearn_search(values: Floats, queries: Floats) -> Floats:
    """Return distances [query, k] by scikit-learn's brute force."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(values).kneighbors(queries)
    return np.asarray(distances, np.float32)


def trained_rows(path: Path, n_rows: int) -> Rows:
    """Harvest the last residual stream of a trained model, and return about so many rows of it."""
    model = os.environ.get("ACTDB_BENCH_MODEL", MODEL)
    prompts = os.environ.get("ACTDB_BENCH_PROMPTS", PROMPTS)
    run = actdb.harvest(model, Path(prompts), path, sites=["resid_post"], stats=())
    ends = np.cumsum(run.prompt_index.n_rows)
    last = max(1, int(np.searchsorted(ends, n_rows)))
    return open_rows(path, run.layers[-1], f"prompt_id < {last}")


def made_rows(path: Path, n_rows: int) -> Rows:
    """Write rows 768 wide near a plane of 32 dimensions, by blocks, and return them."""
    generator = np.random.default_rng(0)
    plane = generator.standard_normal((INNER, WIDTH), np.float32)
    values = np.empty((1, n_rows, WIDTH), np.float16)
    for begin in range(0, n_rows, 10_000):
        block = generator.standard_normal((min(10_000, n_rows - begin), INNER), np.float32) @ plane
        values[0, begin : begin + len(block)] = block + generator.standard_normal(block.shape, np.float32)
    data.write_run(path, {"resid_post": values}, np.full(n_rows // TOKENS, TOKENS), "lz4")
    return open_rows(path, 0)


def open_rows(path: Path, layer: int, where: str | None = None) -> Rows:
    """Return the rows of one layer, compared by l2."""
    run = actdb.open(path).run()
    plane = make_plane(run, "resid_post", layer=layer, head=None)
    return Rows(plane, make_map(run, plane.width), "l2", where)


if __name__ == "__main__":
    make_graph(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
