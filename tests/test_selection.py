"""Selections against NumPy indexing, and the reads that they cost."""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crc32c import crc32c
from hooked import Written, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

import actdb
from actdb.schema import SiteSpec
from actdb.selection.plan import plan_reads
from actdb.storage import codecs
from actdb.storage.shards import ShardReader

LAYERS = (0, 2, 5)


def make(path: Path, **options: Any) -> tuple[actdb.Run, Written]:
    written = write_run(path / "x.actdb", **options)
    return actdb.open(path / "x.actdb").run(), written


@pytest.fixture(scope="module", params=["lz4", "raw"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[actdb.Run, Written]:
    return make(tmp_path_factory.mktemp("made"), codec=request.param, seed=3, n_prompts=11, longest=9)


def axis_index(draw: Any, n: int) -> Any:
    """None, an int, a slice, a list or a boolean mask along an axis of n."""
    kind = draw(st.sampled_from(["none", "int", "slice", "list", "mask", "array"]))
    if kind == "int":
        return draw(st.integers(0, n - 1))
    if kind == "slice":
        return slice(draw(st.integers(0, n)), draw(st.integers(0, n)), draw(st.sampled_from([None, 1, 2])))
    if kind == "mask":
        return np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if kind in ("list", "array"):
        chosen = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
        return np.array(chosen) if kind == "array" else chosen
    return None


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_row_sites_equal_numpy(made: tuple[actdb.Run, Written], data: st.DataObject) -> None:
    run, written = made
    site = data.draw(st.sampled_from(["resid_post", "k", "embed", "pattern_index"]))
    spec = run.info.site(site)
    assert spec is not None
    given_: dict[str, Any] = {}
    axes = {"layer": len(LAYERS)} if spec.layers else {}
    if len(spec.planes) == 2:
        axes["head"] = spec.planes[1]
    axes["neuron"] = spec.feature[0]
    places: list[Any] = []
    for name, n in axes.items():
        index = axis_index(data.draw, n)
        places.append(slice(None) if index is None else index)
        if index is not None:
            if name == "layer":
                index = translate_layer(index)
            given_[name] = index
    prompts, dropped = chosen_prompts(data, run, given_)
    lengths = [written.lengths[p] for p in prompts]
    slices = [
        slice(1, None),
        slice(-2, None),
        slice(None, -1),
        slice(3, 1),
        slice(None, None, 2),
        slice(None, None, -1),
    ]
    pos = data.draw(st.sampled_from([None, -1, 0, [0], [-1, 0], np.array([-1]), np.int64(0), *slices]))
    if pos is not None:
        given_["pos"] = pos
    selection = run[site].sel(**given_)
    rows, row_prompts, row_pos = [], [], []
    for p, n in zip(prompts, lengths, strict=True):
        positions = np.arange(n)[pos] if pos is not None else np.arange(n)
        positions = np.atleast_1d(positions)
        rows.append(written.values[site][p][..., positions, :])
        row_prompts += [p] * len(positions)
        row_pos += positions.tolist()
    axis = len(spec.planes)
    empty = np.empty((*spec.planes, 0, *spec.feature), spec.dtype)
    want = np.concatenate(rows, axis=axis) if rows else empty
    for place, index in reversed(list(enumerate(places[:axis]))):
        want = want[(*[slice(None)] * place, index)]
    want = want[..., places[-1]]
    if dropped and isinstance(pos, int | np.integer):
        want = want.take(0, axis=want.ndim - 1 - (0 if isinstance(places[-1], int) else 1))
    assert selection.shape == want.shape
    assert selection.dtype == want.dtype
    assert selection.nbytes == want.nbytes
    assert len(selection.dims) == want.ndim
    assert selection.prompt.tolist() == row_prompts
    assert selection.pos.tolist() == row_pos
    before = run[site]._source.reader.n_reads
    assert repr(selection)
    assert run[site]._source.reader.n_reads == before
    values = selection.numpy()
    assert np.array_equal(values, want)
    assert np.array_equal(np.asarray(selection), want)


def translate_layer(index: Any) -> Any:
    """The model's layer numbers for places 0, 1, 2."""
    if isinstance(index, slice):
        numbers = [*LAYERS, LAYERS[-1] + 1]
        if index.step == 2:
            return [LAYERS[i] for i in range(*index.indices(len(LAYERS)))]
        return slice(numbers[index.start], numbers[index.stop])
    if isinstance(index, np.ndarray) and index.dtype == bool:
        return [LAYERS[i] for i in np.flatnonzero(index)]
    return LAYERS[index] if isinstance(index, int) else [LAYERS[i] for i in np.asarray(index).tolist()]


def chosen_prompts(data: st.DataObject, run: actdb.Run, given_: dict[str, Any]) -> tuple[list[int], bool]:
    index = axis_index(data.draw, run.n_prompts)
    if index is None:
        return list(range(run.n_prompts)), False
    given_["prompt"] = index
    everything = np.arange(run.n_prompts)
    return np.atleast_1d(everything[index]).tolist(), isinstance(index, int)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_patterns_equal_unpacked_squares(tmp_path: Path, causal: bool, codec: str) -> None:
    run, written = make(tmp_path, causal=causal, codec=codec, seed=5)
    squares = []
    for n, packed in zip(written.lengths, written.values["pattern"], strict=True):
        square = np.zeros((3, 2, n, n), np.float16)
        if causal:
            square[..., *np.tril_indices(n)] = packed
        else:
            square[:] = packed.reshape(3, 2, n, n)
        squares.append(square)
    for prompt, square in enumerate(squares):
        selection = run["pattern"].sel(layer=2, head=1, prompt=prompt)
        assert selection.dims == ("query", "key")
        assert selection.shape == square.shape[2:]
        assert np.array_equal(selection.numpy(), square[1, 1])
        for query in (0, -1):
            row = run["pattern"].sel(layer=[5, 0], prompt=prompt, pos=query)
            assert np.array_equal(row.numpy(), square[[2, 0]][:, :, query])
            assert row.shape == row.numpy().shape
    several = run["pattern"].sel(prompt=[4, 1, 4])
    assert all(np.array_equal(a, squares[p]) for a, p in zip(several.numpy(), (4, 1, 4), strict=True))
    padded = several.numpy(pad=True)
    assert padded.shape == several.shape
    n = squares[1].shape[-1]
    assert np.array_equal(padded[:, :, 1, :n, :n], squares[1])
    assert np.isnan(padded[:, :, 1, n:]).all()
    assert np.isnan(padded[:, :, 1, :, n:]).all()
    blocks = list(run["pattern"].sel(layer=0).batches(4))
    assert sorted(p for block in blocks for p in block.prompt.tolist()) == list(range(run.n_prompts))
    for block in blocks:
        for value, prompt in zip(block.values, block.prompt.tolist(), strict=True):
            assert np.array_equal(value, squares[prompt][0])
    with pytest.raises(actdb.SelectionError, match="batches"):
        run["pattern"].shuffled(3)


def test_prompt_level_site(made: tuple[actdb.Run, Written]) -> None:
    run, written = made
    everything = np.concatenate(written.values["pooled"])
    assert run["pooled"].dims == ("prompt", "feature")
    assert np.array_equal(run["pooled"].numpy(), everything)
    assert np.array_equal(run["pooled"].sel(prompt=[3, 0]).numpy(), everything[[3, 0]])
    assert np.array_equal(run["pooled"].sel(prompt=3).numpy(), everything[3])
    with pytest.raises(actdb.SelectionError, match="no positions"):
        run["pooled"].sel(pos=0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"layer": 1}, "layer 1: there are layers 0, 2, 5"),
        ({"layer": -1}, "layer -1"),
        ({"head": 2}, "head 2: there are heads 0 to 1"),
        ({"neuron": 99}, "neuron 99: there are neurons 0 to 1"),
        ({"prompt": 11}, "prompt 11: run 'made' has prompts 0 to 10"),
        ({"prompt": -1}, "prompt -1"),
        ({"pos": 50}, "pos 50: prompt 0 has positions 0 to"),
        ({"pos": [0, -50]}, "pos -50"),
        ({"layer": "a"}, "give an int, a slice, or a list of ints"),
        ({"head": [0.5]}, "give an int, a slice, or a list of ints"),
        ({"prompt": True}, "give an int, a slice, or a list of ints"),
        ({"prompt": [[1]]}, "give an int, a slice, or a list of ints"),
        ({"prompt": 2**70}, "prompt 1180591620717411303424: run 'made' has prompts 0 to 10"),
        ({"prompt": [True, False]}, "prompt: the mask has 2 places instead of 11"),
        ({"layer": [True]}, "layer: the mask has 1 places instead of 3"),
        ({"head": np.ones(3, bool)}, "head: the mask has 3 places instead of 2"),
        ({"pos": [True] * 40}, "pos: the mask has 40 places instead of"),
        ({"pos": 2**70}, "pos 1180591620717411303424: no prompt is that long"),
        ({"pos": np.array([2**63], np.uint64)}, "pos 9223372036854775808: no prompt is that long"),
        ({"layer": slice(0, 1, 0)}, "layer=.*slice step cannot be zero"),
        ({"prompt": slice(0, 4, 0)}, "prompt=.*slice step cannot be zero"),
        ({"pos": slice(None, None, 0)}, "pos=.*slice step cannot be zero"),
        ({"pos": slice(0.5)}, "pos=.*slice indices must be integers"),
    ],
)
def test_outside_the_range(made: tuple[actdb.Run, Written], index: dict[str, Any], message: str) -> None:
    with pytest.raises(actdb.SelectionError, match=message):
        made[0]["k"].sel(**index).numpy()


