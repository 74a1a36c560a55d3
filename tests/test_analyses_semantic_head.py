"""The known answer: one head of a model built by hand is semantic; the same shape with random weights has none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import actdb
from analyses.common.intervention import stored_mean
from analyses.semantic_head import planted
from analyses.semantic_head.attention import (
    SelfAttention,
    attention_by_cosine,
    measure_self,
    scale_first,
    scale_negative,
    self_suppression,
)
from analyses.semantic_head.behaviour import read_behaviour
from analyses.semantic_head.circuit import Circuit, random_circuit, read_circuit, token_scores
from analyses.semantic_head.claims import is_suppressed, score_claims
from analyses.semantic_head.community import agreement, find_communities, strongest_edges
from analyses.semantic_head.intervention import component_means, steer
from analyses.semantic_head.prompt import succession_prompts, word_prompts
from analyses.semantic_head.score import (
    permute_categories,
    rank_heads,
    score_in_sql,
    semantic_score,
    store_scores,
    targets,
)
from analyses.semantic_head.subject import SMALL, Head, Subject, choose_vocabulary

LAYER, HEAD = 1, planted.SEMANTIC_HEAD
EXTENT = replace(SMALL, n_prompts=4, n_words=63, n_parts=6, n_corpus=8, n_texts=8, n_permutations=19, n_controls=4)
CATEGORIES = planted.planted_categories()


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The hand-built model with its words harvested and scored."""
    db = tmp_path_factory.mktemp("semantic") / "x.actdb"
    found = Subject("hand-built", planted.build_model(), CATEGORIES, db, EXTENT, seed=0)
    store_scores(db, found.harvest_words(), CATEGORIES, found.labels, seed=0)
    return found


@pytest.fixture(scope="module")
def control(subject: Subject) -> Subject:
    """The same shape with random weights, in the same database."""
    found = replace(subject, name="control", model=planted.build_control())
    store_scores(found.db, found.harvest_words(), CATEGORIES, found.labels, seed=0)
    return found


@pytest.fixture(scope="module")
def head(subject: Subject) -> Head:
    """The semantic head of the hand-built model."""
    return Head(subject, LAYER, HEAD)


@pytest.fixture(scope="module")
def alone(head: Head) -> tuple[actdb.Run, np.ndarray]:
    """The head's input for each token of the vocabulary on its own, and the tokens."""
    with actdb.open(head.subject.db) as db:
        tokens = choose_vocabulary(db, head.subject.harvest_corpus(LAYER), head.subject)
    return head.harvest_vocabulary(head.harvest_parts(), tokens), tokens


def inputs_of(run: actdb.Run, head: Head) -> np.ndarray:
    return np.asarray(run[head.input_site].sel(layer=head.layer).numpy())


# the score


def test_the_score_is_that_of_its_definition() -> None:
    tokens = np.array([0, 1, 2, 3, 1, 9])  # BOS, two words of one category, one of another, the first again, no word
    labels = np.array([-1, 0, 0, 1, -1, -1, -1, -1, -1, -1])
    target = targets(tokens, labels)
    expected = {1: [0], 2: [1], 3: [0], 4: [2], 5: [0]}  # its own copy is none of a token's targets
    assert {query: np.flatnonzero(target[query]).tolist() for query in expected} == expected
    pattern = np.tril(np.random.default_rng(0).random((6, 6)))
    pattern[5, 0] = 0.0  # nothing on the target: held at 1e-12
    mass = [pattern[query, keys].sum() for query, keys in {0: [0], **expected}.items()]
    assert semantic_score(pattern, target) == pytest.approx(np.mean([-np.log(max(m, 1e-12)) for m in mass]))


def test_the_hand_built_head_is_singled_out(subject: Subject) -> None:
    with actdb.open(subject.db) as db:
        ranked = rank_heads(db, "hand-built-words")
    assert (ranked[0].layer, ranked[0].head) == (LAYER, HEAD)
    assert ranked[0].score < 0.1
    assert ranked[1].score > 1.5
    assert ranked[0].shuffled > 3
    run = actdb.open(subject.db).run("hand-built-words")
    null = permute_categories(run, subject.labels, layer=LAYER, head=HEAD, n=19, seed=0)
    verdicts = {entry.key: entry.verdict for entry in score_claims(ranked[0], null, n_heads=8, seed=0)}
    assert verdicts["score.advantage"] == "semantic"


