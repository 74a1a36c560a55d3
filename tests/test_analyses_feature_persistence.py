"""Feature persistence: the planted case and its control, the tiny model, tracking, and the study end to end."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import actdb
from analyses.feature_persistence import __main__ as program
from analyses.feature_persistence import crowd, experiment, scale, study, tracking, training
from analyses.feature_persistence.attention import describe_attention
from analyses.feature_persistence.correlation import correlate, importance
from analyses.feature_persistence.model import PostNormTransformer, initialise, restore
from analyses.feature_persistence.null import check_null
from analyses.feature_persistence.planted import eta_interval, plant
from analyses.feature_persistence.random_network import RandomNetwork
from analyses.feature_persistence.selection import KINDS, MAX_CELLS, measure, token_cells
from analyses.feature_persistence.source import find_sources
from analyses.feature_persistence.study import FULL, plan_trainings
from analyses.feature_persistence.task import STRUCTURES, probe_prompts, structured_prompts, training_sequences
from analyses.feature_persistence.toolkit import apply_toolkit, harvest_structured
from analyses.feature_persistence.training import Training, run_training

PLANTED = {(0, 3): ("token", 0.5), (0, 40): ("position", 0.1), (1, 7): ("token", 0.02), (1, 8): ("position", 0.8)}


def test_planted_effects_are_found_at_their_size_and_no_others(tmp_path: Path) -> None:
    found = measure(plant(tmp_path / "x.actdb", PLANTED).run)
    assert found.n_rows == 4000
    for (layer, neuron), (kind, eta) in PLANTED.items():
        low, high = eta_interval(eta, kind, n_rows=found.n_rows)
        assert low < found.by_kind(kind).eta_squared[layer, neuron] < high
        assert high - low < 0.1  # narrow enough that a wrong one would be noticed
    for kind in KINDS:
        selective = {(int(i), int(j)) for i, j in np.argwhere(found.selective(kind))}
        assert selective == {place for place, (planted, _) in PLANTED.items() if planted == kind}
        assert found.crossed.interaction.eta_squared.mean() < 0.03


def test_without_structure_nothing_is_selective(tmp_path: Path) -> None:
    control = plant(tmp_path / "x.actdb", {}, n_layers=4, run="control", seed=1).run
    found = measure(control)
    for kind in KINDS:
        assert not found.selective(kind).any()
        expected = (len(token_cells(control).tokens) if kind == "token" else 8) - 1
        assert found.by_kind(kind).eta_squared.mean() == pytest.approx(expected / 3999, rel=0.15)


def test_noise_gives_the_false_positives_that_the_correction_allows(tmp_path: Path) -> None:
    run = plant(tmp_path / "x.actdb", {}, n_layers=1, n_neurons=1).run
    null = check_null(token_cells(run), prompt_lengths=[8] * 500, n_neurons=64, n_repetitions=60, seed=0)
    for kind in KINDS:
        assert null.false_positives[kind] <= 4  # 0.6 are expected in 60 families at 0.01
        assert null.mean_eta[kind] == pytest.approx(null.expected_eta[kind], rel=0.05)


def test_the_tiny_model_is_torchs_post_norm_encoder() -> None:
    """The same function as `nn.TransformerEncoderLayer`, which the original was built of."""
    model = PostNormTransformer(seed=3).eval()
    ids = torch.from_numpy(training_sequences(0, n=16))
    x = model.embed.W_E[ids] + model.pos_embed.W_pos[: ids.shape[1]]
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True).eval()
        attn = block.attn
        weights = [torch.cat(list(getattr(attn, f"W_{name}")), 1).T for name in "QKV"]
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(torch.cat(weights))
            layer.self_attn.in_proj_bias.copy_(torch.cat([getattr(attn, f"b_{name}").flatten() for name in "QKV"]))
            layer.self_attn.out_proj.weight.copy_(attn.W_O.flatten(0, 1).T)
            layer.self_attn.out_proj.bias.copy_(attn.b_O)
            for linear, names in ((layer.linear1, ("W_in", "b_in")), (layer.linear2, ("W_out", "b_out"))):
                linear.weight.copy_(getattr(block.mlp, names[0]).T)
                linear.bias.copy_(getattr(block.mlp, names[1]))
        x = layer(x)
    torch.testing.assert_close(model(ids), x @ model.unembed.W_U + model.unembed.b_U, rtol=1e-4, atol=1e-5)


def test_initialisations_have_their_scale() -> None:
    default = PostNormTransformer(seed=0).requires_grad_(False)
    assert float(default.blocks[0].mlp.W_in.abs().max()) == pytest.approx(16**-0.5, rel=0.01)
    he = PostNormTransformer(seed=0, scheme="he").requires_grad_(False)
    assert float(he.blocks[0].mlp.W_in.std()) == pytest.approx((2 / 16) ** 0.5, rel=0.1)
    assert not he.blocks[0].mlp.b_in.any()
    xavier = PostNormTransformer(seed=0, scheme="xavier").requires_grad_(False)
    assert float(xavier.blocks[0].mlp.W_in.abs().max()) == pytest.approx((6 / 80) ** 0.5, rel=0.01)
    small = PostNormTransformer(seed=0, scheme="small").requires_grad_(False)
    assert float(small.embed.W_E.std()) == pytest.approx(0.02, rel=0.2)
    with pytest.raises(actdb.SettingError, match="choose one of default, xavier, he, small"):
        initialise(default, "zero", seed=0)


def test_sequences_are_of_their_kind() -> None:
    for pattern in ("ascending", "alternating", "repeating"):
        for ids in training_sequences(1, patterns=(pattern,), n=50).tolist():
            if pattern == "ascending":
                assert all((b - a) % 10 == 1 for a, b in pairwise(ids))
            else:
                periods = (2,) if pattern == "alternating" else (2, 3, 4)
                assert any(all(ids[i] == ids[i - n] for i in range(n, 8)) for n in periods)
    assert [*dict.fromkeys(p["kind"] for p in structured_prompts(n_each=2))] == [*STRUCTURES]
    assert (training_sequences(5) == training_sequences(5)).all()
    assert (training_sequences(5) != training_sequences(6)).any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Training]:
    """One short training with every site of its three checkpoints."""
    db = tmp_path_factory.mktemp("trained") / "study.actdb"
    made = Training("default", seed=42, n_epochs=4, all_sites=True)
    result = run_training(made, db)
    assert result.last_loss < result.first_loss
    return db, made


def test_checkpoints_are_runs_of_one_model_with_their_step(trained: tuple[Path, Training]) -> None:
    db, made = trained
    with actdb.open(db) as database:
        assert [run.step for run in map(database.run, made.runs)] == [0, 64, 128]
        assert {run.info.model["model"] for run in database.runs()} == {"default-seed42"}
        assert not database.run(made.runs[0]).info.causal
        restored = restore(database.run(made.runs[-1]))
        ids = torch.tensor([p["tokens"] for p in probe_prompts(n=5)])
        restored(ids)
        stored = database.run(made.runs[-1])["mlp_post"].sel(layer=1, prompt=0).numpy()
        x = restored.embed.W_E[ids] + restored.pos_embed.W_pos
        x = restored.blocks[0](x)
        hidden = restored.blocks[1].ln1(x + restored.blocks[1].attn(x))
        neurons = (hidden @ restored.blocks[1].mlp.W_in + restored.blocks[1].mlp.b_in).relu()
        np.testing.assert_allclose(stored, neurons[0].detach(), rtol=1e-4, atol=1e-5)


def test_the_untrained_model_is_selective_and_noise_in_its_place_is_not(trained: tuple[Path, Training]) -> None:
    db, made = trained
    with actdb.open(db) as database:
        run = database.run(made.runs[0])
        found = measure(run)
        assert found.selective("token").mean() > 0.9
        values = run["mlp_post"].numpy()
        shuffled = np.random.default_rng(0).permuted(values, axis=1)
        cells = token_cells(run)
        places = cells(run["mlp_post"].prompt, run["mlp_post"].pos)
        from analyses.common.selectivity import CellSums
        from analyses.feature_persistence.selection import from_sums

        sums = CellSums(cells.n_cells)
        sums.add(shuffled, places)
        assert from_sums(sums, cells.shape).selective("token").sum() <= 1


def test_attention_is_described_from_stored_patterns(trained: tuple[Path, Training]) -> None:
    db, made = trained
    with actdb.open(db) as database:
        run = database.run(made.runs[0])
        found = describe_attention(run)
        patterns = run["pattern"].numpy(pad=True)  # [layer, head, prompt, query, key]
        mean = patterns.mean(2, dtype=np.float64)
        np.testing.assert_allclose(found.distance, np.abs(mean - 1 / 8).max((-2, -1)), rtol=1e-5)
        np.testing.assert_allclose(found.deviation, patterns.std(2, dtype=np.float64).mean((-2, -1)), rtol=1e-4)


def test_tracking_tells_kept_changed_and_lost() -> None:
    initial = np.array([0.4, 0.4, 0.4, 0.4, 0.1])
    final = np.array([0.3, 0.7, 0.04, 0.19, 0.06])
    assert tracking.is_maintained(initial, final).tolist() == [True, False, False, False, True]
    assert tracking.is_persistent(initial, final).tolist() == [True, True, False, False, True]
    found = tracking.fate(initial, final)
    assert (found.maintained, found.changed, found.lost) == (2, 2, 1)


def test_persistence_of_neurons_that_stay_exceeds_that_of_shuffled_ones() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 1, (1, 2, 64)) ** 4
    kept = tracking.History(("a", "b"), (0, 1), {kind: np.concatenate([before, before * 0.9]) for kind in KINDS})
    fresh = generator.permuted(before, axis=2)
    turned = tracking.History(("a", "b"), (0, 1), {kind: np.concatenate([before, fresh]) for kind in KINDS})
    assert (tracking.persistence(kept, "token") == 1).all()
    assert tracking.persistence(turned, "token").mean() < 0.5
    chance = [tracking.chance_persistence(history, "token", seed=0).mean() for history in (kept, turned)]
    assert max(chance) < 0.3
    assert kept.of("token", kept.top("token"))[0].min() >= np.sort(before[0], axis=1)[:, -5:].min()


def test_sources_of_structure_are_those_of_the_weights(trained: tuple[Path, Training]) -> None:
    db, made = trained
    with actdb.open(db) as database:
        found = find_sources(database.run(made.runs[0]))
    model = PostNormTransformer(seed=42)
    tokens = nn.functional.normalize(model.embed.W_E.detach(), dim=1)
    pairs = (tokens @ tokens.T)[np.triu_indices(10, 1)]
    np.testing.assert_allclose(np.sort(found.token_cosines), np.sort(pairs), rtol=1e-4, atol=1e-6)
    query = torch.cat(list(model.blocks[1].attn.W_Q.detach()), dim=1)
    assert found.query_ratio[1] == pytest.approx(np.linalg.cond(query.numpy()), rel=1e-3)
    assert len(found.sum_cosines) == 80 * 79 // 2


def test_the_random_network_is_harvested_and_its_five_experiments_run(tmp_path: Path) -> None:
    network = RandomNetwork(seed=1)
    prompts = probe_prompts(n=200, n_positions=4)
    run = actdb.harvest(network, prompts, out=tmp_path / "x.actdb", sites=["mlp_post"], store="float32")
    with actdb.open(tmp_path / "x.actdb") as db:
        rows = experiment.read_rows(run)
        assert rows.values.shape == (800, 64)
        purity = experiment.detect_features(db, run, seed=0)
        assert purity.value > purity.null + 0.1
        effect, telling = experiment.weigh_hypothesis(rows, seed=0)
        assert effect.value > 2 * effect.null
        assert telling.value > 0.3
        circuits = experiment.discover_circuits(rows, seed=0)
        assert circuits.n_distinct_first == 10  # a causal network's first position knows its own token alone
        assert circuits.first_correlated > circuits.correlated.value > circuits.correlated.null


def test_experiments_report_nothing_of_noise() -> None:
    generator = np.random.default_rng(0)
    prompt, pos = np.repeat(np.arange(200), 4), np.tile(np.arange(4), 200)
    noise = experiment.Rows(generator.standard_normal((800, 40)), generator.integers(0, 10, 800), prompt, pos)
    effect, telling = experiment.weigh_hypothesis(noise, seed=0)
    assert effect.value < 1.5 * effect.null
    assert telling.value == 0
    circuits = experiment.discover_circuits(noise, seed=0)
    assert circuits.correlated.value == circuits.opposed.value == 0
    kinds = np.repeat([*"abcde"], 40)
    assert [f.value for f in experiment.compare_structures(noise, kinds, seed=0).values()] == [0, 0]
    told = experiment.Rows(noise.values + np.repeat(np.arange(200) // 40, 4)[:, None], noise.token, prompt, pos)
    assert [f.value for f in experiment.compare_structures(told, kinds, seed=0).values()] == [1, 0]


def test_the_toolkit_finds_what_a_trained_model_uses(trained: tuple[Path, Training]) -> None:
    db, made = trained
    with actdb.open(db) as database:
        run = harvest_structured(database.run(made.runs[-1]), db)
        database.refresh()
        found = apply_toolkit(database, database.run(run.name), seed=0)
    assert found.lens.agreement[-1] == 1
    assert found.lens.kl[0] > found.lens.kl[-1] == pytest.approx(0, abs=1e-9)
    assert set(found.roles) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert found.patches["residual 1"].value == pytest.approx(1, abs=1e-4)  # the last residual decides the output
    assert found.ablations["mlp 1 mean"].value > 0
    assert set(found.paths) == {"head 0.0 → mlp 1", "head 0.1 → mlp 1"}


def test_the_importance_of_a_neuron_is_the_loss_without_it(trained: tuple[Path, Training]) -> None:
    db, made = trained
    with actdb.open(db) as database:
        run = database.run(made.runs[-1])
        found = importance(run, seed=3)
        mean = run["mlp_post"].sel(layer=1).numpy()[:, 5].mean()
        model = restore(run)
    ids = torch.from_numpy(training_sequences(1003, n=200))

    def loss(module: PostNormTransformer) -> float:
        logits = module(ids)[:, :-1].transpose(1, 2)
        return float(nn.functional.cross_entropy(logits, ids[:, 1:]).detach())

    before = loss(model)
    mlp = model.blocks[1].mlp
    with torch.no_grad():  # the neuron's mean goes into the bias, and its own output away
        mlp.b_out += mean * mlp.W_out[5]
        mlp.W_out[5] = 0
    assert found[1, 5] == pytest.approx(loss(model) - before, abs=1e-5)
    assert found.shape == (2, 64)


def test_correlations_tell_neurons_that_keep_their_rank_from_shuffled_ones() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0.1, 1, (6, 1, 2, 64))
    kept = [tracking.History(("a", "b"), (0, 1), {"token": np.concatenate([b, b**2])}) for b in before]
    turned = [
        tracking.History(("a", "b"), (0, 1), {"token": np.concatenate([b, generator.permuted(b, axis=2)])})
        for b in before
    ]
    found, other = (correlate(histories, "token", layer=1, seed=0) for histories in (kept, turned))
    assert found.with_final.value == pytest.approx(1)
    assert found.with_persistence.low > 0.5 > 0 > found.chance
    assert other.with_final.low < 0 < other.with_final.high
    assert other.with_persistence.low < other.chance < other.with_persistence.high


def test_many_runs_and_many_rows_are_timed(tmp_path: Path) -> None:
    found = crowd.time_runs(tmp_path / "crowd.actdb", n_seeds=1)
    assert (found["runs"], found["head_stats_rows"]) == (10, 10 * 500 * 4)
    assert found["open_s"] < 0.5
    with actdb.open(tmp_path / "crowd.actdb") as db:
        timed = scale.time_measurement(db.run("seed0-step320"))
        assert timed["rows"] == 4000
        assert timed["eta_token_mean"] == measure(db.run("seed0-step320")).token.eta_squared.mean()


def test_cells_of_a_large_vocabulary_are_its_commonest_tokens(tmp_path: Path) -> None:
    from hooked import TinyModel

    generator = np.random.default_rng(0)
    model = TinyModel(d_vocab=3000, n_ctx=80)
    prompts = [{"tokens": (generator.zipf(1.3, 80) % 3000).tolist()} for _ in range(10)]
    run = actdb.harvest(model, prompts, out=tmp_path / "x.actdb", sites=["mlp_post"])
    cells = token_cells(run)
    assert cells.shape == (64, 64)
    assert cells.n_cells <= MAX_CELLS
    flat = np.concatenate([p["tokens"] for p in prompts])
    counts = np.bincount(flat, minlength=3000)
    assert counts[cells.tokens].min() >= np.delete(counts, cells.tokens).max()
    places = cells(np.zeros(80, np.int64), np.arange(80))
    assert (places[64:] == -1).all()
    for pos in range(64):
        token = prompts[0]["tokens"][pos]
        expected = -1 if token not in cells.tokens else np.flatnonzero(cells.tokens == token)[0] * 64 + pos
        assert places[pos] == expected


def test_the_plan_has_the_specified_trainings() -> None:
    plan = plan_trainings(FULL, seed=42)
    main = [t for t in plan if t.group == "default"]
    assert len(main) == len({t.seed for t in main}) == 12
    assert main[0].steps == (0, 64, 128, 192, 256, 320)
    groups = {t.group for t in plan}
    assert {"xavier", "he", "small", "causal", "40-epochs", "random-only", "rate-0.003"} <= groups
    assert len({run for t in plan for run in t.runs}) == sum(len(t.runs) for t in plan)


def test_the_study_runs_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four short trainings in this process; every step after them as it is."""
    plan = [Training("default", seed=s, n_epochs=2, all_sites=True) for s in (42, 43)]
    plan += [Training("he", seed=s, n_epochs=2, scheme="he", every_checkpoint=False) for s in (42, 43)]
    monkeypatch.setattr(study, "plan_trainings", lambda extent, seed: plan)
    monkeypatch.setattr(training, "N_PROCESSES", 1)
    out = tmp_path / "out"
    assert program.main(["--size", "small", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["results"]
    keys = [entry["key"] for entry in results]
    assert len(keys) == len(set(keys))
    assert {"init.L0.token.n_selective", "track.maintained", "seeds.L1.position.persistence", "lens.L0.kl"} <= set(keys)
    assert all(key in printed for key in keys)
    assert all(entry["verdict"] for entry in results)
    figures = {path.name for path in (out / "figures").iterdir()}
    assert {"selectivity.png", "persistence.png", "effect_sizes.png"} <= figures
    with actdb.open(out / "study.actdb") as db:
        eta = db.sql("SELECT count(*), count(DISTINCT run), min(eta_squared) FROM neuron_selectivity").fetchone()
        stored = db.sql("SELECT count(*) FROM results WHERE analysis = 'feature_persistence'").fetchone()
    assert eta == (8 * 256, 8, pytest.approx(0, abs=0.3))
    assert stored == (len(results),)


def test_trainings_that_are_there_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = tmp_path / "x.actdb"
    plan = [Training("default", seed=s, n_epochs=2) for s in (1, 2)]
    monkeypatch.setattr(training, "N_PROCESSES", 1)
    first = training.run_trainings(plan, db)
    trained: list[Training] = []
    run = training.run_training
    monkeypatch.setattr(training, "run_training", lambda made, out: (trained.append(made), run(made, out))[1])
    longer = Training("longer", seed=1, n_epochs=4)
    again = training.run_trainings([*plan, longer], db)
    assert trained == [longer]
    assert again[:2] == first
    with actdb.open(db) as database:
        database.remove("default-seed2-step64")
    training.run_trainings(plan, db)
    assert trained == [longer, plan[1]]


def test_a_named_model_is_measured(
    trained: tuple[Path, Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    db, made = trained
    assert program.main(["--db", str(db), "--run", made.runs[-1], "--out", str(tmp_path / "out")]) == 0
    keys = capsys.readouterr().out
    assert "L0.token.selective" in keys
    assert "token.persistence" in keys
    assert (tmp_path / "out" / "figures" / "selectivity.png").exists()


def test_intervals_of_planted_effects_have_their_level() -> None:
    position = np.tile(np.arange(8), 100)
    effect = np.linspace(-1, 1, 8)[position]
    effect *= np.sqrt(0.2 / 0.8) / effect.std()
    values = effect + np.random.default_rng(0).standard_normal((2000, 800))
    means = values.reshape(2000, 100, 8).mean(1)
    eta = 100 * means.var(1) * 8 / (values.var(1) * 800)
    low, high = eta_interval(0.2, "position", n_rows=800, confidence=0.9)
    assert ((low < eta) & (eta < high)).mean() == pytest.approx(0.9, abs=0.02)
