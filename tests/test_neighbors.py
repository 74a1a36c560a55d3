"""Exact neighbours: held to brute force in float64 over what `sel` returns, in every metric, map and exclusion."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import actdb
from actdb.cli import cli
from actdb.errors import (
    ModelError,
    PromptError,
    SelectionError,
    SettingError,
    SiteError,
    SqlError,
    WriteError,
)
from actdb.neighbors import device, exact
from actdb.neighbors.best import Best
from actdb.neighbors.device import Processor, TorchProcessor
from actdb.neighbors.map import make_map
from actdb.neighbors.metric import METRICS, widen
from actdb.neighbors.row import Rows, make_plane
from tests.hooked import TinyModel, random_prompts, write_run

Array = npt.NDArray[Any]
N_PROMPTS = 40
LENGTHS = [len(prompt["tokens"]) for prompt in random_prompts(N_PROMPTS)]
LONG = LENGTHS.index(max(LENGTHS))


class Characters:
    """A tokenizer of letters a … p."""

    bos_token_id, cls_token_id, all_special_ids = None, None, ()

    def __len__(self) -> int:
        return 16

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) - 97 for letter in text]})

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(97 + token)

    def decode(self, ids: list[int], **_: Any) -> str:
        return chr(97 + ids[0])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvested database of 40 prompts with labels `kind` (a, b) and `i`."""
    out = tmp_path_factory.mktemp("neighbors") / "x.actdb"
    prompts = random_prompts(N_PROMPTS)
    sites = ["resid_post", "z", "k", "embed", "pattern", "hook_pooled"]
    actdb.harvest(TinyModel(), prompts, out, sites=sites, part_tokens=64, tokenizer=Characters(), store="float32")
    return out


@pytest.fixture
def db(path: Path) -> Iterator[actdb.Database]:
    with actdb.open(path) as opened:
        yield opened


def brute(metric: str, queries: Array, rows: Array) -> Array:
    """Distances [query, row] by definition, in float64."""
    left, right = queries.astype(np.float64)[:, None], rows.astype(np.float64)[None]
    if metric == "l2":
        return np.asarray(np.sqrt(((left - right) ** 2).sum(-1)))
    products = (left * right).sum(-1)
    if metric == "ip":
        return -products
    return 1 - products / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


def barred(prompt: Array, pos: Array, *, exclude_prompt: bool, exclude_within: int) -> Array:
    """Which rows [row, row] shall not find each other."""
    same = prompt[:, None] == prompt
    return same if exclude_prompt else same & (np.abs(pos[:, None] - pos) <= exclude_within)


