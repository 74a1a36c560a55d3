"""SQL functions on stored activations: macros with an optional run over functions that take whole Arrow columns.

They reach nothing but the runs of the snapshot that they are registered with: names of runs and sites are looked up
among those, never joined into a path.
"""

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.catalog.documentation import FUNCTIONS
from actdb.catalog.lookup import Address, Found, Lookup, groups_of
from actdb.errors import SelectionError, SiteError
from actdb.unembedding import Readout

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from actdb.run import Run

Ints = npt.NDArray[np.int64]
Column = Any
"""A pyarrow ChunkedArray, or what becomes one. DuckDB evaluates annotations, where pyarrow is not imported yet."""
RESIDUAL, PATTERN, INTERACTION = "resid_post", "pattern", "interaction"
INTERACTION_DIMS = ("layer", "head", "prompt", "target")
READOUTS_KEPT = 2
_with_functions: "weakref.WeakSet[duckdb.DuckDBPyConnection]" = weakref.WeakSet()


@atexit.register
def _close_connections() -> None:
    """Close what users left open: DuckDB writes pages of notes where Python functions outlive the interpreter."""
    for connection in list(_with_functions):
        connection.close()


def add_functions(connection: "duckdb.DuckDBPyConnection", runs: dict[str, "Run"]) -> None:
    """Add the functions to a connection to the catalog, over these runs, oldest first.

    DuckDB holds the functions until the connection is closed or freed; one that is still open at exit is closed then.
    """
    from duckdb import func as kinds

    functions = ActivationFunctions(Lookup(runs))
    for function in FUNCTIONS:
        inner: Callable[..., Any] = getattr(functions, function.name)
        types: list[Any] = ["VARCHAR", *(kind for _, kind in function.parameters)]
        connection.create_function(
            f"_{function.name}", inner, types, function.returns, type=kinds.ARROW, null_handling=kinds.SPECIAL
        )
        names = ", ".join(name for name, _ in function.parameters)
        connection.execute(f"CREATE MACRO memory.main.{function.signature} AS _{function.name}(run, {names})")
    _with_functions.add(connection)


