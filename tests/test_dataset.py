"""Lazy xarray datasets and torch streams over a run: the values of `sel()`, no chunk read for nothing, no row lost."""

import builtins
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import xarray
from hooked import TinyModel, random_prompts, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import actdb
from actdb.interchange.dataset import triangle_row
from actdb.selection import reader

LAYOUTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "both ways": {"causal": False},
    "last positions": {"positions": "last"},
    "raw": {"codec": "raw"},
    "partial": {"committed": [0, 2]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variables_are_what_numpy_gives(tmp_path: Path, layout: str) -> None:
    write_run(tmp_path / "x.actdb", **LAYOUTS[layout])
    run = actdb.open(tmp_path / "x.actdb").run()
    dataset = run.dataset()
    assert set(dataset.data_vars) == set(run.sites)
    for site in run.sites:
        found = dataset[site]
        assert found.dtype == run[site].dtype
        if site != "pattern":
            assert np.array_equal(found.values, run[site].numpy())
    assert dataset.layer.values.tolist() == [0, 2, 5]
    assert dataset.resid_post.dims == ("layer", "row", "d_model")
    assert dataset.k.dims == ("layer", "kv_head", "row", "d_head")
    assert dataset.pooled.dims == ("prompt_id", "feature")
    assert np.array_equal(dataset.prompt.values, run["embed"].prompt)
    assert np.array_equal(dataset.pos.values, run["embed"].pos)
    assert dataset.prompt_id.values.tolist() == run["pattern"].prompt.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_know_their_query_and_key(tmp_path: Path, layout: str) -> None:
    write_run(tmp_path / "x.actdb", **LAYOUTS[layout])
    run = actdb.open(tmp_path / "x.actdb").run()
    pattern = run.dataset().pattern.load()
    for prompt in run["pattern"].prompt.tolist():
        entries = pattern[..., pattern.entry_prompt.values == prompt]
        square = run["pattern"].sel(prompt=prompt).numpy()
        rebuilt = np.zeros_like(square)
        row = np.zeros_like(entries["query"]) if LAYOUTS[layout].get("positions") else entries["query"]
        rebuilt[:, :, row, entries["key"]] = entries.values
        assert np.array_equal(rebuilt, square)
        if LAYOUTS[layout].get("positions"):
            assert (entries["query"] == entries.sizes["entry"] - 1).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_index_is_that_of_numpy(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "x.actdb").exists():
        write_run(tmp_path / "x.actdb", seed=3)
    variable = actdb.open(tmp_path / "x.actdb").run().dataset()[data.draw(st.sampled_from(["k", "pattern", "pooled"]))]
    index = {}
    for dim, n in variable.sizes.items():
        whole = st.integers(-n, n - 1)
        bound = st.none() | st.integers(-n - 2, n + 2)
        step = st.sampled_from([None, 1, 2])
        backwards = st.just(slice(None, None, -1))  # with bounds, xarray's own arithmetic of empty slices is wrong
        index[dim] = data.draw(
            st.none() | whole | backwards | st.builds(slice, bound, bound, step) | st.lists(whole, max_size=5)
        )
    key = {dim: place for dim, place in index.items() if place is not None}
    assert np.array_equal(variable.isel(key).values, xarray.Variable(variable.dims, variable.values).isel(key).values)
    twice = {dim: slice(1, None) for dim in variable.isel(key).dims}  # an index of an index is still lazy
    assert np.array_equal(
        variable.isel(key).isel(twice).values, variable.isel(key).values[(slice(1, None),) * len(twice)]
    )


def test_only_what_is_indexed_is_read(tmp_path: Path) -> None:
    prompts = random_prompts(40, longest=30)
    run = actdb.harvest(TinyModel(), prompts, tmp_path / "x.actdb", sites=["z", "pattern"], part_tokens=100)
    dataset = run.dataset()
    readers = {site: run.source(site).reader for site in run.sites}
    repr(dataset)
    assert dataset.sel(prompt_id=dataset.label_kind == "a").n_tokens.values.tolist() == [
        len(prompt["tokens"]) for prompt in prompts if prompt["kind"] == "a"
    ]
    _ = dataset.entry_prompt.values, dataset["query"].values, dataset.prompt.values
    assert [reader.n_reads for reader in readers.values()] == [0, 0]
    rows = np.flatnonzero(dataset.prompt.values == 7)
    one = dataset.z.sel(layer=1, head=0).isel(row=rows)
    assert readers["z"].n_reads == 0
    assert np.array_equal(one.values, run["z"].sel(layer=1, head=0, prompt=7).numpy())
    alone = actdb.open(tmp_path / "x.actdb").run()
    alone["z"].sel(layer=1, head=0, prompt=7).numpy()
    twice = 2 * alone.source("z").reader.n_reads  # once for the dataset, once for sel() beside it
    assert readers["z"].n_reads == twice
    loaded = one.load()
    before = readers["z"].n_reads
    _ = loaded.values, loaded.mean().item()
    assert readers["z"].n_reads == before


def test_labels_and_writing(tmp_path: Path) -> None:
    prompts: list[dict[str, Any]] = [{"tokens": [1, 2], "a": "x", "n": 3}, {"tokens": [3], "b": True}, {"tokens": [4]}]
    run = actdb.harvest(TinyModel(), prompts, tmp_path / "x.actdb", sites=["z"], step=5)
    dataset = run.dataset()
    assert dataset.label_a.isnull().values.tolist() == [False, True, True]
    assert dataset.label_b.isnull().values.tolist() == [True, False, True]
    assert (dataset.label_a.values[0], dataset.label_b.values[1]) == ("x", True)
    assert np.array_equal(dataset.label_n.values, [3, np.nan, np.nan], equal_nan=True)
    assert dataset.attrs["run"] == "tiny-step5"
    assert dataset.attrs["step"] == 5
    dataset.z[0, 0, 0] = 9  # a copy: what is stored stays
    assert (dataset.z[0, 0, 0] == 9).all()
    assert np.array_equal(run.dataset().z.values, run["z"].numpy())


def test_without_xarray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "x.actdb")
    run = actdb.open(tmp_path / "x.actdb").run()
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "xarray":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(actdb.SettingError, match=r"needs xarray: pip install xarray, or the extra actdb\[analyses\]"):
        run.dataset()


