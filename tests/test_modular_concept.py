"""Concepts: properties by hand, probes told apart from their control tasks, autoencoders that keep the answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import actdb
from analyses.modular_arithmetic.concept import (
    agreement,
    assign,
    balanced_accuracy,
    centroids,
    class_means,
    cluster_all,
    linear_probe,
    probe,
    properties,
    purity,
)
from analyses.modular_arithmetic.concept_claims import ABSENT, MEMORISED, READ, verdict_of
from analyses.modular_arithmetic.concept_study import study_concepts
from analyses.modular_arithmetic.feature import LABELS, _between, train_features
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.model import Shape, build, pair_ids
from analyses.modular_arithmetic.planted_circuit import SITES, planted_grid
from analyses.modular_arithmetic.state import State, read_state, read_states, split_pairs

P = 13


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return planted_grid(tmp_path_factory.mktemp("planted") / "x.actdb", P)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    model = build(Shape("one-layer", n_layers=1, d_model=16, n_heads=2, d_mlp=24), P, seed=0).eval()
    prompts = [{"tokens": row} for row in pair_ids(P, equals=True).tolist()]
    out = tmp_path_factory.mktemp("untrained") / "x.actdb"
    run = actdb.harvest(model, prompts, out=out, run="untrained", sites=SITES, store="float32")
    return Grid(model, run, P)


def state_of(rows: np.ndarray) -> State:
    return State("resid_post", 0, (2,), "blocks.0.hook_resid_post", rows.astype(np.float32))


def test_properties_hold_where_they_say(grid: Grid) -> None:
    found = {entry.name: entry.labels for entry in properties(grid)}
    for pair, (a, b) in enumerate((a, b) for a in range(P) for b in range(P)):
        answer = (a + b) % P
        expected = {
            "a is odd": a % 2 == 1,
            "a is zero": a == 0,
            "a above p/2": a > P / 2,
            "answer is odd": answer % 2 == 1,
            "answer is zero": answer == 0,
            "answer above p/2": answer > P / 2,
            "a = b": a == b,
            "a next to b": (a - b) % P in (1, P - 1),
            "carry: a + b ≥ p": a + b >= P,
        }
        assert {name: bool(labels[pair]) for name, labels in found.items()} == expected


def test_a_planted_property_is_told_from_a_memory_of_values(grid: Grid) -> None:
    generator = np.random.default_rng(0)
    odd = next(entry for entry in properties(grid) if entry.name == "a is odd")
    fitted = split_pairs(P, seed=0)
    noise = 0.3 * generator.normal(size=(P * P, 6))
    known = probe(state_of(np.column_stack([noise, 2 * odd.labels])), odd, fitted=fitted, seed=0)
    assert known.accuracy > 0.95
    assert known.unseen > 0.95
    assert known.selectivity.low > 0.2
    assert verdict_of(known, 0.0) == READ
    memory = probe(state_of(np.column_stack([noise, 3 * np.eye(P)[grid.a]])), odd, fitted=fitted, seed=0)
    assert memory.accuracy > 0.95  # a number of its own for each value tells any set of them
    assert memory.controls.min() > 0.9
    assert memory.unseen < 0.75
    assert verdict_of(memory, 0.0) == ABSENT
    some = replace(known, controls=np.array([0.6, 0.62, 0.61, 0.6, 0.59]), unseen=0.5)
    assert verdict_of(some, 0.0) == MEMORISED
    assert verdict_of(some, 0.5) == ABSENT  # random weights do as well
    nothing = probe(state_of(noise), odd, fitted=fitted, seed=0)
    assert abs(nothing.accuracy - 0.5) < 0.2
    assert verdict_of(nothing, 0.0) == ABSENT


def test_too_few_values_leave_nothing_unseen(grid: Grid) -> None:
    zero = next(entry for entry in properties(grid) if entry.name == "answer is zero")
    found = probe(state_of(np.eye(P)[grid.answers]), zero, fitted=split_pairs(P, seed=0), seed=0)
    assert np.isnan(found.unseen)
    assert found.accuracy == 1.0


def test_a_linear_probe_tells_numbers_on_a_circle_apart() -> None:
    labels = np.tile(np.arange(12), 8)
    angle = 2 * np.pi * labels / 12
    noise = np.random.default_rng(1).normal(0, 0.03, (len(labels), 2))
    rows = (np.stack([np.cos(angle), np.sin(angle)], 1) + noise).astype(np.float32)
    model = linear_probe().fit(rows[:48], labels[:48])
    assert (model.predict(rows[48:]) == labels[48:]).all()


def test_clusters_of_answers_agree_with_answers(grid: Grid) -> None:
    rows = np.eye(P)[grid.answers]
    found = {entry.label: entry for entry in cluster_all(grid, [state_of(rows)], seed=0)}
    assert found["answer"].agreement == pytest.approx(1.0)
    assert abs(found["answer"].null) < 0.1
    assert abs(found["a"].agreement) < 0.1


def test_measures_of_clusters_by_hand() -> None:
    clusters, labels = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 0, 2])
    assert purity(clusters, labels) == pytest.approx(5 / 6)
    assert agreement(labels, labels) == 1.0
    assert balanced_accuracy(
        np.array([True, True, True, False]), np.array([True, False, True, False])
    ) == pytest.approx(5 / 6)
    rows = np.array([[0.0, 0.0], [0.2, 0.0], [5.0, 5.0], [5.0, 5.2]], np.float32)
    centres = centroids(rows, 2, seed=0)
    nearest = assign(rows, centres)
    brute = np.linalg.norm(rows[:, None] - centres[None], axis=2).argmin(1)
    assert np.array_equal(nearest, brute)
    assert nearest[0] == nearest[1] != nearest[2] == nearest[3]
    means = class_means(rows, np.array([0, 0, 2, 2]), 3)
    np.testing.assert_allclose(means, [[0.1, 0], rows.mean(0), [5, 5.1]], atol=1e-6)


def test_the_share_between_labels_is_eta_squared() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 4, 200)
    values = generator.normal(size=(200, 3)) + np.stack([labels * 2.0, np.zeros(200), labels % 2], 1)
    expected = []
    for column in values.T:
        grand = column.mean()
        between = sum((labels == i).sum() * (column[labels == i].mean() - grand) ** 2 for i in range(4))
        expected.append(between / ((column - grand) ** 2).sum())
    np.testing.assert_allclose(_between(values.astype(np.float32), labels, 4), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["TopK", "gated"])
def test_autoencoders_keep_the_answers(grid: Grid, kind: str) -> None:
    state = read_state(grid, "resid_post", layer=0)
    found = train_features(grid, state, kind, fitted=split_pairs(P, seed=0), seed=0, small=True)
    assert found.explained > 0.5
    assert found.kept.low > 3 / P
    assert found.tuned > found.null + 0.1
    assert found.tuning.shape == (len(LABELS), found.n_live)
    assert 0 < found.n_active < 0.3 * len(found.trained.model.decoder)
    with pytest.raises(actdb.SettingError, match="autoencoder 'dense': choose one of TopK, gated"):
        train_features(grid, state, "dense", fitted=split_pairs(P, seed=0), seed=0, small=True)


def test_states_are_those_of_the_run(grid: Grid) -> None:
    states = read_states(grid)
    assert [state.name for state in states] == ["embed", "resid_mid 0", "mlp_post 0", "resid_post 0"]
    expected = grid.run["mlp_post"].sel(layer=0, pos=-1).numpy()
    np.testing.assert_array_equal(states[2].rows, expected)
    assert states[0].rows.shape == (P * P, 2 * 4 * P)


def test_the_study_of_concepts(grid: Grid, untrained: Grid, tmp_path: Path) -> None:
    found = study_concepts(grid, control=untrained, folder=tmp_path / "figures", seed=0, name="planted", small=True)
    claims = {entry.key: entry for entry in found.claims}
    assert claims["planted.probe.carry:_a_+_b_≥_p"].value > 0.2
    assert claims["planted.probe.a_is_odd"].verdict == ABSENT
    assert claims["planted.features.TopK.kept"].value > claims["planted.features.TopK.kept"].null
    assert len(found.figures) == 3
    assert all((tmp_path / file).stat().st_size > 5000 for file in found.figures)
    assert "a is odd" in found.sections["Concepts of planted"]


def test_mirrored_pairs_are_held_out_together() -> None:
    fitted = split_pairs(P, seed=1).reshape(P, P)
    assert np.array_equal(fitted, fitted.T)
    assert 0.3 < fitted.mean() < 0.7
    assert not np.array_equal(fitted, split_pairs(P, seed=2).reshape(P, P))
