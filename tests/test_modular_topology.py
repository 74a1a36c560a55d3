"""Concept graphs of the numbers: representations, edges, layouts, loops, and the comparison of architectures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actdb
from analyses.modular_arithmetic import comparison, graph, homology, layout, topology
from analyses.modular_arithmetic.comparison_study import (
    claimed_accuracy,
    comparison_claims,
    comparison_table,
    grouped,
    study_comparison,
)
from analyses.modular_arithmetic.comparison_training import MIRRORED, TRAINED, UNSEEN, plan, split_pairs
from analyses.modular_arithmetic.model import build
from analyses.modular_arithmetic.progress import read_predictions
from analyses.modular_arithmetic.representation import Representation, number_scores, read_representations
from analyses.modular_arithmetic.topology_study import LEVEL, study_topology
from analyses.modular_arithmetic.training import MEMORY_SITES, SITES, Training, grid_prompts

P = 11
PRIMES = (3, 5, 7, 11, 13, 17, 23, 31, 59, 113)


def circles(modulus: int, frequencies: tuple[int, ...], *, d_model: int = 16, noise: float = 0.0) -> np.ndarray:
    """Return an embedding [number, d_model] of circles of some frequencies, turned at random, with noise."""
    random = np.random.default_rng(0)
    angles = 2 * np.pi * np.outer(np.arange(modulus), frequencies) / modulus
    planes = np.hstack([np.cos(angles), np.sin(angles)])
    turned = planes @ np.linalg.qr(random.standard_normal((d_model, d_model)))[0][: planes.shape[1]]
    return np.asarray(turned + noise * random.standard_normal((modulus, d_model)))


def held(vectors: np.ndarray) -> Representation:
    return Representation("embedding", vectors)


# Loops


@pytest.mark.parametrize("n", [5, 8, 12, 23, 40])
def test_a_regular_polygon_has_the_loop_that_theory_gives(n: int) -> None:
    """Born when neighbours are joined; filled when a triangle goes round (Adamaszek and Adams 2017)."""
    points = circles(n, (1,))
    chord = np.sin(np.pi * np.arange(n) / n)
    diameter = chord[n // 2]
    bars = homology.loop_bars(points)
    assert len(bars) == 1
    assert bars[0] == pytest.approx([chord[1] / diameter, chord[-(-n // 3)] / diameter], abs=1e-5)


def test_a_torus_has_two_loops_and_a_blob_none() -> None:
    a, b = np.divmod(np.arange(144), 12)
    torus = np.stack([f(2 * np.pi * x / 12) for x in (a, b) for f in (np.cos, np.sin)], axis=1)
    found = homology.find_loops(torus, n_null=39, seed=0)
    assert found.n_loops == 2
    assert found.p == pytest.approx(1 / 40)
    blob = homology.find_loops(np.random.default_rng(1).standard_normal((40, 3)), n_null=39, seed=0)
    assert blob.p > 0.05
    assert blob.longest == pytest.approx(blob.expected, abs=0.1)


def test_loops_of_nothing() -> None:
    found = homology.find_loops(np.ones((6, 3)), n_null=3, seed=0)
    assert (found.longest, found.n_loops, found.bars.shape) == (0.0, 0, (0, 2))
    assert found.p == 1.0


def test_the_null_cloud_has_the_covariance() -> None:
    points = np.random.default_rng(0).standard_normal((4000, 3)) * [5, 2, 0.5]
    drawn = homology.same_covariance(points, np.random.default_rng(1))
    ours, theirs = (np.linalg.eigvalsh(np.cov(each.T)) for each in (points, drawn))
    assert theirs == pytest.approx(ours, rel=0.1)


# Order and edges


@pytest.mark.parametrize("modulus", PRIMES)
def test_a_step_is_the_inverse_of_its_frequency(modulus: int) -> None:
    for frequency in range(1, modulus // 2 + 1):
        step = topology.step_of(frequency, modulus)
        assert 1 <= step <= modulus // 2
        assert frequency * step % modulus in (1, modulus - 1)


@given(st.integers(3, 40), st.integers(1, 39))
def test_addition_joins_each_number_with_two_others(modulus: int, step: int) -> None:
    edges = topology.addition_edges(modulus, step % modulus or 1)
    joined = {frozenset((n, m)) for n, m, _ in edges}
    wanted = {frozenset((n, (n + (step % modulus or 1)) % modulus)) for n in range(modulus)}
    assert joined == wanted
    assert len(joined) == len(edges)
    assert all(n < m for n, m, _ in edges)


@pytest.mark.parametrize("frequency", [1, 3, 5])
def test_on_a_circle_the_most_similar_numbers_are_a_step_away(frequency: int) -> None:
    circle = held(circles(P, (frequency,)))
    step = topology.step_of(frequency, P)
    assert [edge[:2] for edge in topology.similarity_edges(circle)] == [
        edge[:2] for edge in topology.addition_edges(P, step)
    ]
    assert [edge[2] for edge in topology.similarity_edges(circle)] == pytest.approx([np.cos(2 * np.pi / P)] * P)
    shape = topology.measure(circle, n_null=39, seed=0)
    assert (shape.order.frequency, shape.order.step, shape.order.agreement) == (frequency, step, 1.0)
    assert shape.order.share == pytest.approx(1.0)
    assert shape.order.circularity > 0.95
    assert shape.order.adjacency < 0.5
    assert (shape.circularity_p, shape.agreement_p) == (1 / 40, 1 / 40)
    assert shape.loops.n_loops == 1


def test_a_noised_circle_is_found_and_a_random_matrix_is_not() -> None:
    noised = topology.measure(held(circles(23, (4,), noise=0.08)), n_null=99, seed=0)
    assert noised.order.frequency == 4
    assert max(noised.circularity_p, noised.agreement_p, noised.loops.p) <= LEVEL
    control = topology.measure(held(np.random.default_rng(5).standard_normal((23, 16))), n_null=99, seed=0)
    assert min(control.circularity_p, control.agreement_p, control.loops.p) > LEVEL
    assert control.order.share == pytest.approx(control.null.share, abs=0.05)


def test_several_circles_agree_in_their_steps_without_being_one() -> None:
    knot = topology.measure(held(circles(31, (3, 7, 11))), n_null=39, seed=0)
    assert knot.order.agreement == 1.0
    assert knot.agreement_p == 1 / 40
    assert knot.order.circularity < 0.7
    assert knot.order.share == pytest.approx(1 / 3)


def test_the_null_of_an_order_permutes_the_numbers() -> None:
    circle = held(circles(P, (2,)))
    permuted = circle.permuted(np.random.default_rng(0))
    assert sorted(map(tuple, permuted.vectors.tolist())) == sorted(map(tuple, circle.vectors.tolist()))
    assert np.sort(permuted.distances.ravel()) == pytest.approx(np.sort(circle.distances.ravel()))


def test_vectors_without_any_difference_are_measured_as_nothing() -> None:
    shape = topology.measure(held(np.ones((7, 4))), n_null=3, seed=0)
    assert np.isnan(shape.order.circularity)
    assert shape.loops.longest == 0
    assert all(graph.plain(value) is None or np.isfinite(value) for value in shape.measures().values())


# Layouts


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("dimension", layout.DIMENSIONS)
def test_layouts_lie_in_the_unit_ball(name: str, dimension: int) -> None:
    numbers = held(circles(13, (5,), noise=0.05))
    found = layout.lay_out(name, numbers.vectors, graph.affinity_of(numbers), dimension, seed=0)
    assert found.shape == (13, dimension)
    assert np.abs(found.mean(0)).max() < 1e-9
    assert np.linalg.norm(found, axis=1).max() == pytest.approx(1.0)
    again = layout.lay_out(name, numbers.vectors, graph.affinity_of(numbers), dimension, seed=0)
    assert np.array_equal(found, again)


def test_principal_components_are_those_of_the_svd() -> None:
    vectors = np.random.default_rng(0).standard_normal((9, 5))
    found = layout.lay_out("pca", vectors, np.ones((9, 9)), 3, seed=0)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    wanted = (u * s)[:, :3]
    wanted /= np.linalg.norm(wanted, axis=1).max()
    assert np.abs(found) == pytest.approx(np.abs(wanted))


@pytest.mark.parametrize("name", ["pca", "spectral"])
def test_a_circle_is_drawn_as_a_circle(name: str) -> None:
    numbers = held(circles(13, (5,)))
    points = layout.lay_out(name, numbers.vectors, graph.affinity_of(numbers), 2, seed=0)
    assert np.linalg.norm(points, axis=1) == pytest.approx(np.ones(13))
    step = topology.step_of(5, 13)
    near = np.linalg.norm(points - np.roll(points, -step, axis=0), axis=1)
    assert near == pytest.approx(np.full(13, 2 * np.sin(np.pi / 13)))


def test_numbers_in_order_stand_on_a_ring() -> None:
    points = layout.lay_out("circular", circles(8, (1,)), np.ones((8, 8)), 2, seed=0)
    angles = np.unwrap(np.arctan2(points[:, 1], points[:, 0]))
    assert np.diff(angles) == pytest.approx(np.full(7, 2 * np.pi / 8))


def test_flat_numbers_have_zeros_beyond() -> None:
    points = layout.lay_out("pca", np.arange(5.0)[:, None], np.ones((5, 5)), 3, seed=0)
    assert np.array_equal(points[:, 1:], np.zeros((5, 2)))


def test_align_undoes_a_rotation() -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((9, 3))
    rotation = np.linalg.qr(random.standard_normal((3, 3)))[0]
    assert layout.align(points @ rotation, points) == pytest.approx(points)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(actdb.SettingError, match="layout 'flat': choose one of pca, spectral, force, circular"):
        layout.lay_out("flat", np.eye(3), np.eye(3), 2, seed=0)
    with pytest.raises(actdb.SettingError, match="4 dimensions: choose 2 or 3"):
        layout.lay_out("pca", np.eye(3), np.eye(3), 4, seed=0)


# Representations, from a database


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every architecture with random weights, and one whose embedding is a circle, at two "epochs"."""
    path = tmp_path_factory.mktemp("topology") / "x.actdb"
    for architecture in ("one-layer", "pooled", "lookup", "hybrid"):
        training = Training(
            architecture=architecture, modulus=P, d_model=16, d_mlp=0 if architecture == "lookup" else 24
        )
        model = build(training.shape, P, seed=0, name=architecture)
        _harvest(model, training, path, architecture, step=0)
    training = Training(architecture="one-layer", modulus=P, d_model=16, d_mlp=24)
    model = build(training.shape, P, seed=0, name="circle")
    with torch.no_grad():
        model.embed.W_E[:P] = torch.from_numpy(circles(P, (3,))).float()
    _harvest(model, training, path, "circle", step=7)
    return path


