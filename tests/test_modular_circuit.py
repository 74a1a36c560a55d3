"""Path patching, faithfulness, circuits: a planted circuit is found and nothing else; patches held to ones by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import actdb
from analyses.common.intervention import Place, Route, logits_of, path_patch, replace
from analyses.modular_arithmetic.circuit_claims import ALONE, FAITHFUL
from analyses.modular_arithmetic.circuit_study import study_circuit
from analyses.modular_arithmetic.component import components_of
from analyses.modular_arithmetic.discovery import find_circuit, importances
from analyses.modular_arithmetic.faithfulness import Substitution
from analyses.modular_arithmetic.grid import CORRUPTIONS, Grid, corruption
from analyses.modular_arithmetic.model import Shape, build, pair_ids, shape_of
from analyses.modular_arithmetic.neighbourhood import CLOSE, DISTANT, SAME, patch_neighbours
from analyses.modular_arithmetic.path import change, patch_components, path_effects, sender_hook, share_lost
from analyses.modular_arithmetic.planted_circuit import SITES, planted_edges, planted_grid
from analyses.modular_arithmetic.state import read_state, split_pairs
from analyses.modular_arithmetic.wiring import Wiring

P = 7
POOLED = shape_of("pooled", d_model=8, n_heads=2, d_mlp=12)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return planted_grid(tmp_path_factory.mktemp("planted") / "x.actdb", P)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Two layers with norms and random weights, larger than usual: every edge carries something."""
    model = build(POOLED, P, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    prompts = [{"tokens": row} for row in pair_ids(P, equals=False).tolist()]
    out = tmp_path_factory.mktemp("pooled") / "x.actdb"
    return Grid(model, actdb.harvest(model, prompts, out=out, run="pooled", sites=SITES, store="float32"), P)


def test_corruptions_are_what_they_say(planted: Grid) -> None:
    sources = {kind: corruption(planted, kind, seed=3) for kind in CORRUPTIONS}
    a, b, answers = planted.a, planted.b, planted.answers
    shifted = sources["shifted"]
    assert np.array_equal(a[shifted], (a + 1) % P)
    assert np.array_equal(b[shifted], b)
    assert sorted(sources["shuffled"]) == list(range(P * P))
    assert not (answers[sources["random"]] == answers).any()
    assert np.array_equal(answers[sources["same answer"]], answers)
    assert not (a[sources["same answer"]] == a).any()
    with pytest.raises(actdb.SettingError, match="corruption 'none': choose one of shifted, shuffled, random, same"):
        corruption(planted, "none", seed=0)


def test_a_grid_must_hold_all_pairs_in_order(planted: Grid, tmp_path: Path) -> None:
    with pytest.raises(actdb.SelectionError, match="has 49 prompts; modulus 11 has 121 pairs"):
        Grid(planted.model, planted.run, 11)
    turned = [{"tokens": row} for row in pair_ids(P, equals=True)[::-1].tolist()]
    run = actdb.harvest(planted.model, turned, out=tmp_path / "x.actdb", run="turned", sites=SITES)
    with pytest.raises(actdb.SelectionError, match="does not hold the pairs of modulus 7 in"):
        Grid(planted.model, run, P)


def test_the_answer_is_read_where_the_model_reads_it(planted: Grid, pooled: Grid) -> None:
    assert planted.read_positions == (2,)
    assert planted.varying == (0, 1)
    assert pooled.read_positions == (0, 1)


@pytest.mark.parametrize("working", [0, 1])
def test_the_planted_circuit_is_found_and_nothing_else(working: int, tmp_path: Path) -> None:
    grid = planted_grid(tmp_path / "x.actdb", P, working=working)
    assert grid.accuracy() == 1.0
    lost = {name: found.accuracy_lost.value for name, found in importances(grid).items()}
    assert lost[f"L0H{1 - working}"] == 0.0
    assert min(lost[name] for name in ("embed a", "embed b", f"L0H{working}", "MLP0")) > 0.5
    effects = list(path_effects(grid, corruption(grid, "random", seed=0)))
    edges = planted_edges(working=working)
    for effect in effects:
        expected = (effect.sender, effect.receiver) in edges
        assert (effect.direct.loss_rise.value > 1.0) == expected, effect.sender
        assert expected or np.allclose(effect.direct.rise, 0, atol=1e-6)
    total = {(effect.sender, effect.receiver): effect.total.accuracy_lost.value for effect in effects}
    assert total["embed a", "MLP0"] > 0.5  # by way of the head
    assert total["embed a", "output"] > 0.5
    assert total[f"L0H{1 - working}", "output"] == 0.0
    circuit = find_circuit(Wiring(grid), effects, seed=0)
    assert frozenset(circuit.edges) == edges
    assert circuit.accuracy == circuit.whole == 1.0
    assert circuit.rest < 0.5
    assert circuit.random.mean() < 0.7
    assert circuit.components == ("embed a", "embed b", f"L0H{working}", "MLP0", "output")


def test_a_direct_effect_is_the_change_of_what_the_receiver_reads(pooled: Grid) -> None:
    source = torch.from_numpy(corruption(pooled, "shuffled", seed=1))
    effects = {(effect.sender, effect.receiver): effect.direct for effect in path_effects(pooled, source.numpy())}
    clean = pooled.written
    z = clean["blocks.0.attn.hook_z"][:, :, 1]
    block: torch.nn.Module = pooled.model.blocks[1]
    with torch.no_grad():
        moved = (z[source] - z) @ pooled.model.blocks[0].attn.W_O[1]
        before = block.ln2(pooled.stored("resid_mid", layer=1) + moved) @ block.mlp.W_in + block.mlp.b_in
    expected = change(pooled, pooled.logits([replace(Place("blocks.1.mlp.hook_pre"), before)]))
    found = effects["L0H1", "MLP1"]
    np.testing.assert_allclose(found.rise, expected.rise, atol=1e-5)
    assert np.abs(found.rise).max() > 0.01
    with torch.no_grad():
        last = pooled.stored("resid_post", layer=1) + moved
    expected = change(pooled, pooled.logits([replace(Place("blocks.1.hook_resid_post"), last)]))
    np.testing.assert_allclose(effects["L0H1", "output"].rise, expected.rise, atol=1e-5)


def test_the_total_effect_on_the_output_is_that_of_patching_the_sender(pooled: Grid) -> None:
    source = corruption(pooled, "shifted", seed=0)
    whole = patch_components(pooled, source)
    for effect in path_effects(pooled, source):
        if effect.receiver == "output":
            np.testing.assert_allclose(effect.total.rise, whole[effect.sender].rise, atol=1e-5)
    np.testing.assert_allclose(whole["embed b"].rise, 0, atol=1e-6)  # a + 1 leaves b
    identity = patch_components(pooled, np.arange(P * P))
    assert all(np.allclose(found.rise, 0, atol=1e-5) for found in identity.values())


def test_no_edge_cut_is_the_model_and_all_edges_of_a_component_cut_is_its_mean(pooled: Grid) -> None:
    wiring = Wiring(pooled)
    whole = wiring.compute(wiring.edges)
    torch.testing.assert_close(whole.logits, pooled.clean)
    for name, found in importances(pooled).items():
        cut = wiring.compute({edge for edge in wiring.edges if edge[0] != name})
        np.testing.assert_allclose(change(pooled, cut.logits).rise, found.rise, atol=1e-5)
    # computed from nothing rather than from the model's own values, a component at a time
    other = wiring.compute(set(wiring.edges) - {("embed a", "L0H0")})
    torch.testing.assert_close(wiring.compute(wiring.edges, known=other).logits, pooled.clean, rtol=1e-4, atol=1e-4)


def test_a_cut_edge_is_a_path_patch_from_the_mean(pooled: Grid) -> None:
    wiring, clean = Wiring(pooled), pooled.written
    nodes = {node.name: node for node in components_of(pooled)}
    frozen = {name: values for name, values in clean.items() if name != "hook_embed"}
    for sender, receiver in (("embed a", "MLP0"), ("L0H0", "L1H1"), ("MLP0", "output"), ("embed b", "L0H1")):
        at = nodes[sender].writes
        assert at is not None
        mean = clean[at.hook].mean(0, keepdim=True).expand_as(clean[at.hook])
        route = Route(replace(at, mean), nodes[receiver].reads, frozen)
        expected = pooled.read(path_patch(pooled.model, pooled.ids, route))
        found = wiring.compute(set(wiring.edges) - {(sender, receiver)}).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, pooled.clean, atol=1e-3)


