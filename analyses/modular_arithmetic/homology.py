"""Loops in a cloud of points: persistent homology in degree 1, against Gaussian clouds of the same covariance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ripser import ripser
from scipy.spatial.distance import pdist, squareform

Floats = npt.NDArray[np.float64]
LEVEL = 0.05


@dataclass(frozen=True)
class Homology:
    """The loops (H1) of a cloud: bars [loop, 2] of birth and death, as shares of the cloud's diameter, longest first.

    `null` holds the longest bar of each of several Gaussian clouds with the same number of points and covariance.
    """

    bars: Floats
    null: Floats

    @property
    def longest(self) -> float:
        """Length of the longest bar; 0 without any."""
        return float(self.lengths.max(initial=0.0))

    @property
    def lengths(self) -> Floats:
        """Length of each bar: death − birth."""
        return np.asarray(self.bars[:, 1] - self.bars[:, 0], np.float64)

    @property
    def expected(self) -> float:
        """Mean of the null: the longest bar that a cloud without structure has."""
        return float(self.null.mean()) if len(self.null) else float("nan")

    @property
    def p(self) -> float:
        """Chance of a bar at least as long in the null: (1 + clouds that have one) / (1 + clouds)."""
        return float((1 + np.sum(self.null >= self.longest)) / (1 + len(self.null)))

    @property
    def n_loops(self) -> int:
        """Bars longer than the longest bar of 95 % of the null's clouds."""
        return int(np.sum(self.lengths > np.quantile(self.null, 1 - LEVEL))) if len(self.null) else len(self.bars)


def find_loops(points: npt.NDArray[Any], *, n_null: int, seed: int) -> Homology:
    """Return the H1 of points [point, d] by the Vietoris–Rips filtration (ripser; Bauer 2021).

    Costs 1 + n_null filtrations: some milliseconds each up to 100 points.
    """
    values = np.asarray(points, np.float64)
    random = np.random.default_rng(seed)
    null = [longest_bar(same_covariance(values, random)) for _ in range(n_null)]
    return Homology(loop_bars(values), np.array(null, np.float64))


def loop_bars(points: Floats) -> Floats:
    """Return birth and death [loop, 2] of the H1 classes, as shares of the largest distance, longest first."""
    distances = squareform(pdist(points))
    largest = float(distances.max(initial=0.0))
    if not largest > 0:
        return np.zeros((0, 2))
    bars = np.asarray(ripser(distances / largest, maxdim=1, distance_matrix=True)["dgms"][1], np.float64)
    return bars[np.argsort(bars[:, 0] - bars[:, 1])]


def longest_bar(points: Floats) -> float:
    """Return the length of the longest H1 bar, as a share of the largest distance; 0 without any."""
    bars = loop_bars(points)
    return float(bars[0, 1] - bars[0, 0]) if len(bars) else 0.0


def same_covariance(points: Floats, random: np.random.Generator) -> Floats:
    """Draw as many points from the Gaussian with the points' covariance, in its principal axes [point, axis].

    It has the cloud's dimensions and their sizes, and no loop: what few dimensions alone bring is not taken for one.
    """
    sizes = np.linalg.svd(points - points.mean(0), compute_uv=False) / np.sqrt(max(len(points) - 1, 1))
    return np.asarray(random.standard_normal((len(points), len(sizes))) * sizes, np.float64)
