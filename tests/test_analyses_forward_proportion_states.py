"""Forward proportion: steps 6 to 9 against NumPy and hand-made interventions, and their known answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actdb
from actdb import hooked
from analyses.common.metric import kl_divergence
from analyses.forward_proportion import planted
from analyses.forward_proportion.batch import batches, make_batch
from analyses.forward_proportion.patching import ALL, CleanPairs, clean_logits, convergent_pairs, patch
from analyses.forward_proportion.perturbation import perturb, random_pairs, strongest_pairs
from analyses.forward_proportion.prediction import (
    explain,
    held_out,
    powers_of_two,
    r_squared,
    singular_directions,
    sweep,
)
from analyses.forward_proportion.ring import circularity, loop_persistence, matched_gaussian, measure_ring
from analyses.forward_proportion.state import (
    DISTANCES,
    SITE,
    measure_pairs,
    neighbour_pairs,
    normed_differences,
    other_pairs,
    store_states,
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, build: Any) -> tuple[Any, Path]:
    """A GPT-2 with random weights and its run over labelled prompts of several lengths, in float32."""
    root = tmp_path_factory.mktemp("states")
    build("gpt2", n_layer=3, n_head=2).save_pretrained(root / "model")
    generator = np.random.default_rng(0)
    prompts = [
        {"tokens": [1, *generator.integers(3, 48, generator.integers(4, 9)).tolist()], "category": "ab"[i % 2]}
        for i in range(30)
    ]
    model = actdb.load_model(root / "model")
    sites = ("resid_post", "z", "pattern")
    actdb.harvest(model, prompts, root / "x.actdb", run="gpt2", sites=sites, store="float32", stats=())
    with actdb.open(root / "x.actdb", mode="a") as db:
        store_states(db.run())
    return model, root / "x.actdb"


def final_logits(model: Any, run: actdb.Run, prompt: int, hooks: Any = ()) -> torch.Tensor:
    """Logits at the last position of a prompt that runs alone."""
    with torch.inference_mode(), hooked(model, list(hooks)):
        out = model(torch.from_numpy(run.tokens(prompt).astype(np.int64))[None])
    return torch.as_tensor(getattr(out, "logits", out))[0, -1].float()


def test_batches_run_prompts_as_if_alone(language_model: tuple[Any, Path]) -> None:
    model, path = language_model
    with actdb.open(path) as db:
        run = db.run()
        prompts = [7, 3, 22, 0, 29]
        seen = []
        for places, batch in batches(run, prompts):
            for place, prompt, logits in zip(places, batch.prompts, batch.last_logits(model), strict=True):
                assert prompts[place] == prompt
                torch.testing.assert_close(logits, final_logits(model, run, prompt), rtol=1e-4, atol=1e-4)
                seen.append(prompt)
            z = batch.stored("z", layer=1, head=0)
            for row, prompt, n in zip(z, batch.prompts, batch.lengths.tolist(), strict=True):
                np.testing.assert_array_equal(row[:n], run["z"].sel(layer=1, head=0, prompt=prompt).numpy())
                assert (row[n:] == 0).all()
        assert sorted(seen) == sorted(prompts)


def test_perturbations_equal_hand_made_ones(language_model: tuple[Any, Path]) -> None:
    model, path = language_model
    with actdb.open(path) as db:
        run = db.run()
        pair = ((0, 1), (2, 0))
        prompts = [4, 11, 2]
        found = perturb(run, model, [pair, ((0, 0), (1, 1))], prompts)
        for i, prompt in enumerate(prompts):
            clean = final_logits(model, run, prompt)

            def zero(z: torch.Tensor, hook: Any, head: int) -> torch.Tensor:
                out = z.clone()
                out[:, :, head] = 0
                return out

            hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook, h=head: zero(z, hook, h)) for layer, head in pair]
            expected = kl_divergence(clean, final_logits(model, run, prompt, hooks))
            assert found.ablation[0, i] == pytest.approx(float(expected), rel=1e-3)
            expected = kl_divergence(clean, _cut_by_hand(model, run, prompt))
            assert found.disruption[0, i] == pytest.approx(float(expected), rel=1e-2, abs=1e-9)
        assert (found.disruption > 0).all()
        ratio = found.ratio(seed=0).value
        assert ratio == pytest.approx(found.disruption.sum() / found.ablation.sum())
        alone = perturb(run, model, [pair], prompts).ratio(seed=0)
        assert (alone.low, alone.high, alone.n) == (-np.inf, np.inf, 1)


def _cut_by_hand(model: Any, run: actdb.Run, prompt: int) -> torch.Tensor:
    """Run with head 0.1's output left out of the input of head 2.0: its q, k, v from weights, LayerNorm by hand."""
    resid = torch.from_numpy(run["resid_post"].sel(layer=1, prompt=prompt).numpy())
    z = torch.from_numpy(run["z"].sel(layer=0, head=1, prompt=prompt).numpy())
    x = resid - z @ torch.from_numpy(run.weight("W_O", layer=0, head=1))
    x = torch.nn.functional.layer_norm(
        x,
        x.shape[-1:],
        torch.from_numpy(run.weight("ln1.w", layer=2)),
        torch.from_numpy(run.weight("ln1.b", layer=2)),
        eps=1e-5,
    )
    hooks = []
    for name in "QKV":
        weight, bias = (torch.from_numpy(run.weight(f"{kind}_{name}", layer=2, head=0)) for kind in "Wb")
        value = x @ weight + bias

        def put(activation: torch.Tensor, hook: Any, value: torch.Tensor = value) -> torch.Tensor:
            out = activation.clone()
            out.reshape(*out.shape[:2], 2, -1)[:, :, 0] = value
            return out

        hooks.append((f"blocks.2.attn.hook_{name.lower()}", put))
    return final_logits(model, run, prompt, hooks)


