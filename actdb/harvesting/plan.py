"""The plan of a harvest: batches, parts, array shapes. A pure function of prompts, sites and settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.harvesting.sites import HarvestSite
from actdb.schema import SiteSpec

CHUNK_BYTES = 256 * 1024
STAGING_BYTES = 64 * 1024**2
MIN_CHUNK_BYTES = 32 * 1024
PART_BYTES = 1024**3
PART_FLOPS = 1.5e12
ACCELERATOR_SPEEDUP = 200
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, right-padded to the longest; `part` is where they are stored."""

    part: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where every prompt's rows and entries lie, and in which batches the model runs.

    Arrays are indexed by prompt_id; `row_starts` and `entry_starts` are array indices. A part covers
    `row_capacity` rows, `entry_capacity` entries and `prompt_capacity` prompts of the arrays, its tail unused.
    """

    batches: tuple[Batch, ...]
    n_parts: int
    row_capacity: int
    entry_capacity: int
    prompt_capacity: int
    parts: npt.NDArray[np.int32]
    row_starts: npt.NDArray[np.int64]
    n_rows: npt.NDArray[np.int32]
    entry_starts: npt.NDArray[np.int64]
    n_entries: npt.NDArray[np.int64]
    prompt_indices: npt.NDArray[np.int64]

    def part_batches(self, part: int) -> Iterator[Batch]:
        """Return a part's batches in order."""
        return (batch for batch in self.batches if batch.part == part)


