"""Claims of path patching, circuits and faithfulness, each with its null."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import proportion_interval
from analyses.modular_arithmetic.component import OUTPUT
from analyses.modular_arithmetic.discovery import Circuit
from analyses.modular_arithmetic.faithfulness import ENOUGH, Substitution
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.neighbourhood import CLAIMED_LOST, Moved
from analyses.modular_arithmetic.path import Change, PathEffect

N_STATED = 8
"""Direct and total effects that are stated as claims, the largest; the JSON file has all."""
LEAST_LOST, MUCH_LOST = 0.05, 0.5
ALONE, FAITHFUL = "carries the answer alone", "faithful"


def path_claims(effects: Sequence[PathEffect], *, seed: int) -> Iterator[Claim]:
    """Step 4: the edges whose patching costs most, and the components whose change costs most along all paths."""
    for effect in _strongest(effects, "direct"):
        about = (
            f"accuracy lost when another pair's {effect.sender} reaches {effect.receiver} through the residual stream "
        )
        about += f"alone; the loss rises by {effect.direct.loss_rise.value:.3g} nats; null: the pair's own"
        key = f"path.{effect.sender}>{effect.receiver}.direct"
        yield claim(key, effect.direct.accuracy_lost, seed=seed, null=0.0, about=about).judged()
    for effect in _strongest([effect for effect in effects if effect.receiver == OUTPUT], "total"):
        about = f"accuracy lost when another pair's {effect.sender} reaches the output along all paths; directly "
        about += f"{effect.direct.accuracy_lost.value:.3g}; null: the pair's own"
        key = f"path.{effect.sender}>output.total"
        yield claim(key, effect.total.accuracy_lost, seed=seed, null=0.0, about=about).judged()


def answer_claims(
    same: Mapping[str, Change], other: Mapping[str, Change], *, names: Sequence[str], seed: int
) -> Iterator[Claim]:
    """Step 4: whether a component carries the answer alone: patched from another pair with the same answer."""
    for name in names:
        lost, against = same[name].accuracy_lost, other[name].accuracy_lost.value
        alone = lost.value < LEAST_LOST and against > MUCH_LOST
        verdict = ALONE if alone else "carries more" if lost.value > LEAST_LOST else "matters little"
        about = f"accuracy lost with {name} patched from another pair with the same answer; null: with another answer"
        yield claim(f"same_answer.{name}", lost, seed=seed, null=against, verdict=verdict, about=about)


def circuit_claims(circuit: Circuit, grid: Grid, *, seed: int) -> Iterator[Claim]:
    """Step 6: the minimal circuit against random ones of its size, and the model without it."""
    about = f"edges of the minimal circuit, of {circuit.n_edges}, that keeps {circuit.threshold:.0%} of the accuracy"
    yield Claim("circuit.edges", len(circuit.edges), n=circuit.n_edges, seed=seed, verdict="measured", about=about)
    random = float(np.mean(circuit.random))
    learnt = proportion_interval(round(circuit.whole * grid.n_pairs), grid.n_pairs).low > 1 / grid.modulus
    above = learnt and float(np.max(circuit.random)) < circuit.accuracy
    about = f"accuracy of the circuit, all else at its mean; the model has {circuit.whole:.4g}; null: mean of "
    about += f"{len(circuit.random)} circuits of as many edges, left by cutting at random"
    yield Claim(
        "circuit.accuracy", circuit.accuracy, n=grid.n_pairs, seed=seed, null=random,
        verdict="sufficient" if circuit.accuracy >= circuit.threshold * circuit.whole and above else "no effect",
        about=about,
    )  # fmt: skip
    about = "accuracy of all other edges with those of the circuit cut; null: chance"
    verdict = "necessary" if circuit.rest < MUCH_LOST * circuit.whole else "the rest does without it"
    yield Claim(
        "circuit.rest", circuit.rest, n=grid.n_pairs, seed=seed, null=1 / grid.modulus, verdict=verdict, about=about
    )


def faithfulness_claims(substitution: Substitution) -> Iterator[Claim]:
    """Step 5: accuracy kept with concepts in the place of a state, and how the state tells answers apart."""
    state, seed, chance = substitution.state.name, substitution.seed, 1 / substitution.grid.modulus
    n_dimensions, separation = substitution.curve.least(ENOUGH), substitution.separation()
    for found in substitution.kept():
        above = found.accuracy.low > max(found.null, chance)
        faithful = above and found.accuracy.value >= ENOUGH * substitution.whole
        about = f"held-out accuracy with {state} replaced by its concepts ({_concepts(found.name, n_dimensions)}); "
        about += f"completeness {found.completeness:.3g}; with the concepts taken out {found.without:.3g}; "
        about += "null: concepts drawn at random"
        verdict = FAITHFUL if faithful else "partly" if above else "no effect"
        key = f"faithfulness.{state}.{found.name}"
        yield claim(key, found.accuracy, seed=seed, null=found.null, verdict=verdict, about=about)
    about = f"held-out accuracy of a linear probe of the answer in {state}; null: answers permuted"
    yield claim(
        f"separability.{state}", separation.separability, seed=seed, null=separation.null_separability, about=about
    ).judged()
    about = f"share of held-out pairs with the commonest answer of their cluster of {state}; null: answers permuted"
    yield Claim(
        f"purity.{state}", separation.purity, n=separation.separability.n, seed=seed, null=separation.null_purity,
        about=about,
    ).judged()  # fmt: skip


def neighbour_claims(state: str, moved: Sequence[Moved], *, seed: int) -> Iterator[Claim]:
    """Step 5: patches from close and distant numbers; null: from pairs with the same answer."""
    same = moved[0]
    for found in moved:
        about = f"accuracy lost when {state} is patched from a pair with the {found.source}; the logits move by "
        about += f"{found.distance.value:.3g} of the distance between any two pairs; null: the same answer"
        claimed = CLAIMED_LOST.get(found.source)
        null = None if found is same else same.lost.value
        key = f"neighbour.{state}.{found.source}"
        yield claim(key, found.lost, seed=seed, null=null, claimed=claimed, about=about).judged()


def _strongest(effects: Sequence[PathEffect], kind: str) -> list[PathEffect]:
    ranked = sorted(effects, key=lambda effect: -float(getattr(effect, kind).loss_rise.value))
    return ranked[:N_STATED]


def _concepts(name: str, n_dimensions: int) -> str:
    return {
        "k-means": "the nearest of as many centroids as numbers",
        "PCA": f"{n_dimensions} principal components",
        "probe": "the mean state of the answer that a linear probe reads",
    }[name]