def test_pairs_go_upwards() -> None:
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    mean = np.zeros((6, 6))
    mean[0, 3], mean[2, 5], mean[1, 4] = 3.0, 2.0, 1.0
    strong = strongest_pairs(mean, heads, n=2)
    assert strong == [((0, 0), (1, 1)), ((1, 0), (2, 1))]
    assert len(strongest_pairs(mean, heads, n=20)) == 3
    drawn = random_pairs(heads, n=50, without=strong, seed=0)
    assert len(set(drawn)) == len(drawn) == 12 - 2
    assert all(a[0] < b[0] for a, b in drawn)
    assert not set(drawn) & set(strong)


def test_distances_are_those_of_the_neighbour_search(language_model: tuple[Any, Path]) -> None:
    _, path = language_model
    with actdb.open(path) as db:
        run = db.run()
        readout = run.readout()
        for name, options in DISTANCES.items():
            graph = db.neighbors(SITE, layer=1, k=3, **options)
            a, b = np.repeat(graph.prompt, 3), graph.prompt[graph.numbers.reshape(-1)]
            found = measure_pairs(run, readout, a, b, layer=1)
            np.testing.assert_allclose(found.distances[name], graph.distances.reshape(-1), rtol=1e-3, atol=1e-5)


def test_divergences_are_the_models(language_model: tuple[Any, Path]) -> None:
    model, path = language_model
    with actdb.open(path) as db:
        run = db.run()
        a, b = other_pairs(np.arange(30), n=6, seed=0)
        assert (a != b).all()
        found = measure_pairs(run, run.readout(), a, b, layer=0)
        p, q = clean_logits(run, model, a), clean_logits(run, model, b)
        np.testing.assert_allclose(found.kl, kl_divergence(p, q), rtol=1e-3, atol=1e-6)
        assert (found.js > 0).all()
        assert (found.js < found.kl).all()
        delta = normed_differences(run, run.readout(), a, b, layer=2)
        logits = delta @ run.weight("W_U")
        np.testing.assert_allclose(logits, (p - q).numpy(), rtol=1e-2, atol=1e-3)


