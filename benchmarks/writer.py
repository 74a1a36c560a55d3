"""What the writers take from a model that costs nothing: blocks of GPT-2-small's four sites from memory, at full speed.

This is what a fast GPU would ask for. Cores are processor time over wall time. The floor for comparison is writing the
same bytes to one file in blocks of 4 MiB, and syncing it.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from actdb.harvesting.pipeline import PartWriter, Writers
from actdb.harvesting.plan import chunk_length
from actdb.schema import SiteSpec
from benchmarks import data
from benchmarks.harness import Table, note

SCALE = {"full": (8, 3), "quick": (2, 2), "tiny": (1, 1)}  # batches, rounds
TOKENS, LAYERS, HEADS = 2048, 12, 12
ENTRIES = 16 * 128 * 129 // 2
SHAPES = {"resid_post": ((), TOKENS, 768), "mlp_post": ((), TOKENS, 3072), "z": ((HEADS,), TOKENS, 64)}


def run(size: str, folder: Path) -> Table:
    """Return GB/s and cores of each codec and number of threads."""
    n_batches, rounds = SCALE[size]
    tokens = 64 if size == "tiny" else TOKENS
    blocks = made_blocks(tokens)
    n_bytes = sum(block.nbytes for block in blocks.values()) * LAYERS * n_batches
    threads = sorted({1, 2, os.cpu_count() or 2})
    ways: dict[tuple[str, str], Callable[[], None]] = {("", "plain file"): lambda: plain_file(folder / "x", n_bytes)}
    for codec in ("raw", "lz4"):
        for n_threads in threads:
            label = f"actdb, {n_threads} encoder threads"
            ways[codec, label] = lambda c=codec, n=n_threads: feed(folder / "x", blocks, n_batches, c, n)
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, function in ways.items():
            began, used = time.perf_counter(), time.process_time()
            function()
            wall = time.perf_counter() - began
            seen[way].append((n_bytes / 1e9 / wall, (time.process_time() - used) / wall))
            remove(folder / "x")
    rows = [(*way, *(float(v) for v in np.median(values, axis=0))) for way, values in seen.items()]
    header = ("codec", "writer", "GB/s of values, synced", "cores used")
    return Table("Writer alone", note(__doc__), header, rows, plotted="GB/s of values, synced")


def made_blocks(tokens: int) -> dict[str, np.ndarray]:
    """Return one layer's block of each site."""
    generator = np.random.default_rng(0)
    shapes = {name: (*planes, tokens, width) for name, (planes, _, width) in SHAPES.items()}
    shapes["pattern"] = (HEADS, ENTRIES * tokens // TOKENS)
    return {name: generator.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}


def feed(path: Path, blocks: dict[str, np.ndarray], n_batches: int, codec: str, n_threads: int) -> None:
    """Hand batches to the writers as fast as they take them, and commit."""
    specs = tuple(spec(name, block, n_batches, codec) for name, block in blocks.items())
    n_rows = blocks["resid_post"].shape[0] * n_batches
    folder, info = data.claim(path, specs, np.full(n_rows // 64, 64))
    writers = Writers(n_threads)
    part = PartWriter(folder, info, 0, writers, computed_dtype="float16")
    for _ in range(n_batches):
        for layer in range(LAYERS):
            for name, block in blocks.items():
                part.append(name, layer, block)
    part.finish(dict, replace=False, done=lambda commit: None)
    writers.close()


def spec(name: str, block: np.ndarray, n_batches: int, codec: str) -> SiteSpec:
    """Return a site whose one part holds all batches of a block."""
    if name != "pattern":
        *heads, n_rows, width = block.shape
        return data.site_spec(name, (LAYERS, *heads, n_rows * n_batches, width), codec)
    length = block.shape[1] * n_batches
    chunk = chunk_length(2, LAYERS * HEADS, length)
    shard = (LAYERS, HEADS, -(-length // chunk) * chunk)
    shape, chunks = (LAYERS, HEADS, length), (1, 1, chunk)
    layers = tuple(range(LAYERS))
    return SiteSpec(name, name, ("layer", "head", "entry"), shape, shard, chunks, "float16", codec, layers=layers)


def plain_file(path: Path, n_bytes: int) -> None:
    """Write a file of as many bytes."""
    block = np.random.default_rng(0).bytes(4 * 1024**2)
    with open(path, "wb", buffering=0) as file:
        for _ in range(max(n_bytes // len(block), 1)):
            file.write(block)
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