# Every row's neighbours, and those of one.


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    metric=st.sampled_from(METRICS),
    site=st.sampled_from([("resid_post", 2, None), ("k", 5, 1), ("embed", None, None)]),
    codec=st.sampled_from(["lz4", "raw"]),
    positions=st.sampled_from(["all", "last"]),
    n_prompts=st.integers(3, 60),
    n_parts=st.integers(1, 4),
    k=st.integers(1, 12),
    block=st.sampled_from([1, 3, 16, 64, 4096]),
    panel=st.integers(1, 4000),
    exclude_prompt=st.booleans(),
    exclude_within=st.integers(0, 3),
    on_torch=st.booleans(),
)
def test_join_is_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    metric: str,
    site: tuple[str, int | None, int | None],
    codec: str,
    positions: str,
    n_prompts: int,
    n_parts: int,
    k: int,
    block: int,
    panel: int,
    exclude_prompt: bool,
    exclude_within: int,
    on_torch: bool,
) -> None:
    root = tmp_path_factory.mktemp("join")
    write_run(root, seed=seed, codec=codec, n_prompts=n_prompts, n_parts=n_parts, positions=positions)
    name, layer, head = site
    with actdb.open(root) as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK_ROWS", block)
        chosen = db.run()[name].sel(layer=layer, head=head)
        values = chosen.numpy()
        plane = make_plane(db.run(), name, layer=layer, head=head)
        rows = Rows(plane, make_map(db.run(), plane.width), metric)
        bars = barred(rows.prompt, rows.pos, exclude_prompt=exclude_prompt, exclude_within=exclude_within)
        ranges = rows.around(np.arange(len(rows)), exclude_prompt=exclude_prompt, exclude_within=exclude_within)
        processor = TorchProcessor("cpu") if on_torch else Processor()
        fewest = int((~bars).sum(1).min())
        if k > fewest:
            with pytest.raises(SettingError, match=f"k {k}: there are {fewest} rows to find"):
                exact.join(rows, k, exact.Excluded(*ranges), processor, panel_bytes=panel)
            return
        found = exact.join(rows, k, exact.Excluded(*ranges), processor, panel_bytes=panel)
        place = {(p, q): i for i, (p, q) in enumerate(zip(chosen.prompt.tolist(), chosen.pos.tolist(), strict=True))}
    order = [place[key] for key in zip(rows.prompt.tolist(), rows.pos.tolist(), strict=True)]
    truth = brute(metric, values[order], values[order])
    assert not bars[np.arange(len(rows))[:, None], found.numbers].any()
    assert all(len(set(numbers)) == k for numbers in found.numbers.tolist())
    np.testing.assert_allclose(np.take_along_axis(truth, found.numbers, 1), found.distances, rtol=1e-4, atol=1e-5)
    truth[bars] = np.inf
    np.testing.assert_allclose(np.sort(truth, axis=1)[:, :k], found.distances, rtol=1e-4, atol=1e-5)


def test_every_finite_half_widens_to_the_same_number() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    for values in (halves, np.tile(halves, 3).reshape(3, -1), halves[::-2], halves[:0]):
        np.testing.assert_array_equal(widen(values).view(np.int32), values.astype(np.float32).view(np.int32))
    assert widen(halves.astype(np.float64)).dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 200),
    width=st.integers(1, 300),
    k=st.integers(1, 9),
    axis=st.integers(0, 1),
    rounds=st.integers(1, 4),
    hidden=st.floats(0, 1),
)
def test_the_best_are_kept(seed: int, n: int, width: int, k: int, axis: int, rounds: int, hidden: float) -> None:
    generator = np.random.default_rng(seed)
    best, offered = Best(n + 2, k), []
    for number in range(rounds):
        block = generator.integers(-40, 40, (n, width)).astype(np.float32)  # with many ties
        block[generator.random(block.shape) < hidden] = -np.inf
        best.offer(1, block if axis == 1 else np.ascontiguousarray(block.T), number * width, axis=axis)
        offered.append(block)
    everything = np.concatenate([*offered, np.full((n, k), -np.inf)], axis=1)
    numbers, products = best.found()
    np.testing.assert_array_equal(products[1:-1], -np.sort(-everything, axis=1)[:, :k])
    assert (products[[0, -1]] == -np.inf).all()
    kept = numbers[1:-1] >= 0
    np.testing.assert_array_equal(kept, products[1:-1] > -np.inf)
    rows, _ = np.nonzero(kept)
    np.testing.assert_array_equal(everything[rows, numbers[1:-1][kept]], products[1:-1][kept])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("where", [None, "kind = 'a'", "i < 20"])
