"""The figures of the study as claims, each with its null."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import mean_interval, proportion_interval
from analyses.subspace_partition.baseline import RANDOM, TRAINED
from analyses.subspace_partition.evaluation import Effects, Geometry, gini_measures
from analyses.subspace_partition.merging import Event
from analyses.subspace_partition.planted import N_GROUPS, WIDTH
from analyses.subspace_partition.toy import Null, Toy
from analyses.subspace_partition.training import MERGE, Recipe, Trained, sizes_text

HOLDS, FAILS = "holds", "does not hold"
LEAST_OVERLAP, LEAST_SHARE = 0.95, 0.9
GINI_CLAIMED = {TRAINED: 0.71, "PCA": 0.375, "identity": 0.210, RANDOM: 0.205}
"""What is claimed of gpt2-small: the mean Gini coefficient of |effect| by partition."""


def toy_claims(toys: Sequence[Toy], *, seed: int) -> Iterator[Claim]:
    """Toy (a): whether both groups' subspaces are recovered, seed by seed, and how well."""
    recovered = [toy.recovery.holds(LEAST_OVERLAP) for toy in toys]
    share = proportion_interval(sum(recovered), len(recovered))
    about = f"share of {len(toys)} seeds in which both groups' spans are recovered, overlap ≥ {LEAST_OVERLAP}"
    verdict = HOLDS if share.value >= LEAST_SHARE else FAILS
    yield claim("toy_a.recovered", share, seed=seed, gold=LEAST_SHARE, verdict=verdict, about=about)
    chance = float(np.mean([toy.chance for toy in toys]))
    overlaps = [value for toy in toys for value in toy.recovery.overlap]
    about = "mean squared cosine of principal angles, both groups; null: random spans of the same dimensions"
    yield claim("toy_a.overlap", mean_interval(overlaps, within=(0, 1)), seed=seed, null=chance, about=about)
    about = "the least overlap of a group over all seeds"
    yield Claim("toy_a.overlap_least", float(np.nanmin(overlaps)), n=len(overlaps), seed=seed, null=chance, about=about)
    shares = [value for toy in toys for value in toy.recovery.variance]
    about = "share of a group's variance that lies in its subspace; null: a random subspace of those dimensions"
    yield claim("toy_a.variance", mean_interval(shares, within=(0, 1)), seed=seed, null=chance, about=about)
    counts = [toy.trained.partition.n_subspaces for toy in toys]
    yield claim(
        "toy_a.n_subspaces", mean_interval(counts), seed=seed, gold=N_GROUPS, about="subspaces found, of two groups",
        verdict=HOLDS if set(counts) == {N_GROUPS} else f"{min(counts)} to {max(counts)}",
    )  # fmt: skip
    errors = [toy.error for toy in toys]
    about = f"the model's squared error as a share of its inputs' squares: {2 * 20} features in {WIDTH} dimensions"
    yield claim("toy_a.model_error", mean_interval(errors), seed=seed, about=about)
    yield from _merge_claims(toys, seed=seed)


def _merge_claims(toys: Sequence[Toy], *, seed: int) -> Iterator[Claim]:
    """Toy (a): what decided the merges, and what the threshold alone would do with the two groups."""
    threshold = Recipe().threshold
    for when, kind in (("first_merge", MERGE), ("at_the_end", None)):
        events = [pick_event(toy.trained, kind) for toy in toys]
        values = [event.highest for event in events if event is not None]
        about = f"highest normalised information of a pair, {when.replace('_', ' ')}; null: the threshold"
        verdict = f"{sum(value > threshold for value in values)} of {len(values)} above the threshold"
        yield claim(
            f"toy_a.information.{when}", mean_interval(values), seed=seed, null=threshold, verdict=verdict, about=about
        )


