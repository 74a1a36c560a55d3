"""Patches between topologically close and distant numbers: does the model lose less where the source lies near?

A pair's state is replaced by that of another pair whose answer is some steps away: next to it on the circle of numbers,
opposite to it, or the nearest and farthest of the model's own states. A model that computes with the number loses the
answer for any other number; how far its logits move may still tell near from far.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cdist

from analyses.common.significance import Estimate, mean_interval
from analyses.modular_arithmetic.concept import class_means
from analyses.modular_arithmetic.grid import Grid, Ints
from analyses.modular_arithmetic.path import share_lost
from analyses.modular_arithmetic.state import State

SAME, CLOSE, DISTANT = "same answer", "next number", "opposite number"
NEAREST, FARTHEST = "nearest state", "farthest state"
CLAIMED_LOST = {CLOSE: 0.05, DISTANT: 0.40}
"""What the original states of patches between topologically close and distant concepts."""


@dataclass(frozen=True)
class Moved:
    """What a patch from one kind of source does: accuracy lost, and how far the logits move.

    `distance` is the Euclidean distance of the logits (each pair's about their mean) from the clean ones, over the mean
    such distance between two pairs of any answers.
    """

    source: str
    lost: Estimate
    distance: Estimate


def patch_neighbours(grid: Grid, state: State, *, seed: int) -> list[Moved]:
    """Patch a state from pairs of the same answer, the next, the opposite, and by nearness of the model's own states.

    A source is drawn at random among the pairs that have its answer. Costs a forward pass of all pairs a kind.
    """
    generator = np.random.default_rng((seed, 51))
    clean = _centred(grid.clean)
    apart = float((clean - clean[torch.from_numpy(generator.permutation(grid.n_pairs))]).norm(dim=-1).mean())
    right = grid.right(grid.clean).astype(np.float64)
    found = []
    for name, target in _targets(grid, state, generator).items():
        a = generator.integers(0, grid.modulus, grid.n_pairs)
        source = a * grid.modulus + (target[grid.answers] - a) % grid.modulus
        logits = grid.logits([state.put(state.rows[source])])
        moved = (_centred(logits) - clean).norm(dim=-1).double().numpy() / max(apart, 1e-12)
        found.append(Moved(name, share_lost(right - grid.right(logits)), mean_interval(moved)))
    return found


def _targets(grid: Grid, state: State, generator: np.random.Generator) -> Mapping[str, Ints]:
    """For every kind of source, the answer that each answer is given [answer]."""
    p = grid.modulus
    numbers = np.arange(p)
    side = generator.choice([-1, 1], p)
    means = class_means(state.rows, grid.answers, p)
    distances = cdist(means, means)
    others = np.where(np.eye(p, dtype=bool), np.nan, distances)
    return {
        SAME: numbers,
        CLOSE: (numbers + side) % p,
        DISTANT: (numbers + side * (p // 2)) % p,
        NEAREST: np.nanargmin(others, 1),
        FARTHEST: np.nanargmax(others, 1),
    }


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)