def test_neighbour_pairs_stand_once(language_model: tuple[Any, Path]) -> None:
    _, path = language_model
    with actdb.open(path) as db:
        run = db.run()
        a, b = neighbour_pairs(db, run, layer=2, k=4, n=10**6, seed=0)
        assert (a < b).all()
        assert len({*zip(a.tolist(), b.tolist(), strict=True)}) == len(a)
        thinned = neighbour_pairs(db, run, layer=2, k=4, n=12, seed=0)
        assert {*zip(*(ids.tolist() for ids in thinned), strict=True)} < {*zip(a.tolist(), b.tolist(), strict=True)}
        assert len(thinned[0]) == 12
        near_a, near_b = convergent_pairs(db, run, np.arange(0, 30, 2), layer=2, n=5)
        assert not (np.concatenate([near_a, near_b]) % 2).any()
        states = run[SITE].sel(layer=2).numpy()
        unit = states / np.linalg.norm(states, axis=1, keepdims=True)
        distances = 1 - (unit[near_a] * unit[near_b]).sum(1)
        assert (np.diff(distances) >= -1e-6).all()


def test_explained_is_one_for_a_function_and_nothing_for_noise() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 1, 600)
    group = np.repeat(np.arange(60), 10)
    exact = explain(x, np.exp(4 * x), group, kind="isotonic", seed=0)
    assert exact.r2 > 0.999
    assert exact.low > 0.99
    assert exact.null < 0.05
    assert explain(x, 2 * x + 1, group, kind="linear", seed=0).r2 == pytest.approx(1)
    noise = explain(x, generator.standard_normal(600), group, kind="isotonic", seed=0)
    assert noise.low < 0 < noise.high + 0.05
    assert noise.r2 < 0.02
    assert r_squared(np.zeros(3), np.ones(3)) == 0.0
    predicted = held_out(x[:, None], x, group, kind="linear")
    np.testing.assert_allclose(predicted, x, atol=1e-9)


def test_divergence_that_follows_from_one_distance_is_explained_by_it(tmp_path: Path) -> None:
    n = 24
    prompts = [{"tokens": [i % n], "category": "ab"[i % 2]} for i in range(4 * n)]
    made = planted.harvest(planted.build_circle(n_states=n), prompts, tmp_path / "x.actdb", run="circle")
    with actdb.open(tmp_path / "x.actdb", mode="a") as db:
        run = db.run("circle")
        store_states(run)
        readout = run.readout()
        a, b = other_pairs(np.arange(4 * n), n=800, seed=0)
        found = measure_pairs(run, readout, a, b, layer=0)
        explained = {name: explain(x, found.kl, a, kind="isotonic", seed=0) for name, x in found.distances.items()}
        assert explained["unembed"].r2 > 0.999
        assert explained["cosine"].r2 < 0.9
        near = neighbour_pairs(db, run, layer=0, k=8, n=500, seed=0)
        of_near = measure_pairs(run, readout, *near, layer=0)
        assert explain(of_near.distances["unembed"], of_near.kl, near[0], kind="isotonic", seed=0).r2 > 0.99
        directions, values = singular_directions(run.weight("W_U"))
        assert (values[:2] > 1).all()
        assert (values[2:] < 1e-3).all()
        delta = normed_differences(run, readout, a, b, layer=0)
        swept = sweep(delta, directions, found.kl, a, ks=powers_of_two(8))
    assert swept.k.tolist() == [1, 2, 4, 8]
    assert swept.inside[1] > 0.999  # the circle lies in two directions
    assert swept.inside[0] < 0.9
    assert swept.outside[1] < 0.2
    assert made.run.name == "circle"


def test_singular_directions_are_those_of_the_svd() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 40))
    directions, values = singular_directions(matrix)
    left, expected, _ = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(values, expected)
    np.testing.assert_allclose(np.abs((directions * left).sum(0)), 1)