def orthogonal_claims(toy: Toy, *, seed: int) -> Iterator[Claim]:
    """The model built by hand, whose groups are orthogonal: the threshold alone stops at them."""
    verdict = HOLDS if toy.recovery.holds(LEAST_OVERLAP) else FAILS
    about = "overlap of the groups' spans, built orthogonal, no number of subspaces given; null: random spans"
    overlap = float(np.min(toy.recovery.overlap))
    yield Claim(
        "orthogonal.overlap_least", overlap, n=N_GROUPS, seed=seed, null=toy.chance, verdict=verdict, about=about
    )
    highest = toy.trained.events[-1].highest
    about = "normalised information between the two groups when no pair qualified any more; null: the threshold"
    verdict = "below the threshold" if highest < Recipe().threshold else "above the threshold"
    yield Claim("orthogonal.information", highest, seed=seed, null=Recipe().threshold, verdict=verdict, about=about)


def toy_baseline_claims(toys: Sequence[Toy], *, seed: int) -> Iterator[Claim]:
    """Toy (a): distance, information and Gini of each partition, means over seeds; the null is the random one's."""
    measures: dict[str, tuple[str, Callable[[Toy, str], float]]] = {
        "distance": (
            "mean distance to the nearest key, of subspaces alike",
            lambda toy, name: toy.geometry[name].unweighted,
        ),
        "information": (
            "mean information of a pair of subspaces in nats",
            lambda toy, name: toy.geometry[name].mean_information,
        ),
        "gini": (
            "Gini of |effect| of patching over subspaces (two: at most 0.5)",
            lambda toy, name: float(toy.gini[name]["effect"].mean()),
        ),
    }
    for measure, (about, value) in measures.items():
        null = float(np.nanmean([value(toy, RANDOM) for toy in toys]))
        for name in toys[0].geometry:
            estimate = mean_interval([value(toy, name) for toy in toys])
            key, sizes = f"toy_a.{measure}.{slug(name)}", toys[0].geometry[name].sizes
            comparable = name != RANDOM and sizes == toys[0].geometry[RANDOM].sizes
            words = f"{about}: {name}, {sizes_text(sizes)}"
            yield claim(key, estimate, seed=seed, null=null if comparable else None, about=words)


def null_claims(nulls: Sequence[Null], *, seed: int) -> Iterator[Claim]:
    """The null: isotropic rows have no preferred partition, so no pair is merged and seeds agree by chance alone."""
    merged = sum(len(null.trained.merges) > 0 for null in nulls)
    about = "share of trainings on isotropic noise in which any pair was merged"
    verdict = HOLDS if merged == 0 else FAILS
    yield claim(
        "null.merged", proportion_interval(merged, len(nulls)), seed=seed, gold=0.0, verdict=verdict, about=about
    )
    values = [null.trained.events[0].highest for null in nulls]
    about = "highest normalised information of a pair of subspaces of noise; null: the merge threshold"
    verdict = HOLDS if max(values) < Recipe().threshold else FAILS
    yield claim(
        "null.information", mean_interval(values), seed=seed, null=Recipe().threshold, verdict=verdict, about=about
    )
    gains = [1 - null.trained_distance / null.random_distance for null in nulls]
    about = "share by which training on noise shortens the distances of rows held out; null: none"
    yield claim("null.gain", mean_interval(gains), seed=seed, null=0.0, verdict=_small(gains), about=about)
    overlaps, chance = [null.agreement for null in nulls], float(np.mean([null.chance for null in nulls]))
    about = "best overlap of a subspace with those of another seed's training; null: with those of a random rotation"
    yield claim("null.agreement", mean_interval(overlaps, within=(0, 1)), seed=seed, null=chance, about=about)


