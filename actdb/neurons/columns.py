"""A neuron-major copy of one layer: every value of a neuron in one run of bytes, where a scan would read all chunks.

It lies in `indexes/<run>/neurons/` as a `.npy` file [neuron, row] in the stored dtype, rows in storage order, beside a
JSON file with a CRC-32C of each neuron's values and what the copy was made from. It takes the layer's size before
encoding.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from actdb.errors import DamageError, SelectionError
from actdb.schema import RunInfo, seal, unseal
from actdb.selection.view import Selection
from actdb.storage.commits import INDEXES
from actdb.storage.folder import Folder, write_error

if TYPE_CHECKING:
    from actdb.run import Run

BLOCK_BYTES = 64 * 1024**2
HEADER_BYTES = 128
MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True)
class Columns:
    """A copy that fits the run as it is: values [neuron, row], checked when they are read."""

    path: str
    values: npt.NDArray[Any]
    checksums: tuple[int, ...]

    def read(self, neurons: Sequence[int]) -> npt.NDArray[Any]:
        """Return the values [neuron, row] of some neurons; raises `DamageError` where a checksum does not fit."""
        for neuron in neurons:
            if crc32c(self.values[neuron]) != self.checksums[neuron]:
                raise DamageError(f"{self.path} is damaged; make it anew by actdb transpose")
        return self.values[list(neurons)]


def columns_name(run: str, site: str, layer: int | None) -> str:
    """Return the path of a copy without its suffix."""
    return f"{INDEXES}/{run}/neurons/{site}" + ("" if layer is None else f"-{layer}")


def build_columns(
    folder: Folder, run: "Run", site: str, layer: int | None, *, progress: Callable[[int, int], None] | None = None
) -> int:
    """Make or replace the copy of one layer; returns its bytes. Reads the layer once, in some 128 MiB of memory.

    `progress` gets (rows done, rows). Raises `SpaceError` or `WriteError` where it cannot be written.
    """
    rows = plane(run, site, layer)
    n_neurons, n_rows, dtype = rows.shape[-1], rows.n_rows, rows.dtype
    checksums, done = [0] * n_neurons, 0
    name = columns_name(run.name, site, layer)
    folder.make_parent(name)
    try:
        with folder.temporary(f"{name}.npy") as path:
            path.write_bytes(_header(dtype, (n_neurons, n_rows)))
            os.truncate(path, HEADER_BYTES + n_neurons * n_rows * dtype.itemsize)
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                target = np.ndarray((n_neurons, n_rows), dtype, memory, HEADER_BYTES)
                for block in rows.batches(max(1, BLOCK_BYTES // (n_neurons * dtype.itemsize))):
                    columns = np.ascontiguousarray(block.values.T)
                    target[:, done : done + len(block)] = columns
                    checksums = [crc32c(column, crc) for column, crc in zip(columns, checksums, strict=True)]
                    done += len(block)
                    if progress is not None:
                        progress(done, n_rows)
                del target
                memory.flush()
            folder.adopt(path, f"{name}.npy")
        record = {
            "made_from": _made_from(run),
            "checksums": checksums,
            "shape": [n_neurons, n_rows],
            "dtype": str(dtype),
        }
        folder.publish(f"{name}.json", seal(record))
    except OSError as exc:
        raise write_error(exc, str(folder.root)) from exc
    return n_neurons * n_rows * dtype.itemsize


def open_columns(folder: Folder, run: "Run", site: str, layer: int | None) -> Columns | None:
    """Return the copy of one layer; None where there is none, or it was made of fewer parts or another plan.

    Raises `DamageError` for files that are not what was written.
    """
    name = columns_name(run.name, site, layer)
    if not folder.exists(f"{name}.json"):
        return None
    record = _read_record(folder, name)
    if record["made_from"] != _made_from(run):
        return None
    path, shape, dtype = folder.path(f"{name}.npy"), tuple(record["shape"]), np.dtype(record["dtype"])
    rows = plane(run, site, layer)
    size = HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize
    if shape != (rows.shape[-1], rows.n_rows) or not path.exists() or path.stat().st_size != size:
        raise DamageError(f"{path} is damaged; make it anew by actdb transpose")
    values = np.memmap(folder.inside(f"{name}.npy"), dtype, "r", HEADER_BYTES, shape) if shape[1] else np.empty(shape)
    return Columns(str(path), values, tuple(record["checksums"]))


def check_columns(folder: Folder, info: RunInfo) -> Iterator[tuple[str, str]]:
    """Yield (path, what is wrong) of the damaged copies of a run; reads them whole."""
    for file in folder.names(f"{INDEXES}/{info.name}/neurons"):
        if not file.endswith(".json"):
            continue
        name = f"{INDEXES}/{info.name}/neurons/{file[:-5]}"
        try:
            record = _read_record(folder, name)
            content = memoryview(folder.read_bytes(f"{name}.npy"))[HEADER_BYTES:]
            size = record["shape"][1] * np.dtype(record["dtype"]).itemsize
            found = [crc32c(content[i * size : (i + 1) * size]) for i in range(record["shape"][0])]
            if found != record["checksums"]:
                raise DamageError(f"{folder.path(name)}.npy does not match its checksums")
        except DamageError as exc:
            yield f"{name}.npy", f"{exc}; make it anew by actdb transpose"


def plane(run: "Run", site: str, layer: int | None) -> Selection:
    """Return all rows of one layer of a site without heads; raises `SelectionError` for others."""
    selection = run[site] if layer is None else run[site].sel(layer=layer)
    if len(selection.dims) != 2 or selection.dims[0] != "row":
        needs = " and a layer" if "layer" in selection.dims else ""
        raise SelectionError(f"queries by neuron need a site of rows without heads{needs}; {site} is {selection.dims}")
    return selection


def _made_from(run: "Run") -> dict[str, Any]:
    return {"plan_hash": run.info.plan_hash, "parts": list(run.snapshot.parts)}


def _read_record(folder: Folder, name: str) -> dict[str, Any]:
    path = str(folder.path(f"{name}.json"))
    record = unseal(folder.read_bytes(f"{name}.json"), path)
    try:
        shape = [int(n) for n in record["shape"]]
        if len(shape) != 2 or len(record["checksums"]) != shape[0] or np.dtype(record["dtype"]).hasobject:
            raise ValueError("malformed")
        _ = record["made_from"]
    except (KeyError, TypeError, ValueError) as exc:
        raise DamageError(f"{path} is damaged; make it anew by actdb transpose") from exc
    return record


def _header(dtype: np.dtype[Any], shape: tuple[int, int]) -> bytes:
    """Return the header of a version 1.0 .npy file, of a fixed length."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    length = HEADER_BYTES - len(MAGIC) - 2
    return MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"