@pytest.mark.parametrize("by_last", [True, False])
def test_one_state_explains_all_or_nothing_where_that_was_built(tmp_path: Path, by_last: bool) -> None:
    model = planted.build_decider(by_last=by_last)
    made = planted.harvest(model, planted.decider_prompts(n=40), tmp_path / "x.actdb", run="decider")
    run = made.run
    a, b = other_pairs(np.arange(40), n=40, seed=0)
    firsts, lasts = (np.array([run.tokens(p)[i] for p in range(40)]) for i in (0, -1))
    differ = (firsts[a] != firsts[b]) & (lasts[a] != lasts[b])
    a, b = a[differ], b[differ]
    pairs = CleanPairs.make(run, model, a, b)
    share = patch(run, model, pairs, layer=0).share(seed=0)
    if by_last:
        assert share.value == pytest.approx(1, abs=1e-6)
    else:
        assert share.value == pytest.approx(0, abs=1e-3)
    assert patch(run, model, pairs, layer=1).share(seed=0).value == pytest.approx(1, abs=1e-6)
    same = np.array([len(run.tokens(i)) == len(run.tokens(j)) for i, j in zip(a, b, strict=True)])
    whole = patch(run, model, CleanPairs.make(run, model, a[same], b[same]), layer=0, n_last=ALL)
    assert whole.share(seed=0).value == pytest.approx(1, abs=1e-6)


def test_patching_equals_a_hand_made_one(language_model: tuple[Any, Path]) -> None:
    model, path = language_model
    with actdb.open(path) as db:
        run = db.run()
        a, b = np.array([3, 8]), np.array([5, 1])
        found = patch(run, model, CleanPairs.make(run, model, a, b), layer=1, n_last=2)
        for i, (source, target) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            states = torch.from_numpy(run["resid_post"].sel(layer=1, prompt=source).numpy()[-2:])

            def put(activation: torch.Tensor, hook: Any, states: torch.Tensor = states) -> torch.Tensor:
                out = activation.clone()
                out[0, -2:] = states
                return out

            clean = final_logits(model, run, source)
            patched = final_logits(model, run, target, [("blocks.1.hook_resid_post", put)])
            assert found.left[i] == pytest.approx(float(kl_divergence(clean, patched)), rel=1e-3)
            apart = kl_divergence(clean, final_logits(model, run, target))
            assert found.apart[i] == pytest.approx(float(apart), rel=1e-3)


def test_a_planted_ring_is_found_and_a_blob_is_none() -> None:
    ring = measure_ring(planted.ring_cloud(n=60, width=12), n_null=39, seed=0)
    assert ring.circularity > 0.9
    assert ring.circularity_p == ring.persistence_p == 1 / 40
    assert ring.persistence > 3 * ring.persistence_null
    blob = measure_ring(planted.blob_cloud(n=60, width=12), n_null=39, seed=0)
    assert blob.circularity_p > 0.05 < blob.persistence_p
    assert blob.circularity == pytest.approx(1 - np.sqrt(4 / np.pi - 1), abs=0.1)


def test_circularity_and_loops_of_simple_clouds() -> None:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([3 * np.cos(angle), np.sin(angle)], 1)  # an ellipse is scaled to a circle
    assert circularity(circle) == pytest.approx(1)
    assert circularity(np.outer(np.arange(10.0), [1, 2])) == 0.0
    assert loop_persistence(np.outer(np.arange(10.0), [1, 2])) == 0.0
    round_one = np.stack([np.cos(angle), np.sin(angle)], 1)
    step, width = 2 * np.sin(np.pi / 40), np.sqrt(3)  # the loop is born at a side and dies near the inner triangle's
    assert loop_persistence(round_one) == pytest.approx((width - step) / np.sqrt(2), rel=0.1)


def test_matched_gaussians_have_the_covariance() -> None:
    states = planted.blob_cloud(n=400, width=4)
    generator = np.random.default_rng(0)
    found = np.mean([np.cov(matched_gaussian(states, generator).T) for _ in range(60)], axis=0)
    np.testing.assert_allclose(found, np.cov(states.T), atol=0.02)
    few = matched_gaussian(states[:3], generator)
    assert np.linalg.matrix_rank(few - few.mean(0)) <= 2


def test_make_batch_pads_at_the_end(language_model: tuple[Any, Path]) -> None:
    with actdb.open(language_model[1]) as db:
        batch = make_batch(db.run(), [0, 5])
        for row, prompt, n in zip(batch.ids, batch.prompts, batch.lengths, strict=True):
            assert row[:n].tolist() == db.run().tokens(prompt).tolist()
            assert (row[n:] == 0).all()