def test_one_layer_is_enough(tmp_path: Path) -> None:
    found = Subject("one", planted.build_model(n_layers=1), CATEGORIES, tmp_path / "x.actdb", EXTENT, seed=0)
    store_scores(found.db, found.harvest_words(), CATEGORIES, found.labels, seed=0)
    with actdb.open(found.db) as db:
        ranked = rank_heads(db, "one-words")
    assert [ranked[0].layer, ranked[0].head] == [0, HEAD]
    assert ranked[0].score < 0.1 < 1.5 < ranked[1].score
    head = Head(found, 0, HEAD)
    assert set(head.components) == {"embed", "pos"}
    run = head.harvest_vocabulary(head.harvest_parts(), np.arange(found.d_vocab))
    check_spectrum(read_circuit(run, layer=0, head=HEAD))


def test_random_weights_hold_no_semantic_head(control: Subject) -> None:
    with actdb.open(control.db) as db:
        ranked = rank_heads(db, "control-words")
        run = db.run("control-words")
        for found in ranked:
            assert abs(found.score - found.shuffled) < 0.3  # by chance, over four prompts; the planted head has 4.9
        null = permute_categories(run, control.labels, layer=ranked[0].layer, head=ranked[0].head, n=19, seed=0)
    verdicts = {entry.key: entry.verdict for entry in score_claims(ranked[0], null, n_heads=8, seed=0)}
    assert verdicts["score.advantage"] == "no effect"


def test_ranking_and_the_score_straight_from_patterns_agree_in_sql(subject: Subject, control: Subject) -> None:
    with actdb.open(subject.db) as db:
        for name in ("hand-built-words", "control-words"):
            for found in rank_heads(db, name):
                direct = score_in_sql(db, name, layer=found.layer, head=found.head)
                assert direct == pytest.approx(found.score, rel=1e-4, abs=1e-5)


# the parts of the head's input


def test_ablating_a_component_tells_what_the_score_rests_on(head: Head) -> None:
    parts = head.harvest_parts()
    scores = {"none": mean_score(head, parts)}
    scores |= {name: mean_score(head, run) for name, run in head.harvest_ablations(parts)}
    assert set(scores) == {"none", "embed", "pos", "attn 0", "mlp 0"}
    assert scores["embed"] > 1
    assert scores["mlp 0"] > 1
    assert abs(scores["pos"] - scores["none"]) < 0.05
    assert abs(scores["attn 0"] - scores["none"]) < 0.05


def test_components_add_up_to_the_input_of_the_layer(head: Head) -> None:
    model = head.subject.model
    kept: dict[str, torch.Tensor] = {}
    ids = torch.tensor([prompt["tokens"] for prompt in word_prompts(CATEGORIES, 2, n_words=9, seed=5)])
    names = [*head.components.values(), f"blocks.{LAYER}.hook_resid_pre"]
    with torch.no_grad(), actdb.hooked(model, [(n, lambda a, hook, n=n: kept.update({n: a.clone()})) for n in names]):
        model(ids)
    total: Any = sum(kept[name] for name in names[:-1])
    torch.testing.assert_close(total, kept[names[-1]])
    means = component_means(head.harvest_parts(), list(head.components))
    parts = head.harvest_parts()
    torch.testing.assert_close(means["embed"], stored_mean(parts, "embed"))
    n = len(parts.tokens(0))  # all prompts are equally long
    torch.testing.assert_close(means["pos"], torch.from_numpy(parts.weight("W_pos")[:n]).mean(0))


def test_a_token_alone_has_the_same_input_wherever_it_stands(head: Head, alone: tuple[actdb.Run, np.ndarray]) -> None:
    run, tokens = alone
    assert sorted(tokens.tolist()) == list(range(planted.D_VOCAB))  # the whole vocabulary, one row a token
    assert [run.tokens(prompt).tolist() for prompt in (0, 7)] == [[tokens[0]], [tokens[7]]]
    means = component_means(head.harvest_parts(), list(head.components))
    word = CATEGORIES.words[30]
    embedded = torch.from_numpy(run.weight("W_E"))[word]
    held = embedded + means["pos"] + means["attn 0"]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    weights = {name: torch.from_numpy(run.weight(name, layer=LAYER)) for name in ("W_Q",)}
    assert weights["W_Q"].shape == (4, planted.D_MODEL, planted.D_HEAD)
    parts = head.harvest_parts()
    w_in, b_in, w_out, b_out = (parts.torch_weight(f"mlp.{n}", layer=0) for n in ("W_in", "b_in", "W_out", "b_out"))
    held = held + (norm(held) @ w_in + b_in).relu() @ w_out + b_out
    row = int(np.flatnonzero(tokens == word)[0])
    stored = torch.from_numpy(run[head.input_site].sel(layer=LAYER, prompt=row, pos=0).numpy())
    torch.testing.assert_close(stored, norm(held), rtol=1e-4, atol=1e-5)