@pytest.mark.parametrize(("exclude_prompt", "exclude_within"), [(False, 0), (False, 2), (True, 0)])
def test_nearest_is_brute_force(
    db: actdb.Database, metric: str, where: str | None, exclude_prompt: bool, exclude_within: int
) -> None:
    chosen = db.run()["z"].sel(layer=1, head=1)
    values, prompt, pos = chosen.numpy(), chosen.prompt, chosen.pos
    allowed = np.isin(prompt, db.run()["z"].sel(where=where).prompt)
    row = int(np.flatnonzero(prompt == LONG)[-1])
    bars = barred(prompt, pos, exclude_prompt=exclude_prompt, exclude_within=exclude_within)[row]
    truth = np.where(allowed & ~bars, brute(metric, values[[row]], values)[0], np.inf)
    options: dict[str, Any] = {"metric": metric, "where": where, "k": 6, "exclude_prompt": exclude_prompt}
    found = db.nearest("z", layer=1, head=1, prompt=LONG, pos=-1, exclude_within=exclude_within, **options).df()
    order = np.argsort(truth, kind="stable")[:6]
    np.testing.assert_allclose(found["distance"], truth[order], rtol=1e-4, atol=1e-6)
    own = [truth[(prompt == p) & (pos == q)][0] for p, q in zip(found["prompt_id"], found["pos"], strict=True)]
    np.testing.assert_allclose(found["distance"], own, rtol=1e-4, atol=1e-6)
    # a radius: those and no others
    radius = float(np.sort(truth)[9]) + 1e-6
    options["k"] = None
    within = db.nearest(
        "z", layer=1, head=1, prompt=LONG, pos=-1, exclude_within=exclude_within, radius=radius, **options
    ).df()
    assert len(within) == int((truth <= radius).sum())
    np.testing.assert_allclose(within["distance"], np.sort(truth)[: len(within)], rtol=1e-4, atol=1e-6)


def test_a_result_has_tokens_context_and_labels(db: actdb.Database) -> None:
    found = db.nearest("resid_post", layer=1, prompt=3, pos=0, k=5)
    labels = ["kind", "i"]
    assert list(found.columns) == ["run", "rank", "prompt_id", "pos", "distance", "token", "context", *labels]
    frame = found.df()
    assert frame["rank"].tolist() == [0, 1, 2, 3, 4]
    assert frame["distance"].is_monotonic_increasing
    for row in frame.itertuples():
        texts = db.run().token_texts(row.prompt_id)
        assert row.token == texts[row.pos]
        marked = [f"[{text}]" if i == row.pos else text for i, text in enumerate(texts)]
        assert row.context == "".join(marked[max(0, row.pos - 8) : row.pos + 5])
        assert row.kind == "ab"[row.prompt_id % 2]
        assert row.i == row.prompt_id
    assert isinstance(found.arrow(), pa.Table)
    assert len(found.fetchall()) == 5


def test_equal_rows_have_distance_zero(db: actdb.Database) -> None:
    """The first position knows its token alone: rows of one token are equal, however far from the origin."""
    run = db.run()
    first = {prompt: int(run.tokens(prompt)[0]) for prompt in range(40)}
    same = [prompt for prompt, token in first.items() if token == first[3] and prompt != 3]
    for metric in ("cosine", "l2"):
        found = db.nearest("resid_post", layer=1, prompt=3, pos=0, k=len(same), metric=metric).df()
        assert sorted(found["prompt_id"]) == same
        assert (found["pos"] == 0).all()
        assert (found["distance"] < 1e-5).all()


def test_a_vector_may_find_every_row(db: actdb.Database) -> None:
    values = db.run()["resid_post"].sel(layer=0, prompt=LONG, pos=1).numpy()
    found = db.nearest("resid_post", layer=0, vector=values, k=1).fetchall()
    assert found[0][2:4] == (LONG, 1)
    assert found[0][4] < 1e-6
    n_rows = db.run()["resid_post"].sel(layer=0).n_rows
    assert len(db.nearest("resid_post", layer=0, vector=values, k=n_rows).fetchall()) == n_rows
    with pytest.raises(SettingError, match=f"k {n_rows + 1}: there are {n_rows} rows"):
        db.nearest("resid_post", layer=0, vector=values, k=n_rows + 1)


def test_a_site_of_prompts(db: actdb.Database) -> None:
    values = db.run()["hook_pooled"].numpy()
    found = db.nearest("hook_pooled", prompt=4, k=3, metric="l2").df()
    truth = np.sort(brute("l2", values[[4]], values)[0])[1:4]
    np.testing.assert_allclose(found["distance"], truth, rtol=1e-4, atol=1e-6)
    assert found[["pos", "token", "context"]].isna().all(axis=None)
    with pytest.raises(SelectionError, match="has no positions: leave pos out"):
        db.nearest("hook_pooled", prompt=4, pos=0)


