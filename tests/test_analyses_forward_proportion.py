"""Forward proportion: steps 1 to 5 against loops and NumPy, and the known answers of planted heads and readers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

import actdb
from analyses.forward_proportion import planted
from analyses.forward_proportion.classification import classify, compare
from analyses.forward_proportion.community import coactivation, find_communities, separate
from analyses.forward_proportion.interaction import (
    fingerprints,
    interaction_blocks,
    prompt_blocks,
    read_interactions,
    store_interactions,
)
from analyses.forward_proportion.own import PROMPTS
from analyses.forward_proportion.rewiring import incoming, mean_interaction, measure_rewiring, pair_means
from analyses.forward_proportion.subject import make_subject, surface
from tests.hooked import PLAN, TinyModel

LAYERS, HEADS = 3, 2


def labelled_prompts(n: int, *, d_vocab: int = 16, longest: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [
        {"tokens": generator.integers(0, d_vocab, generator.integers(2, longest)).tolist(), "category": "abc"[i % 3]}
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several parts, prompts of several lengths, in float32."""
    path = tmp_path_factory.mktemp("forward") / "x.actdb"
    model = TinyModel(n_layers=LAYERS, n_heads=HEADS, n_kv_heads=1)
    actdb.harvest(model, labelled_prompts(36), path, run="tiny", store="float32", stats=(), **PLAN)
    return path


