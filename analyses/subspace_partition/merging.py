"""Which subspaces are merged: greedily, the pairs that tell most about one another, each subspace once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from analyses.subspace_partition.partition import column_ranges

Pair = tuple[int, int]


@dataclass(frozen=True)
class Event:
    """What was decided at a step: the information of all pairs, normalised, and which pairs were merged or begun anew.

    `information` is [subspace, subspace] in nats a dimension, NaN on the diagonal; `sizes` are those before.
    """

    step: int
    kind: str
    sizes: tuple[int, ...]
    information: npt.NDArray[np.float64]
    pairs: tuple[Pair, ...]

    @property
    def highest(self) -> float:
        """The highest normalised information of a pair; NaN where there is one subspace."""
        values = self.information[np.isfinite(self.information)]
        return float(values.max()) if len(values) else float("nan")


def choose_pairs(information: npt.NDArray[np.float64], *, threshold: float, n_most: int) -> tuple[Pair, ...]:
    """Choose disjoint pairs above a threshold, the highest first, at most `n_most`."""
    n = len(information)
    ordered = sorted(((float(information[i, j]), i, j) for i in range(n) for j in range(i + 1, n)), reverse=True)
    chosen: list[Pair] = []
    for value, i, j in ordered:
        if len(chosen) == n_most or not value > threshold:
            break
        if not {i, j} & {member for pair in chosen for member in pair}:
            chosen.append((i, j))
    return tuple(chosen)


def merge_pairs(
    basis: torch.Tensor, sizes: Sequence[int], pairs: Sequence[Pair]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Put the columns of each pair side by side, and all blocks in descending order of size.

    Returns the basis [width, width] with its columns permuted, and the new sizes. Blocks of one size keep their order.
    """
    columns = list(column_ranges(sizes))
    partner = dict(pairs)
    merged = {j for _, j in pairs}
    blocks = [
        torch.cat([basis[:, columns[k]] for k in (i, partner[i])], 1) if i in partner else basis[:, columns[i]]
        for i in range(len(sizes))
        if i not in merged
    ]
    blocks.sort(key=lambda block: -block.shape[1])
    return torch.cat(blocks, 1), tuple(block.shape[1] for block in blocks)


def begin_anew(basis: torch.Tensor, sizes: Sequence[int], pair: Pair, *, seed: int) -> torch.Tensor:
    """Return the basis with a pair's columns turned at random within the span of both: another start for the two."""
    columns = list(column_ranges(sizes))
    places = torch.cat([torch.arange(columns[k].start, columns[k].stop) for k in pair])
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(places), len(places), generator=generator)).Q.to(basis.device)
    out = basis.clone()
    out[:, places] = basis[:, places] @ turn
    return out