def test_masks(made: tuple[actdb.Run, Written]) -> None:
    """A boolean mask picks places along an axis, as in NumPy, also where layer numbers have gaps."""
    run, written = made
    layers, prompts = np.array([False, True, True]), np.arange(11) % 3 == 0
    selection = run["k"].sel(layer=layers, prompt=prompts)
    assert selection.layers == (2, 5)
    chosen = [value for value, wanted in zip(written.values["k"], prompts, strict=True) if wanted]
    assert np.array_equal(selection.numpy(), np.concatenate(chosen, axis=2)[1:])
    prompt = int(np.argmax(written.lengths))
    mask = np.arange(written.lengths[prompt]) % 2 == 1
    assert np.array_equal(run["k"].sel(prompt=prompt, pos=mask).numpy(), written.values["k"][prompt][:, :, mask])


@pytest.mark.parametrize("codec", ["lz4", "raw"])
@pytest.mark.parametrize("causal", [True, False])
def test_last_positions(tmp_path: Path, codec: str, causal: bool) -> None:
    """Runs that keep the last position of each prompt: one row each, and a pattern of one query."""
    run, written = make(tmp_path, positions="last", codec=codec, causal=causal, seed=9)
    everything = np.concatenate(written.values["k"], axis=2)
    for pos in (None, -1, slice(None), slice(-1, None), [-1]):
        selection = run["k"].sel(**({} if pos is None else {"pos": pos}))
        assert np.array_equal(selection.numpy(), everything)
        assert selection.pos.tolist() == [n - 1 for n in written.lengths]
    for prompt, n in enumerate(written.lengths):
        assert np.array_equal(run["k"].sel(prompt=prompt, pos=n - 1).numpy(), everything[:, :, prompt])
        pattern = run["pattern"].sel(prompt=prompt)
        assert pattern.dims == ("layer", "head", "query", "key")
        assert pattern.shape == (3, 2, 1, n)
        assert np.array_equal(pattern.numpy()[:, :, 0], written.values["pattern"][prompt])
        assert np.array_equal(pattern.sel(pos=-1).numpy(), written.values["pattern"][prompt])
    padded = run["pattern"].numpy(pad=True)
    assert padded.shape == run["pattern"].shape == (3, 2, run.n_prompts, 1, max(written.lengths))
    longer = next(prompt for prompt, n in enumerate(written.lengths) if n > 1)
    assert run["k"].sel(prompt=longer, pos=slice(0, 1)).shape == (3, 2, 0, 2)
    with pytest.raises(actdb.SelectionError, match="stores the last position of each prompt only"):
        run["k"].sel(prompt=longer, pos=0).numpy()
    with pytest.raises(actdb.SelectionError, match="stores the last position of each prompt only"):
        run["pattern"].sel(prompt=longer, pos=0).numpy()