def geometry_claims(geometry: Mapping[str, Geometry], *, seed: int) -> Iterator[Claim]:
    """Step 4: distances and information of a partition beside the baselines; the null is the random rotation's."""
    null = geometry[RANDOM]
    for name, found in geometry.items():
        about = f"mean distance to the nearest key, {name}; null: random"
        key = slug(name)
        for measure in ("unweighted", "weighted", "relative"):
            about = f"mean distance to the nearest key over subspaces, {measure}: {name}; null: random"
            value, other = getattr(found, measure), getattr(null, measure)
            yield Claim(f"distance.{measure}.{key}", value, n=len(found.sizes), seed=seed, null=other, about=about)
        n_pairs = len(found.sizes) * (len(found.sizes) - 1) // 2
        about = f"mean information of a pair of subspaces in nats: {name}; null: random"
        value, other = found.mean_information, null.mean_information
        yield Claim(f"information.mean.{key}", value, n=n_pairs, seed=seed, null=other, about=about)
        about = f"highest information of a pair divided by its dimensions: {name}; null: random"
        value, other = found.highest_normalised, null.highest_normalised
        yield Claim(f"information.highest.{key}", value, n=n_pairs, seed=seed, null=other, about=about)


def event_claims(trained: Trained, *, seed: int) -> Iterator[Claim]:
    """Step 2: the highest normalised information at each event, beside the merge threshold."""
    for event in trained.events:
        done = f"{len(event.pairs)} pairs merged" if event.kind == MERGE else event.kind
        about = f"highest normalised information at step {event.step:,}, {len(event.sizes)} subspaces, {done}"
        yield Claim(
            f"merging.step_{event.step}", event.highest, n=len(event.sizes), seed=seed, null=Recipe().threshold,
            verdict=done, about=f"{about}; null: the threshold",
        )  # fmt: skip
    yield Claim("n_subspaces", float(trained.partition.n_subspaces), seed=seed, about="subspaces of the partition")


def patching_claims(
    effects: Mapping[str, Effects],
    geometry: Mapping[str, Geometry],
    *,
    seed: int,
    claimed: Mapping[str, float] | None = None,
) -> Iterator[Claim]:
    """Step 4: Gini coefficients of patching effects, and the best subspace beside patching all of the site.

    `claimed` are Gini coefficients of |effect| by partition, where the model is one of which any are.
    """
    ginis = {
        name: gini_measures(found.effect, geometry[name].sizes, geometry[name].variance)
        for name, found in effects.items()
    }
    for name, measures in ginis.items():
        for measure, values in measures.items():
            null = None if name == RANDOM else float(ginis[RANDOM][measure].mean())
            about = (
                f"Gini of |{measure.replace('_by_', '| / ').replace('dim', 'dimension')}{'' if '_' in measure else '|'}"
            )
            about += f" over subspaces, mean over pairs: {name}; null: random"
            stated = (claimed or {}).get(name) if measure == "effect" else None
            share, key = mean_interval(values, within=(0, 1)), f"gini.{measure}.{slug(name)}"
            yield claim(key, share, seed=seed, null=null, claimed=stated, about=about)
    for name, found in effects.items():
        best = int(np.argmax(found.effect.mean(0)))
        about = f"effect of patching the best subspace ({geometry[name].sizes[best]} dimensions), {name}; null: random"
        null = None if name == RANDOM else float(effects[RANDOM].effect.mean(0).max())
        yield claim(
            f"effect.best.{slug(name)}", mean_interval(found.effect[:, best]), seed=seed, null=null, about=about
        )
    whole = effects[TRAINED].whole
    yield claim("effect.whole", mean_interval(whole), seed=seed, null=0.0, about="effect of patching all of the site")


def pick_event(trained: Trained, kind: str | None) -> Event | None:
    """Return the first event of a kind, or the last of all."""
    if kind is None:
        return trained.events[-1]
    return next((event for event in trained.events if event.kind == kind), None)


def slug(name: str) -> str:
    """Return a partition's name as part of a key."""
    return name.lower().replace(" ", "_")


def _small(values: Sequence[Any], bound: float = 0.02) -> str:
    """Whether all values lie within a bound of 0."""
    return HOLDS if max(abs(float(value)) for value in values) < bound else FAILS