def test_a_circuit_does_not_depend_on_what_is_known(pooled: Grid) -> None:
    wiring, generator = Wiring(pooled), np.random.default_rng(0)
    known = wiring.whole
    for _ in range(6):
        edges = [edge for edge in wiring.edges if generator.random() < 0.6]
        found = wiring.compute(edges, known=known)
        torch.testing.assert_close(found.logits, wiring.compute(edges).logits, rtol=1e-4, atol=1e-4)
        known = found


def test_live_edges_lie_on_a_path_from_a_number_to_the_output(pooled: Grid) -> None:
    wiring = Wiring(pooled)
    path = {("embed a", "L0H0"), ("L0H0", "MLP0"), ("MLP0", "output")}
    dangling = {("L0H1", "MLP1"), ("embed b", "L1H0")}  # from nothing that varies; to what nothing reads
    assert wiring.live(path | dangling) == path
    assert wiring.live(wiring.edges) == frozenset(wiring.edges)
    unread = wiring.compute(path | {("embed b", "L1H0")})
    torch.testing.assert_close(unread.logits, wiring.compute(path).logits)


def test_a_circuit_that_was_found_is_minimal(pooled: Grid) -> None:
    wiring = Wiring(pooled)
    effects = list(path_effects(pooled, corruption(pooled, "random", seed=0)))
    circuit = find_circuit(wiring, effects, n_random=2, seed=0)
    least = circuit.threshold * circuit.whole
    assert circuit.accuracy >= least
    for edge in circuit.edges:
        left = wiring.compute(wiring.live(set(circuit.edges) - {edge}))
        assert pooled.right(left.logits).mean() < least


