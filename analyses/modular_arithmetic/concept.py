"""Concepts in a model's states: clusters of them, and what linear probes read of a pair's properties.

A probe alone says little: enough directions let it learn anything. So every property has its control task (Hewitt and
Liang 2019): the same share of *values* (numbers, sums, differences), drawn at random, is to be told apart. What counts
is the selectivity, held-out accuracy minus that of the control; and the accuracy on values the probe never saw, which
no memory of single values can give.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import adjusted_rand_score

from analyses.common.significance import Estimate, mean_interval
from analyses.modular_arithmetic.grid import Booleans, Floats, Grid, Ints
from analyses.modular_arithmetic.state import Rows, State

N_INITIALISATIONS = 4
N_PERMUTATIONS = 20
N_CONTROLS = 6
RIDGE = 1e-3
FEWEST_VALUES = 3
"""Values of either kind on each side of a split by values."""


@dataclass(frozen=True)
class Property:
    """Something that is true of some values: `value` [pair] is what it depends on, `holds` [value] where it does."""

    name: str
    value: Ints
    holds: Booleans

    @property
    def labels(self) -> Booleans:
        """Whether it holds of each pair [pair]."""
        return self.holds[self.value]


@dataclass(frozen=True)
class Probed:
    """Balanced accuracies of a linear probe: on held-out pairs, of its control tasks [draw], on held-out values.

    `unseen` is NaN where too few values have the property to hold some out.
    """

    state: str
    concept: str
    accuracy: float
    controls: Floats
    unseen: float

    @property
    def selectivity(self) -> Estimate:
        """Accuracy minus that of the control tasks, over their draws."""
        return mean_interval(self.accuracy - self.controls, within=(-1.0, 1.0))


@dataclass(frozen=True)
class Clusters:
    """How k-means clusters of a state, as many as numbers, agree with a, b or the answer: adjusted Rand index."""

    state: str
    label: str
    agreement: float
    null: float


def properties(grid: Grid) -> tuple[Property, ...]:
    """Return the properties that are probed: of a, of the answer, of the difference, of the sum before mod p."""
    p = grid.modulus
    numbers, sums = np.arange(p), np.arange(2 * p - 1)
    difference = (grid.a - grid.b) % p
    return (
        Property("a is odd", grid.a, numbers % 2 == 1),
        Property("a is zero", grid.a, numbers == 0),
        Property("a above p/2", grid.a, numbers > p / 2),
        Property("answer is odd", grid.answers, numbers % 2 == 1),
        Property("answer is zero", grid.answers, numbers == 0),
        Property("answer above p/2", grid.answers, numbers > p / 2),
        Property("a = b", difference, numbers == 0),
        Property("a next to b", difference, (numbers == 1) | (numbers == p - 1)),
        Property("carry: a + b ≥ p", grid.a + grid.b, sums >= p),
    )


def probe_all(grid: Grid, states: list[State], *, fitted: Booleans, seed: int) -> Iterator[Probed]:
    """Yield a probe of every property in every state: fitted on `fitted` pairs, measured on the others.

    Costs `N_CONTROLS` + 2 linear discriminants each.
    """
    for state in states:
        for found in properties(grid):
            yield probe(state, found, fitted=fitted, seed=seed)


def probe(state: State, found: Property, *, fitted: Booleans, seed: int) -> Probed:
    """Fit a probe of one property, its control tasks, and one that some values are kept from."""
    generator = np.random.default_rng((seed, 41))

    def accuracy(labels: Booleans, training: Booleans) -> float:
        model = linear_probe().fit(state.rows[training], labels[training])
        return balanced_accuracy(labels[~training], model.predict(state.rows[~training]))

    controls = [accuracy(generator.permutation(found.holds)[found.value], fitted) for _ in range(N_CONTROLS)]
    seen = _seen_values(found.holds, generator)
    unseen = float("nan") if seen is None else accuracy(found.labels, seen[found.value])
    return Probed(state.name, found.name, accuracy(found.labels, fitted), np.array(controls), unseen)


def cluster_all(grid: Grid, states: list[State], *, seed: int) -> Iterator[Clusters]:
    """Yield how the clusters of every state agree with a, b and the answer, and with these permuted."""
    generator = np.random.default_rng((seed, 42))
    for state in states:
        clusters = assign(state.rows, centroids(state.rows, grid.modulus, seed=seed))
        for label, values in {"a": grid.a, "b": grid.b, "answer": grid.answers}.items():
            permuted = [agreement(clusters, generator.permutation(values)) for _ in range(N_PERMUTATIONS)]
            yield Clusters(state.name, label, agreement(clusters, values), float(np.mean(permuted)))


def linear_probe() -> "Discriminant":
    """Return the probe used throughout: it has a closed form, and tells apart numbers that lie on a circle."""
    return Discriminant()


class Discriminant:
    """Fisher's linear discriminant, shrunk after Ledoit and Wolf; classes count alike, however many rows they have.

    A small part of the rows' variance is added to that within classes, so that classes without any can be told apart.
    """

    def __init__(self) -> None:
        self.classes: npt.NDArray[Any] = np.zeros(0)
        self.weights, self.biases = np.zeros((0, 0)), np.zeros(0)

    def fit(self, rows: Rows, labels: npt.NDArray[Any]) -> "Discriminant":
        """Rows [row, feature], labels [row]."""
        self.classes, label = np.unique(labels, return_inverse=True)
        values = rows.astype(np.float64)
        means = class_means(values, label, len(self.classes)).astype(np.float64)
        within = ledoit_wolf(values - means[label], assume_centered=True)[0]
        within += np.eye(values.shape[1]) * (RIDGE * values.var(0).mean() + np.finfo(np.float64).tiny)
        self.weights = np.linalg.solve(within, means.T)  # [feature, class]
        self.biases = -0.5 * (means.T * self.weights).sum(0)
        return self

    def predict(self, rows: Rows) -> npt.NDArray[Any]:
        """Return the class of every row [row]."""
        return np.asarray(self.classes[(rows @ self.weights + self.biases).argmax(1)])


def centroids(rows: Rows, n: int, *, seed: int) -> Rows:
    """Return the centroids [cluster, feature] of k-means."""
    fitted = KMeans(n, n_init=N_INITIALISATIONS, random_state=seed).fit(rows)
    return np.asarray(fitted.cluster_centers_, np.float32)


def assign(rows: Rows, centres: Rows) -> Ints:
    """Return the nearest centre of every row [row]."""
    scores = (centres**2).sum(1) - 2 * rows @ centres.T  # ‖row − centre‖² less ‖row‖²
    return np.asarray(scores.argmin(1), np.int64)


def purity(clusters: Ints, labels: Ints) -> float:
    """Return the share of rows that have the commonest label of their cluster."""
    counts = np.zeros((clusters.max() + 1, labels.max() + 1), np.int64)
    np.add.at(counts, (clusters, labels), 1)
    return float(counts.max(1).sum() / len(labels))


def balanced_accuracy(labels: Booleans, predicted: Booleans) -> float:
    """Return the mean over the labels that there are of the share of their rows predicted so: 0.5 for guessing."""
    return float(np.mean([(predicted[labels == kind] == kind).mean() for kind in np.unique(labels)]))


def agreement(clusters: Ints, labels: Ints) -> float:
    """Return the adjusted Rand index: 1 for the same partition, 0 as by chance."""
    return float(adjusted_rand_score(labels, clusters))


def class_means(rows: npt.NDArray[Any], labels: Ints, n: int) -> Rows:
    """Return the mean row of each label [label, feature]; of one without rows the mean of all."""
    counts = np.bincount(labels, minlength=n)[:, None]
    sums = np.zeros((n, rows.shape[1]))
    np.add.at(sums, labels, rows)
    return np.where(counts > 0, sums / np.maximum(counts, 1), rows.mean(0)).astype(np.float32)


def _seen_values(holds: Booleans, generator: np.random.Generator) -> Booleans | None:
    """Draw two thirds of the values of either kind [value]; None where that leaves too few on a side."""
    seen = np.zeros(len(holds), np.bool_)
    for kind in (True, False):
        values = generator.permutation(np.flatnonzero(holds == kind))
        n_held = len(values) // 3
        if n_held < FEWEST_VALUES - 1 or len(values) - n_held < FEWEST_VALUES:
            return None
        seen[values[n_held:]] = True
    return seen
