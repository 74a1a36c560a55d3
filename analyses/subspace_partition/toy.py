"""Toy (a) and the null, trained and measured: what the study says of rows whose partition is known."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.subspace_partition.baseline import RANDOM, TRAINED, baselines
from analyses.subspace_partition.buffer import fill_buffer
from analyses.subspace_partition.evaluation import Geometry, gini_measures, measure_geometry
from analyses.subspace_partition.partition import Partition, span_overlap, store_partition
from analyses.subspace_partition.planted import (
    N_GROUPS,
    SITE,
    Recovery,
    SuperpositionModel,
    chance_overlap,
    draw_sample,
    measure_recovery,
    orthogonal_model,
    patch_effects,
    store_noise,
    store_rows,
    train_model,
)
from analyses.subspace_partition.training import Recipe, Trained, train_partition

NAME = "ndm"
"""The name of a trained partition in the table `partitions`."""
RECIPE = Recipe(
    unit=3,
    n_key_blocks=1,
    learning_rate=3e-2,
    decays=True,
    first_merge=1500,
    merge_every=300,
    n_steps=2700,
    information_keys=4000,
    information_queries=1500,
    save_every=1500,
)
"""The method's recipe at the size of a toy: fewer keys, and fewer steps at a higher rate."""
STOPPED = replace(RECIPE, stop_at_n_subspaces=N_GROUPS)
"""For trained models, whose groups are not quite orthogonal: the threshold alone would merge them."""
BLOCK_ROWS = 1024
N_RANDOM = 20


@dataclass(frozen=True)
class Extent:
    """How much is done: seeds of toy (a) and of the null, rows, steps of the model, pairs patched."""

    n_seeds: int
    n_nulls: int
    n_rows: int
    n_model_steps: int
    n_pairs: int


FULL = Extent(10, 3, 16_384, 3000, 400)
SMALL = Extent(2, 2, 16_384, 2000, 100)


@dataclass(frozen=True)
class Toy:
    """Toy (a) of one seed: its model, the partition trained on its rows, what that recovers, and the baselines.

    `geometry` and `gini` (measure → [pair]) are by partition; `error` is the model's squared error as a share of its
    inputs' squares, `chance` the overlap of random spans.
    """

    seed: int
    run: str
    model: SuperpositionModel
    trained: Trained
    recovery: Recovery
    geometry: Mapping[str, Geometry]
    gini: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]
    error: float

    @property
    def chance(self) -> float:
        """The overlap of random spans."""
        return chance_overlap(self.trained.partition)


@dataclass(frozen=True)
class Null:
    """A training on isotropic noise: its distances beside a random rotation's, and its overlap with another seed's."""

    run: str
    trained: Trained
    trained_distance: float
    random_distance: float
    agreement: float
    chance: float


def study_toy(db: Path, extent: Extent, *, seed: int, state: Path) -> Toy:
    """Train the model of one seed, store its rows, train a partition on them, store that, and measure it."""
    run_name = f"toy-a-seed{seed}"
    model = train_model(seed=seed, n_steps=extent.n_model_steps, state=state / f"{run_name}.pt")
    return _measure(db, extent, model, run_name, STOPPED, seed=seed, state=state)


def study_orthogonal(db: Path, extent: Extent, *, seed: int, state: Path) -> Toy:
    """The same for a model built by hand, whose groups are orthogonal: here the threshold alone ends the merging."""
    return _measure(db, extent, orthogonal_model(seed=seed), f"orthogonal-seed{seed}", RECIPE, seed=seed, state=state)


def _measure(
    db: Path, extent: Extent, model: SuperpositionModel, run_name: str, recipe: Recipe, *, seed: int, state: Path
) -> Toy:
    store_rows(model, db, run_name, n_rows=extent.n_rows, seed=seed)
    trained, buffer = _train(db, run_name, recipe, seed=seed, state=state / run_name)
    sizes = trained.partition.sizes
    partitions = {TRAINED: trained.partition, **baselines(buffer.rows.numpy(), sizes, unit=recipe.unit, seed=seed)}
    counts: dict[str, Any] = {"n_queries": recipe.information_queries, "n_keys": recipe.information_keys, "seed": seed}
    geometry = {name: measure_geometry(buffer, each, **counts) for name, each in partitions.items()}
    effects = {name: patch_effects(model, each, n_pairs=extent.n_pairs, seed=seed) for name, each in partitions.items()}
    gini = {name: gini_measures(effects[name], geometry[name].sizes, geometry[name].variance) for name in partitions}
    recovery = measure_recovery(model, trained.partition)
    return Toy(seed, run_name, model, trained, recovery, geometry, gini, _error(model, seed))


def study_nulls(db: Path, extent: Extent, *, seed: int, state: Path) -> list[Null]:
    """Train on isotropic noise with several seeds, and hold each partition against the one before it."""
    found: list[tuple[str, Trained, Any]] = []
    for i in range(extent.n_nulls):
        run_name = f"noise-seed{seed + i}"
        store_noise(db, run_name, n_rows=extent.n_rows, seed=seed + i)
        found.append((run_name, *_train(db, run_name, RECIPE, seed=seed + i, state=state / run_name)))
    nulls = []
    for i, (run_name, trained, buffer) in enumerate(found):
        other, sizes = found[i - 1][1].partition, trained.partition.sizes
        rows, seeds = buffer.rows.numpy(), range(seed + i, seed + i + N_RANDOM)
        randoms = [baselines(rows, sizes, unit=RECIPE.unit, seed=each)[RANDOM] for each in seeds]
        counts: dict[str, Any] = {"n_queries": RECIPE.information_queries, "n_keys": RECIPE.information_keys}
        trained_distance, random_distance = (
            measure_geometry(buffer, each, **counts, seed=seed + i, pairs=False).unweighted
            for each in (trained.partition, randoms[0])
        )
        chance = float(np.mean([best_overlap(random, other) for random in randoms]))
        agreement = best_overlap(trained.partition, other)
        nulls.append(Null(run_name, trained, trained_distance, random_distance, agreement, chance))
    return nulls


def best_overlap(partition: Partition, other: Partition) -> float:
    """Return the mean over subspaces of the best overlap with a subspace of another partition."""
    overlaps = [
        max(span_overlap(partition.basis(i), other.basis(j)) for j in range(other.n_subspaces))
        for i in range(partition.n_subspaces)
    ]
    return float(np.mean(overlaps))


def _train(db: Path, run_name: str, recipe: Recipe, *, seed: int, state: Path) -> tuple[Trained, Any]:
    """Train a partition on a run's rows, from the database and back into it."""
    with actdb.open(db, mode="a") as opened:
        run = opened.run(run_name)
        buffer = fill_buffer(run[SITE].sel(layer=0), seed=seed, block_rows=BLOCK_ROWS)
        trained = train_partition(buffer, recipe, seed=seed, state=state, name=run_name)
        store_partition(opened, run, NAME, trained.partition, site=SITE, layer=0, steps=len(trained.losses), seed=seed)
    return trained, buffer


def _error(model: SuperpositionModel, seed: int, n: int = 4096) -> float:
    """The model's squared error on fresh inputs, as a share of their squares."""
    x = draw_sample(n, np.random.default_rng((seed, 45))).inputs()
    with torch.no_grad():
        return float((model(x) - x).square().sum() / x.square().sum())