def test_a_prompt_left_out_by_the_condition_still_asks(db: actdb.Database) -> None:
    found = db.nearest("resid_post", layer=1, prompt=3, pos=0, where="kind = 'a'").df()
    assert (found["kind"] == "a").all()


# Maps.


def test_maps_are_what_the_model_does(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    prompts = [{"tokens": row.tolist()} for row in np.random.default_rng(0).integers(0, 48, (12, 9))]
    actdb.harvest(model_folder("gpt2"), prompts, tmp_path / "x.actdb", sites=["resid_post", "z"], store="float32")
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((24, 24)))[0]
    with actdb.open(tmp_path / "x.actdb", mode="a") as db:
        run = db.run()
        residual = run["resid_post"].sel(layer=0).numpy().astype(np.float64)
        scale, shift, unembedding = (run.weight(f"ln_final.{n}") for n in ("w", "b")), None, run.weight("W_U")
        weight, bias = scale
        centred = residual - residual.mean(-1, keepdims=True)
        norm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
        part = rotation[:, 4:9]
        ways: list[tuple[dict[str, Any], Array]] = [
            ({"map": "final_norm"}, norm),
            ({"map": "unembed"}, residual @ unembedding),
            ({"map": ("final_norm", "unembed")}, norm @ unembedding),
            ({"map": "final_norm, unembed"}, norm @ unembedding),
            ({"partition": rotation, "subspace": (4, 9)}, residual @ part),
            (
                {"partition": rotation, "subspace": slice(4, 9), "map": "unembed"},
                residual @ part @ part.T @ unembedding,
            ),
            ({"partition": rotation}, residual),
        ]
        assert shift is None
        for given_options, mapped in ways:
            for metric in METRICS:
                truth = np.sort(brute(metric, mapped[[5]], np.delete(mapped, 5, axis=0))[0])[:4]
                found = db.nearest("resid_post", layer=0, prompt=0, pos=5, k=4, metric=metric, **given_options).df()
                np.testing.assert_allclose(found["distance"], truth, rtol=1e-3, atol=1e-4)
        # stored under a name, in subspaces
        db.add_partition(run, "parts", rotation, [4, 5, 15])
        db.add_partition(run, "other", rotation)
        stored = db.nearest("resid_post", layer=0, prompt=0, pos=5, partition="parts", subspace=1).fetchall()
        asked = db.nearest("resid_post", layer=0, prompt=0, pos=5, partition=rotation, subspace=(4, 9)).fetchall()
        assert [row[2:4] for row in stored] == [row[2:4] for row in asked]
        sizes = db.sql("SELECT size FROM partitions WHERE partition = 'parts' ORDER BY subspace").fetchall()
        assert sizes == [(4,), (5,), (15,)]
        for options, message in [
            ({"partition": "none"}, "has no partition 'none'; it has other, parts"),
            ({"partition": "parts", "subspace": 3}, "subspace 3: the partition has subspaces 0 to 2"),
            ({"partition": rotation, "subspace": (20, 25)}, "subspace 20:25: the rotation has columns 0 to 23"),
            ({"partition": rotation, "subspace": 1}, "subspace 1: give a range of columns"),
            ({"partition": rotation * 2}, "partition is no rotation: its columns are not orthonormal, off by 3"),
            ({"partition": np.eye(5)}, "a rotation of 5 does not fit vectors of 24"),
            ({"partition": np.ones((2, 3))}, "a matrix .2, 3. is no rotation"),
            ({"partition": np.full((24, 24), np.nan)}, "off by nan"),
            ({"subspace": (0, 4)}, "give the partition that it belongs to"),
            ({"map": "ln"}, "map 'ln': choose from final_norm, unembed"),
        ]:
            with pytest.raises(SettingError, match=message):
                db.nearest("resid_post", layer=0, prompt=0, pos=5, **options)
        for name in ("final_norm", "unembed"):
            with pytest.raises(SettingError, match=f"map '{name}' takes vectors of the residual stream, 24 wide"):
                db.nearest("z", layer=0, head=0, prompt=0, pos=5, map=name)
        with pytest.raises(SettingError, match="sizes .4, 4.: they do not add up to the rotation's 24 columns"):
            db.add_partition(run, "parts", rotation, [4, 4])


