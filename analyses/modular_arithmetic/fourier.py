"""Step 1: which Fourier frequencies a matrix over the numbers 0 … p − 1 is made of, against random matrices.

The basis is the real one, orthonormal over the p inputs: a constant, and for each frequency k = 1 … ⌊p/2⌋ a cosine and
a sine of 2πkn/p (for an even p the last has the cosine alone). It is complete: the share of *all* frequencies together
is 1 for any matrix and says nothing. What can say something is how few of them hold how much, beside what the few
largest of a random matrix hold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
N_NULL = 500
LEVEL = 0.01
TOP = 5
"""Frequencies whose common share is reported, at most; see `n_top`."""
ROUNDING = 1e-10
"""Share of the squares below which the variance is that of rounding, float32's at most."""


@dataclass(frozen=True)
class Spectrum:
    """The Fourier power of a matrix [p, d]: `power` [frequency − 1] are shares of its variance, which sum to 1.

    `null_top` [draw, k − 1] are the shares of the k largest in random matrices of the same shape. A frequency is a key
    one where its share exceeds what the largest of a random matrix has in all but `LEVEL` of the draws.
    """

    power: Floats
    null_top: Floats

    @property
    def keys(self) -> tuple[int, ...]:
        """The key frequencies, strongest first."""
        order = np.argsort(-self.power, kind="stable")
        return tuple(int(i) + 1 for i in order if self.power[i] > self.threshold)

    @property
    def threshold(self) -> float:
        """The share above which a frequency is a key one."""
        return float(np.quantile(self.null_top[:, 0], 1 - LEVEL))

    @property
    def key_share(self) -> float:
        """The share of the variance in the key frequencies."""
        return float(sum(self.power[key - 1] for key in self.keys))

    @property
    def gini(self) -> float:
        """Gini coefficient of the power: 0 where all frequencies are alike, 1 − 1/n where one has all."""
        return gini(self.power)

    @property
    def null_gini(self) -> float:
        """The mean Gini coefficient of a random matrix."""
        return float(np.mean([gini(np.diff(row, prepend=0.0)) for row in self.null_top]))

    def top_share(self, k: int = TOP) -> float:
        """The share of the k largest frequencies."""
        return float(np.sort(self.power)[::-1][:k].sum())

    def null_share(self, k: int = TOP) -> float:
        """The mean share of the k largest frequencies of a random matrix."""
        return float(self.null_top[:, min(k, self.null_top.shape[1]) - 1].mean())


@dataclass(frozen=True)
class Circle:
    """How far numbers lie on a circle in the order of a frequency.

    `pearson` is that of the distances of all pairs with their distances around the circle; `adjacency` the mean
    distance of neighbours on it over that of all pairs. The nulls are of random matrices at their best frequency.
    """

    frequency: int
    pearson: float
    adjacency: float
    null_pearson: float
    null_adjacency: float


@dataclass(frozen=True)
class NeuronSpectrum:
    """The best frequency of each neuron [neuron] and the share of its variance over the grid that this one explains.

    `null` is the mean share of the best frequency of white noise over the grid; silent neurons have frequency 0 and
    share NaN.
    """

    frequency: npt.NDArray[np.int64]
    explained: Floats
    null: float

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """Which neurons are not silent."""
        return self.frequency > 0


def n_frequencies(modulus: int) -> int:
    """Return the number of real frequencies of p numbers, the constant left out."""
    return modulus // 2


