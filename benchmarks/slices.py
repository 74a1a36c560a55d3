"""Reading one prompt of one head, and scanning one head over all rows, against stock readers of the same values.

A site `z` of GPT-2-small's shape (12 layers × 12 heads × 64, float16, values of a standard normal) over prompts of 20
to 128 tokens, through the public `sel(...).numpy()`. zarr-python and tensorstore read the very files that actdb wrote;
memmap reads a plain file that holds the same array. Everything is in the page cache.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import actdb
from actdb.harvesting.pipeline import PartWriter, Writers
from actdb.harvesting.plan import chunk_length
from actdb.schema import RunInfo, SiteSpec, digest
from actdb.storage import commits, verify
from actdb.storage.folder import Folder
from benchmarks.harness import Table, latencies, take_turns

SCALE = {"full": (600, 300, 7), "quick": (200, 100, 3), "tiny": (12, 5, 1)}  # prompts, slices, rounds
LAYERS, HEADS, WIDTH = 12, 12, 64
LAYER, HEAD = 5, 7


def run(size: str, folder: Path) -> Table:
    """Return microseconds a slice and GB/s a scan of each reader."""
    n_prompts, n_slices, rounds = SCALE[size]
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 129, n_prompts)
    values = generator.standard_normal((LAYERS, HEADS, int(lengths.sum()), WIDTH), np.float32).astype(np.float16)
    starts = np.cumsum(lengths) - lengths
    plain = np.memmap(folder / "plain", np.float16, "w+", shape=values.shape)
    plain[...] = values
    rows = []
    for codec in ("raw", "lz4"):
        path = folder / f"{codec}.actdb"
        write(path, values, lengths, codec)
        rows += compare(path, codec, plain, starts, lengths, generator.integers(0, n_prompts, n_slices), rounds)
    header = ("codec", "reader", "slice p50 µs", "slice p95 µs", "scan of a head, GB/s")
    return Table("Slices and scans", (__doc__ or "").strip().replace("\n", " "), header, rows)


def compare(
    path: Path,
    codec: str,
    plain: npt.NDArray[np.float16],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    rounds: int,
) -> list[tuple[str, str, float, float, float]]:
    """Time actdb and its peers on one database, after asserting that they return the same."""
    import tensorstore
    import zarr

    site = actdb.open(path).run()["z"]
    array_path = path / "arrays.zarr" / "bench" / "z"
    stock = zarr.open_array(array_path, mode="r")
    store = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array_path)}}).result()

    def rows(prompt: int) -> slice:
        return slice(int(starts[prompt]), int(starts[prompt] + lengths[prompt]))

    slices = {
        "actdb": lambda p: site.sel(layer=LAYER, head=HEAD, prompt=p).numpy(),
        "np.memmap": lambda p: np.array(plain[LAYER, HEAD, rows(p)]),
        "tensorstore": lambda p: store[LAYER, HEAD, rows(p)].read().result(),
        "zarr-python": lambda p: stock[LAYER, HEAD, rows(p)],
    }
    scans = {
        "actdb": lambda: site.sel(layer=LAYER, head=HEAD).numpy(),
        "np.memmap": lambda: np.array(plain[LAYER, HEAD]),
        "tensorstore": lambda: store[LAYER, HEAD].read().result(),
        "zarr-python": lambda: stock[LAYER, HEAD],
    }
    wanted = np.array(plain[LAYER, HEAD])
    for name, scan in scans.items():
        assert np.array_equal(scan(), wanted), name
        assert np.array_equal(slices[name](3), wanted[rows(3)]), name
    quick, whole = latencies(slices, keys.tolist()), take_turns(scans, rounds=rounds)
    return [(codec, name, *quick[name], wanted.nbytes / 1e9 / whole[name]) for name in slices]


def write(path: Path, values: npt.NDArray[np.float16], lengths: npt.NDArray[np.int64], codec: str) -> None:
    """Write a run of one site and one part, prompt after prompt, through actdb's own writers."""
    n_rows, name = values.shape[2], "bench"
    chunk = chunk_length(WIDTH * 2, LAYERS * HEADS, n_rows)
    capacity = -(-n_rows // chunk) * chunk
    spec = SiteSpec(
        name="z",
        hook="attn.hook_z",
        dims=("layer", "head", "row", "d_head"),
        shape=values.shape,
        shard_shape=(LAYERS, HEADS, capacity, WIDTH),
        chunk_shape=(1, 1, chunk, WIDTH),
        dtype="float16",
        codec=codec,
        layers=tuple(range(LAYERS)),
    )
    folder = Folder.create(path)
    entries = lengths * (lengths + 1) // 2
    table = {
        "prompt_id": np.arange(len(lengths)),
        "n_tokens": lengths,
        "part": np.zeros(len(lengths), np.int64),
        "row_start": np.cumsum(lengths) - lengths,
        "n_rows": lengths,
        "entry_start": np.cumsum(entries) - entries,
        "n_entries": entries,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    folder.publish(f"runs/{name}/prompts.parquet", sink.getvalue().to_pybytes())
    plan = {"causal": True, "positions": "all", "statistics": []}
    files = (folder.record(f"runs/{name}/prompts.parquet"),)
    info = RunInfo(name, digest(plan), plan, {"model": name}, (spec,), 1, len(lengths), n_rows, 0, files)
    commits.claim_run(folder, info)
    for file, content in verify.metadata_files(info).items():
        folder.publish(file, content)
    writers = Writers()
    writer = PartWriter(folder, info, 0, writers, computed_dtype="float16")
    for layer in range(LAYERS):
        writer.append("z", layer, values[layer])
    writer.finish(dict, replace=False, done=lambda commit: None)
    writers.close()
