"""Circuits between subspaces: strengths and nulls by hand, Jacobians by autograd, and a copier built by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformer_lens.hook_points import HookPoint

import actdb
from analyses.subspace_partition import circuit_picture as picture
from analyses.subspace_partition import hand_built
from analyses.subspace_partition.circuit import Graph, Plane, find_routes, make_graph
from analyses.subspace_partition.copying import SITES, exact_match
from analyses.subspace_partition.edge import STREAM, EdgeCheck, Pairs, parse_head
from analyses.subspace_partition.partition import Partition
from analyses.subspace_partition.sequence import paired_prompts
from analyses.subspace_partition.strength import (
    block_norms,
    input_norm,
    mean_jacobian,
    measure_map,
    random_rotation,
    read_heads,
    read_jacobians,
)

LENGTH = 5
SEED = 0


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The hand-built copier and its shape with random weights, harvested on clean and corrupted prompts."""
    model, plane = hand_built.build_hand_built()
    other = hand_built.build_random()
    db = tmp_path_factory.mktemp("circuit") / "x.actdb"
    prompts = paired_prompts(hand_built.TASK, 12, length=LENGTH, seed=SEED)
    options: dict[str, Any] = {"out": db, "sites": SITES, "store": "float32", "stats": ("heads", "tokens")}
    run = actdb.harvest(model, prompts, run="copier", **options)
    control = actdb.harvest(other, prompts, run="control", **options)
    return SimpleNamespace(model=model, plane=plane, other=other, db=db, run=run, control=control)


@pytest.fixture(scope="module")
def graph(copier: SimpleNamespace) -> Graph:
    return make_graph(copier.run, planes_of(copier.plane), seed=SEED, n_null=60)


def planes_of(middle: Plane) -> list[Plane]:
    width = hand_built.D_MODEL
    return [Plane.whole("resid_post", 1, width), middle, Plane.whole("resid_pre", 0, width)]  # in any order


def label(copier: SimpleNamespace, name: str) -> str:
    return str(copier.plane.label(copier.plane.names.index(name)))


# strengths


