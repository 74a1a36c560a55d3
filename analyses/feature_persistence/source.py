"""Where the structure of an untrained model comes from: its embeddings and query matrices, read from stored weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import actdb

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sources:
    """Of one untrained model.

    `token_cosines` [pair] among token embeddings, `sum_cosines` [pair] among token + position sums, `query_ratio`
    [layer] the largest singular value of W_Q (heads side by side) over its smallest.
    """

    token_cosines: Floats
    sum_cosines: Floats
    query_ratio: Floats


def find_sources(run: actdb.Run) -> Sources:
    """Read the weights of a run and describe them."""
    tokens, positions = run.weight("W_E"), run.weight("W_pos")
    sums = (tokens[:, None] + positions[None]).reshape(-1, tokens.shape[1])  # [token × position, d_model]
    ratios = []
    for layer in run.layers:
        heads = run.weight("W_Q", layer=layer)  # [head, d_model, d_head]
        values = np.linalg.svd(np.concatenate(list(heads), axis=1), compute_uv=False)
        ratios.append(values[0] / values[-1])
    return Sources(cosines(tokens), cosines(sums), np.array(ratios))


def cosines(vectors: npt.NDArray[np.floating]) -> Floats:
    """Return the cosine of every pair [pair] of vectors [row, d]."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(unit), 1)], np.float64)


def gaussian_cosines(shape: Sequence[int], *, n: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Return mean smallest, mean largest and mean |cosine| of `n` sets of Gaussian vectors [row, d]: the null."""
    generator = np.random.default_rng((seed, 6))
    found = [cosines(generator.standard_normal(tuple(shape))) for _ in range(n)]
    smallest, largest, size = ([f(values) for values in found] for f in (np.min, np.max, lambda v: np.abs(v).mean()))
    return float(np.mean(smallest)), float(np.mean(largest)), float(np.mean(size))
