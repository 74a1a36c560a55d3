"""Writing one array [12 layers, rows, 768] of float16, layer by layer, and syncing it to disk.

Every candidate gets the same blocks from memory and ends with its files synced (fsync), for what lies in the page cache
only is not written yet. raw: no codec, but actdb's checksums; lz4: Blosc lz4 with bit-shuffling, level 1, then CRC-32C,
the same codec for all. Values of a standard normal, which compress as little as activations do.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import data
from benchmarks.harness import Goal, Table, missing, note, peers, take_turns

SCALE = {"full": (16_384, 3), "quick": (4096, 3), "tiny": (64, 1)}  # rows, rounds
CHECKED = "each chunk is checksummed and entered in an index by Python, one thread writing"
LAYERS, WIDTH = 12, 768
CHUNK = 128  # rows: what actdb chooses, 192 KiB
PEERS = ("tensorstore", "zarrs", "h5py", "lance", "datasets")
Write = Callable[[], Any]


def run(size: str, folder: Path) -> Table:
    """Return GB/s of each candidate and codec."""
    n_rows, rounds = SCALE[size]
    values = np.random.default_rng(0).standard_normal((LAYERS, n_rows, WIDTH), np.float32).astype(np.float16)
    out, rows, goals = folder / "out", [], []

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()

    for codec in ("raw", "lz4"):
        ways = candidates(values, out, codec)
        for name, write in ways.items():
            clear()
            write()
            check(name, values, out, codec)
        medians = take_turns(
            {name: lambda write=write: (write(), sync(out)) for name, write in ways.items()},
            rounds=rounds,
            before=clear,
        )
        speed = {name: values.nbytes / 1e9 / t for name, t in medians.items()}
        rows += [(codec, name, v, v / speed["actdb"]) for name, v in speed.items()]
        if codec == "raw":
            goals += [
                Goal("write raw ÷ raw file", speed["actdb"] / speed["raw file"], 0.8, why=CHECKED),
                Goal("write raw ÷ tensorstore", speed["actdb"] / speed.get("tensorstore", np.inf), 1.5),
            ]
        else:
            best = max(v for name, v in speed.items() if name != "actdb")
            goals.append(Goal("write with the default codec ÷ best peer", speed["actdb"] / best, 1.3))
    header = ("codec", "writer", "GB/s, synced", "÷ actdb")
    return Table("Writing", note(__doc__) + missing(*PEERS), header, rows, goals, "GB/s, synced")


def candidates(values: npt.NDArray[np.float16], out: Path, codec: str) -> dict[str, Write]:
    """Return the writers of one codec that are installed."""
    found = peers(*PEERS)
    lengths = np.full(values.shape[1] // 64, 64)
    ways: dict[str, Write] = {"actdb": lambda: data.write_run(out / "x", {"resid_post": values}, lengths, codec)}
    if codec == "raw":
        ways |= {"raw file": lambda: values.tofile(out / "x"), "safetensors": lambda: save_safetensors(values, out)}
        if "h5py" in found:
            ways["h5py"] = lambda: save_h5py(found["h5py"], values, out)
        if "lance" in found:
            ways["Lance"] = lambda: save_lance(found["lance"], values, out)
        if "datasets" in found:
            ways["HF Datasets"] = lambda: save_datasets(found["datasets"], values, out)
    if "tensorstore" in found:
        ways["tensorstore"] = lambda: save_tensorstore(found["tensorstore"], values, out, codec)
    ways["zarr-python"] = lambda: save_zarr(values, out, codec)
    if "zarrs" in found:
        ways["zarrs"] = lambda: save_zarrs(values, out, codec)
    return ways


def save_safetensors(values: npt.NDArray[np.float16], out: Path) -> None:
    """Write one file."""
    from safetensors.numpy import save_file

    save_file({str(layer): block for layer, block in enumerate(values)}, out / "x")


def save_h5py(h5py: Any, values: npt.NDArray[np.float16], out: Path) -> None:
    """Write one contiguous dataset."""
    with h5py.File(out / "x", "w") as file:
        dataset = file.create_dataset("x", values.shape, values.dtype)
        for layer, block in enumerate(values):
            dataset[layer] = block


def save_lance(lance: Any, values: npt.NDArray[np.float16], out: Path) -> None:
    """Write a table of a layer and a vector."""
    import pyarrow as pa

    def batches() -> Any:
        for layer, block in enumerate(values):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), WIDTH)
            yield pa.record_batch([pa.array(np.full(len(block), layer, np.int32)), vectors], ["layer", "vector"])

    schema = pa.schema([("layer", pa.int32()), ("vector", pa.list_(pa.float16(), WIDTH))])
    lance.write_dataset(batches(), str(out / "x"), schema=schema)


def save_datasets(datasets: Any, values: npt.NDArray[np.float16], out: Path) -> None:
    """Write Arrow files a row at a time in blocks, as `save_to_disk` does."""
    import pyarrow as pa

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), WIDTH)
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table({"vector": vectors})).save_to_disk(str(out / "x"))


def save_tensorstore(tensorstore: Any, values: npt.NDArray[np.float16], out: Path, codec: str) -> None:
    """Write Zarr v3 shards, one a layer."""
    inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if codec == "lz4":
        blosc = {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "typesize": 2, "blocksize": 0}
        inner.append({"name": "blosc", "configuration": blosc})
    shard = {"chunk_shape": [1, CHUNK, WIDTH], "codecs": [*inner, {"name": "crc32c"}]}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(out / "x")},
        "metadata": {
            "shape": list(values.shape),
            "data_type": "float16",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1, _shard_rows(values), WIDTH]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": shard}],
        },
    }
    store = tensorstore.open(spec, create=True).result()
    for layer, block in enumerate(values):
        store[layer].write(block).result()


def save_zarr(values: npt.NDArray[np.float16], out: Path, codec: str) -> None:
    """Write Zarr v3 shards, one a layer."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    blosc = BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=2)
    array = zarr.create_array(
        str(out / "x"),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, CHUNK, WIDTH),
        shards=(1, _shard_rows(values), WIDTH),
        compressors=[blosc, Crc32cCodec()] if codec == "lz4" else [Crc32cCodec()],
    )
    for layer, block in enumerate(values):
        array[layer] = block


def save_zarrs(values: npt.NDArray[np.float16], out: Path, codec: str) -> None:
    """Write as zarr-python does, with the zarrs codec pipeline."""
    import zarr

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        save_zarr(values, out, codec)


def check(name: str, values: npt.NDArray[np.float16], out: Path, codec: str) -> None:
    """Assert that what was written reads back the same."""
    import zarr

    import actdb

    if name == "actdb":
        read = actdb.open(out / "x").run()["resid_post"].sel(layer=LAYERS - 1).numpy()
    elif name in ("tensorstore", "zarr-python", "zarrs"):
        read = zarr.open_array(out / "x", mode="r")[LAYERS - 1]
    elif name == "raw file":
        read = np.fromfile(out / "x", np.float16).reshape(values.shape)[LAYERS - 1]
    else:
        assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) >= values.nbytes, name
        return
    assert np.array_equal(read, values[LAYERS - 1]), (name, codec)


def sync(out: Path) -> None:
    """Sync every file below a folder."""
    for path in (path for path in out.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _shard_rows(values: npt.NDArray[np.float16]) -> int:
    return -(-values.shape[1] // CHUNK) * CHUNK
