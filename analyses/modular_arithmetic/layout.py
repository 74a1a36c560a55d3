"""Where the numbers are drawn: principal components, spectral, force-directed and circular layouts, in 2-D and 3-D."""

from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh, orthogonal_procrustes
from scipy.sparse.csgraph import laplacian
from sklearn.decomposition import PCA

import actdb

Floats = npt.NDArray[np.float64]
DIMENSIONS = (2, 3)
N_ITERATIONS = 100


def lay_out(name: str, vectors: npt.NDArray[Any], affinity: npt.NDArray[Any], dimension: int, *, seed: int) -> Floats:
    """Return positions [number, dimension] within the unit ball, by one of `LAYOUTS`.

    `vectors` [number, d_model] say where the numbers lie, `affinity` [number, number] ≥ 0 how alike they are: `pca`
    uses the first, `spectral` and `force` (Fruchterman and Reingold 1991) the second, `circular` neither but for its
    height in 3-D. Raises `SettingError` for another name or dimension.
    """
    if name not in LAYOUTS:
        raise actdb.SettingError(f"layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    if dimension not in DIMENSIONS:
        raise actdb.SettingError(f"{dimension} dimensions: choose 2 or 3")
    found = LAYOUTS[name](np.asarray(vectors, np.float64), np.asarray(affinity, np.float64), dimension, seed)
    return _fit(np.pad(found, ((0, 0), (0, dimension - found.shape[1]))))  # few numbers have fewer axes


def align(points: Floats, reference: Floats) -> Floats:
    """Turn positions [number, dimension], reflecting where needed, as near to others as a rotation brings them.

    A layout's axes are arbitrary; aligned, the checkpoints of one model can be seen to move.
    """
    rotation, _ = orthogonal_procrustes(points, reference)
    return np.asarray(points @ rotation, np.float64)


def _principal(vectors: Floats, affinity: Floats, dimension: int, seed: int) -> Floats:
    """The first principal components."""
    n = min(dimension, *vectors.shape)
    return np.asarray(PCA(n, svd_solver="full").fit_transform(vectors), np.float64)


def _spectral(vectors: Floats, affinity: Floats, dimension: int, seed: int) -> Floats:
    """Eigenvectors of the graph's normalised Laplacian after the first, which tells nothing apart."""
    last = min(dimension, len(affinity) - 1)
    return np.asarray(eigh(laplacian(affinity, normed=True), subset_by_index=(1, last))[1], np.float64)


def _force(vectors: Floats, affinity: Floats, dimension: int, seed: int) -> Floats:
    """Edges pull by their weight, all numbers push each other away."""
    return _array(nx.spring_layout(_graph(affinity), dim=dimension, seed=seed, iterations=N_ITERATIONS))


def _circular(vectors: Floats, affinity: Floats, dimension: int, seed: int) -> Floats:
    """The numbers in order on a ring; in 3-D their first principal component is the height."""
    ring = _array(nx.circular_layout(nx.empty_graph(len(vectors))))
    if dimension == 2:
        return ring
    height = _principal(vectors, affinity, 1, seed)
    return np.hstack([ring, height / (2 * np.abs(height).max() or 1.0)])


LAYOUTS: Mapping[str, Callable[[Floats, Floats, int, int], Floats]] = {
    "pca": _principal,
    "spectral": _spectral,
    "force": _force,
    "circular": _circular,
}


def _graph(affinity: Floats) -> Any:
    weights = affinity.copy()
    np.fill_diagonal(weights, 0)
    return nx.from_numpy_array(weights)


def _array(positions: Mapping[int, Any]) -> Floats:
    return np.array([positions[number] for number in range(len(positions))], np.float64)


def _fit(points: Floats) -> Floats:
    """Centre, and scale so that the outermost lies at 1."""
    centred = points - points.mean(0)
    return np.asarray(centred / (np.linalg.norm(centred, axis=1).max() or 1.0), np.float64)