def _harvest(model: Any, training: Training, path: Path, name: str, *, step: int) -> None:
    sites = MEMORY_SITES.get(training.architecture, SITES)
    prompts = grid_prompts(training)
    actdb.harvest(model, prompts, out=path, run=name, step=step, sites=sites, stats=(), store="float32")


@pytest.mark.parametrize(("name", "layers"), [("one-layer", 1), ("pooled", 2)])
def test_representations_are_means_by_number(db: Path, name: str, layers: int) -> None:
    with actdb.open(db) as database:
        run = database.run(name)
        found = {each.place: each.vectors for each in read_representations(run, modulus=P)}
        stored = run["resid_post"].numpy().reshape(layers, P, P, -1, 16).astype(np.float64)  # [layer, a, b, pos, d]
        weights = run.weight("W_E"), run.weight("W_U")
    assert list(found) == [
        "embedding",
        *(f"layer {layer} {part}" for layer in range(layers) for part in ("operand", "answer")),
        "unembedding",
    ]
    assert np.array_equal(found["embedding"], weights[0][:P].astype(np.float64))
    assert np.array_equal(found["unembedding"], weights[1].T.astype(np.float64))
    a, b = np.divmod(np.arange(P * P), P)
    for layer in range(layers):
        assert found[f"layer {layer} operand"] == pytest.approx(stored[layer, :, :, 0].mean(1))
        end = stored[layer].mean(2) if name == "pooled" else stored[layer, :, :, -1]
        end = end.reshape(P * P, -1)
        wanted = np.array([end[(a + b) % P == answer].mean(0) for answer in range(P)])
        assert found[f"layer {layer} answer"] == pytest.approx(wanted)