def test_nothing_selected(made: tuple[actdb.Run, Written]) -> None:
    run, _ = made
    for options, shape in (
        ({"prompt": []}, (3, 2, 0, 2)),
        ({"prompt": [], "pos": [0]}, (3, 2, 0, 2)),
        ({"prompt": [], "pos": -1, "layer": 2}, (2, 0, 2)),
        ({"layer": [], "prompt": 0, "pos": 0}, (0, 2, 2)),
        ({"neuron": [], "prompt": 0, "pos": 0}, (3, 2, 0)),
        ({"head": slice(1, 1)}, None),
    ):
        selection = run["k"].sel(**options)
        assert shape is None or selection.shape == shape
        assert selection.numpy().shape == selection.shape
        assert sum(len(block) for block in selection.batches(4)) == selection.n_rows
    nothing = run["pattern"].sel(prompt=[])
    assert nothing.numpy() == []
    for selection in (nothing, nothing.sel(pos=0)):
        assert selection.numpy(pad=True).shape == selection.shape
    assert list(nothing.batches(3)) == []


def test_axes_that_a_site_lacks(made: tuple[actdb.Run, Written]) -> None:
    run = made[0]
    for site, index, message in (
        ("resid_post", {"head": 0}, "no heads; its axes are layer, row, d_model"),
        ("embed", {"layer": 0}, "no layers"),
        ("pattern", {"neuron": 0}, "no neurons"),
        ("pattern", {"pos": slice(0, 2)}, "pos of a pattern is one query"),
        ("pattern", {"pos": [0]}, "pos of a pattern is one query"),
    ):
        with pytest.raises(actdb.SelectionError, match=message):
            run[site].sel(**index)
    with pytest.raises(actdb.SiteError, match="no site 'zz'; it holds resid_post, k, pattern"):
        run["zz"]