def replace_rows(substitution: Substitution, rows: np.ndarray) -> Substitution:
    return dataclasses.replace(substitution, state=dataclasses.replace(substitution.state, rows=rows))


def test_concepts_of_the_answer_are_faithful_and_those_drawn_at_random_are_not(planted: Grid) -> None:
    fitted = split_pairs(P, seed=0)
    assert 0.4 < fitted.mean() < 0.6
    substitution = Substitution(planted, read_state(planted, "resid_post", layer=0), fitted, 0)
    kept = {found.name: found for found in substitution.kept()}
    assert kept["probe"].accuracy.value == kept["PCA"].accuracy.value == 1.0
    assert kept["probe"].completeness == 1.0
    assert kept["probe"].without < 0.5
    assert kept["probe"].null < 0.5
    separation = substitution.separation()
    assert separation.separability.value == 1.0
    assert separation.null_separability < 0.6
    clear = replace_rows(substitution, np.eye(P, dtype=np.float32)[planted.answers]).separation()
    assert clear.purity == clear.separability.value == 1.0
    assert clear.null_purity < 0.7
    curve = substitution.curve
    assert curve.principal[0] < curve.principal[-1] == curve.whole == 1.0
    assert curve.least(0.95) == curve.n_dimensions[np.flatnonzero(curve.principal >= 0.95)[0]]


def test_a_state_put_back_as_it_is_changes_nothing(planted: Grid, pooled: Grid) -> None:
    for grid, sites in ((planted, ("resid_mid", "mlp_post", "resid_post")), (pooled, ("resid_mid", "resid_post"))):
        for site in sites:
            for layer in grid.run.layers:
                state = read_state(grid, site, layer=layer)
                torch.testing.assert_close(grid.logits([state.put(state.rows)]), grid.clean)
        embedded = read_state(grid, "embed")
        source = corruption(grid, "shuffled", seed=0)
        found = grid.logits([embedded.put(embedded.rows[source])])
        torch.testing.assert_close(found, grid.clean[torch.from_numpy(source)], rtol=1e-4, atol=1e-4)