# the bilinear form


def check_closed_forms(circuit: Circuit) -> None:
    """What holds of every head: W = S + A, real and imaginary eigenvalues, rank ≤ 2·d_head, Frobenius' identity."""
    form, symmetric, skew = circuit.form, circuit.symmetric, circuit.skew
    assert np.array_equal(symmetric + skew, form) or np.abs(symmetric + skew - form).max() <= 1e-15 * np.abs(form).max()
    assert np.array_equal(symmetric, symmetric.T)
    assert np.array_equal(skew, -skew.T)
    values = np.linalg.eigvals(symmetric)
    scale = max(np.abs(form).max(), 1e-300) * len(form)
    assert np.abs(values.imag).max() < 1e-9 * scale
    assert np.abs(np.linalg.eigvals(skew).real).max() < 1e-9 * scale
    norms = [np.linalg.norm(part) ** 2 for part in (symmetric, skew, form)]
    assert norms[0] + norms[1] == pytest.approx(norms[2])
    spectrum = circuit.spectrum
    assert spectrum.rank <= circuit.bound == min(2 * circuit.query.shape[1], len(form))
    assert (np.abs(np.linalg.eigvalsh(symmetric)) > 1e-9 * scale).sum() <= circuit.bound
    full = np.linalg.eigvalsh(symmetric)
    kept = np.sort(full[np.argsort(-np.abs(full), kind="stable")][: len(spectrum.values)])
    assert np.allclose(kept, spectrum.values, atol=1e-10 * scale)
    rebuilt = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    assert np.allclose(rebuilt, symmetric, atol=1e-10 * scale)
    assert np.abs(circuit.skew_values.real).max() == 0
    assert (np.abs(circuit.skew_values.imag) ** 2).sum() == pytest.approx(norms[1])
    assert spectrum.values.sum() == pytest.approx(np.trace(form), abs=1e-9 * scale)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 1000))