def slow_interaction(run: actdb.Run, prompt: int, query: str) -> npt.NDArray[np.float64]:
    """I [source, target] by loops over pairs of heads, as the specification has it."""
    out = np.zeros((LAYERS * HEADS, LAYERS * HEADS))
    for a in range(LAYERS * HEADS):
        z = run["z"].sel(layer=a // HEADS, head=a % HEADS, prompt=prompt).numpy()
        written = np.linalg.norm(z @ run.weight("W_O", layer=a // HEADS, head=a % HEADS), axis=1)
        for b in range(LAYERS * HEADS):
            if a // HEADS < b // HEADS:
                pattern = run["pattern"].sel(layer=b // HEADS, head=b % HEADS, prompt=prompt).numpy()
                row = pattern[-1] if query == "last" else pattern.mean(0)
                out[a, b] = row @ written
    return out


@pytest.mark.parametrize("query", ["last", "mean"])
@pytest.mark.parametrize("block_tokens", [1, 40, 10_000])
def test_interactions_equal_the_loops(harvested: Path, query: str, block_tokens: int) -> None:
    with actdb.open(harvested) as db:
        run = db.run()
        prompts = []
        for block in interaction_blocks(run, query=query, block_tokens=block_tokens):
            assert block.values.shape == (LAYERS, HEADS, len(block), LAYERS * HEADS)
            for i, prompt in enumerate(block.prompt.tolist()):
                expected = slow_interaction(run, prompt, query)
                found = block.values[:, :, i].reshape(LAYERS * HEADS, -1)
                np.testing.assert_allclose(found, expected, atol=1e-5)
            prompts += block.prompt.tolist()
    assert prompts == run.prompt_ids(order="stored")


@pytest.mark.parametrize("query", ["last", "mean"])
def test_fingerprints_equal_the_loops(harvested: Path, query: str) -> None:
    with actdb.open(harvested) as db:
        run = db.run()
        found = fingerprints(run, [5, 0, 17, 33], query=query)
        for row, prompt in zip(found, [5, 0, 17, 33], strict=True):
            for head in range(LAYERS * HEADS):
                z = run["z"].sel(layer=head // HEADS, head=head % HEADS, prompt=prompt).numpy()
                sizes = np.linalg.norm(z @ run.weight("W_O", layer=head // HEADS, head=head % HEADS), axis=1)
                assert row[head] == pytest.approx(sizes[-1] if query == "last" else sizes.mean(), rel=1e-4)


def test_an_unknown_query_is_refused(harvested: Path) -> None:
    with actdb.open(harvested) as db, pytest.raises(actdb.SettingError, match="query 'all': choose one of last, mean"):
        next(interaction_blocks(db.run(), query="all"))


def test_interactions_are_stored_once_and_sql_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.actdb"
    model = TinyModel(n_layers=LAYERS, n_heads=HEADS)
    actdb.harvest(model, labelled_prompts(9), path, run="tiny", stats=(), **PLAN)
    with actdb.open(path, mode="a") as db:
        run = db.run()
        store_interactions(run)
        store_interactions(run)
        found = {int(i): v for ids, values in read_interactions(run, rows=4) for i, v in zip(ids, values, strict=True)}
        assert sorted(found) == list(range(9))
        (value,) = db.sql("SELECT interaction(0, 1, 2, 0, 4)").fetchone()  # type: ignore[misc]
        assert value == found[4][1, 2 * HEADS]
        np.testing.assert_allclose(found[4], slow_interaction(run, 4, "last"), rtol=2e-3, atol=1e-4)
        assert db.verify() == []


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 36), limit=st.integers(1, 120), seed=st.integers(0, 99))
def test_prompt_blocks_hold_every_prompt_once(harvested: Path, n: int, limit: int, seed: int) -> None:
    run = actdb.open(harvested).run()
    ids = np.random.default_rng(seed).permutation(36)[:n].tolist()
    blocks = list(prompt_blocks(run, ids, block_tokens=limit))
    assert [i for _, block in blocks for i in block] == ids
    assert [i for places, _ in blocks for i in range(n)[places]] == list(range(n))
    for _, block in blocks:
        assert len(block) == 1 or len(block) * max(len(run.tokens(i)) for i in block) <= limit


def test_communities_recover_planted_blocks() -> None:
    values, block = planted.planted_fingerprints(n_blocks=5, heads_a_block=8, n_prompts=150)
    found = find_communities(values, n_seeds=20, n_null=30, seed=0)
    assert adjusted_rand_score(block, found.member) > 0.95
    assert found.n == 5
    assert found.stability > 0.95
    assert found.modularity > found.null.max() + 0.2


def test_communities_of_noise_are_no_more_than_chance() -> None:
    values, block = planted.planted_fingerprints(n_blocks=0, heads_a_block=40, n_prompts=150)
    found = find_communities(values, n_seeds=5, n_null=40, seed=0)
    assert np.quantile(found.null, 0.005) <= found.modularity <= np.quantile(found.null, 0.995) + 0.01
    assert (found.weights.diagonal() == 0).all()
    assert found.stability < 0.8
    assert len(block) == 40


def test_coactivation_is_the_positive_correlation() -> None:
    values, _ = planted.planted_fingerprints(n_blocks=2, heads_a_block=3, n_prompts=30)
    values = np.concatenate([values, np.full((30, 1), 7.0)], 1)  # a head that never changes
    expected = np.zeros((7, 7))
    expected[:6, :6] = np.maximum(np.corrcoef(values[:, :6].T), 0)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(coactivation(values), expected, atol=1e-12)


def test_separation_finds_the_planted_community() -> None:
    values, block = planted.planted_fingerprints(n_blocks=2, heads_a_block=4, n_prompts=120)
    category = np.arange(120) % 4
    symbolic = category < 2
    values[np.ix_(symbolic, block == 0)] += 2.0
    found = separate(values, block, category=category, symbolic=symbolic, names=list("abcd"), seed=0)
    assert found.tests[0].p < 0.01 < found.tests[1].p
    scores = (values - values.mean(0)) / values.std(0)
    assert found.by_category[0, 2] == pytest.approx(scores[category == 2][:, block == 0].mean())
    assert separate(values, block, category=category, symbolic=category < 9, names="abcd", seed=0).tests == ()


def blobs(n: int, *, informative: bool, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    generator = np.random.default_rng(seed)
    category = np.arange(n) % 3
    features = generator.standard_normal((n, 120))
    if informative:
        features[:, :6] += 2.0 * np.eye(3)[category].repeat(2, axis=1)
    return features, category


def test_classifier_names_what_can_be_named_and_nothing_else() -> None:
    good, category = blobs(90, informative=True)
    bad, _ = blobs(90, informative=False, seed=1)
    named = classify(good, category, n_repeats=2, n_null=2, seed=0)
    guessed = classify(bad, category, n_repeats=2, n_null=2, seed=0)
    assert named.estimate(seed=0).low > 0.6
    assert guessed.estimate(seed=0).low < 1 / 3 < guessed.estimate(seed=0).high
    assert named.null < 0.55
    gap = compare(guessed, named, seed=0)
    assert gap.test.p < 0.01
    assert gap.mcnemar < 0.01
    assert gap.low > 0.2
    constant = classify(np.ones((90, 3)), category, n_repeats=1, n_null=1, seed=0)
    assert constant.estimate(seed=0).value <= 1 / 3
    none = compare(guessed, guessed, seed=0)
    assert (none.test.value, none.mcnemar, none.only_first) == (0.0, 1.0, 0)


def cosines(values: npt.NDArray[Any], category: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean cosines of incoming vectors over pairs within and between categories, by loops."""
    within, between = [], []
    for i in range(len(values)):
        for j in range(i):
            x, y = values[i], values[j]
            reading = (x != 0).any(0)
            pair = [
                x[:, b] @ y[:, b] / np.linalg.norm(x[:, b]) / np.linalg.norm(y[:, b]) for b in np.flatnonzero(reading)
            ]
            (within if category[i] == category[j] else between).append(np.mean(pair))
    return float(np.mean(within)), float(np.mean(between))


def random_interactions(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    values = np.random.default_rng(seed).uniform(0.1, 1, (n, 6, 6)).astype(np.float32)
    layer = np.repeat(np.arange(3), 2)
    return np.where(layer[:, None] < layer, values, np.float32(0))


def blocks_of(values: npt.NDArray[Any], size: int = 4) -> Callable[[], Any]:
    return lambda: (
        (np.arange(i, min(i + size, len(values))), values[i : i + size]) for i in range(0, len(values), size)
    )


def test_pair_means_equal_the_loops_over_pairs() -> None:
    values, category = random_interactions(13), np.arange(13) % 3
    prompts = np.arange(13)
    weights = np.ones((2, 13), np.float32)
    weights[1] = [2, 0, 1, 1, 3, 1, 1, 0, 1, 1, 1, 0, 1]
    groups = np.stack([category, category])
    within, between = pair_means(blocks_of(values), prompts, groups, weights, 3)
    assert (within[0], between[0]) == pytest.approx(cosines(values, category), rel=1e-5)
    drawn = np.repeat(prompts, weights[1].astype(int))
    pairs: dict[bool, list[float]] = {True: [], False: []}
    unit = incoming(values).astype(np.float64)
    for i in drawn:
        for j in drawn:
            if i != j:
                pairs[bool(category[i] == category[j])].append(unit[i] @ unit[j] / 4)
    assert (within[1], between[1]) == pytest.approx((np.mean(pairs[True]), np.mean(pairs[False])), rel=1e-5)
    some = np.array([11, 3, 5, 7])
    chosen = pair_means(blocks_of(values, 5), some, category[some][None], np.ones((1, 4), np.float32), 3)
    assert tuple(v[0] for v in chosen) == pytest.approx(cosines(values[some], category[some]), rel=1e-5)
    np.testing.assert_allclose(mean_interaction(blocks_of(values), some), values[some].mean(0), rtol=1e-6)


@pytest.mark.parametrize("rewires", [True, False])
def test_rewiring_is_found_where_it_was_built_and_not_elsewhere(tmp_path: Path, rewires: bool) -> None:
    prompts = planted.reader_prompts(n=60)
    made = planted.harvest(planted.build_reader(rewires=rewires), prompts, tmp_path / "x.actdb", run="reader")
    with actdb.open(tmp_path / "x.actdb", mode="a") as db:
        run = db.run("reader")
        store_interactions(run)
        category = np.arange(60) % 2
        found = measure_rewiring(
            lambda: read_interactions(run), np.arange(60), category, n_resamples=200, n_permutations=100, seed=0
        )
        mean = mean_interaction(lambda: read_interactions(run), np.arange(60)[category == 0])
    assert found.low < found.ratio < found.high
    if rewires:
        assert found.low > 1.2
        assert found.p < 0.02 > found.centred_p
        assert mean[0, 2] > 10 * mean[1, 2]  # in this category head 1.0 reads head 0.0 alone
    else:
        assert found.low < 1 < found.high
        assert found.p > 0.02
    assert made.run.sites == ("resid_post", "z", "pattern")


def test_own_prompts_do_not_give_themselves_away(tmp_path: Path) -> None:
    import json

    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    texts = [row["text"] for row in rows]
    names = sorted({row["category"] for row in rows})
    assert len(names) == 6
    assert {sum(row["category"] == name for row in rows) for name in names} == {20}
    assert {len(text.split()) for text in texts} == {12}
    assert not set("".join(texts)) - set("abcdefghijklmnopqrstuvwxyz ")
    assert len(set(texts)) == 120
    category = np.array([names.index(row["category"]) for row in rows])
    length = np.array([[len(text)] for text in texts], np.float64)
    named = classify(length, category, n_repeats=3, n_null=0, seed=0)
    assert named.estimate(seed=0).value < 0.3  # chance is 0.17


def test_subject_reads_labels_and_refuses_what_does_not_serve(tmp_path: Path) -> None:
    path = tmp_path / "x.actdb"
    prompts = labelled_prompts(36)
    for i in (0, 1):
        prompts[i]["category"] = "rare"
    del prompts[2]["category"]
    actdb.harvest(TinyModel(), prompts, path, run="tiny", stats=(), **PLAN)
    actdb.harvest(TinyModel(), prompts, path, run="bare", sites=["z"], stats=(), **PLAN)
    actdb.harvest(TinyModel(), prompts, path, run="last", positions="last", stats=(), **PLAN)
    with actdb.open(path) as db:
        subject = make_subject(db, db.run("tiny"), label="category")
        assert subject.names == ("a", "b", "c")
        assert subject.prompts.tolist() == list(range(3, 36))
        assert [subject.names[i] for i in subject.category] == ["abc"[i % 3] for i in range(3, 36)]
        assert subject.shape == (2, 2)
        assert surface(db, subject)[:, 0].tolist() == [len(prompts[i]["tokens"]) for i in range(3, 36)]
        with pytest.raises(actdb.SettingError, match="have no label 'kind'; their labels: category"):
            make_subject(db, db.run("tiny"), label="kind")
        with pytest.raises(actdb.SettingError, match="lacks resid_post, pattern: harvest with --sites resid_post,z,"):
            make_subject(db, db.run("bare"), label="category")
        with pytest.raises(actdb.SettingError, match="lacks all positions but the last"):
            make_subject(db, db.run("last"), label="category")
    few = [{**prompt, "category": "only"} for prompt in prompts]
    actdb.harvest(TinyModel(), few, tmp_path / "few.actdb", run="few", stats=(), **PLAN)
    with actdb.open(tmp_path / "few.actdb") as db, pytest.raises(actdb.SettingError, match="has 1 categories"):
        make_subject(db, db.run(), label="category")
