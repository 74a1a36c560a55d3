"""Partitions that need no training, to hold a trained one against: principal components, the axes, chance."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analyses.subspace_partition.partition import Partition, unit_sizes

TRAINED, PCA, PCA_BLOCKS, IDENTITY, RANDOM = "trained", "PCA", "PCA in blocks", "identity", "random"


def baselines(rows: npt.NDArray[Any], sizes: Sequence[int], *, unit: int, seed: int) -> dict[str, Partition]:
    """Return partitions of rows [row, width]: all but `PCA` have the sizes of the trained one.

    `PCA` has principal components, most variance first, in even blocks of `unit`; `PCA in blocks` has the same ones
    in blocks of the trained sizes, so that its largest block holds most of the variance by far.
    """
    width = rows.shape[1]
    components = principal_components(rows)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0].astype(np.float32)
    cut = tuple(sizes)
    return {
        PCA: Partition(components, unit_sizes(width, unit)),
        PCA_BLOCKS: Partition(components, cut),
        IDENTITY: Partition(np.eye(width, dtype=np.float32), cut),
        RANDOM: Partition(turn, cut),
    }


def principal_components(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the principal components of rows [row, width] as columns [width, width], most variance first."""
    centred = np.asarray(rows, np.float64)
    centred = centred - centred.mean(0)
    vectors = np.linalg.eigh(centred.T @ centred)[1]
    return np.ascontiguousarray(vectors[:, ::-1], np.float32)