def test_maps_need_weights(db: actdb.Database) -> None:
    with pytest.raises(SelectionError, match="keeps no final norm"):
        db.nearest("resid_post", layer=0, prompt=0, pos=0, map="final_norm")
    with pytest.raises(SelectionError, match="has no weight 'W_U'"):
        db.nearest("resid_post", layer=0, prompt=0, pos=0, map="unembed")


# Text.


def test_a_text_is_run_through_the_model(db: actdb.Database) -> None:
    text = "".join(db.run().token_texts(9))
    for pos, expected in ((None, len(text) - 1), (0, 0), (-2, len(text) - 2)):
        found = db.nearest(
            "z", layer=0, head=1, text=text, pos=pos, k=3, metric="l2", model=TinyModel(), tokenizer=Characters()
        ).df()
        assert found["distance"][0] < 1e-5
        mine = db.nearest("z", layer=0, head=1, prompt=9, pos=expected, k=2, metric="l2").df()
        np.testing.assert_allclose(found["distance"][1:], mine["distance"], atol=1e-5)


def test_a_text_needs_the_model_of_the_run(db: actdb.Database, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 0, "text": "abc", "tokenizer": Characters()}
    with pytest.raises(
        ModelError,
        match="a text query runs the run's model, and 'tiny' cannot be loaded .*: give its folder as model= .--model.",
    ):
        db.nearest("resid_post", **options)
    with pytest.raises(ModelError, match="no such folder"):
        db.nearest("resid_post", **options, model=tmp_path / "no" / "such" / "model")
    with pytest.raises(ModelError, match="other weights than those that run 'tiny' was harvested from"):
        db.nearest("resid_post", **options, model=TinyModel(seed=1))
    with pytest.raises(SelectionError, match="pos 3: the text has positions 0 to 2"):
        db.nearest("resid_post", **options, model=TinyModel(), pos=3)
    with pytest.raises(PromptError, match="no usable tokenizer"):
        db.nearest("resid_post", layer=0, text="abc", model=TinyModel())
    out, hooks = tmp_path / "x.actdb", [("hook_embed", lambda tensor, hook: tensor * 2)]
    actdb.harvest(TinyModel(), random_prompts(3), out, hooks=hooks, hooks_id="twice", run="twice")
    with actdb.open(out) as other, pytest.raises(SettingError, match="harvested under interventions"):
        other.nearest("resid_post", **options, model=TinyModel())


# Bad input.