def test_the_closed_forms_hold_for_any_head(d_model: int, d_head: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = (generator.standard_normal((d_model, d_head)) for _ in range(2))
    check_closed_forms(Circuit(*parts, float(d_head) ** 0.5))


def check_spectrum(circuit: Circuit) -> None:
    check_closed_forms(circuit)
    layer = planted.planted_place()
    assert circuit.spectrum.rank - circuit.spectrum.n_negative == layer.n_positive
    assert circuit.spectrum.n_negative == layer.n_negative


def test_eigenvalues_have_the_planted_signs(alone: tuple[actdb.Run, np.ndarray]) -> None:
    run, _ = alone
    circuit = read_circuit(run, layer=LAYER, head=HEAD)
    check_spectrum(circuit)
    # the skew part is γ (o bᵀ − b oᵀ)/2 alone: one pair of imaginary eigenvalues
    assert (np.abs(circuit.skew_values) > 1e-6).sum() == 2
    control = random_circuit(circuit, seed=0)
    check_closed_forms(control)
    assert np.linalg.norm(control.form) == pytest.approx(np.linalg.norm(circuit.form))
    share = np.linalg.norm(control.symmetric) ** 2 / np.linalg.norm(control.form) ** 2
    assert share == pytest.approx(0.5, abs=0.05)  # of a random form
    with pytest.raises(actdb.SelectionError, match="--head 4: layer 1 has heads 0 to 3"):
        read_circuit(run, layer=LAYER, head=4)


def test_scaling_the_negative_eigenvalues_to_0_restores_self_attention(
    head: Head, alone: tuple[actdb.Run, np.ndarray]
) -> None:
    run, tokens = alone
    rows = np.flatnonzero(head.subject.labels[tokens] >= 0)
    words = inputs_of(run, head)[rows]
    labels = head.subject.labels[tokens[rows]]
    circuit = read_circuit(run, layer=LAYER, head=HEAD)
    scores = token_scores(words, circuit)
    np.testing.assert_allclose(scores.base, words @ circuit.form @ words.T / circuit.scale, atol=1e-4)
    without = np.where(circuit.spectrum.values < 0, 0.0, 1.0)
    changed = (circuit.spectrum.vectors * (circuit.spectrum.values * without)) @ circuit.spectrum.vectors.T
    expected = words @ (changed + circuit.skew) @ words.T / circuit.scale
    np.testing.assert_allclose(scores.scaled(without), expected, atol=1e-4)
    found = scale_negative(scores)
    same = planted.N_WORDS - 1
    assert found[1.0].mean_rank > same  # all of its category come before the token itself
    assert found[1.1].mean_rank >= found[1.0].mean_rank
    assert found[0.0].mean_rank == found[-1.0].mean_rank == 1  # dominant
    assert found[0.0].reciprocal_rank == 1
    assert found[1.0].spearman == pytest.approx(1)
    by_rank = scale_first(scores, numbers=(1, 48), factors=(0.0, 1.0))
    assert by_rank[1][0.0].mean_rank > same
    assert by_rank[48][0.0].mean_rank < 2
    assert by_rank[48][1.0] == found[1.0]
    suppression = self_suppression(words @ circuit.symmetric @ words.T, labels)
    controls = [self_suppression(words @ random_circuit(circuit, seed=i).symmetric @ words.T, labels) for i in range(4)]
    assert is_suppressed(suppression, controls)
    assert not is_suppressed(controls[0], controls[1:]) or not is_suppressed(controls[1], controls[2:])


def test_ranks_are_those_of_a_sort() -> None:
    scores = np.random.default_rng(0).standard_normal((9, 9)).astype(np.float32)
    ranks = [1 + sorted(row.tolist(), reverse=True).index(row[i]) for i, row in enumerate(scores)]
    found = measure_self(scores)
    assert found.mean_rank == pytest.approx(np.mean(ranks))
    assert found.reciprocal_rank == pytest.approx(np.mean([1 / rank for rank in ranks]))
    other = np.random.default_rng(1).standard_normal((9, 9)).astype(np.float32)
    expected = np.mean([stats.spearmanr(a, b).statistic for a, b in zip(scores, other, strict=True)])
    assert measure_self(scores, other).spearman == pytest.approx(expected)
    assert measure_self(np.ones((5, 5), np.float32)).mean_rank == 3 == SelfAttention.chance(5).mean_rank


# attention between tokens


def test_attention_goes_to_the_near_and_not_to_the_same(head: Head, alone: tuple[actdb.Run, np.ndarray]) -> None:
    run, tokens = alone
    words = inputs_of(run, head)[tokens > 0]
    circuit = read_circuit(run, layer=LAYER, head=HEAD)
    curve, control = attention_by_cosine(words, [circuit, random_circuit(circuit, seed=1)])
    assert 0.1 < curve.crossing < curve.peak[0] < 1
    assert curve.peak[1] > 5
    assert abs(control.peak[1]) < 2
    below = curve.filled & (curve.centres < curve.crossing - 0.02)
    assert (curve.means[below] < 0).all()
    # the same by hand, in one bin
    units = words / np.linalg.norm(words, axis=1, keepdims=True)
    cosines, logits = units @ units.T, words @ circuit.form @ words.T / circuit.scale
    shifted = torch.from_numpy(logits).log_softmax(-1).numpy()
    shifted -= shifted.diagonal()[:, None]
    place = int(np.nanargmax(curve.counts))
    edge = np.linspace(-1, 1, len(curve.counts) + 1)[[place, place + 1]]
    chosen = (cosines >= edge[0]) & (cosines < edge[1]) & ~np.eye(len(words), dtype=bool)
    assert abs(int(curve.counts[place]) - int(chosen.sum())) <= 2  # a cosine on the edge rounds either way
    assert curve.means[place] == pytest.approx(shifted[chosen].mean(), abs=1e-3)


def test_communities_are_the_planted_categories(head: Head, alone: tuple[actdb.Run, np.ndarray]) -> None:
    run, tokens = alone
    circuit = read_circuit(run, layer=LAYER, head=HEAD)
    scores = token_scores(inputs_of(run, head), circuit)
    labels = head.subject.labels[tokens]
    found = find_communities(scores.base, seed=0)
    assert agreement(found.member, labels) == 1.0
    assert find_communities(scores.base, seed=0).member.tolist() == found.member.tolist()
    assert found.modularity > 2 * find_communities(scores.base, seed=0, rewired=True).modularity
    random = token_scores(inputs_of(run, head), random_circuit(circuit, seed=3)).base
    assert abs(agreement(find_communities(random, seed=0).member, labels)) < 0.1
    central = found.central(int(found.member[np.flatnonzero(labels == 0)[0]]))
    assert {int(labels[token]) for token in central} == {0}
    edges, weights = strongest_edges(scores.base)
    assert not (edges[:, 0] == edges[:, 1]).any()
    first = edges[edges[:, 0] == 3][:, 1]
    order = np.argsort(-np.where(np.arange(len(labels)) == 3, -np.inf, scores.base[3]))
    assert set(first.tolist()) == set(order[:4].tolist())
    assert (weights <= 1).all()


# interventions on the live model


def test_steering_by_hooks_is_a_step_on_the_weights(head: Head) -> None:
    """Editing W_Q and W_K of the raw model gives the pattern that the hooks give the folded one."""
    plain = head.harvest_behaviour()
    rate = 0.2
    steered = head.harvest_behaviour("test", steer(plain, layer=LAYER, head=HEAD, rate=rate, site=head.input_site))
    pattern = steered["pattern"].sel(layer=LAYER, head=HEAD, prompt=0).numpy()
    run = plain
    query, key = (run.torch_weight(name, layer=LAYER, head=HEAD).double() for name in ("W_Q", "W_K"))
    new_query, new_key = query + rate * key, key + rate * query
    kept: dict[str, torch.Tensor] = {}
    name = f"blocks.{LAYER}.{head.input_site}"
    ids = torch.from_numpy(run.tokens(0).astype(np.int64))[None]
    with torch.no_grad(), actdb.hooked(head.subject.model, [(name, lambda a, hook: kept.update(x=a[0].double()))]):
        head.subject.model(ids)
    bias = [run.torch_weight(b, layer=LAYER, head=HEAD).double() for b in ("b_Q", "b_K")]
    logits = (kept["x"] @ new_query + bias[0]) @ (kept["x"] @ new_key + bias[1]).T / planted.D_HEAD**0.5
    expected = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)
    np.testing.assert_allclose(pattern, expected.numpy(), atol=1e-5)
    others = [other for other in range(4) if other != HEAD]
    np.testing.assert_allclose(
        steered["pattern"].sel(layer=LAYER, head=others, prompt=0).numpy(),
        plain["pattern"].sel(layer=LAYER, head=others, prompt=0).numpy(),
        atol=1e-6,
    )


