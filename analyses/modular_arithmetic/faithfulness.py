"""Are concepts what the model computes with? They are put back in the place of its states, and its answers counted.

Concepts are fitted on half of the pairs; everything is measured on the other half. `completeness` is that of Yeh et al.
(2020), "On completeness-aware concept-based explanations": (accuracy kept − chance) ÷ (accuracy of the model − chance).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from analyses.common.significance import Estimate, proportion_interval
from analyses.modular_arithmetic.concept import (
    N_PERMUTATIONS,
    Discriminant,
    assign,
    centroids,
    class_means,
    linear_probe,
    purity,
)
from analyses.modular_arithmetic.grid import Booleans, Floats, Grid, Ints
from analyses.modular_arithmetic.state import Rows, State

Substitute = Callable[[Rows], Rows]
"""Rows [row, feature] → the concepts' rows in their place."""
ENOUGH = 0.95
"""Share of the accuracy that the principal components are to keep."""


@dataclass(frozen=True)
class Kept:
    """Accuracy on held-out pairs with a state replaced by its concepts; `without`: with these taken out of it.

    `null` is the accuracy kept by as many concepts drawn at random.
    """

    name: str
    accuracy: Estimate
    null: float
    without: float
    completeness: float


@dataclass(frozen=True)
class Curve:
    """Accuracy kept on held-out pairs [dimension] by the first principal components, and by random directions."""

    n_dimensions: Ints
    principal: Floats
    random: Floats
    whole: float

    def least(self, share: float) -> int:
        """The fewest dimensions that keep a share of the accuracy; all where none do."""
        enough = np.flatnonzero(self.principal >= share * self.whole)
        return int(self.n_dimensions[enough[0] if len(enough) else -1])


@dataclass(frozen=True)
class Separation:
    """How far a state tells the answers apart, on held-out pairs, each with what permuted answers give.

    `separability`: accuracy of a linear probe of the answer; `purity`: the share of pairs that have the commonest
    answer of their k-means cluster, with as many clusters as numbers.
    """

    separability: Estimate
    null_separability: float
    purity: float
    null_purity: float


@dataclass(frozen=True)
class Substitution:
    """One state of one model: concepts are fitted on `fitted` pairs [pair] and put back on all."""

    grid: Grid
    state: State
    fitted: Booleans
    seed: int

    @cached_property
    def whole(self) -> float:
        """Accuracy of the model on the held-out pairs."""
        return float(self._right(self.grid.clean).mean())

    def kept(self) -> Iterator[Kept]:
        """Put back centroids of k-means, the first principal components, and the mean state of what a probe reads.

        Nulls: rows drawn at random for centroids; random directions; a probe of permuted answers.
        """
        generator = np.random.default_rng((self.seed, 33))
        p, n = self.grid.modulus, self.curve.least(ENOUGH)
        drawn = self._rows[generator.choice(len(self._rows), p, replace=len(self._rows) < p)]
        yield self._measure("k-means", _nearest(self._centroids), _nearest(drawn))
        yield self._measure("PCA", self._principal(n), self._random(n))
        permuted = generator.permutation(self._labels)
        control = linear_probe().fit(self._rows, permuted)
        means, others = class_means(self._rows, self._labels, p), class_means(self._rows, permuted, p)
        yield self._measure(
            "probe", lambda rows: means[self._probe.predict(rows)], lambda rows: others[control.predict(rows)]
        )

    @cached_property
    def curve(self) -> Curve:
        """Accuracy kept by the first principal components, at doubling numbers of them."""
        most = int(min(self._rows.shape[1], len(self._rows) - 1))
        numbers = np.unique(np.minimum(2 ** np.arange(0, 16), most))
        principal = [self._accuracy(self._principal(n)(self.state.rows)) for n in numbers]
        random = [self._accuracy(self._random(n)(self.state.rows)) for n in numbers]
        return Curve(numbers, np.array(principal), np.array(random), self.whole)

    def separation(self) -> Separation:
        """Measure a probe of the answer and the purity of clusters, and both for permuted answers."""
        generator = np.random.default_rng((self.seed, 35))
        held, answers = self.state.rows[~self.fitted], self.grid.answers[~self.fitted]
        right = int((self._probe.predict(held) == answers).sum())
        null = linear_probe().fit(self._rows, generator.permutation(self._labels)).predict(held)
        clusters = assign(held, self._centroids)
        permuted = [purity(clusters, generator.permutation(answers)) for _ in range(N_PERMUTATIONS)]
        return Separation(
            separability=proportion_interval(right, len(held)),
            null_separability=float((null == answers).mean()),
            purity=purity(clusters, answers),
            null_purity=float(np.mean(permuted)),
        )

    def _measure(self, name: str, substitute: Substitute, null: Substitute) -> Kept:
        rows, whole, chance = self.state.rows, self.whole, 1 / self.grid.modulus
        concepts = substitute(rows)
        right = self._right(self.grid.logits([self.state.put(concepts)]))
        return Kept(
            name=name,
            accuracy=proportion_interval(int(right.sum()), len(right)),
            null=self._accuracy(null(rows)),
            without=self._accuracy(rows - concepts + self._mean),
            completeness=(float(right.mean()) - chance) / (whole - chance) if whole > chance else float("nan"),
        )

    def _principal(self, n: int) -> Substitute:
        return _projection(self._mean, self._axes[:n])

    def _random(self, n: int) -> Substitute:
        drawn = np.random.default_rng((self.seed, 36)).standard_normal((self.state.rows.shape[1], n))
        return _projection(self._mean, np.linalg.qr(drawn)[0].T.astype(np.float32))

    def _accuracy(self, rows: Rows) -> float:
        return float(self._right(self.grid.logits([self.state.put(rows)])).mean())

    def _right(self, logits: torch.Tensor) -> Booleans:
        return self.grid.right(logits)[~self.fitted]

    @cached_property
    def _rows(self) -> Rows:
        return self.state.rows[self.fitted]

    @cached_property
    def _mean(self) -> Rows:
        return np.asarray(self._rows.mean(0), np.float32)

    @cached_property
    def _axes(self) -> Rows:
        """Principal axes [component, feature] of the fitted rows."""
        return np.asarray(np.linalg.svd(self._rows - self._mean, full_matrices=False)[2], np.float32)

    @cached_property
    def _labels(self) -> Ints:
        return self.grid.answers[self.fitted]

    @cached_property
    def _centroids(self) -> Rows:
        return centroids(self._rows, self.grid.modulus, seed=self.seed)

    @cached_property
    def _probe(self) -> Discriminant:
        return linear_probe().fit(self._rows, self._labels)


def _nearest(centres: Rows) -> Substitute:
    return lambda rows: centres[assign(rows, centres)]


def _projection(mean: Rows, axes: Rows) -> Substitute:
    """Rows projected onto orthonormal axes [axis, feature] about a mean."""
    return lambda rows: np.asarray((rows - mean) @ axes.T @ axes + mean, np.float32)
