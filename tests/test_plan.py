"""The plan is a pure function of its inputs that loses nothing, overlaps nowhere and keeps its capacities."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actdb.errors import SettingError
from actdb.harvesting.plan import (
    CHUNK_BYTES,
    PART_BYTES,
    STAGING_BYTES,
    Layout,
    chunk_length,
    make_batches,
    make_layout,
    pack_parts,
    part_limits,
    plane_count,
    raw_bytes,
    site_spec,
    stored_counts,
)
from actdb.harvesting.sites import HarvestSite

Lengths = npt.NDArray[np.int64]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(lambda lengths: np.asarray(lengths, np.int64))
POWERS = st.sampled_from([1, 2, 4, 8, 64])
LAYOUTS = {
    "causal": st.booleans(),
    "positions": st.sampled_from(["all", "last"]),
    "batch_tokens": st.integers(1, 200),
    "equal_length": st.booleans(),
    "part_rows": st.integers(1, 300),
    "part_entries": st.integers(1, 4000),
    "row_multiple": POWERS,
    "entry_multiple": POWERS,
}


def sites() -> st.SearchStrategy[HarvestSite]:
    """Sites of every kind: rows with heads or without, patterns, activations of a prompt."""

    def make(kind: str, n_layers: int, n_heads: int | None, width: int) -> HarvestSite:
        heads = n_heads if kind == "row" else (n_heads or 1) if kind == "entry" else None
        return HarvestSite(
            name=kind,
            hook="hook",
            kind=kind,
            layers=tuple(range(1, n_layers + 1)) if kind != "prompt" else (),
            points=(),
            head_dim="head" if heads else None,
            n_heads=heads,
            width=width,
            width_dim="feature",
        )

    heads = st.one_of(st.none(), st.integers(1, 12))
    return st.builds(make, st.sampled_from(["row", "entry", "prompt"]), st.integers(0, 3), heads, st.integers(1, 5000))


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200), equal_length=st.booleans())
def test_batches(lengths: Lengths, batch_tokens: int, equal_length: bool) -> None:
    batches = make_batches(lengths, batch_tokens=batch_tokens, equal_length=equal_length)
    assert sorted(prompt for batch in batches for prompt in batch) == list(range(len(lengths)))
    for batch in batches:
        held = lengths[batch]
        assert len(batch) == 1 or len(batch) * held.max() <= batch_tokens  # padded
        assert not equal_length or len(set(held.tolist())) == 1
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest == sorted(longest)
    for batch, following in pairwise(batches):  # no batch ends early
        joined = (len(batch) + 1) * int(lengths[following[0]])
        assert joined > batch_tokens or (equal_length and lengths[batch[0]] != lengths[following[0]])


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
    capacities=st.tuples(st.integers(9, 30), st.integers(9, 30)),
)
def test_parts_keep_both_capacities(sizes: list[tuple[int, ...]], capacities: tuple[int, ...]) -> None:
    parts = pack_parts(sizes, capacities)
    assert parts[0] == 0
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(parts))
    filled = np.zeros((parts[-1] + 1, 2), int)
    np.add.at(filled, parts, sizes)
    assert (filled <= capacities).all()
    for part in range(parts[-1]):  # a part is left only where the next batch would not have fitted
        following = np.array(sizes[parts.index(part + 1)])
        assert (filled[part] + following > capacities).any()


@given(lengths=LENGTHS, **LAYOUTS)
def test_every_prompt_has_a_place_of_its_own(lengths: Lengths, **choices: Any) -> None:
    layout = make_layout(lengths, **choices)
    n_rows, n_entries = stored_counts(lengths, causal=choices["causal"], positions=choices["positions"])
    assert sorted(p for batch in layout.batches for p in batch.prompt_ids) == list(range(len(lengths)))
    places = (
        (layout.row_starts, layout.n_rows, n_rows, layout.row_capacity, choices["row_multiple"]),
        (layout.entry_starts, layout.n_entries, n_entries, layout.entry_capacity, choices["entry_multiple"]),
        (layout.prompt_indices, np.ones(len(lengths)), 1, layout.prompt_capacity, 1),
    )
    for starts, counts, wanted, capacity, multiple in places:
        assert (counts == wanted).all()
        assert capacity % multiple == 0
        order = np.argsort(starts, kind="stable")
        ends = (starts + counts)[order]
        assert (starts[order][1:] >= ends[:-1]).all()  # no overlap
        assert (starts // capacity == layout.parts).all()  # inside its part
        assert ((starts + counts - 1) // capacity == layout.parts).all()
    assert set(layout.parts.tolist()) == set(range(layout.n_parts))


@given(lengths=LENGTHS, **LAYOUTS)
def test_places_follow_the_batches(lengths: Lengths, **choices: Any) -> None:
    """Writers append batch after batch: that order must be the order of the places, without gaps."""
    layout = make_layout(lengths, **choices)
    for part in range(layout.n_parts):
        batches = list(layout.part_batches(part))
        assert batches == [batch for batch in layout.batches if batch.part == part]
        ids = np.array([p for batch in batches for p in batch.prompt_ids])
        for starts, counts, capacity in (
            (layout.row_starts, layout.n_rows, layout.row_capacity),
            (layout.entry_starts, layout.n_entries, layout.entry_capacity),
            (layout.prompt_indices, np.ones(len(lengths), np.int64), layout.prompt_capacity),
        ):
            filled = np.cumsum(counts[ids]) - counts[ids]
            assert (starts[ids] == part * capacity + filled).all()


@given(lengths=LENGTHS, **LAYOUTS)
def test_capacities_are_kept_unless_one_batch_is_larger(lengths: Lengths, **choices: Any) -> None:
    layout = make_layout(lengths, **choices)
    for counts, limit, capacity, multiple in (
        (layout.n_rows, choices["part_rows"], layout.row_capacity, choices["row_multiple"]),
        (layout.n_entries, choices["part_entries"], layout.entry_capacity, choices["entry_multiple"]),
    ):
        largest = max(int(counts[list(batch.prompt_ids)].sum()) for batch in layout.batches)
        assert capacity < max(limit, largest) + multiple
        for part in range(layout.n_parts):
            assert int(counts[layout.parts == part].sum()) <= max(limit, largest)


@given(lengths=LENGTHS, **LAYOUTS)
def test_the_plan_is_deterministic_and_depends_on_lengths_alone(lengths: Lengths, **choices: Any) -> None:
    layout, again = make_layout(lengths, **choices), make_layout(lengths.copy(), **choices)
    assert _plain(layout) == _plain(again)
    backwards = make_layout(lengths[::-1].copy(), **choices)
    shape = [[int(lengths[p]) for p in batch.prompt_ids] for batch in layout.batches]
    assert shape == [[int(lengths[::-1][p]) for p in batch.prompt_ids] for batch in backwards.batches]
    assert [batch.part for batch in layout.batches] == [batch.part for batch in backwards.batches]


def _plain(layout: Layout) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(layout).items()}


@given(lengths=LENGTHS, site=sites(), dtype=st.sampled_from(["float16", "float32"]), data=st.data(), **LAYOUTS)
@settings(max_examples=150)
def test_chunks_divide_shards(lengths: Lengths, site: HarvestSite, dtype: str, data: Any, **choices: Any) -> None:
    """As the harvest plans it: chunk lengths first, then a layout whose capacities they divide."""
    itemsize = np.dtype(dtype).itemsize
    plane_bytes = itemsize * (1 if site.kind == "entry" else site.width)
    n_rows, n_entries = stored_counts(lengths, causal=choices["causal"], positions=choices["positions"])
    totals = {"row": int(n_rows.sum()), "entry": int(n_entries.sum()), "prompt": len(lengths)}
    chunk = chunk_length(plane_bytes, plane_count(site), totals[site.kind])
    assert chunk & (chunk - 1) == 0
    assert chunk * plane_bytes <= CHUNK_BYTES or chunk == 1
    assert chunk < 2 * totals[site.kind]
    other = data.draw(st.sampled_from([1, 2, 16, 1024]))  # another site's chunk
    layout = make_layout(
        lengths,
        **{**choices, "row_multiple": max(chunk, other), "entry_multiple": max(chunk, other)},
    )
    spec = site_spec(site, layout, chunk=chunk, dtype=dtype, codec="lz4", precision=None)
    assert all(s % c == 0 for s, c in zip(spec.shard_shape, spec.chunk_shape, strict=True))
    assert spec == type(spec).from_json(spec.to_json())
    assert all(extent == 1 for extent in spec.chunk_shape[: spec.axis])
    assert spec.planes == (*((len(site.layers),) if site.layers else ()), *((site.n_heads,) if site.n_heads else ()))
    assert spec.feature == (() if site.kind == "entry" else (site.width,))
    assert (layout.n_parts - 1) * spec.capacity < spec.shape[spec.axis] <= layout.n_parts * spec.capacity
    every = totals[site.kind] * plane_count(site) * plane_bytes
    assert raw_bytes(spec, layout) == every
    assert sum(raw_bytes(spec, layout, [part]) for part in range(layout.n_parts)) == every


@given(st.integers(1, 100_000), st.integers(1, 20_000), st.integers(1, 10**9))
def test_buffers_of_all_planes_fit_in_memory(plane_bytes: int, n_planes: int, total: int) -> None:
    chunk = chunk_length(plane_bytes, n_planes, total)
    if n_planes * 32 * 1024 <= STAGING_BYTES and chunk > 1:
        assert chunk * plane_bytes * n_planes <= STAGING_BYTES
    assert chunk * plane_bytes <= 512 * 1024 or chunk == 1


@pytest.mark.parametrize(
    ("causal", "positions", "rows", "entries"),
    [
        (True, "all", [1, 2, 5], [1, 3, 15]),
        (False, "all", [1, 2, 5], [1, 4, 25]),
        (True, "last", [1, 1, 1], [1, 2, 5]),
        (False, "last", [1, 1, 1], [1, 2, 5]),
    ],
)
def test_counts(causal: bool, positions: str, rows: list[int], entries: list[int]) -> None:
    n_rows, n_entries = stored_counts(np.array([1, 2, 5]), causal=causal, positions=positions)
    assert n_rows.tolist() == rows
    assert n_entries.tolist() == entries


def test_counts_of_long_prompts_do_not_overflow() -> None:
    length = 1_000_000
    _, n_entries = stored_counts(np.array([length] * 3), causal=False, positions="all")
    assert n_entries.sum() == 3 * length**2


def test_a_part_is_a_gigabyte_or_half_a_minute() -> None:
    resid = HarvestSite(
        name="resid_post",
        hook="h",
        kind="row",
        layers=tuple(range(12)),
        points=(),
        head_dim=None,
        n_heads=None,
        width=768,
        width_dim="d_model",
    )
    pattern = replace(resid, name="pattern", kind="entry", n_heads=12, head_dim="head")
    limits: dict[str, Any] = {"store_bytes": 2, "n_parameters": 124_000_000, "part_tokens": None}
    rows, entries = part_limits([resid, pattern], device_kind="cpu", **limits)
    assert rows == int(1.5e12 / (2 * 124_000_000))  # bound by work
    assert entries == PART_BYTES // (12 * 12 * 2)
    rows, _ = part_limits([resid, pattern], device_kind="cuda", **limits)
    assert rows == PART_BYTES // (12 * 768 * 2)  # bound by bytes
    assert part_limits([resid], device_kind="cpu", **{**limits, "part_tokens": 7})[0] == 7
    assert min(part_limits([replace(resid, width=10**9)], device_kind="cpu", **limits)) == 1024
    with pytest.raises(SettingError, match="--part-tokens 0"):
        part_limits([resid], device_kind="cpu", **{**limits, "part_tokens": 0})