class ActivationFunctions:
    """The functions under their SQL names, `run` first; columns in, one column out, a null for a row with a null.

    Raises `RunError`, `SiteError` or `SelectionError` naming what there is; DuckDB hands the message on.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._readout = lru_cache(maxsize=READOUTS_KEPT)(lambda name: Readout.of_run(lookup.run(name)))
        self._texts = lru_cache(maxsize=READOUTS_KEPT)(self._token_texts)

    def activation(self, run: Column, site: Column, layer: Column, prompt_id: Column, pos: Column) -> Column:
        """Return vectors of sites without heads."""
        call = _Call.of((run, site), (layer, prompt_id, pos))
        wanted = [
            (Address("activation", run, site, layer), rows, *call.numbers[1:, rows])
            for (run, site, layer), rows in call.groups(1)
        ]
        return _float_lists(self._lookup.vectors(call.n_rows, wanted), call.missing)

    def head_activation(
        self, run: Column, site: Column, layer: Column, head: Column, prompt_id: Column, pos: Column
    ) -> Column:
        """Return vectors of sites with heads."""
        call = _Call.of((run, site), (layer, head, prompt_id, pos))
        wanted = [
            (Address("head_activation", run, site, layer, head), rows, *call.numbers[2:, rows])
            for (run, site, layer, head), rows in call.groups(2)
        ]
        return _float_lists(self._lookup.vectors(call.n_rows, wanted), call.missing)

    def attention(self, run: Column, layer: Column, head: Column, prompt_id: Column, query: Column) -> Column:
        """Return the attention weights of queries."""
        call = _Call.of((run,), (layer, head, prompt_id, query))
        wanted = []
        for (name, layer, head), rows in call.groups(2):
            _check_patterns(self._lookup.run(name))
            wanted.append((Address("attention", name, PATTERN, layer, head), rows, *call.numbers[2:, rows]))
        return _float_lists(self._lookup.vectors(call.n_rows, wanted), call.missing)

    def interaction(
        self, run: Column, layer_a: Column, head_a: Column, layer_b: Column, head_b: Column, prompt_id: Column
    ) -> Column:
        """Return values of the added site `interaction`, from source heads (planes) to target heads (features)."""
        import pyarrow as pa

        call = _Call.of((run,), (layer_a, head_a, layer_b, head_b, prompt_id))
        values = np.zeros(call.n_rows, np.float32)
        for (name, layer, head), rows in call.groups(2):
            target_layers, target_heads, prompts = call.numbers[2:, rows]
            places = _targets(self._lookup.run(name), target_layers, target_heads)
            address = Address("interaction", name, INTERACTION, layer, head)
            wanted = [(address, np.arange(len(rows)), prompts, np.full_like(prompts, -1))]
            found = self._lookup.vectors(len(rows), wanted)
            values[rows] = found.values[found.offsets + places]
        return pa.array(values, mask=call.missing if call.missing.any() else None)

    def logit_lens(self, run: Column, layer: Column, prompt_id: Column, pos: Column, k: Column) -> Column:
        """Return the likeliest tokens by the residual stream after a layer."""
        call = _Call.of((run,), (layer, prompt_id, pos, k))
        blocks, offsets, sizes = [], np.zeros(call.n_rows, np.int64), np.zeros(call.n_rows, np.int64)
        begin = 0
        for (run_name, layer), rows in call.groups(1):
            prompts, positions, counts = call.numbers[1:, rows]
            name = self._lookup.run(run_name).name
            readout = self._readout(name)
            _check_counts(counts, readout.n_tokens)
            address = Address("activation", name, RESIDUAL, layer)
            found = self._lookup.vectors(len(rows), [(address, np.arange(len(rows)), prompts, positions)])
            residual = found.values.reshape(-1, found.sizes[0])
            top = readout.top(residual, int(counts.max()))
            blocks.append((self._texts(name, readout.n_tokens), *top))
            # every vector has as many places as the largest k; a row shows the first of them
            offsets[rows] = begin + found.offsets // found.sizes * counts.max()
            sizes[rows] = counts
            begin += top[0].size
        return _token_lists(blocks, offsets, sizes, call.missing)

    def _token_texts(self, name: str, n_tokens: int) -> "pa.Array":
        """Return the text of each token id, null where the run's prompts do not hold it."""
        import pyarrow as pa

        known = self._lookup.run(name).vocabulary()
        return pa.array([known.get(token) for token in range(n_tokens)], pa.string())


@dataclass(frozen=True)
class _Call:
    """The arguments of one call: text columns as codes into `names`, numbers [column, row], and rows with a null."""

    names: tuple[list[str], ...]
    codes: tuple[Ints, ...]
    numbers: Ints
    missing: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, texts: Sequence["pa.ChunkedArray"], numbers: Sequence["pa.ChunkedArray"]) -> "_Call":
        missing = np.zeros(len(texts[0]), np.bool_)
        for column in (*texts, *numbers):
            if column.null_count:
                missing |= column.is_null().to_numpy()
        coded = [column.combine_chunks().dictionary_encode() for column in texts]
        codes = tuple(column.indices.fill_null(0).to_numpy().astype(np.int64) for column in coded)
        values = np.stack([column.fill_null(0).to_numpy() for column in numbers])
        return cls(tuple(column.dictionary.to_pylist() for column in coded), codes, values, missing)

    @property
    def n_rows(self) -> int:
        return len(self.missing)

    def groups(self, n_numbers: int) -> Iterator[tuple[tuple[Any, ...], Ints]]:
        """Yield the texts and first numbers of each group of rows that share them, with its rows; none with a null."""
        whole = np.flatnonzero(~self.missing)
        keys = [column[whole] for column in (*self.codes, *self.numbers[:n_numbers])]
        for key, rows in groups_of(keys):
            texts = [names[code] for names, code in zip(self.names, key, strict=False)]
            yield (*texts, *key[len(texts) :]), whole[rows]


