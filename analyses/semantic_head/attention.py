"""Attention between tokens that stand alone: against their cosine, and how a token ranks among its own keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from analyses.semantic_head.circuit import Circuit, TokenScores

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]
ROWS = 512
N_BINS = 80
LEAST_PAIRS = 20
"""A bin of cosines with fewer pairs says nothing."""
CUTOFFS = (128, 256, 1024)
N_SPEARMAN_ROWS = 128


@dataclass(frozen=True)
class CosineCurve:
    """Mean of log attention minus that of the token on itself, by cosine of the inputs, [bin] each, in nats.

    `centres` are the bins' cosines, `means` NaN where fewer than `LEAST_PAIRS` pairs fall in, `counts` the pairs.
    """

    centres: Floats
    means: Floats
    counts: npt.NDArray[np.int64]

    @property
    def filled(self) -> npt.NDArray[np.bool_]:
        """Bins with pairs enough."""
        return np.isfinite(self.means)

    @property
    def peak(self) -> tuple[float, float]:
        """The cosine at which attention is highest, and how high."""
        best = int(np.nanargmax(self.means))
        return float(self.centres[best]), float(self.means[best])

    @property
    def crossing(self) -> float:
        """The cosine from which on, up to the peak, tokens get more attention than the token itself; NaN where none."""
        best = int(np.nanargmax(self.means))
        if not self.means[best] > 0:
            return float("nan")
        below = np.flatnonzero(self.filled[:best] & ~(self.means[:best] > 0))
        first = below[-1] + 1 if len(below) else int(np.flatnonzero(self.filled)[0])
        return float(self.centres[first])


def attention_by_cosine(inputs: npt.NDArray[Any], circuits: Sequence[Circuit]) -> list[CosineCurve]:
    """Bin log-softmax(E W Eᵀ/√d_head) minus the row's own diagonal by the cosine of E's rows, pairs i ≠ j.

    `inputs` are E [token, d_model]; a curve for each circuit. The softmax's denominator is the row's and falls out of
    the difference: it is one of scores. Costs the cosine of all pairs once, `ROWS` rows at a time.
    """
    rows = inputs.astype(np.float32)
    units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    sides = [
        (rows @ (each.query / each.scale).astype(np.float32), rows @ each.key.astype(np.float32)) for each in circuits
    ]
    edges = np.linspace(-1.0, 1.0, N_BINS + 1)
    sums, counts = np.zeros((len(circuits), N_BINS)), np.zeros(N_BINS, np.int64)
    for begin in range(0, len(rows), ROWS):
        part = slice(begin, min(begin + ROWS, len(rows)))
        places = np.clip(((units[part] @ units.T + 1) * (N_BINS / 2)).astype(np.int64), 0, N_BINS - 1)
        places[np.arange(part.stop - begin), np.arange(begin, part.stop)] = N_BINS  # the diagonal is in no bin
        counts += np.bincount(places.ravel(), minlength=N_BINS + 1)[:N_BINS]
        for i, (queries, keys) in enumerate(sides):
            scores = queries[part] @ keys.T
            scores -= (queries[part] * keys[part]).sum(1, keepdims=True)
            sums[i] += np.bincount(places.ravel(), scores.ravel(), N_BINS + 1)[:N_BINS]
    means = np.where(counts >= LEAST_PAIRS, sums / np.maximum(counts, 1), np.nan)
    return [CosineCurve((edges[1:] + edges[:-1]) / 2, mean, counts) for mean in means]


@dataclass(frozen=True)
class SelfAttention:
    """How a token ranks among the keys of its own query, means over queries; rank 1 is the most attended.

    `accuracy` is the share of queries whose own token is among the first `CUTOFFS`; `spearman` the rank correlation of
    a row with the unchanged one, mean over rows (NaN where not asked for).
    """

    mean_rank: float
    reciprocal_rank: float
    accuracy: dict[int, float]
    spearman: float

    @classmethod
    def chance(cls, n: int) -> "SelfAttention":
        """Return what a random order of `n` keys gives."""
        shares = {cutoff: min(cutoff / n, 1.0) for cutoff in CUTOFFS}
        return cls((n + 1) / 2, float((1 / np.arange(1, n + 1)).mean()), shares, 0.0)


def measure_self(scores: Scores, reference: Scores | None = None) -> SelfAttention:
    """Rank each token among the keys of its own query in scores [query, key]; ties count half.

    `reference` are the unchanged scores, for the rank correlation over `N_SPEARMAN_ROWS` rows spread evenly.
    """
    own = scores.diagonal()[:, None]
    above, equal = (scores > own).sum(1), (scores == own).sum(1) - 1
    ranks = 1 + above + equal / 2
    spearman = float("nan")
    if reference is not None:
        chosen = np.linspace(0, len(scores) - 1, min(N_SPEARMAN_ROWS, len(scores))).astype(int)
        first, second = (_standard_ranks(values[chosen]) for values in (scores, reference))
        spearman = float((first * second).mean())
    accuracy = {cutoff: float((ranks <= cutoff).mean()) for cutoff in CUTOFFS}
    return SelfAttention(float(ranks.mean()), float((1 / ranks).mean()), accuracy, spearman)


def _standard_ranks(rows: Scores) -> Floats:
    """Ranks within each row, with mean 0 and deviation 1: their products average to Spearman's correlation."""
    ranks = stats.rankdata(rows, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    return np.asarray(ranks / np.maximum(ranks.std(1, keepdims=True), 1e-12))


NEGATIVE_FACTORS = (1.1, 1.0, 0.5, 0.0, -0.5, -1.0)
N_SCALED = (1, 2, 3, 4, 8, 16, 24, 32)
RANK_FACTORS = tuple(np.arange(-5.0, 1.26, 0.25).tolist())


def scale_negative(scores: TokenScores, *, factors: tuple[float, ...] = NEGATIVE_FACTORS) -> dict[float, SelfAttention]:
    """Multiply the negative eigenvalues of S by each factor and rank the tokens anew."""
    return {
        factor: measure_self(scores.scaled(np.where(scores.values < 0, factor, 1.0)), scores.base) for factor in factors
    }


def scale_first(
    scores: TokenScores, *, numbers: tuple[int, ...] = N_SCALED, factors: tuple[float, ...] = RANK_FACTORS
) -> dict[int, dict[float, SelfAttention]]:
    """Multiply the first k eigenvalues of S, the most negative first, by each factor: by k, then by factor."""
    return {
        number: {
            factor: measure_self(
                scores.scaled(np.where(np.arange(len(scores.values)) < number, factor, 1.0)), scores.base
            )
            for factor in factors
        }
        for number in numbers
        if number <= len(scores.values)
    }


@dataclass(frozen=True)
class Suppression:
    """How a token's own score compares with those of other tokens, in standard deviations of its row.

    `all` against all other tokens, `same` against those of its category (NaN without categories).
    """

    all: float
    same: float


def self_suppression(scores: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Suppression:
    """Return the mean over tokens of (own − mean of others) ÷ standard deviation of the row, of scores [query, key].

    `labels` [token] are categories, −1 for none. Negative: the part suppresses self-attention.
    """
    values = np.asarray(scores, np.float64)
    own, n = values.diagonal(), len(values)
    others = (values.sum(1) - own) / (n - 1)
    spread = values.std(1)
    same = (labels[:, None] == labels[None]) & (labels[:, None] >= 0) & ~np.eye(n, dtype=bool)
    has = same.any(1)
    near = (values * same).sum(1)[has] / same.sum(1)[has]
    within = float(((own[has] - near) / spread[has]).mean()) if has.any() else float("nan")
    return Suppression(float(((own - others) / spread).mean()), within)
