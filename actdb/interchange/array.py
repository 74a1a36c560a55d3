"""A selection as named arrays in one .npz or .safetensors file, in the order of `sel()`.

Row sites: `values` as `numpy()` gives it, with `prompt`, `pos` and `token_id` a row. Patterns: `prompt_<id>` [layer,
head, query, key] and `token_id_<id>` a prompt (`values` where an int selected the prompt). For both `prompt_id` lists
the prompts, `label_<name>` their labels in that order, and `vocabulary_id`, `vocabulary` the texts of the tokens.

safetensors holds no text: there a label that is text is a code, −1 where a prompt lacks it, and the texts stand in the
header as JSON, under the label's name and `vocabulary`. Which prompts lack a label says `label_<name>_missing`, where
some do.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.interchange.prompt_table import PromptTable
from actdb.interchange.record import BATCH_BYTES, describe
from actdb.selection import streams

if TYPE_CHECKING:
    import pyarrow as pa

    from actdb.selection.view import Selection

Array = npt.NDArray[Any]
CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "uint16": "U16", "uint32": "U32", "int64": "I64"}
CODES |= {"int32": "I32", "bool": "BOOL"}
COPY_BYTES = 16 * 1024**2
MAX_HEADER_BYTES = 100_000_000  # beyond, safetensors refuses to read a file


def write_npz(selection: "Selection", table: PromptTable, path: Path) -> None:
    """Write an uncompressed .npz that `numpy.load` reads without unpickling."""
    arrays = _small_arrays(selection, table)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        for name, array in arrays.items():
            _write_member(file, name, array)
        for name, array in _pieces(selection, path):
            _write_member(file, name, array)


def write_safetensors(selection: "Selection", table: PromptTable, path: Path) -> None:
    """Write a .safetensors file; raises `SettingError` where the texts of its labels do not fit the header."""
    arrays, texts = _without_texts(_small_arrays(selection, table))
    texts["actdb"] = json.dumps(describe(selection, table))
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()} | _piece_shapes(selection)
    header: dict[str, Any] = {"__metadata__": texts}
    offset = 0
    for name in sorted(shapes, key=lambda name: -shapes[name][0].itemsize):  # each array aligned to its own values
        dtype, shape = shapes[name]
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise SettingError(f"{path.name}: the labels' texts fill {len(text):,} bytes of header; use parquet or npz")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        base = file.tell()
        for name, array in (*arrays.items(), *_pieces(selection, path)):
            file.seek(base + header[name]["data_offsets"][0])
            for block in _blocks(array):
                file.write(np.ascontiguousarray(block).data)
        file.truncate(base + offset)


def _write_member(file: zipfile.ZipFile, name: str, array: Array) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_2_0(member, header)
        for block in _blocks(array):
            member.write(np.ascontiguousarray(block).data.cast("B") if block.size else b"")


def _blocks(array: Array) -> Iterator[Array]:
    """Yield an array flat, some 16 MiB at a time: it may be larger than the memory."""
    flat = array.reshape(-1)
    step = max(1, COPY_BYTES // array.dtype.itemsize)
    return (flat[begin : begin + step] for begin in range(0, len(flat), step))


def _piece_shapes(selection: "Selection") -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return the dtypes and shapes of the arrays that `_pieces` yields."""
    if not selection._is_pattern or selection._single:
        return {"values": (selection.dtype, selection.shape)}
    ids = np.unique(selection.prompt).tolist()
    return {f"prompt_{i}": (selection.dtype, selection.sel(prompt=i).shape) for i in ids}


def _pieces(selection: "Selection", path: Path) -> Iterator[tuple[str, Array]]:
    """Yield the activations: of row sites one array in a scratch file beside `path`, of patterns one a prompt."""
    if not selection._is_pattern:
        with _gathered(selection, path.with_name(f"{path.name}.values")) as values:
            yield "values", values
    elif selection._single:
        yield "values", selection.numpy()
    else:
        once = selection.sel(prompt=np.unique(selection.prompt))
        size = max(1, BATCH_BYTES // max(1, once.nbytes // max(1, len(once.prompt))))
        for block in once.batches(size):
            for prompt, square in zip(block.prompt.tolist(), block.values, strict=True):
                yield f"prompt_{prompt}", square


@contextmanager
def _gathered(selection: "Selection", scratch: Path) -> Iterator[Array]:
    """Yield the values in the order of `sel()`, on disk: each chunk is read once and its rows put in their places."""
    stream, n_rows = selection._stream(), selection.n_rows
    rows = selection._rows
    places = replace(rows, first_pos=np.cumsum(rows.counts) - rows.counts).in_storage_order().positions()
    numbered = replace(stream, prompt=places, pos=None)  # each row goes by its place in the order of `sel()`
    shape = (len(stream.planes), n_rows, *stream.reader._feature_shape(stream.feature))
    if not prod(shape):
        yield np.empty(selection.shape, selection.dtype)
        return
    try:
        values = np.memmap(scratch, selection.dtype, "w+", shape=shape)
        for block in streams.scan(numbered, max(1, BATCH_BYTES // stream.row_bytes)):
            values[:, block.prompt] = block.values.reshape(len(values), *block.values.shape[len(stream.plane_shape) :])
        yield values.reshape(selection.shape)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _small_arrays(selection: "Selection", table: PromptTable) -> dict[str, Array]:
    """Return what says which prompt, position, token and label the activations belong to."""
    ids = np.unique(selection.prompt)
    arrays: dict[str, Array] = {"prompt_id": ids}
    if selection._is_pattern:
        lengths = selection._prompts.n_tokens
        tokens = {f"token_id_{i}": table.token_ids(np.full(lengths[i], i), np.arange(lengths[i])) for i in ids.tolist()}
        arrays |= tokens
        seen = [*tokens.values()]
    elif "prompt" in selection._source.spec.dims:
        arrays["prompt"], seen = selection.prompt, []
    else:
        arrays |= {"prompt": selection.prompt, "pos": selection.pos}
        arrays["token_id"] = table.token_ids(selection.prompt, selection.pos)
        seen = [arrays["token_id"]]
    if seen:
        arrays["vocabulary_id"] = np.unique(np.concatenate(seen))
        arrays["vocabulary"] = np.array(table.vocabulary(arrays["vocabulary_id"]), np.str_)
    for name, column in table.labels.items():
        arrays |= _label_arrays(f"label_{name}", column.take(ids))
    return arrays


def _label_arrays(name: str, column: "pa.ChunkedArray") -> dict[str, Array]:
    """Return a label as an array, and where some prompts lack it also which."""
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = {f"{name}_missing": column.is_null().to_numpy().astype(bool)} if column.null_count else {}
    if pa.types.is_null(column.type):
        return missing
    text = pa.types.is_string(column.type)
    blank = pa.scalar("" if text else 0).cast(column.type)
    values = pc.fill_null(column, blank)
    return {name: np.array(values.to_pylist(), np.str_) if text else values.to_numpy(), **missing}


def _without_texts(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, str]]:
    """Replace texts by codes, and return them as JSON by name; the vocabulary is a list in the order of its ids."""
    kept: dict[str, Array] = {}
    texts: dict[str, str] = {}
    for name, array in arrays.items():
        if array.dtype.kind != "U":
            kept[name] = array
        elif name == "vocabulary":
            texts[name] = json.dumps(array.tolist())
        else:
            known, codes = np.unique(array, return_inverse=True)
            missing = arrays.get(f"{name}_missing")
            kept[name] = (codes if missing is None else np.where(missing, -1, codes)).astype(np.int32)
            texts[name] = json.dumps(known.tolist())
    return kept, texts
