"""The same values behind each reader: actdb's own files for Zarr readers, and a file of its own for each other peer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from benchmarks import data
from benchmarks.harness import peers

Values = npt.NDArray[np.float16]
Read = Callable[[int, int | None, slice], npt.NDArray[np.float16]]
PEERS = ("tensorstore", "zarrs", "h5py", "lance", "datasets")
SHAPES = {"z": (4, 12, 64), "resid_post": (4, 768)}
HEADS = 12


def make(folder: Path, n_prompts: int, codec: str) -> tuple[dict[str, Values], npt.NDArray[np.int64]]:
    """Write both sites of random prompts of 20 to 128 tokens; returns values and lengths."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 129, n_prompts)
    n_rows = int(lengths.sum())
    sites = {
        name: generator.standard_normal((*planes, n_rows, width), np.float32).astype(np.float16)
        for name, (*planes, width) in SHAPES.items()
    }
    data.write_run(folder / "x.actdb", sites, lengths, codec)
    if codec == "raw":
        for name, values in sites.items():
            _write_peers(folder, name, values)
    return sites, lengths


def readers(folder: Path, site: str, lengths: npt.NDArray[np.int64], codec: str) -> dict[str, Read]:
    """Return functions (layer, head, rows) → values of each reader that is installed; all open their files once."""
    import zarr

    found = peers(*PEERS)
    selection = actdb.open(folder / "x.actdb").run()[site]
    starts = np.cumsum(lengths) - lengths
    prompts = {int(start): i for i, start in enumerate(starts)}

    def read_actdb(layer: int, head: int | None, rows: slice) -> npt.NDArray[np.float16]:
        if rows == slice(None):
            return np.asarray(selection.sel(layer=layer, head=head).numpy())
        values = np.asarray(selection.sel(layer=layer, head=head, prompt=prompts[rows.start]).numpy())
        return values if values.flags.owndata else values.copy()  # a view of the mapped file is not read yet

    array_path = folder / "x.actdb" / "arrays.zarr" / data.RUN / site
    stock = zarr.open_array(array_path, mode="r")
    made: dict[str, Read] = {
        "actdb": read_actdb,
        "zarr-python": lambda layer, head, rows: stock[_key(layer, head, rows)],  # type: ignore[dict-item]
    }
    if "tensorstore" in found:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array_path)}}
        store = found["tensorstore"].open(spec).result()
        made["tensorstore"] = lambda layer, head, rows: store[_key(layer, head, rows)].read().result()
    if "zarrs" in found:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            fast = zarr.open_array(array_path, mode="r")
        made["zarrs"] = lambda layer, head, rows: fast[_key(layer, head, rows)]  # type: ignore[assignment]
    if codec == "raw":
        made |= _raw_readers(folder, site, found)
    return made


def _raw_readers(folder: Path, site: str, found: dict[str, Any]) -> dict[str, Read]:
    from safetensors import safe_open

    plain = np.load(folder / f"{site}.npy", mmap_mode="r")
    tensors: Any = safe_open(folder / f"{site}.safetensors", framework="np").__enter__().get_slice("x")
    made: dict[str, Read] = {
        "np.memmap": lambda layer, head, rows: np.array(plain[_key(layer, head, rows)]),
        "safetensors": lambda layer, head, rows: _squeeze(tensors[_ranges(layer, head, rows)], head),
    }
    if "h5py" in found:
        dataset = found["h5py"].File(folder / f"{site}.h5", "r")["x"]
        made["h5py"] = lambda layer, head, rows: dataset[_key(layer, head, rows)]
    n_rows = plain.shape[-2]
    if "lance" in found:
        table = found["lance"].dataset(str(folder / f"{site}.lance"))
        made["Lance"] = lambda layer, head, rows: _vectors(table.take(_indices(layer, head, rows, n_rows)))
    if "datasets" in found:
        held = found["datasets"].load_from_disk(str(folder / f"{site}.hf")).with_format("arrow")
        made["HF Datasets"] = lambda layer, head, rows: _vectors(held[_range(layer, head, rows, n_rows)])
    return made


def _write_peers(folder: Path, site: str, values: Values) -> None:
    import pyarrow as pa
    from safetensors.numpy import save_file

    found = peers(*PEERS)
    np.save(folder / f"{site}.npy", values)
    save_file({"x": values}, folder / f"{site}.safetensors")
    if "h5py" in found:
        with found["h5py"].File(folder / f"{site}.h5", "w") as file:
            file["x"] = values
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[-1])
    table = pa.table({"vector": vectors})
    if "lance" in found:
        found["lance"].write_dataset(table, str(folder / f"{site}.lance"))
    if "datasets" in found:
        found["datasets"].disable_progress_bars()
        found["datasets"].Dataset(table).save_to_disk(str(folder / f"{site}.hf"))


def _key(layer: int, head: int | None, rows: slice) -> tuple[Any, ...]:
    return (layer, rows) if head is None else (layer, head, rows)


def _ranges(layer: int, head: int | None, rows: slice) -> tuple[slice, ...]:
    heads = () if head is None else (slice(head, head + 1),)
    return (slice(layer, layer + 1), *heads, rows)


def _squeeze(values: Values, head: int | None) -> Values:
    return values[0] if head is None else values[0, 0]


def _range(layer: int, head: int | None, rows: slice, n_rows: int) -> slice:
    begin, end, _ = rows.indices(n_rows)
    plane = layer if head is None else layer * HEADS + head
    return slice(plane * n_rows + begin, plane * n_rows + end)


def _indices(layer: int, head: int | None, rows: slice, n_rows: int) -> list[int]:
    chosen = _range(layer, head, rows, n_rows)
    return list(range(chosen.start, chosen.stop))


def _vectors(table: Any) -> Values:
    column = table.column("vector").combine_chunks()
    return np.asarray(column.flatten().to_numpy()).reshape(len(column), -1)