def test_a_patch_from_any_other_number_loses_the_answer(planted: Grid) -> None:
    moved = {
        found.source: found for found in patch_neighbours(planted, read_state(planted, "resid_post", layer=0), seed=0)
    }
    assert moved[SAME].lost.value == 0.0
    assert moved[CLOSE].lost.value == moved[DISTANT].lost.value == 1.0
    assert moved[SAME].distance.value < 1e-6 < moved[CLOSE].distance.value


def test_the_study_of_the_planted_circuit(planted: Grid, tmp_path: Path) -> None:
    found = study_circuit(planted, folder=tmp_path / "figures", seed=0, name="planted")
    verdicts = {entry.key: entry.verdict for entry in found.claims}
    assert verdicts["planted.circuit.accuracy"] == "sufficient"
    assert verdicts["planted.circuit.rest"] == "necessary"
    assert verdicts["planted.same_answer.MLP0"] == ALONE
    assert verdicts["planted.faithfulness.resid_post_0.probe"] == FAITHFUL
    assert verdicts["planted.path.L0H0>MLP0.direct"] == "above chance"
    assert verdicts["planted.neighbour.resid_post_0.next_number"] == "above the claim"
    content = json.loads((tmp_path / "figures" / "circuit_planted.json").read_text())
    kept = {(edge["sender"], edge["receiver"]) for edge in content["edges"] if edge["in_circuit"]}
    assert kept == planted_edges()
    assert {node["name"] for node in content["nodes"] if not node["in_circuit"]} == {"L0H1"}
    assert content["accuracy"]["circuit"] == 1.0
    assert all((tmp_path / file).stat().st_size > 5000 for file in found.figures)
    assert len(found.figures) == 5
    assert "4 of" in found.sections["Circuit of planted"]


def test_a_model_that_has_learnt_nothing_has_no_circuit(tmp_path: Path) -> None:
    model = build(Shape("one-layer", n_layers=1, d_model=8, n_heads=2, d_mlp=12), P, seed=0).eval()
    prompts = [{"tokens": row} for row in pair_ids(P, equals=True).tolist()]
    run = actdb.harvest(model, prompts, out=tmp_path / "x.actdb", run="random", sites=SITES, store="float32")
    found = study_circuit(Grid(model, run, P), folder=tmp_path / "figures", seed=0, name="random")
    verdicts = {entry.key: entry.verdict for entry in found.claims}
    assert verdicts["random.circuit.accuracy"] == "no effect"
    assert FAITHFUL not in verdicts.values()
    assert ALONE not in verdicts.values()


def test_the_hook_of_a_sender_patches_it_alone(pooled: Grid) -> None:
    clean = pooled.written
    node = next(node for node in components_of(pooled) if node.name == "L1H0")
    seen = {}
    source = corruption(pooled, "shuffled", seed=2)
    hook = sender_hook(node, clean, source)
    logits_of(pooled.model, pooled.ids, [hook, ("blocks.1.attn.hook_z", lambda z, hook: seen.update(z=z.clone()))])
    torch.testing.assert_close(seen["z"][:, :, 0], clean["blocks.1.attn.hook_z"][source][:, :, 0])
    torch.testing.assert_close(seen["z"][:, :, 1], clean["blocks.1.attn.hook_z"][:, :, 1])


def test_a_share_lost_has_an_interval_even_where_all_or_none_are() -> None:
    every, none = share_lost(np.ones(40)), share_lost(np.zeros(40))
    assert (every.value, none.value, every.high, none.low) == (1.0, 0.0, 1.0, 0.0)
    assert 0.9 < every.low < 1.0
    assert 0.0 < none.high < 0.1
    mixed = share_lost(np.array([1.0, -1.0, 0.0, 1.0] * 10))
    assert mixed.value == 0.25
    assert mixed.low < 0.25 < mixed.high