def test_boosting_restores_self_attention_and_removing_the_head_costs_loss(head: Head) -> None:
    plain = head.harvest_behaviour()
    boosted = head.harvest_behaviour("boost", steer(plain, layer=LAYER, head=HEAD, rate=1.0, site=head.input_site))
    removed = dict(head.harvest_without_head(plain))
    with actdb.open(head.subject.db) as db:
        read = {run.name: read_behaviour(db, run.name, layer=LAYER, head=HEAD) for run in (plain, boosted)}
        changes = {
            other: read_behaviour(db, run.name, layer=LAYER, head=HEAD).change(read[plain.name])
            for other, run in removed.items()
        }
    before, after = read[plain.name], read[boosted.name]
    assert len(before.text) == EXTENT.n_texts
    assert len(before.succession) == len(succession_prompts(CATEGORIES))
    assert after.self_mass.mean() > before.self_mass.mean() + 0.5
    assert next(iter(changes)) == HEAD
    assert changes[HEAD].text.value > 0.2  # the planted text is easier with the head
    for other in set(changes) - {HEAD}:
        assert abs(changes[other].text.value) < 1e-4  # the other heads write nothing


def mean_score(head: Head, run: actdb.Run) -> float:
    """Mean score of the head over the prompts of a run, from the stored patterns."""
    held = [run["pattern"].sel(layer=head.layer, head=head.head, prompt=p).numpy() for p in run.prompt_ids()]
    found = [
        semantic_score(pattern, targets(run.tokens(p).astype(np.int64), head.subject.labels))
        for p, pattern in enumerate(held)
    ]
    return float(np.mean(found))
