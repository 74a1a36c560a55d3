"""Mutual information between subspaces, by the estimator of Kraskov, Stögbauer and Grassberger (2004), their first:

    I = ψ(1) + ψ(N) − ⟨ψ(n_x + 1) + ψ(n_y + 1)⟩

with k = 1: ε is the distance to a query's nearest key in the max norm of the two subspaces' distances, each divided by
the root of the subspace's total variance; n_x and n_y count the keys that lie strictly within ε in one subspace alone.
Queries are no keys; N is the number of keys, and one: the query. Nats.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from analyses.subspace_partition.partition import column_ranges

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Distances (of all subspaces) that are held at once."""
QUERY_BLOCK = 32
JITTER = 1e-4


def mutual_information(
    queries: torch.Tensor,
    keys: torch.Tensor,
    basis: torch.Tensor,
    sizes: Sequence[int],
    *,
    jitter: float = JITTER,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Estimate the mutual information of every pair of subspaces in nats, [subspace, subspace], NaN on the diagonal.

    `queries` [query, width] and `keys` [key, width] are different rows. Rows that are equal (the same token at the same
    place) break the estimator, which is for densities: Gaussian noise of `jitter` times a subspace's spread is added to
    both, as its authors do. Products are computed in float64, so that distances far below a row's length hold. Costs
    two passes of n_queries · n_keys · (width multiplications + n_subspaces² comparisons), memory for a tile.
    """
    with torch.no_grad():
        points = [rows.to(torch.float64) @ basis.detach().to(torch.float64) for rows in (keys, queries)]
        middle = points[0].mean(0)
        scaled = _scale([rows - middle for rows in points], sizes, jitter, seed)
        total = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
        for block in scaled[1].split(QUERY_BLOCK):
            total += _digammas(block, scaled[0], sizes)
    mean = total / len(queries)
    count = torch.tensor([1.0, len(keys) + 1.0], dtype=torch.float64)
    information = (torch.digamma(count).sum() - (mean + mean.T)).numpy()
    np.fill_diagonal(information, np.nan)
    return information


def normalised(information: npt.NDArray[np.float64], sizes: Sequence[int]) -> npt.NDArray[np.float64]:
    """Divide the information of each pair by the pair's dimensions, d_j + d_k: what the merge threshold is about."""
    widths = np.asarray(sizes, np.float64)
    return information / (widths[:, None] + widths[None])


def _scale(points: Sequence[torch.Tensor], sizes: Sequence[int], jitter: float, seed: int) -> list[torch.Tensor]:
    """Divide each subspace by the root of its total variance among the keys, and add noise of that much less."""
    variance = points[0].var(0, correction=0)
    roots = torch.cat([variance[c].sum().sqrt().expand(c.stop - c.start) for c in column_ranges(sizes)])
    roots = torch.where(roots > 0, roots, 1.0)
    generator = torch.Generator().manual_seed(seed)
    return [
        rows / roots + jitter * torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
        for rows in points
    ]


def _digammas(queries: torch.Tensor, keys: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Sum over queries of ψ(n + 1), [subspace, partner]: n counts keys within the pair's ε in the subspace alone."""
    n = len(sizes)
    tile_rows = max(1, TILE_ELEMENTS[keys.device.type] // (n * len(queries)))
    reach = torch.full((n, n, len(queries)), torch.inf, device=keys.device)  # ε of each pair, above the diagonal
    for tile in keys.split(tile_rows):
        distances = _distances(queries, tile, sizes)
        for i in range(n - 1):
            nearest = torch.maximum(distances[i + 1 :], distances[i]).amin(-1)
            torch.minimum(reach[i, i + 1 :], nearest, out=reach[i, i + 1 :])
    reach = torch.minimum(reach, reach.transpose(0, 1))
    counts = torch.zeros(n, n, len(queries), dtype=torch.float64, device=keys.device)
    for tile in keys.split(tile_rows):
        distances = _distances(queries, tile, sizes)
        for i in range(n):
            counts[i] += (distances[i] < reach[i].unsqueeze(-1)).sum(-1)
    counts[range(n), range(n)] = 0
    return torch.digamma(counts + 1).sum(-1).cpu()


def _distances(queries: torch.Tensor, keys: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return distances [subspace, query, key] in float32, their squares taken in float64."""
    out = torch.empty(len(sizes), len(queries), len(keys), device=keys.device)
    for i, columns in enumerate(column_ranges(sizes)):
        q, k = queries[:, columns], keys[:, columns]
        squares = torch.addmm(k.square().sum(1), q, k.T, alpha=-2) + q.square().sum(1, keepdim=True)
        out[i] = squares.clamp_min_(0).sqrt_()
    return out