def test_bad_input_is_refused(db: actdb.Database) -> None:
    place = {"layer": 0, "prompt": 0, "pos": 0}
    nan = np.zeros(8)
    nan[3] = np.nan
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("resid_post", {"layer": 0, "vector": nan}, SettingError, "value 3 is nan; give finite numbers"),
        ("resid_post", {"layer": 0, "vector": np.zeros(7)}, SettingError, "has vectors of 8 values, not .7."),
        ("resid_post", {"layer": 0, "vector": np.zeros((2, 8))}, SettingError, "has vectors of 8 values, not .2, 8."),
        ("resid_post", {"layer": 0, "vector": "abc"}, SettingError, "give an array of numbers"),
        ("resid_post", {"layer": 0, "vector": np.zeros(8)}, SettingError, "the vector is zero and has no direction"),
        ("resid_post", {"layer": 0, "vector": np.ones(8), "pos": 1}, SettingError, "pos goes with prompt or text"),
        ("resid_post", {**place, "k": 0}, SettingError, "k 0: must be at least 1"),
        ("resid_post", {**place, "k": 10**6}, SettingError, "k 1000000: there are .* rows to find"),
        ("resid_post", {**place, "metric": "l3"}, SettingError, "metric 'l3': choose one of l2, cosine, ip"),
        ("resid_post", {**place, "where": "kind = 'c'"}, SelectionError, "no stored prompt with \"kind = 'c'\""),
        ("resid_post", {**place, "where": "nothing = 1"}, SqlError, "nothing"),
        ("resid_post", {**place, "radius": np.nan}, SettingError, "radius nan: give a finite distance"),
        ("resid_post", {**place, "radius": 1, "k": 0}, SettingError, "k 0: must be at least 1"),
        ("resid_post", {**place, "exclude_within": -1}, SettingError, "exclude_within -1: must not be negative"),
        ("resid_post", {**place, "device": "nowhere"}, SettingError, "device 'nowhere': not available here"),
        ("resid_post", {**place, "run": "x"}, LookupError, "no run 'x'"),
        ("resid_post", {"layer": 0, "prompt": 0}, SelectionError, "prompt 0: choose a position"),
        ("resid_post", {"layer": 0, "prompt": 40, "pos": 0}, SelectionError, "has prompts 0 to 39"),
        ("resid_post", {"layer": 0, "prompt": 0, "pos": 99}, SelectionError, "pos 99: prompt 0 has positions"),
        ("resid_post", {"prompt": 0, "pos": 0}, SelectionError, "has layers: choose one with layer="),
        ("resid_post", {"layer": 7, "prompt": 0, "pos": 0}, SelectionError, "layer 7: there are layers 0 to 1"),
        ("resid_post", {**place, "layer": slice(0, 2)}, SelectionError, "choose one layer by its number"),
        ("resid_post", {**place, "head": 0}, SelectionError, "has no heads"),
        ("resid_post", {"layer": 0}, SettingError, "give one of prompt .with pos., vector or text; given: none"),
        ("resid_post", {**place, "text": "abc"}, SettingError, "given: prompt, text"),
        ("z", place, SelectionError, "has heads: choose one with head="),
        ("pattern", place, SelectionError, "holds attention patterns"),
        ("mlp_out", place, SiteError, "no site 'mlp_out'"),
    ]
    for site, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            db.nearest(site, **options)
    with pytest.raises(SettingError, match="exclude_prompt and exclude_within go with a query by prompt"):
        db.nearest("resid_post", layer=0, vector=np.ones(8), exclude_prompt=True)


def test_zero_rows_have_no_direction(tmp_path: Path) -> None:
    def silence(tensor: Any, hook: Any) -> Any:
        tensor = tensor.clone()
        tensor[:, 1:] = 0
        return tensor

    out, hooks = tmp_path / "x.actdb", [("blocks.1.hook_resid_post", silence)]
    prompts = [{"tokens": [1, 2, 3]}, {"tokens": [4]}, {"tokens": [5]}]
    actdb.harvest(TinyModel(), prompts, out, hooks=hooks, hooks_id="zero", run="zero", sites=["resid_post"], stats=())
    with actdb.open(out) as db:
        with pytest.raises(
            SettingError, match="resid_post layer 1 at prompt 0, pos 1 is zero .* choose metric l2 or ip"
        ):
            db.nearest("resid_post", layer=1, prompt=1, pos=0, k=1)
        with pytest.raises(SettingError, match="resid_post layer 1 at prompt 0, pos 2 is zero and has no direction"):
            db.nearest("resid_post", layer=1, prompt=0, pos=2, k=1)
        assert db.nearest("resid_post", layer=1, prompt=0, pos=2, k=1, metric="l2").fetchall()[0][4] == 0
        assert len(db.nearest("resid_post", layer=1, prompt=1, pos=0, k=1, where="prompt_id > 0").fetchall()) == 1


# Graphs.


