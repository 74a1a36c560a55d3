"""A selection as Arrow record batches: one record a layer, head and row, with its prompt, token and labels.

Layers and heads are the outer loops and rows come in storage order, so that every chunk is read once. Columns: `layer`
and `head` where the site has them, `prompt_id`, `pos`, `token_id`, `token`, `label_<name>` for each label, and
`activation`. A pattern's record is one query: `pos` is the query, `activation` the weights on the keys, query + 1 of
them in causal models, as SQL's `attention()` gives them.
"""

import json
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.interchange.prompt_table import PromptTable
from actdb.schema import HEAD_DIMS, SiteSpec
from actdb.selection.streams import Block

if TYPE_CHECKING:
    import pyarrow as pa

    from actdb.selection.view import Selection

BATCH_BYTES = 16 * 1024**2
"""Decoded activations of a record batch, which is a row group in Parquet: what an export holds at once."""
BATCH_ROWS = 65_536
Ints = npt.NDArray[np.int64]


def record_schema(selection: "Selection", table: PromptTable) -> "pa.Schema":
    """Return the columns of a selection's records, with run, site and model in the metadata under `actdb`."""
    import pyarrow as pa

    spec = selection._source.spec
    fields = [(name, pa.int32()) for name in _plane_names(spec)] + [("prompt_id", pa.int32())]
    if "prompt" not in spec.dims:
        fields += [("pos", pa.int32()), ("token_id", pa.int32()), ("token", pa.string())]
    fields += [(f"label_{name}", column.type) for name, column in table.labels.items()]
    value = pa.from_numpy_dtype(selection.dtype)
    if spec.dims[-1] == "entry":
        activation = pa.list_(value)
    else:
        width = _width(selection)
        activation = value if width is None else pa.list_(value, width)
    return pa.schema([*fields, ("activation", activation)], metadata={"actdb": json.dumps(describe(selection, table))})


def describe(selection: "Selection", table: PromptTable) -> dict[str, Any]:
    """Return what was exported: run, site, hook, model, step, prompt set, dtype."""
    info, spec = table.info, selection._source.spec
    return {
        "run": info.name,
        "site": spec.name,
        "hook": spec.hook,
        "model": info.model.get("model"),
        "step": info.plan.get("step"),
        "prompt_set": info.plan.get("prompt_set"),
        "dtype": spec.dtype,
    }


def record_batches(selection: "Selection", table: PromptTable) -> "Iterator[pa.RecordBatch]":
    """Yield a selection's records in batches of some 16 MiB; costs one read of each chunk."""
    import pyarrow as pa

    schema, spec = record_schema(selection, table), selection._source.spec
    names = _plane_names(spec)
    is_pattern = spec.dims[-1] == "entry"
    for numbers in product(*(axis.numbers for axis in selection._axes)):
        place: dict[str, Any] = dict(zip(names, numbers, strict=True))
        plane = selection.sel(**place)
        for block in plane.batches(_batch_size(plane)):
            prompt, pos, activation = _queries(plane, block) if is_pattern else _rows(block, schema)
            columns: dict[str, Any] = {name: np.full(len(prompt), number, np.int32) for name, number in place.items()}
            columns["prompt_id"] = prompt.astype(np.int32)
            if pos is not None:
                columns["pos"] = pos.astype(np.int32)
                columns["token_id"] = table.token_ids(prompt, pos)
                columns["token"] = table.token_texts(prompt, pos)
            for name, column in table.labels.items():
                columns[f"label_{name}"] = column.take(pa.array(prompt)).combine_chunks()
            columns["activation"] = activation
            yield pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _plane_names(spec: SiteSpec) -> list[str]:
    return ["head" if dim in HEAD_DIMS else dim for dim in spec.dims[: spec.axis]]


def _width(selection: "Selection") -> int | None:
    """Return the values of a row; None where one neuron is selected, whose records hold a number."""
    shape = selection._source.reader._feature_shape(selection._feature)
    return shape[0] if shape else None


def _batch_size(plane: "Selection") -> int:
    """Return the rows of a batch, or the prompts where each has a pattern."""
    if plane._is_pattern:
        longest = int(plane._lengths.max(initial=1))
        return max(1, min(BATCH_ROWS, BATCH_BYTES // (longest * longest * plane.dtype.itemsize)))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // ((_width(plane) or 1) * plane.dtype.itemsize)))


def _rows(block: Block, schema: "pa.Schema") -> tuple[Ints, Ints | None, Any]:
    import pyarrow as pa

    kind = schema.field("activation").type
    flat = pa.array(np.ascontiguousarray(block.values).reshape(-1))
    if not pa.types.is_fixed_size_list(kind):
        return block.prompt, block.pos, flat
    return block.prompt, block.pos, pa.FixedSizeListArray.from_arrays(flat, kind.list_size)


def _queries(plane: "Selection", block: Block) -> tuple[Ints, Ints, Any]:
    """Turn squares [query, key] (or one row [key] each) into one list a query."""
    import pyarrow as pa

    prompts, queries, counts, pieces = [], [], [], []
    for prompt, square in zip(block.prompt.tolist(), block.values, strict=True):
        query = _query_positions(plane, square, int(plane._prompts.n_tokens[prompt]))
        sizes = query + 1 if plane._source.causal else np.full_like(query, square.shape[-1])
        rows = np.atleast_2d(square)
        pieces.append(rows[np.arange(rows.shape[1]) < sizes[:, None]])
        prompts.append(np.full(len(query), prompt, np.int64))
        queries.append(query)
        counts.append(sizes)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(pieces)))
    return np.concatenate(prompts), np.concatenate(queries), lists


def _query_positions(plane: "Selection", square: npt.NDArray[Any], n_tokens: int) -> Ints:
    """Return the positions of a pattern's queries: all, the last one, or the one that was selected."""
    if square.ndim == 2 and len(square) == n_tokens and not plane._prompts.last_only:
        return np.arange(n_tokens)
    pos = -1 if square.ndim == 2 else int(plane._given["pos"])
    return np.array([pos % n_tokens])