def test_memories_have_fewer_places(db: Path) -> None:
    with actdb.open(db) as database:
        run = database.run("lookup")
        found = {each.place: each.vectors for each in read_representations(run, modulus=P)}
        table = run.weight("memory.W_M").reshape(P, P, -1).astype(np.float64)
        hybrid = [each.place for each in read_representations(database.run("hybrid"), modulus=P)]
    assert list(found) == hybrid == ["embedding", "memory answer", "unembedding"]
    assert found["embedding"] == pytest.approx(table.mean(1), abs=1e-6)
    wanted = np.mean([[table[a, (answer - a) % P] for answer in range(P)] for a in range(P)], axis=0)
    assert found["memory answer"] == pytest.approx(wanted, abs=1e-6)


def test_scores_of_numbers_are_means_of_their_pairs(db: Path) -> None:
    with actdb.open(db) as database:
        run = database.run("pooled")
        scores = number_scores(run, modulus=P)
        right = read_predictions(run).hits().reshape(P, P)
        losses = read_predictions(run).losses()
    operand = [np.concatenate([right[n], right[:, n]]).mean() for n in range(P)]
    assert scores["accuracy as operand"] == pytest.approx(operand)
    answer = [[(right[a, (n - a) % P], losses[a * P + (n - a) % P]) for a in range(P)] for n in range(P)]
    assert scores["accuracy as answer"] == pytest.approx(np.mean(answer, axis=1)[:, 0])
    assert scores["loss as answer"] == pytest.approx(np.mean(answer, axis=1)[:, 1])