@given(seed=st.integers(0, 50), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_block_norms_are_those_of_the_blocks(seed: int, sizes: list[int]) -> None:
    width = sum(sizes)
    generator = np.random.default_rng(seed)
    source, target = (Partition(random_rotation(generator, width).astype(np.float32), tuple(sizes)) for _ in range(2))
    matrix = generator.standard_normal((width, width))
    found = measure_map(matrix, source, target, seed=seed, n_null=3)
    expected = [
        [np.linalg.norm(source.basis(i).T @ matrix @ target.basis(j), "fro") for j in range(len(sizes))]
        for i in range(len(sizes))
    ]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    assert np.linalg.norm(block_norms(matrix, sizes, sizes)) == pytest.approx(np.linalg.norm(matrix))
    assert (found.spread == 0).all() == (len(sizes) == 1)


def test_the_null_of_a_map_is_what_random_subspaces_have() -> None:
    # A map of rank one: ‖R_iᵀ a bᵀ R'_j‖ = ‖R_iᵀ a‖·‖R'_jᵀ b‖, whose mean square is (4/16)² of ‖a‖²‖b‖².
    width, sizes = 16, (4, 4, 4, 4)
    generator = np.random.default_rng(1)
    matrix = np.outer(generator.standard_normal(width), generator.standard_normal(width))
    matrix /= np.linalg.norm(matrix)
    identity = Partition(np.eye(width, dtype=np.float32), sizes)
    found = measure_map(matrix, identity, identity, seed=1, n_null=4000)
    square = found.null**2 + found.spread**2
    np.testing.assert_allclose(square, 1 / 16, rtol=0.08)
    # Turned so that one subspace holds all of it, that edge stands out and its neighbours are too weak.
    left, _, right = np.linalg.svd(matrix)
    source, target = (Partition(part.astype(np.float32), sizes) for part in (left, right.T))
    found = measure_map(matrix, source, target, seed=1, n_null=400)
    z = (found.values - found.null) / found.spread
    assert z[0, 0] > 5
    assert found.p[0, 0] == pytest.approx(1 / 401)
    assert (np.delete(z.ravel(), 0) < -1).all()


def test_heads_are_read_with_their_norm(copier: SimpleNamespace, bridge: Any, tmp_path: Path) -> None:
    maps = read_heads(copier.run, 0)[0]
    model = copier.model
    w_v, w_o = (model.state_dict()[f"blocks.0.attn.{name}.weight"].double().numpy() for name in ("v", "o"))
    np.testing.assert_allclose(maps.ov, w_v.T @ w_o.T, atol=1e-6)
    assert maps.name == "L0H0"
    # With a layer norm the form is that of the model itself: scores of rows that are scaled to their own length.
    gpt2 = bridge("gpt2")
    run = actdb.harvest(
        gpt2,
        [{"tokens": [1, 5, 9, 2]}],
        out=tmp_path / "x.actdb",
        sites=("resid_pre", "q", "k", "v", "z"),
        store="float32",
    )
    rows = run["resid_pre"].sel(layer=1).numpy().astype(np.float64)
    scale = np.sqrt(rows.var(1, keepdims=True) + 1e-5)
    for maps in read_heads(run, 1):
        q, k = (run[name].sel(layer=1, head=maps.head).numpy().astype(np.float64) for name in ("q", "k"))
        constants = [run.weight(f"b_{name}", layer=1, head=maps.head) for name in ("Q", "K")]
        bias = run.weight("ln1.b", layer=1)
        shift = [
            bias @ run.weight(f"W_{name}", layer=1, head=maps.head) + b for name, b in zip("QK", constants, strict=True)
        ]
        expected = (q - shift[0]) @ (k - shift[1]).T
        np.testing.assert_allclose(rows / scale @ maps.qk @ (rows / scale).T, expected, atol=1e-4)
    assert np.allclose(input_norm(run, 1).sum(0), 0, atol=1e-6)  # a layer norm centres


class Mlp(nn.Module):
    """An MLP with a norm before it, as a model with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name="mlp", n_layers=1, n_heads=1, d_model=6, d_head=6, d_vocab=9, n_ctx=8, causal=True
        )
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList([nn.Module()])
        block = self.blocks[0]
        block.hook_resid_mid, block.hook_mlp_out = HookPoint(), HookPoint()
        self.norm, self.inner, self.outer = nn.LayerNorm(6), nn.Linear(6, 11), nn.Linear(11, 6)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.outer(torch.tanh(self.inner(self.norm(x))))
        return out

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0].hook_resid_mid(self.embed(ids))
        return x + self.blocks[0].hook_mlp_out(self.mlp(x))


def test_the_mean_jacobian_is_autograds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mlp()
    prompts = [{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}, {"tokens": [6, 7, 8]}]
    run = actdb.harvest(model, prompts, out=tmp_path / "x.actdb", sites=("resid_mid",), store="float32", stats=())
    found = mean_jacobian(model, run, 0, prompts=range(3))
    rows = torch.from_numpy(run["resid_mid"].sel(layer=0).numpy())
    expected = torch.stack([torch.autograd.functional.jacobian(model.mlp, row) for row in rows]).mean(0).T
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_mlps_of_a_bridge_are_edges_of_the_graph(bridge: Any, build: Any, tmp_path: Path) -> None:
    prompts = [{"tokens": [1, 5, 9, 2]}, {"tokens": [7, 3, 11, 30]}]
    sites = ("resid_mid", "resid_post")
    run = actdb.harvest(bridge("gpt2"), prompts, out=tmp_path / "x.actdb", sites=sites, store="float32", stats=())
    jacobians = read_jacobians(bridge("gpt2"), run, prompts=range(2))
    assert set(jacobians) == {0, 1}
    block = build("gpt2").transformer.h[1]
    rows = torch.from_numpy(run["resid_mid"].sel(layer=1).numpy())

    def mlp(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = block.mlp(block.ln_2(x[None, None]))[0, 0]
        return out

    expected = torch.stack([torch.autograd.functional.jacobian(mlp, row) for row in rows]).mean(0).T
    np.testing.assert_allclose(jacobians[1], expected.numpy(), atol=1e-4)
    generator = np.random.default_rng(0)
    middle = Plane("resid_post", 0, Partition(random_rotation(generator, 24).astype(np.float32), (12, 12)))
    planes = [Plane.whole("resid_pre", 0, 24), middle, Plane.whole("resid_post", 1, 24)]
    graph = make_graph(run, planes, jacobians=jacobians, seed=0, n_null=10)
    found = {(edge.via, edge.source, edge.target): edge for edge in graph.of("MLP")}
    assert len(found) == 4
    strength = np.linalg.norm(middle.partition.basis(1).T @ jacobians[1])
    assert found["MLP1", middle.label(1), "resid_post 1: whole"].strength == pytest.approx(strength, rel=1e-4)
    assert picture.draw_graph(tmp_path / "graph.png", graph, title="heads and MLPs")


# the graph of the hand-built copier


def test_the_hand_built_copier_copies(copier: SimpleNamespace, tmp_path: Path) -> None:
    with actdb.open(copier.db) as db:
        rows = db.sql("SELECT layer, head, role FROM head_roles WHERE run = 'copier'").fetchall()
        assert exact_match(db, "copier").value == 1.0
        assert exact_match(db, "control").value < 0.2
    assert sorted(rows) == [(0, 0, "previous"), (1, 0, "induction")]


def test_the_circuit_that_was_put_in_is_recovered(copier: SimpleNamespace, graph: Graph) -> None:
    best = find_routes(graph)[0]
    previous, this = label(copier, "previous token"), label(copier, "this token")
    assert (best.writer, best.subspace, best.reader, best.side) == ("L0H0", previous, "L1H0", "key")
    assert best.z > 3
    strongest = {(e.kind, e.via): (e.source, e.target) for e in reversed(graph.of("QK", "query", "value", "output"))}
    assert strongest["QK", "L1H0"] == (previous, this)  # from key to query
    assert strongest["query", "L1H0"] == (this, "L1H0")
    assert strongest["value", "L1H0"] == (this, "L1H0")
    assert strongest["output", "L0H0"] == ("L0H0", previous)
    zero = [e for e in graph.of("output") if e.via == "L0H0" and e.target != previous]
    assert max(edge.strength for edge in zero) < 1e-4  # nothing else was put in
    assert all(edge.z < 0 for edge in zero)


def test_random_weights_have_no_route(copier: SimpleNamespace) -> None:
    graph = make_graph(copier.control, planes_of(copier.plane), seed=SEED, n_null=200)
    assert find_routes(graph)[0].z < 3
    z = [edge.z for edge in graph.of("OV", "QK", "output", "query", "key", "value") if np.isfinite(edge.z)]
    assert np.abs(z).mean() < 1.5


def test_the_graph_is_written_as_json(copier: SimpleNamespace, graph: Graph, tmp_path: Path) -> None:
    previous = label(copier, "previous token")
    shown = graph.with_effects({("key", previous, "L1H0"): 0.97})
    shown.write(tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert {node["id"]: node.get("size") for node in content["nodes"]}[previous] == hand_built.N_TOKENS
    edges = {(e["kind"], e["via"], e["source"], e["target"]): e for e in content["edges"]}
    assert len(edges) == len(graph.edges)
    key = edges["key", "L1H0", previous, "L1H0"]
    assert key["effect"] == 0.97
    assert key["z"] == pytest.approx(shown.of("key")[0].z)
    whole = next(e for e in content["edges"] if e["via"] == "L0H0" and e["kind"] == "query")
    assert whole["z"] is None  # the first plane is not cut: nothing to compare with
    assert content["about"]["run"] == "copier"


def test_figures_are_drawn(graph: Graph, copier: SimpleNamespace, tmp_path: Path) -> None:
    assert picture.draw_graph(tmp_path / "graph.png", graph, title="circuit")
    assert picture.draw_strengths(tmp_path / "strengths.png", graph, title="strengths")
    assert {path.name for path in tmp_path.iterdir()} == {"graph.png", "strengths.png"}
    uncut = [Plane.whole("resid_pre", 0, hand_built.D_MODEL), Plane.whole("resid_post", 1, hand_built.D_MODEL)]
    with pytest.raises(actdb.SettingError, match="cut at least one plane"):
        picture.draw_strengths(tmp_path / "x.png", make_graph(copier.run, uncut, seed=0, n_null=2), title="")


# edges patched


@pytest.fixture(scope="module")
def check(copier: SimpleNamespace) -> EdgeCheck:
    with actdb.open(copier.db) as db:
        return EdgeCheck(copier.model, Pairs.read(db, copier.run), copier.plane, seed=SEED)


def test_the_edges_that_were_put_in_carry_all_and_the_others_nothing(check: EdgeCheck, copier: SimpleNamespace) -> None:
    carried = {"query": "this token", "key": "previous token", "value": "this token"}
    for side, name in carried.items():
        shares = {effect.subspace: effect.share for effect in check.measure(STREAM, "L1H0", side)}
        assert shares.pop(label(copier, name)) == pytest.approx(1.0, abs=0.02)
        assert max(map(abs, shares.values())) < 0.02
    wrote = {effect.subspace: effect.share for effect in check.measure("L0H0", "L1H0", "key")}
    assert wrote.pop(label(copier, "previous token")) == pytest.approx(1.0, abs=0.02)
    assert max(map(abs, wrote.values())) < 0.02
    everything = check.measure("L0H0")
    assert all(effect.reader is None for effect in everything)
    assert sum(effect.share for effect in everything) < 1  # what the tokens themselves carry is no part of it


def test_the_whole_plane_patched_is_the_corrupted_run(check: EdgeCheck, copier: SimpleNamespace) -> None:
    """The oracle: with every subspace at once, the model does what it does on the corrupted prompts."""
    whole = check.measure(STREAM)[0].whole
    logits = copier.model(torch.tensor([copier.run.tokens(p).tolist() for p in check.pairs.corrupted]))
    expected = (check.clean - check.pairs.metric(logits)).mean()
    assert whole == pytest.approx(float(expected), rel=1e-4)


def test_pairs_must_pair_up(copier: SimpleNamespace, tmp_path: Path) -> None:
    prompts = [{**p, "role": "clean"} for p in paired_prompts(hand_built.TASK, 2, length=4, seed=0)]
    run = actdb.harvest(copier.model, prompts, out=tmp_path / "x.actdb", sites=("resid_post",), stats=())
    with actdb.open(tmp_path / "x.actdb") as db, pytest.raises(actdb.SelectionError, match="no clean and corrupted"):
        Pairs.read(db, run)


@pytest.mark.parametrize("name", ["1.0", "L1", "LxH0", "L1H", "H0L1"])
def test_heads_are_named_by_layer_and_head(name: str) -> None:
    with pytest.raises(actdb.SettingError, match="as L1H0"):
        parse_head(name)
    assert parse_head("L12H3") == (12, 3)


def test_a_plane_elsewhere_is_refused() -> None:
    with pytest.raises(actdb.SettingError, match="resid_pre, resid_post"):
        Plane.whole("resid_mid", 0, 4)