def stored_counts(
    lengths: npt.NDArray[np.int64], *, causal: bool, positions: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the rows and pattern entries that each prompt stores."""
    if positions == "last":
        return np.ones(len(lengths), np.int32), lengths.astype(np.int64)
    entries = lengths * (lengths + 1) // 2 if causal else lengths * lengths
    return lengths.astype(np.int32), entries.astype(np.int64)


def make_batches(lengths: npt.NDArray[np.int64], *, batch_tokens: int, equal_length: bool) -> list[list[int]]:
    """Sort prompts by length and cut them into batches of at most `batch_tokens` padded tokens, one prompt at least."""
    batches: list[list[int]] = []
    shortest = 0
    for prompt_id in np.lexsort((np.arange(len(lengths)), lengths)).tolist():
        length = int(lengths[prompt_id])
        fits = batches and (len(batches[-1]) + 1) * length <= batch_tokens
        if not fits or (equal_length and length != shortest):
            batches.append([])
            shortest = length
        batches[-1].append(prompt_id)
    return batches


def pack_parts(sizes: Sequence[tuple[int, ...]], capacities: tuple[int, ...]) -> list[int]:
    """Assign batches to parts in order, a new part where one of the capacities would be passed."""
    parts: list[int] = []
    used = [0] * len(capacities)
    part = 0
    for size in sizes:
        if any(u + s > c for u, s, c in zip(used, size, capacities, strict=True)) and any(used):
            part += 1
            used = [0] * len(capacities)
        used = [u + s for u, s in zip(used, size, strict=True)]
        parts.append(part)
    return parts


def make_layout(
    lengths: npt.NDArray[np.int64],
    *,
    causal: bool,
    positions: str,
    batch_tokens: int,
    equal_length: bool,
    part_rows: int,
    part_entries: int,
    row_multiple: int,
    entry_multiple: int,
) -> Layout:
    """Lay prompts out in parts of at most `part_rows` rows and `part_entries` entries, larger where one batch is.

    Capacities are multiples of the largest chunk of any site, so that chunks divide shards.
    """
    n_rows, n_entries = stored_counts(lengths, causal=causal, positions=positions)
    batches = make_batches(lengths, batch_tokens=batch_tokens, equal_length=equal_length)
    sizes = [(int(n_rows[ids].sum()), int(n_entries[ids].sum())) for ids in map(np.asarray, batches)]
    row_limit = max(part_rows, *(size[0] for size in sizes))
    entry_limit = max(part_entries, *(size[1] for size in sizes))
    assigned = pack_parts(sizes, (row_limit, entry_limit))
    n_parts = assigned[-1] + 1
    used = np.zeros((n_parts, 3), np.int64)
    parts, indices = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int64)
    row_starts, entry_starts = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for part, ids in zip(assigned, batches, strict=True):
        for prompt_id in ids:
            parts[prompt_id] = part
            row_starts[prompt_id], entry_starts[prompt_id], indices[prompt_id] = used[part]
            used[part] += (n_rows[prompt_id], n_entries[prompt_id], 1)
    row_capacity = _round_up(int(used[:, 0].max()), row_multiple)
    entry_capacity = _round_up(int(used[:, 1].max()), entry_multiple)
    prompt_capacity = _round_up(int(used[:, 2].max()), row_multiple)
    return Layout(
        batches=tuple(Batch(part, tuple(ids)) for part, ids in zip(assigned, batches, strict=True)),
        n_parts=n_parts,
        row_capacity=row_capacity,
        entry_capacity=entry_capacity,
        prompt_capacity=prompt_capacity,
        parts=parts,
        row_starts=row_starts + parts.astype(np.int64) * row_capacity,
        n_rows=n_rows,
        entry_starts=entry_starts + parts.astype(np.int64) * entry_capacity,
        n_entries=n_entries,
        prompt_indices=indices + parts.astype(np.int64) * prompt_capacity,
    )


def part_limits(
    sites: Sequence[HarvestSite], *, store_bytes: int, n_parameters: int, device_kind: str, part_tokens: int | None
) -> tuple[int, int]:
    """Return the rows and entries of a part: about 1 GiB before encoding and, on a CPU, about 30 s of work.

    The work is 2 floating-point operations a parameter and token, at the 50 GFLOP/s of two older cores: a pure
    function of the model, so that the plan does not depend on how fast a machine happens to be.
    """
    if part_tokens is not None:
        if part_tokens < 1:
            raise SettingError(f"--part-tokens {part_tokens}: must be at least 1")
        return part_tokens, 2**62
    row_bytes = sum(plane_count(site) * site.width * store_bytes for site in sites if site.kind == "row")
    entry_bytes = sum(plane_count(site) * store_bytes for site in sites if site.kind == "entry")
    flops = PART_FLOPS * (1 if device_kind == "cpu" else ACCELERATOR_SPEEDUP)
    by_work = int(flops / (2 * max(n_parameters, 1)))
    by_bytes = PART_BYTES // max(row_bytes, 1)
    return max(min(by_work, by_bytes), 1024), max(PART_BYTES // max(entry_bytes, 1), 1024)


def chunk_length(plane_bytes: int, n_planes: int, total: int) -> int:
    """Return the rows of a chunk: a power of two of about 256 KiB, less where many planes would fill the memory."""
    target = max(min(CHUNK_BYTES, STAGING_BYTES // max(n_planes, 1)), MIN_CHUNK_BYTES)
    return max(1, min(_floor_power(target // max(plane_bytes, 1)), _ceil_power(total)))


def plane_count(site: HarvestSite) -> int:
    """Return the planes of a site: layers × heads."""
    return max(len(site.layers), 1) * (site.n_heads or 1)


def site_spec(
    site: HarvestSite, layout: Layout, *, chunk: int, dtype: str, codec: str, precision: int | None
) -> SiteSpec:
    """Return the array of a site under a layout."""
    layer_dims = ("layer",) if site.layers else ()
    head_dims = (site.head_dim,) if site.head_dim else ()
    planes = ((len(site.layers),) if site.layers else ()) + ((site.n_heads,) if site.n_heads else ())
    axis, capacity, ends = {
        "row": ("row", layout.row_capacity, layout.row_starts + layout.n_rows),
        "entry": ("entry", layout.entry_capacity, layout.entry_starts + layout.n_entries),
        "prompt": ("prompt", layout.prompt_capacity, layout.prompt_indices + 1),
    }[site.kind]
    feature = () if site.kind == "entry" else (site.width,)
    feature_dims = () if site.kind == "entry" else (site.width_dim,)
    return SiteSpec(
        name=site.name,
        hook=site.hook,
        dims=(*layer_dims, *head_dims, axis, *feature_dims),
        shape=(*planes, int(ends.max()), *feature),
        shard_shape=(*planes, capacity, *feature),
        chunk_shape=(*(1 for _ in planes), chunk, *feature),
        dtype=dtype,
        codec=codec,
        precision=precision if dtype.startswith("float") else None,
        layers=site.layers,
    )


def raw_bytes(spec: SiteSpec, layout: Layout, parts: Sequence[int] | None = None) -> int:
    """Return the bytes that a site's used rows or entries have before encoding, of all parts or some."""
    counts: Mapping[str, npt.NDArray[Any]] = {
        "row": layout.n_rows,
        "entry": layout.n_entries,
        "prompt": np.ones_like(layout.parts),
    }
    used = counts[spec.dims[spec.axis]].astype(np.int64)
    if parts is not None:
        used = used[np.isin(layout.parts, parts)]
    return int(used.sum()) * prod(spec.planes) * prod(spec.feature) * np.dtype(spec.dtype).itemsize


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _floor_power(value: int) -> int:
    return 1 << max(value.bit_length() - 1, 0)


def _ceil_power(value: int) -> int:
    return 1 << max((value - 1).bit_length(), 0)
