"""Semantic rings, to be falsified: are states of one category on a ring, more than Gaussians of the same covariance?"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ring:
    """Circularity and persistent H1 of a cloud of states, with their means under matched Gaussians and one-sided p."""

    circularity: float
    circularity_null: float
    circularity_p: float
    persistence: float
    persistence_null: float
    persistence_p: float
    n: int


def circularity(states: npt.NDArray[Any]) -> float:
    """Return 1 − std(r) ÷ mean(r) of states [state, d] in their top principal plane, both axes scaled to unit variance.

    1 for a ring round its centre, √(4/π − 1): 0.477 for a Gaussian. 0 where the states lie on a line.
    """
    plane = principal_plane(states)
    spread = plane.std(0)
    if spread[1] <= 1e-9 * max(spread[0], 1e-300):
        return 0.0
    radius = np.sqrt(((plane / spread) ** 2).sum(1))
    return float(1 - radius.std() / radius.mean())


def principal_plane(states: npt.NDArray[Any]) -> Floats:
    """Return states [state, d] in the plane of their two greatest principal components: [state, 2]."""
    centred = np.asarray(states, np.float64) - np.mean(states, axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return np.asarray(left[:, :2] * values[:2])


def loop_persistence(states: npt.NDArray[Any]) -> float:
    """Return the longest life of a loop (H1, Vietoris–Rips; ripser) over the median distance of states [state, d].

    0 where there is no loop. Costs some 10 ms for 100 states.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ripser wonders at more dimensions than points, and its imports are deprecated
        from ripser import ripser
        from scipy.spatial.distance import pdist, squareform

        distances = pdist(np.asarray(states, np.float64))
        loops = ripser(squareform(distances), maxdim=1, distance_matrix=True)["dgms"][1]
    scale = float(np.median(distances))
    return float((loops[:, 1] - loops[:, 0]).max() / scale) if len(loops) and scale > 0 else 0.0


def matched_gaussian(states: npt.NDArray[Any], generator: np.random.Generator) -> Floats:
    """Draw as many states from the Gaussian of the states' own covariance, also where it has not full rank."""
    centred = np.asarray(states, np.float64) - np.mean(states, axis=0)
    return np.asarray(generator.standard_normal((len(centred), len(centred))) @ centred / np.sqrt(len(centred) - 1))


def measure_ring(states: npt.NDArray[Any], *, n_null: int, seed: int, n_most: int = 120) -> Ring:
    """Measure one cloud [state, d] and as many matched Gaussians.

    Step 9. Of more than `n_most` states some are drawn: the cost of H1 rises with their cube. States are first turned
    into their own principal axes, which changes no distance.
    """
    generator = np.random.default_rng((seed, 10))
    kept = np.asarray(states, np.float64)
    if len(kept) > n_most:
        kept = kept[np.sort(generator.permutation(len(kept))[:n_most])]
    centred = kept - kept.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    cloud = left * values
    null = [
        (circularity(drawn), loop_persistence(drawn))
        for drawn in (matched_gaussian(cloud, generator) for _ in range(n_null))
    ]
    rings, loops = np.array(null).T
    found, loop = circularity(cloud), loop_persistence(cloud)
    return Ring(
        circularity=found,
        circularity_null=float(rings.mean()),
        circularity_p=float((1 + (rings >= found).sum()) / (1 + n_null)),
        persistence=loop,
        persistence_null=float(loops.mean()),
        persistence_p=float((1 + (loops >= loop).sum()) / (1 + n_null)),
        n=len(cloud),
    )
