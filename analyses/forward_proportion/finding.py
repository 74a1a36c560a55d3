"""The nine steps on one subject, from stored activations; steps 6 and 8 run the model too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.program import note
from analyses.common.significance import Estimate
from analyses.forward_proportion import state
from analyses.forward_proportion.classification import Accuracy, Gap, classify_all, compare
from analyses.forward_proportion.community import Communities, Separation, find_communities, separate
from analyses.forward_proportion.interaction import fingerprints, read_interactions, store_interactions
from analyses.forward_proportion.patching import ALL, CleanPairs, Patched, convergent_pairs, patch
from analyses.forward_proportion.perturbation import Perturbed, perturb, random_pairs, strongest_pairs
from analyses.forward_proportion.prediction import (
    KINDS,
    Explained,
    Swept,
    explain,
    powers_of_two,
    singular_directions,
    sweep,
)
from analyses.forward_proportion.rewiring import Rewiring, mean_interaction, measure_rewiring
from analyses.forward_proportion.ring import Ring, measure_ring
from analyses.forward_proportion.subject import Subject, surface

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Extent:
    """How much is done of everything."""

    n_seeds: int = 20
    n_null: int = 100
    n_bootstraps: int = 40
    n_repeats: int = 5
    n_label_nulls: int = 3
    n_resamples: int = 400
    n_permutations: int = 200
    n_pairs: int = 15
    n_perturbed: int = 20
    n_layers: int = 6
    k: int = 10
    n_state_pairs: int = 6000
    n_patched: int = 48
    n_ring_null: int = 99


FULL = Extent()
SMALL = Extent(
    n_null=20,
    n_bootstraps=10,
    n_repeats=2,
    n_label_nulls=1,
    n_resamples=100,
    n_permutations=60,
    n_pairs=5,
    n_perturbed=18,
    n_layers=3,
    n_state_pairs=1500,
    n_patched=24,
    n_ring_null=19,
)


@dataclass(frozen=True)
class Heads:
    """Steps 1 to 5: fingerprints, communities, the mean interaction [source, target], accuracies, rewiring."""

    fingerprints: npt.NDArray[np.float32]
    communities: Communities
    spread: Estimate
    separation: Separation
    mean: Floats
    accuracies: Mapping[str, Accuracy]
    gap: Gap
    rewiring: Rewiring


@dataclass(frozen=True)
class States:
    """Step 7 at one layer: near and random pairs, what each distance explains of either, and the sweep over k."""

    layer: int
    near: state.Pairs
    random: state.Pairs
    explained: Mapping[tuple[str, str, str], Explained]
    """By kind of pairs, distance and fit, of KL."""
    explained_js: Mapping[str, Explained]
    swept: Swept


@dataclass(frozen=True)
class Shares:
    """Step 8: by layer and kind of pairs, and at one layer by the number of last positions patched."""

    by_layer: Mapping[tuple[int, str], Patched]
    by_positions: Mapping[tuple[int, str], Patched]
    middle: int


def study_heads(db: actdb.Database, subject: Subject, extent: Extent, *, query: str, seed: int) -> Heads:
    """Steps 1 to 5; adds the site `interaction` to the run."""
    run = subject.run
    note("steps 1 and 2: fingerprints and communities")
    magnitudes = fingerprints(run, subject.prompts.tolist(), query=query)
    found = find_communities(magnitudes, n_seeds=extent.n_seeds, n_null=extent.n_null, seed=seed)
    options: dict[str, Any] = {"category": subject.category, "symbolic": subject.symbolic, "names": subject.names}
    separation = separate(magnitudes, found.member, **options, seed=seed)
    note("step 3: interaction graphs")
    store_interactions(run, query=query)
    note("step 4: predicting the category")
    graphs = flattened(subject)
    features: dict[str, npt.NDArray[Any]] = {
        "length": surface(db, subject),
        "magnitudes": magnitudes,
        "interactions": graphs,
        "both": np.concatenate([magnitudes, graphs], 1),
    }
    accuracies = classify_all(
        features, subject.category, n_repeats=extent.n_repeats, n_null=extent.n_label_nulls, seed=seed
    )
    note("step 5: rewiring")
    return Heads(
        fingerprints=magnitudes,
        communities=found,
        spread=_bootstrapped(magnitudes, found.modularity, n=extent.n_bootstraps, seed=seed),
        separation=separation,
        mean=mean_interaction(lambda: read_interactions(run), subject.prompts),
        accuracies=accuracies,
        gap=compare(accuracies["magnitudes"], accuracies["interactions"], seed=seed),
        rewiring=measure_rewiring(
            lambda: read_interactions(run),
            subject.prompts,
            subject.category,
            n_resamples=extent.n_resamples,
            n_permutations=extent.n_permutations,
            seed=seed,
        ),
    )


def flattened(subject: Subject) -> npt.NDArray[np.float32]:
    """Return I of the pairs of heads that can interact [prompt, pair]: heads² · layers (layers − 1) ÷ 2 of them."""
    n_layers, n_heads = subject.shape
    layer_of = np.repeat(np.arange(n_layers), n_heads)
    below = layer_of[:, None] < layer_of
    place = {int(prompt): i for i, prompt in enumerate(subject.prompts)}
    out = np.empty((len(place), int(below.sum())), np.float32)
    for ids, values in read_interactions(subject.run):
        kept = [i for i, prompt in enumerate(ids.tolist()) if prompt in place]
        out[[place[int(ids[i])] for i in kept]] = values[kept][:, below]
    return out


def _bootstrapped(magnitudes: npt.NDArray[Any], value: float, *, n: int, seed: int) -> Estimate:
    """Return the modularity with its interval over prompts drawn with replacement."""
    generator = np.random.default_rng((seed, 3))
    drawn = [generator.integers(0, len(magnitudes), len(magnitudes)) for _ in range(n)]
    found = [find_communities(magnitudes[rows], n_seeds=1, n_null=0, seed=seed).modularity for rows in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(magnitudes))


def study_perturbations(subject: Subject, heads: Heads, extent: Extent, *, seed: int) -> dict[str, Perturbed]:
    """Step 6: the strongest pairs of heads, and random ones, on some prompts of every category."""
    note("step 6: ablating pairs of heads and cutting their pathways")
    n_heads = subject.shape[1]
    every = [(layer, head) for layer in subject.run["z"].layers for head in range(n_heads)]
    strong = strongest_pairs(heads.mean, every, n=extent.n_pairs)
    pairs = {"strongest": strong, "random": random_pairs(every, n=extent.n_pairs, without=strong, seed=seed)}
    prompts = some_prompts(subject, extent.n_perturbed, seed=seed)
    return {kind: perturb(subject.run, subject.model, chosen, prompts) for kind, chosen in pairs.items() if chosen}


def some_prompts(subject: Subject, n: int, *, seed: int) -> list[int]:
    """Draw prompts, as many of each category."""
    generator = np.random.default_rng((seed, 12))
    each = max(1, n // len(subject.names))
    groups = [generator.permutation(subject.prompts[subject.category == i])[:each] for i in range(len(subject.names))]
    return [int(prompt) for prompt in np.sort(np.concatenate(groups))]


def study_states(db: actdb.Database, subject: Subject, extent: Extent, *, seed: int) -> list[States]:
    """Step 7 at some layers; adds the site `last_state` to the run."""
    note("step 7: how much of the divergence the distance of states explains")
    state.store_states(subject.run)
    readout = subject.run.readout()
    directions, _ = singular_directions(subject.run.weight("W_U"))
    return [
        _states(db, subject, extent, readout, directions, layer, seed) for layer in some_layers(subject.run, extent)
    ]


def _states(
    db: actdb.Database,
    subject: Subject,
    extent: Extent,
    readout: Any,
    directions: Floats,
    layer: int,
    seed: int,
) -> States:
    run = subject.run
    near_ids = state.neighbour_pairs(db, run, layer=layer, k=extent.k, n=extent.n_state_pairs, seed=seed)
    other_ids = state.other_pairs(np.array(run.prompt_ids()), n=len(near_ids[0]), seed=seed)
    found = {
        "near": state.measure_pairs(run, readout, *near_ids, layer=layer),
        "random": state.measure_pairs(run, readout, *other_ids, layer=layer),
    }
    explained = {
        (kind, distance, fit): explain(x, pairs.kl, pairs.a, kind=fit, seed=seed)
        for kind, pairs in found.items()
        for distance, x in pairs.distances.items()
        for fit in KINDS
    }
    near = found["near"]
    of_js = {name: explain(x, near.js, near.a, kind=KINDS[0], seed=seed) for name, x in near.distances.items()}
    delta = state.normed_differences(run, readout, near.a, near.b, layer=layer)
    ks = powers_of_two(delta.shape[1])
    return States(
        layer=layer,
        near=near,
        random=found["random"],
        explained=explained,
        explained_js=of_js,
        swept=sweep(delta, directions, near.kl, near.a, ks=ks),
    )


def study_patching(db: actdb.Database, subject: Subject, extent: Extent, *, seed: int) -> Shares:
    """Step 8: convergent and random pairs, by layer, and at a middle layer by the last positions patched."""
    note("step 8: one prompt's state in another's run")
    run, layers = subject.run, some_layers(subject.run, extent)
    middle = layers[len(layers) // 2]
    by_layer: dict[tuple[int, str], Patched] = {}
    by_positions: dict[tuple[int, str], Patched] = {}
    drawn = state.other_pairs(subject.prompts, n=extent.n_patched, seed=seed)
    random = CleanPairs.make(run, subject.model, *drawn)
    for layer in layers:
        found = convergent_pairs(db, run, subject.prompts, layer=layer, n=extent.n_patched)
        near = CleanPairs.make(run, subject.model, *found)
        for kind, pairs in {"convergent": near, "random": random}.items():
            by_layer[layer, kind] = patch(run, subject.model, pairs, layer=layer)
            if layer == middle:
                by_positions[1, kind] = by_layer[layer, kind]
                for m in (2, 4, 8, ALL):
                    by_positions[m, kind] = patch(run, subject.model, pairs, layer=layer, n_last=m)
    return Shares(by_layer, by_positions, middle)


def study_rings(subject: Subject, extent: Extent, *, seed: int) -> dict[tuple[int, str], Ring]:
    """Step 9: the last states of each category at some layers."""
    note("step 9: rings")
    run = subject.run
    found = {}
    for layer in some_layers(run, extent):
        for i, name in enumerate(subject.names):
            members = subject.prompts[subject.category == i].tolist()
            states = run["resid_post"].sel(layer=layer, prompt=members, pos=-1).numpy()
            found[layer, name] = measure_ring(states, n_null=extent.n_ring_null, seed=seed)
    return found


def some_layers(run: actdb.Run, extent: Extent) -> list[int]:
    """Return up to so many layers, evenly spaced, the first and the last among them."""
    layers: Sequence[int] = run["resid_post"].layers
    places = np.unique(np.linspace(0, len(layers) - 1, min(extent.n_layers, len(layers))).round().astype(int))
    return [layers[i] for i in places]