def _check_patterns(run: "Run") -> None:
    """Raise `SiteError` where a run keeps no whole patterns, saying what it keeps and which option keeps them."""
    if PATTERN in run:
        return
    kept = "no attention patterns"
    if f"{PATTERN}_value" in run:
        kept = (
            "the largest attention weights of each query only, which"
            f" head_activation('{PATTERN}_value', ...) and head_activation('{PATTERN}_index', ...) return"
        )
    raise SiteError(f"run {run.name!r} keeps {kept}; attention() needs a harvest with site pattern and --pattern full")


def _targets(run: "Run", layers: Ints, heads: Ints) -> Ints:
    """Return the places of target heads in the rows of the site `interaction`, layer after layer."""
    spec = run.info.site(INTERACTION)
    if spec is None:
        raise SiteError(
            f"run {run.name!r} has no site {INTERACTION!r}; python -m analyses.forward_proportion --db DB adds it"
        )
    if spec.dims != INTERACTION_DIMS or spec.feature != (spec.planes[0] * spec.planes[1],):
        raise SiteError(
            f"site {INTERACTION!r} of run {run.name!r} has axes {', '.join(spec.dims)} {list(spec.shape)} instead of "
            f"{', '.join(INTERACTION_DIMS)} with a target for each layer and head"
        )
    for name, given, valid in (("layer", layers, spec.layers), ("head", heads, range(spec.planes[1]))):
        outside = ~np.isin(given, valid)
        if outside.any():
            raise SelectionError(f"{name}_b {given[outside][0]}: choose one of {', '.join(map(str, valid))}")
    return np.asarray(np.searchsorted(spec.layers, layers) * spec.planes[1] + heads, np.int64)


def _check_counts(counts: Ints, n_tokens: int) -> None:
    if counts.min() < 1 or counts.max() > n_tokens:
        wrong = counts.min() if counts.min() < 1 else counts.max()
        raise SelectionError(f"k {wrong}: choose 1 to {n_tokens}, the tokens of the vocabulary")


def _float_lists(found: Found, missing: npt.NDArray[np.bool_]) -> "pa.Array":
    """Return list views into the values found; nothing is copied."""
    import pyarrow as pa

    return _views(found.offsets, found.sizes, pa.array(found.values), missing)


def _token_lists(
    blocks: Sequence[tuple["pa.Array", npt.NDArray[np.int32], Any, Any]],
    offsets: Ints,
    sizes: Ints,
    missing: npt.NDArray[np.bool_],
) -> "pa.Array":
    """Return list views into structs; each block has a run's token texts, and ids, logits, probabilities [row, k]."""
    import pyarrow as pa

    kinds = (pa.int32(), pa.string(), pa.float32(), pa.float32())
    columns = [
        [pa.array(ids.reshape(-1)), texts.take(ids.reshape(-1)), *(pa.array(v.reshape(-1)) for v in values)]
        for texts, ids, *values in blocks
    ]
    fields = [
        pa.chunked_array(parts, kind).combine_chunks()
        for parts, kind in zip(zip(*columns, strict=True) if columns else [()] * len(kinds), kinds, strict=True)
    ]
    structs = pa.StructArray.from_arrays(fields, names=["token_id", "token", "logit", "probability"])
    return _views(offsets, sizes, structs, missing)


def _views(offsets: Ints, sizes: Ints, values: "pa.Array", missing: npt.NDArray[np.bool_]) -> "pa.Array":
    import pyarrow as pa

    mask = pa.array(missing) if missing.any() else None
    return pa.LargeListViewArray.from_arrays(pa.array(offsets), pa.array(sizes), values, mask=mask)