def test_a_run_of_another_modulus_is_refused(db: Path) -> None:
    with actdb.open(db) as database, pytest.raises(actdb.RunError, match=f"{P**2} prompts; the places of 7 numbers"):
        read_representations(database.run("pooled"), modulus=7)


# The study of the concept graphs


def subjects() -> list[graph.Subject]:
    history = {"training loss": [2.5, 0.5], "held-out accuracy": [0.1, float("nan")]}
    return [
        graph.Subject("learnt", ("one-layer", "circle"), P, history=history),
        graph.Subject("pooled", ("pooled",), P),
        graph.Subject("lookup", ("lookup",), P),
    ]


def test_the_study_writes_graphs_page_and_figures(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyses.modular_arithmetic.topology_study.N_NULL", 99)
    with actdb.open(db) as database:
        found = study_topology(database, subjects(), folder=tmp_path, seed=0)
        places = {each.place: each for each in read_representations(database.run("circle"), modulus=P)}
    claims = {claim.key: claim for claim in found.claims}
    for measure in ("circularity", "step_agreement", "longest_loop"):
        assert claims[f"topology.learnt.embedding.{measure}"].verdict == "above chance, p = 0.01"
        assert claims[f"topology.pooled.embedding.{measure}"].verdict.startswith("no effect")
        assert claims[f"topology.lookup.unembedding.{measure}"].verdict.startswith("no effect")
    data = json.loads((tmp_path / "topology.json").read_text())
    assert [model["name"] for model in data["models"]] == ["learnt", "pooled", "lookup"]
    first = data["models"][0]
    assert first["history"]["training loss"] == {"epoch": [0, 7], "value": [2.5, 0.5]}
    assert first["history"]["held-out accuracy"]["value"] == [0.1, None]
    assert first["history"]["embedding: circularity"]["value"][1] > 0.95
    place = first["checkpoints"][-1]["places"][0]
    assert (place["place"], place["step"]) == ("embedding", topology.step_of(3, P))
    assert place["edges"]["similarity"][0][2] == pytest.approx(np.cos(2 * np.pi / P), abs=1e-3)
    assert place["edges"]["addition"] == [[n, m] for n, m, _ in topology.addition_edges(P, place["step"])]
    assert place["numbers"]["norm"] == pytest.approx(places["embedding"].norms, rel=1e-3)
    sizes = {name: {d: np.shape(points) for d, points in each.items()} for name, each in place["layouts"].items()}
    assert sizes == {name: {"2": (P, 2), "3": (P, 3)} for name in layout.LAYOUTS}
    assert set(found.figures) == {f"figures/{name}.png" for name in ("topology", "topology_3d", "topology_course")}
    assert all((tmp_path / file).read_bytes()[:4] == b"\x89PNG" for file in found.figures)
    assert "| learnt | embedding | 3 (step 4) |" in found.sections["Topology"]
    assert (tmp_path / "topology.html").stat().st_size > 1_000_000


def test_many_checkpoints_are_drawn_in_part() -> None:
    subject = graph.Subject("long", tuple(map(str, range(60))), P)
    shown = graph.shown_runs(subject)
    assert (len(shown), shown[0], shown[-1]) == (graph.MOST_CHECKPOINTS, 0, 59)
    assert graph.shown_runs(graph.Subject("short", ("a", "b", "c"), P)) == [0, 1, 2]


def test_no_model_is_refused(db: Path, tmp_path: Path) -> None:
    with actdb.open(db) as database, pytest.raises(actdb.SettingError, match="no model to draw"):
        study_topology(database, [], folder=tmp_path, seed=0)


# Architectures compared


@pytest.mark.parametrize("modulus", [5, 11, 23])
def test_pairs_are_held_out_in_one_order_or_in_both(modulus: int) -> None:
    kinds = split_pairs(plan("pooled", modulus, seed=3, share=0.8)).reshape(modulus, modulus)
    n = round(0.15 * modulus * (modulus + 1) / 2)
    unseen, mirrored = kinds == UNSEEN, kinds == MIRRORED
    assert np.array_equal(unseen, unseen.T)
    assert np.triu(unseen).sum() == mirrored.sum() == n
    assert (kinds.T[mirrored] == TRAINED).all()
    assert (split_pairs(plan("pooled", modulus, seed=3, share=1.0)) == TRAINED).all()
    other = split_pairs(plan("pooled", modulus, seed=4, share=0.8))
    assert not np.array_equal(kinds.ravel(), other)


def test_a_memory_learns_all_pairs_and_none_that_it_has_not_seen(tmp_path: Path) -> None:
    [entry] = comparison.compare(tmp_path / "x.actdb", architectures=["lookup"], moduli=[7], seeds=[0])
    assert (entry.all_accuracy, entry.train_accuracy) == (1.0, 1.0)
    assert max(entry.mirrored_accuracy, entry.unseen_accuracy) <= 0.4
    kinds = split_pairs(plan("lookup", 7, seed=0, share=0.8))
    assert entry.n_unseen == (kinds == UNSEEN).sum()
    with actdb.open(tmp_path / "x.actdb") as database:
        assert {run.step for run in database.runs()} == set(entry.epochs)
        assert {len(run.prompt_ids("split = 'train'")) for run in database.runs()} == {49, (kinds == TRAINED).sum()}


def test_the_comparison_is_trained_once_and_put_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyses.modular_arithmetic.comparison_study.SMALL_EPOCHS", 20)
    monkeypatch.setattr("analyses.modular_arithmetic.comparison_study.SMALL_MODULI", (5, 7))
    found = study_comparison(tmp_path / "x.actdb", folder=tmp_path, seed=3, small=True)
    monkeypatch.setattr("analyses.modular_arithmetic.comparison_training.train", _refuse)
    again = study_comparison(tmp_path / "x.actdb", folder=tmp_path, seed=3, small=True)
    assert [entry.value for entry in again.claims] == [entry.value for entry in found.claims]
    claims = {claim.key: claim for claim in found.claims}
    assert claims["comparison.lookup.p7.all_pairs"].claimed == 1.0
    assert claims["comparison.pooled.p7.all_pairs"].n == 49
    assert claims["comparison.pooled.p5.unseen"].null == pytest.approx(0.2)
    assert claims["comparison.pooled.p5.longest_loop"].verdict == "one seed, not judged"
    table = found.sections["Architectures compared"].splitlines()
    assert sum(line.startswith("| pooled |") for line in table) == 2
    assert len([line for line in table if line.startswith("| ")]) == 2 + 4 * 2
    assert (tmp_path / "figures/comparison.png").read_bytes()[:4] == b"\x89PNG"


def _refuse(*given: Any, **options: Any) -> None:
    raise AssertionError("trained again")


def test_seeds_stand_together_in_the_table() -> None:
    shape = topology.measure(held(circles(7, (2,))), n_null=9, seed=0)
    entries = [
        comparison.Entry("pooled", 7, seed, accuracy, 1.0, 0.75, 0.5, 4, 8, (100, 200), (2,), 1.0, 0.5, shape)
        for seed, accuracy in enumerate((1.0, 0.9))
    ]
    [_, _, row] = comparison_table(grouped(entries)).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == ["pooled", "7", "95% (90%–100%)", "100%", "75%", "50%", "100, 200"]
    assert (claimed_accuracy("one-layer", 7), claimed_accuracy("hybrid", 31)) == (None, None)


def test_seeds_that_agree_on_few_pairs_say_little() -> None:
    shape = topology.measure(held(circles(7, (2,))), n_null=9, seed=0)
    entries = [
        comparison.Entry("pooled", 7, seed, 1.0, 1.0, 0.5, 0.0, 4, 8, (100, 200), (2,), 1.0, 0.5, shape)
        for seed in range(3)
    ]
    claims = {claim.key.split(".")[-1]: claim for claim in comparison_claims(entries, seed=0)}
    unseen, mirrored = claims["unseen"], claims["mirrored"]
    assert (unseen.value, unseen.low, unseen.n) == (0.0, 0.0, 3)
    assert unseen.high == pytest.approx(0.1380, abs=1e-4)  # Wilson's bound of 0 of 24
    assert (mirrored.low, mirrored.high) == pytest.approx((0.2538, 0.7462), abs=1e-4)  # 6 of 12
    assert claims["all_pairs"].high == 1.0


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(actdb.SettingError, match="architecture 'x': choose one of pooled, one-layer, lookup, hybrid"):
        plan("x", 7, seed=0, share=1.0)
