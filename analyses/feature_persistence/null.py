"""The null check: selectivity of "neurons" that are noise, N(0, 1), at the cells of the real sequences."""

from dataclasses import dataclass

import numpy as np

from analyses.common.selectivity import CellSums
from analyses.feature_persistence.selection import KINDS, Cells, from_sums

VALUES_AT_ONCE = 2**23


@dataclass(frozen=True)
class NullCheck:
    """Of noise: by kind, false positives in all repetitions, mean η² and what is expected of it."""

    n_repetitions: int
    n_neurons: int
    n_rows: int
    false_positives: dict[str, int]
    mean_eta: dict[str, float]
    expected_eta: dict[str, float]


def check_null(cells: Cells, *, prompt_lengths: list[int], n_neurons: int, n_repetitions: int, seed: int) -> NullCheck:
    """Repeat the measurement on noise of the same shape.

    The expectation of η² without any effect is (groups − 1) / (n − 1).
    """
    prompt = np.repeat(np.arange(len(prompt_lengths)), prompt_lengths)
    pos = np.concatenate([np.arange(n) for n in prompt_lengths])
    places = cells(prompt, pos)
    generator = np.random.default_rng((seed, 4))
    positives, etas = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0.0)
    at_once = max(1, VALUES_AT_ONCE // (len(places) * n_neurons))
    for begin in range(0, n_repetitions, at_once):
        shape = (min(at_once, n_repetitions - begin), len(places), n_neurons)
        sums = CellSums(cells.n_cells)
        sums.add(generator.standard_normal(shape, np.float32), places)
        found = from_sums(sums, cells.shape)
        for kind in KINDS:
            positives[kind] += int(found.selective(kind).sum())
            etas[kind] += float(found.by_kind(kind).eta_squared.sum())
    n, values = len(places), n_repetitions * n_neurons
    groups = dict(zip(KINDS, cells.shape, strict=True))
    return NullCheck(
        n_repetitions=n_repetitions,
        n_neurons=n_neurons,
        n_rows=n,
        false_positives=positives,
        mean_eta={kind: etas[kind] / values for kind in KINDS},
        expected_eta={kind: (groups[kind] - 1) / (n - 1) for kind in KINDS},
    )