def test_rows_of_a_triangle() -> None:
    query, key = np.tril_indices(400)
    assert np.array_equal(triangle_row(query * (query + 1) // 2 + key), query)
    far = np.array([2**31 - 1, 2**30 + 7])
    begins = far * (far + 1) // 2
    for entries, row in ((begins - 1, far - 1), (begins, far), (begins + far, far)):
        assert np.array_equal(triangle_row(entries), row)


def rows_of(batches: Any) -> Counter[tuple[int, int]]:
    return Counter(place for b in batches for place in zip(b["prompt"].tolist(), b["pos"].tolist(), strict=True))


@pytest.fixture
def stored(tmp_path: Path) -> actdb.Run:
    write_run(tmp_path / "x.actdb", n_prompts=60, n_parts=3, longest=30)
    return actdb.open(tmp_path / "x.actdb").run()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # newer Pythons warn of forks beside threads
def test_workers_share_the_rows_out(stored: actdb.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "THREADED_BYTES", 0)
    selection = stored["resid_post"].sel(layer=2)
    selection.numpy()  # starts the reader's threads, which forked workers do not have
    stream = selection.torch_dataset(size=32, seed=4, epochs=2)
    batches = list(DataLoader(stream, batch_size=None, num_workers=2, timeout=60))
    wanted = Counter(zip(selection.prompt.tolist(), selection.pos.tolist(), strict=True))
    assert rows_of(batches) == Counter({place: 2 * n for place, n in wanted.items()})
    assert max(len(b["values"]) for b in batches) == 32
    for batch in batches[:3]:
        assert batch["values"].dtype == torch.float16
        for value, prompt, pos in zip(batch["values"], batch["prompt"].tolist(), batch["pos"].tolist(), strict=True):
            assert np.array_equal(value.numpy(), selection.sel(prompt=prompt, pos=pos).numpy())


def test_one_process_streams_what_shuffled_does(stored: actdb.Run) -> None:
    selection = stored["k"]
    blocks = list(selection.shuffled(50, seed=7, epochs=2))
    for block, batch in zip(blocks, selection.torch_dataset(size=50, seed=7, epochs=2), strict=True):
        assert np.array_equal(block.values, batch["values"].numpy())
        assert np.array_equal(block.prompt, batch["prompt"].numpy())
    pooled = next(iter(stored["pooled"].torch_dataset(size=9)))
    assert sorted(pooled) == ["prompt", "values"]


@pytest.mark.parametrize("spawned", [False, True])
def test_ranks_share_the_rows_out(stored: actdb.Run, monkeypatch: pytest.MonkeyPatch, spawned: bool) -> None:
    selection = stored["resid_post"].sel(layer=0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        stream = selection.torch_dataset(size=20)
        if spawned:  # the copy in another process, which belongs to no group
            content = pickle.dumps(stream)
            with monkeypatch.context() as patch:
                patch.setattr(torch.distributed, "is_initialized", lambda: False)
                shares.append(rows_of(pickle.loads(content)))
        else:
            shares.append(rows_of(stream))
    assert all(shares)
    wanted = Counter(zip(selection.prompt.tolist(), selection.pos.tolist(), strict=True))
    assert shares[0] + shares[1] + shares[2] == wanted


def test_patterns_are_not_streamed(stored: actdb.Run) -> None:
    with pytest.raises(actdb.SelectionError, match="needs a row site"):
        stored["pattern"].torch_dataset(size=4)
    with pytest.raises(actdb.SelectionError, match="must be at least 1"):
        stored["k"].torch_dataset(size=0)
