"""Communities of heads that are active together: Louvain on the positive correlations of their fingerprints."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_rand_score

from analyses.common.significance import Comparison, difference_test

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Communities:
    """A cut of heads: `member` [head] numbers communities from the largest; `modularity` says how well they part.

    `agreements` are the adjusted Rand indices of all pairs of seeds; `null` [time] are the modularities after permuting
    each head's prompts by itself.
    """

    member: Ints
    modularity: float
    agreements: Floats
    null: Floats
    weights: Floats

    @property
    def n(self) -> int:
        """How many communities there are."""
        return int(self.member.max()) + 1

    @property
    def stability(self) -> float:
        """Mean adjusted Rand index over all pairs of seeds."""
        return float(self.agreements.mean())


def coactivation(fingerprints: npt.NDArray[Any]) -> Floats:
    """Return max(0, Pearson's r) between heads over prompts [head, head], 0 on the diagonal and for constant heads."""
    values = np.asarray(fingerprints, np.float64)
    centred = values - values.mean(0)
    spread = np.sqrt((centred**2).sum(0))
    scaled = np.divide(
        centred, spread, out=np.zeros_like(centred), where=spread > 1e-12 * np.abs(values).max(initial=1)
    )
    weights = np.maximum(scaled.T @ scaled, 0)
    np.fill_diagonal(weights, 0)
    return np.asarray(weights)


def cut(weights: Floats, *, seed: int) -> tuple[Ints, float]:
    """Cut a weighted graph by Louvain (Blondel et al. 2008; networkx); returns members, largest first, and Q."""
    graph = nx.from_numpy_array(weights)
    found = sorted(nx.community.louvain_communities(graph, seed=seed), key=lambda heads: (-len(heads), min(heads)))
    member = np.empty(len(weights), np.int64)
    for number, heads in enumerate(found):
        member[list(heads)] = number
    return member, float(nx.community.modularity(graph, found)) if weights.any() else 0.0


def find_communities(fingerprints: npt.NDArray[Any], *, n_seeds: int, n_null: int, seed: int) -> Communities:
    """Cut the heads' co-activation graph: the best of `n_seeds` cuts, how far they agree, and Q of shuffled columns.

    Step 2. Costs one Louvain a seed and a permutation: 0.1 s each for 144 heads.
    """
    weights = coactivation(fingerprints)
    cuts = [cut(weights, seed=seed + i) for i in range(n_seeds)]
    member, modularity = max(cuts, key=lambda found: found[1])
    agreements = [adjusted_rand_score(a, b) for (a, _), (b, _) in combinations(cuts, 2)]
    generator = np.random.default_rng((seed, 2))
    null = [
        cut(coactivation(generator.permuted(np.asarray(fingerprints), axis=0)), seed=seed + i)[1] for i in range(n_null)
    ]
    return Communities(member, modularity, np.array(agreements or [1.0]), np.array(null), weights)


@dataclass(frozen=True)
class Separation:
    """How far each community tells symbolic tasks from natural language, in standard deviations of its heads.

    `by_category` [community, category] are mean z-scores; `tests` [community] compare symbolic with other prompts.
    """

    by_category: Floats
    tests: tuple[Comparison, ...]


def separate(
    fingerprints: npt.NDArray[Any],
    member: Ints,
    *,
    category: Ints,
    symbolic: npt.NDArray[np.bool_],
    names: Sequence[str],
    seed: int,
) -> Separation:
    """Compare the communities' mean activation between categories, by permuting prompts' labels."""
    values = np.asarray(fingerprints, np.float64)
    spread = values.std(0)
    scores = np.divide(values - values.mean(0), spread, out=np.zeros_like(values), where=spread > 0)
    activity = np.stack([scores[:, member == i].mean(1) for i in range(int(member.max()) + 1)])  # [community, prompt]
    by_category = np.stack([activity[:, category == i].mean(1) for i in range(len(names))], 1)
    if symbolic.all() or not symbolic.any():
        return Separation(by_category, ())
    tests = tuple(difference_test(row[symbolic], row[~symbolic], seed=seed) for row in activity)
    return Separation(by_category, tests)