def test_a_graph_becomes_a_table(path: Path) -> None:
    with actdb.open(path, mode="a") as db:
        graph = db.neighbors("resid_post", layer=1, k=3, exclude_prompt=True, save=True)
        assert repr(graph) == f"<Neighbors tiny resid_post {len(graph):,} rows, k 3, cosine, exact>"
        edges = db.sql("SELECT * FROM neighbor_edges ORDER BY prompt_id, pos, rank").df()
        assert len(edges) == 3 * len(graph)
        for row in range(0, len(graph), 17):
            prompt, pos = int(graph.prompt[row]), int(graph.pos[row])
            asked = db.nearest("resid_post", layer=1, prompt=prompt, pos=pos, k=3, exclude_prompt=True).df()
            mine = edges[(edges.prompt_id == prompt) & (edges.pos == pos)]
            np.testing.assert_allclose(mine["distance"], asked["distance"], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(graph.prompt[graph.numbers[row]], mine["neighbor_prompt_id"])
            np.testing.assert_array_equal(graph.pos[graph.numbers[row]], mine["neighbor_pos"])
        assert edges[["run", "site", "layer", "metric"]].drop_duplicates().values.tolist() == [
            ["tiny", "resid_post", 1, "cosine"]
        ]
        assert edges[["head", "map"]].isna().all(axis=None)
        db.neighbors("resid_post", layer=1, k=2, save=True)
        db.neighbors("resid_post", layer=1, k=1, metric="l2", save=True)
        counts = db.sql("SELECT metric, count(*) FROM neighbor_edges GROUP BY ALL ORDER BY ALL").fetchall()
        assert counts == [("cosine", 2 * len(graph)), ("l2", len(graph))]
    with actdb.open(path) as db, pytest.raises(WriteError, match="open it with mode='a' to save neighbor edges"):
        db.neighbors("resid_post", layer=1, k=2, save=True)


def test_progress_reaches_the_end(db: actdb.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", 32)
    seen: list[tuple[int, int]] = []
    db.neighbors("resid_post", layer=0, k=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len({done for done, _ in seen}) * (len(seen) + 1) // 2


# Devices.


def test_the_processor_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert type(device.choose_processor("cpu")) is Processor
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(device.choose_processor()) is Processor
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose_processor().name == "cuda"


def test_a_gpu_finds_the_same(db: actdb.Database) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for metric in METRICS:
        there = db.neighbors("resid_post", layer=1, k=5, metric=metric, device="cuda")
        here = db.neighbors("resid_post", layer=1, k=5, metric=metric, device="cpu")
        np.testing.assert_allclose(there.distances, here.distances, rtol=1e-4, atol=1e-4)


# The command line.


def run_command(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_nearest_on_the_command_line(path: Path, db: actdb.Database, tmp_path: Path) -> None:
    place = ("nearest", path, "resid_post", "--layer", 1, "--prompt", 3, "--pos", -1)
    result = run_command(*place, "-k", 4, "--exclude-prompt", "--where", "kind = 'a'", "--metric", "l2")
    assert result.exit_code == 0, result.output
    found = db.nearest(
        "resid_post", layer=1, prompt=3, pos=-1, k=4, exclude_prompt=True, where="kind = 'a'", metric="l2"
    ).df()
    lines = result.stdout.splitlines()
    assert lines[0] == "run,rank,prompt_id,pos,distance,token,context,kind,i"
    assert [line.split(",")[2:4] for line in lines[1:]] == found[["prompt_id", "pos"]].astype(str).values.tolist()
    np.save(tmp_path / "v.npy", db.run()["resid_post"].sel(layer=1, prompt=3, pos=-1).numpy())
    by_file = run_command("nearest", path, "resid_post", "--layer", 1, "--vector", tmp_path / "v.npy", "-k", 1)
    assert by_file.stdout.splitlines()[1].startswith("tiny,0,3,")
    (tmp_path / "w.npy").write_text("no array")
    refused = run_command("nearest", path, "resid_post", "--layer", 1, "--vector", tmp_path / "w.npy")
    assert "vector: give an array of numbers, or a .npy file of one" in str(refused.exception)
    for wrong, message in [(("-k", 0), "k 0: must be at least 1"), (("--map", "x"), "map 'x'")]:
        refused = run_command(*place, *wrong)
        assert isinstance(refused.exception, SettingError)
        assert message in str(refused.exception)