def n_top(modulus: int) -> int:
    """Return how many of the frequencies of p numbers are put together: `TOP`, at most a third of them, at least one.

    All frequencies together have all the power of any matrix: of p = 7, which has three, five would say nothing.
    """
    return max(1, min(TOP, n_frequencies(modulus) // 3))


@lru_cache(maxsize=16)
def basis(modulus: int) -> Floats:
    """Return the real orthonormal Fourier basis [p, p]: row 0 the constant, rows 2k − 1 and 2k cosine and sine of k."""
    n = np.arange(modulus)
    rows = [np.full(modulus, modulus**-0.5)]
    for k in range(1, n_frequencies(modulus) + 1):
        angle = 2 * np.pi * k * n / modulus
        for wave in (np.cos(angle), np.sin(angle)):
            if (norm := np.linalg.norm(wave)) > 1e-6:  # the sine of p/2 is 0
                rows.append(wave / norm)
    made = np.array(rows)
    made.setflags(write=False)
    return made


def waves(modulus: int, frequencies: Iterable[int]) -> Floats:
    """Return the cosines and sines of some frequencies [n, p], orthonormal."""
    rows = [row for k in frequencies for row in (2 * k - 1, 2 * k) if row < modulus]
    return np.asarray(basis(modulus)[rows])


def power(matrix: npt.NDArray[Any]) -> Floats:
    """Return each frequency's share [frequency − 1] of the variance over a matrix's rows [p, d]; NaN without any."""
    values = np.asarray(matrix, np.float64)
    squares = ((basis(len(values)) @ values) ** 2).sum(-1)[1:]
    padded = np.concatenate([squares, np.zeros(len(squares) % 2)])  # an even p has no sine of p/2
    by_frequency = padded.reshape(-1, 2).sum(1)
    total = by_frequency.sum()
    if total <= ROUNDING * (values**2).sum():
        return np.full(len(by_frequency), np.nan)
    return np.asarray(by_frequency / total, np.float64)


def spectrum(matrix: npt.NDArray[Any], *, seed: int) -> Spectrum:
    """Return the Fourier power of a matrix [p, d] with its null: `N_NULL` Gaussian matrices of the same shape."""
    generator = np.random.default_rng(seed)
    p, d = matrix.shape
    draws = np.array([np.sort(power(generator.standard_normal((p, d))))[::-1] for _ in range(N_NULL)])
    return Spectrum(power(matrix), draws.cumsum(1))


def circularity(matrix: npt.NDArray[Any], frequency: int, *, seed: int | None = 0, n_null: int = 50) -> Circle:
    """Return how far the rows of a matrix [p, d] lie on a circle in the order of a frequency k coprime to p.

    Number n is put at place k·n, so that a wave of frequency k goes round once. Distances are those of the whole rows:
    in the plane of one frequency the rows of any matrix lie on an ellipse. Without a seed the nulls are NaN.
    """
    pearson, adjacency = _on_circle(_distances(matrix), frequency)
    nulls = np.full((1, 2), np.nan)
    if seed is not None:
        generator = np.random.default_rng(seed)
        nulls = np.array([_best_circle(generator.standard_normal(matrix.shape)) for _ in range(n_null)])
    return Circle(frequency, pearson, adjacency, *(float(mean) for mean in nulls.mean(0)))


def plane(matrix: npt.NDArray[Any], frequency: int) -> Floats:
    """Return the rows of a matrix [p, d] in the plane that the waves of a frequency span in it [p, 2], for drawing.

    The plane is that of W_Eᵀ cos and W_Eᵀ sin, made orthonormal by a singular value decomposition.
    """
    values = np.asarray(matrix, np.float64)
    directions = waves(len(values), (frequency,)) @ values  # [2, d]
    axes = np.linalg.svd(directions, full_matrices=False)[2]
    return np.asarray((values - values.mean(0)) @ axes.T)


def neuron_spectrum(neurons: npt.NDArray[Any], modulus: int) -> NeuronSpectrum:
    """Return the best frequency of neurons over the grid of pairs [p², neuron], from their 2-D Fourier transform.

    A frequency k explains the waves of k in a, in b, and their products: 8 of the p² components (Nanda et al. 2023).
    """
    shares = neuron_power(neurons, modulus)  # [frequency, neuron]
    silent = ~np.isfinite(shares).all(0)
    best = np.where(silent, 0, np.nan_to_num(shares).argmax(0) + 1)
    noise = np.random.default_rng(0).standard_normal((modulus**2, 64))
    null = float(neuron_power(noise, modulus).max(0).mean())
    return NeuronSpectrum(best, np.where(silent, np.nan, shares.max(0)), null)


def neuron_power(neurons: npt.NDArray[Any], modulus: int) -> Floats:
    """Return what share of each neuron's variance a frequency explains [frequency − 1, neuron]; NaN where constant."""
    squares = grid_transform(neurons, modulus) ** 2
    squares[0, 0] = 0.0
    total = squares.sum((0, 1))
    own = []
    for k in range(1, n_frequencies(modulus) + 1):
        rows = [0, *(row for row in (2 * k - 1, 2 * k) if row < modulus)]
        own.append(squares[np.ix_(rows, rows)].sum((0, 1)))  # the constant's own square is 0
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.array(own) / total
    found[:, total <= ROUNDING * (np.asarray(neurons, np.float64) ** 2).sum(0)] = np.nan
    return np.asarray(found, np.float64)


def grid_transform(values: npt.NDArray[Any], modulus: int) -> Floats:
    """Return the 2-D Fourier transform [wave of a, wave of b, feature] of values over the grid [p², feature]."""
    grid = np.asarray(values, np.float64).reshape(modulus, modulus, -1)
    waves_of = basis(modulus)
    along_a = np.tensordot(waves_of, grid, (1, 0))  # [wave, b, feature]
    return np.asarray(np.tensordot(along_a, waves_of, (1, 1)).transpose(0, 2, 1))  # [wave, wave, feature]


def sum_waves(modulus: int, frequencies: Iterable[int]) -> Floats:
    """Return cos and sin of 2πk(a + b)/p over the grid [n, p²] for some frequencies, orthonormal."""
    a, b = np.divmod(np.arange(modulus**2), modulus)
    return np.asarray(waves(modulus, frequencies)[:, (a + b) % modulus] / modulus**0.5)


def gini(values: npt.NDArray[Any] | Sequence[float]) -> float:
    """Return the Gini coefficient of values ≥ 0: half their mean absolute difference over their mean."""
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    total = ordered.sum()
    if not n or not total > 0:
        return float("nan")
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def _distances(matrix: npt.NDArray[Any]) -> Floats:
    values = np.asarray(matrix, np.float64)
    squares = (values**2).sum(1)
    return np.asarray(np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * values @ values.T, 0)))


def _on_circle(distances: Floats, frequency: int) -> tuple[float, float]:
    """Pearson of distances [p, p] with those around the circle, and the mean of neighbours over the mean of all."""
    p = len(distances)
    n = np.arange(p)
    apart = (frequency * (n[:, None] - n[None])) % p
    around = np.minimum(apart, p - apart)
    pairs = np.triu_indices(p, 1)
    x, y = distances[pairs], around[pairs].astype(np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), 1.0
    return float(np.corrcoef(x, y)[0, 1]), float(x[y == y.min()].mean() / x.mean())


def _best_circle(matrix: Floats) -> tuple[float, float]:
    """Pearson and adjacency of the frequency with the highest Pearson."""
    distances = _distances(matrix)
    return max(_on_circle(distances, k) for k in range(1, n_frequencies(len(matrix)) + 1))