def test_selecting_again_narrows(made: tuple[actdb.Run, Written]) -> None:
    run, _ = made
    twice = run["k"].sel(layer=2).sel(head=1).sel(prompt=4)
    assert np.array_equal(twice.numpy(), run["k"].sel(layer=2, head=1, prompt=4).numpy())


def test_only_the_chunks_of_a_selection_are_read(tmp_path: Path) -> None:
    run, written = make(tmp_path, seed=8, n_prompts=20, longest=9)
    spec = run.info.site("resid_post")
    assert spec is not None
    chunk, index = spec.chunk_shape[1], run._prompts
    for prompt in range(20):
        reader = run["resid_post"]._source.reader
        before = reader.n_reads
        run["resid_post"].sel(layer=2, prompt=prompt).numpy()
        start, n = int(index.row_start[prompt]), written.lengths[prompt]
        within = start % spec.capacity
        assert reader.n_reads - before == (within + n - 1) // chunk - within // chunk + 1
    before = run["resid_post"]._source.reader.n_reads
    rows = 0
    for block in run["resid_post"].sel(layer=2).batches(7):
        assert len(block) <= 7
        rows += len(block)
    used = {int(r) // chunk for s, n in zip(index.row_start, index.n_rows, strict=True) for r in range(s, s + n)}
    assert rows == sum(written.lengths)
    assert run["resid_post"]._source.reader.n_reads - before == len(used)


def rows_of(blocks: list[actdb.Block]) -> dict[tuple[int, int], np.ndarray]:
    rows: dict[tuple[int, int], np.ndarray] = {}
    for block in blocks:
        assert block.pos is not None
        for i, key in enumerate(zip(block.prompt.tolist(), block.pos.tolist(), strict=True)):
            assert key not in rows
            rows[key] = np.asarray(block.values)[..., i, :]
    return rows


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_streams_give_every_row_once(made: tuple[actdb.Run, Written], size: int) -> None:
    run, written = made
    truth = {(p, i): v[1, 0, i] for p, v in enumerate(written.values["k"]) for i in range(v.shape[2])}
    selection = run["k"].sel(layer=2, head=0)
    for blocks in (list(selection.batches(size)), list(selection.shuffled(size, seed=4))):
        rows = rows_of(blocks)
        assert rows.keys() == truth.keys()
        assert all(np.array_equal(rows[key], truth[key]) for key in truth)
        assert all(len(block) == size for block in blocks[:-1])


def test_shuffling_is_seeded_and_shared_by_workers(made: tuple[actdb.Run, Written]) -> None:
    selection = made[0]["k"].sel(layer=2, head=0)

    def order(**options: Any) -> list[tuple[int, int]]:
        return [
            k
            for block in selection.shuffled(5, **options)
            for k in zip(block.prompt.tolist(), block.pos.tolist(), strict=True)
        ]

    once = order(seed=1)
    assert once == order(seed=1)
    assert once != order(seed=2)
    assert once != sorted(once)
    twice = order(seed=1, epochs=2)
    assert twice[: len(once)] == once
    assert sorted(twice[len(once) :]) == sorted(once)
    assert twice[len(once) :] != once
    shares = [order(seed=1, worker=(i, 3)) for i in range(3)]
    assert sorted(k for share in shares for k in share) == sorted(once)
    with pytest.raises(actdb.SelectionError, match="worker"):
        order(worker=(3, 3))


def test_other_forms(made: tuple[actdb.Run, Written]) -> None:
    run, _ = made
    selection = run["k"].sel(layer=2, prompt=[1, 0])
    values = selection.numpy()
    tensor = selection.torch()
    assert isinstance(tensor, torch.Tensor)
    tensor += 0  # owns its memory
    assert np.array_equal(tensor.numpy(), values)
    array = selection.xarray()
    assert array.dims == ("kv_head", "row", "d_head")
    assert np.array_equal(array.values, values)
    assert int(array.coords["layer"]) == 2
    assert array.coords["prompt"].values.tolist() == selection.prompt.tolist()
    assert array.coords["pos"].values.tolist() == selection.pos.tolist()
    copied = np.array(run["embed"].sel(prompt=0))  # a raw chunk alone is a read-only view of the file
    assert copied.flags.writeable
    assert np.array_equal(np.asarray(selection, np.float64), values.astype(np.float64))
    one = run["pooled"].sel(prompt=2).xarray()
    assert one.dims == ("feature",)
    assert int(one.coords["prompt"]) == 2
    patterns = run["pattern"].sel(head=0, prompt=[1, 0]).xarray()
    assert patterns.dims == ("layer", "prompt", "query", "key")
    assert patterns.coords["layer"].values.tolist() == list(LAYERS)


@pytest.mark.parametrize("causal", [True, False])
def test_tensors_of_patterns_own_their_memory(tmp_path: Path, causal: bool) -> None:
    run, _ = make(tmp_path, codec="raw", causal=causal)
    selection = run["pattern"].sel(layer=2, head=1)
    tensors = [*selection.torch(), *(selection.sel(prompt=prompt).torch() for prompt in range(run.n_prompts))]
    for tensor, wanted in zip(tensors, selection.numpy() * 2, strict=True):
        assert np.array_equal(tensor.numpy(), wanted)
        tensor += 1
    assert np.array_equal(selection.torch()[0].numpy(), selection.numpy()[0])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """Any number of runs, sites and parts can be read by one process: all readers share one limit."""
    monkeypatch.setattr("actdb.selection.reader.MAX_OPEN_SHARDS", 6)
    for i in range(3):
        write_run(tmp_path / "x.actdb", name=f"run{i}", seed=i, codec=codec, n_parts=6, n_prompts=24)
    with actdb.open(tmp_path / "x.actdb") as db:
        runs, before = db.runs(), open_files()
        for _ in range(2):
            for i, run in enumerate(runs):
                assert run.name == f"run{i}"
                for site in run:
                    run[site].numpy()
                    for prompt in range(0, 24, 5):
                        run[site].sel(prompt=prompt).numpy()
                    assert open_files() - before <= 2 * 6  # a raw shard is open twice: mapped, and for its index


def test_threads_inside_a_read(made: tuple[actdb.Run, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large reads go over threads; here every read does, with more shards than may be open."""
    run, written = made
    monkeypatch.setattr("actdb.selection.reader.THREADED_BYTES", 0)
    monkeypatch.setattr("actdb.selection.reader.MAX_OPEN_SHARDS", 2)
    for _ in range(5):
        assert np.array_equal(run["k"].numpy(), np.concatenate(written.values["k"], axis=2))
        assert np.array_equal(run["embed"].sel(neuron=3).numpy(), np.concatenate(written.values["embed"])[:, 3])


def test_partial_runs_show_committed_prompts_only(tmp_path: Path) -> None:
    run, written = make(tmp_path, seed=2, n_prompts=12, committed=[0, 2])
    assert run.status == "partial"
    stored = [p for p in range(12) if run._prompts.part[p] != 1]
    assert 0 < len(stored) < 12
    wanted = np.concatenate([written.values["embed"][p] for p in stored])
    assert np.array_equal(run["embed"].numpy(), wanted)
    missing = next(p for p in range(12) if p not in stored)
    with pytest.raises(actdb.SelectionError, match="not stored yet"):
        run["embed"].sel(prompt=missing).numpy()


def test_threads_read_what_one_reads(made: tuple[actdb.Run, Written]) -> None:
    run, written = made
    wrong: list[int] = []

    def read(seed: int) -> None:
        for prompt in np.random.default_rng(seed).permutation(run.n_prompts).tolist() * 5:
            if not np.array_equal(run["k"].sel(prompt=prompt).numpy(), written.values["k"][prompt]):
                wrong.append(prompt)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), min_size=1, max_size=12), st.sampled_from([1, 2, 4, 8])
)
@settings(deadline=None)
def test_plans_cover_their_ranges(ranges: list[tuple[int, int]], chunk: int) -> None:
    spec = SiteSpec(
        "x", "x", ("layer", "row", "d"), (1, 80, 3), (1, 16, 3), (1, chunk, 3), "float32", "raw", None, (0,)
    )
    starts = [start for start, _ in ranges]
    counts = [min(count, 16 - start % 16) for start, count in ranges]
    want = [row for start, count in zip(starts, counts, strict=True) for row in range(start, start + count)]
    got: dict[int, int] = {}
    reads = plan_reads(spec, starts, counts)
    assert len({(read.part, read.row_chunk) for read in reads}) == len(reads)
    for read in reads:
        for source, target, count in zip(read.sources, read.targets, read.counts, strict=True):
            assert source + count <= chunk
            for i in range(count):
                assert target + i not in got
                got[target + i] = read.part * 16 + read.row_chunk * chunk + source + i
    assert [got[i] for i in range(len(want))] == want
    for start, count in zip(starts, counts, strict=True):
        if count:
            assert plan_reads(spec, [start], [count]) == plan_reads(spec, [start, 0], [count, 0])


def test_one_prompt_reads_as_several_do(made: tuple[actdb.Run, Written]) -> None:
    """The short path of ints for layer, head and prompt gives what the general one gives, values and chunk reads."""
    run, _ = made
    for site in run:
        selection = run[site]
        heads: list[dict[str, int]] = [{}]
        if "head" in selection.dims or "kv_head" in selection.dims:
            heads = [{"head": 0}, {"head": 1}]
        for layer in selection.layers or (None,):
            for head in heads:
                for prompt in range(0, run.n_prompts, 3):
                    one = selection.sel(layer=layer, prompt=prompt, **head)
                    reader = one._source.reader
                    before = reader.n_reads
                    values, n_reads = one.numpy(), reader.n_reads - before
                    if "prompt" not in reader.spec.dims and reader.spec.dims[-1] != "entry":
                        assert one._place is not None
                        several = selection.sel(layer=layer, prompt=[prompt], **head)
                        assert several._place is None
                        before = reader.n_reads
                        assert np.array_equal(values, several.numpy())
                        assert reader.n_reads - before == n_reads
                        assert one.shape == values.shape


@given(
    st.permutations(range(12)),
    st.lists(st.integers(0, 40), min_size=12, max_size=12),
    st.integers(0, 5),
    st.integers(1, 7),
)
@settings(deadline=None, max_examples=40)
def test_raw_chunks_at_any_spacing_read_again(order: list[int], gaps: list[int], first: int, count: int) -> None:
    """A second scan copies verified chunks together: in any order in the file, equally spaced or not."""
    spec = SiteSpec("x", "x", ("layer", "row", "d"), (2, 24, 3), (2, 24, 3), (1, 4, 3), "float16", "raw", None, (0, 1))
    values = np.random.default_rng(0).standard_normal((2, 24, 3)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0")
        content, index = bytearray(), np.zeros((12, 2), "<u8")
        for chunk, gap in zip(order, gaps, strict=True):
            payload, crc = codecs.encode(values[chunk // 6, chunk % 6 * 4 : chunk % 6 * 4 + 4].copy(), "raw")
            content += bytes(gap)
            index[chunk] = len(content), len(payload) + len(crc)
            content += bytes(payload) + crc
        tail = index.tobytes()
        path.write_bytes(bytes(content) + tail + crc32c(tail).to_bytes(4, "little"))
        reader, begin = ShardReader(str(path), spec), min(first, 6 - min(count, 6))
        out = np.empty((min(count, 6) * 4, 3), np.float16)
        assert not reader.copy_whole(begin, out)  # nothing is verified yet
        for place in range(min(count, 6)):
            reader.copy(begin + place, 0, out[place * 4 : place * 4 + 4])
        assert np.array_equal(out, values[0, begin * 4 : begin * 4 + len(out)])
        out[:] = 0
        assert reader.copy_whole(begin, out)
        assert np.array_equal(out, values[0, begin * 4 : begin * 4 + len(out)])
