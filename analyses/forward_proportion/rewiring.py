"""Do heads read others differently by context? Cosines of incoming vectors within and between categories.

For a head B the incoming vector of a prompt is I[:, B]. With unit vectors u the mean cosine over pairs of prompts of a
group is (‖Σ u‖² − n) / (n² − n): sums over prompts are enough, so that no matrix of pairs is made, and resampling
prompts or permuting labels only changes weights. A pair is of two different prompts, also where one was drawn twice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Blocks = Callable[[], Iterable[tuple[Ints, npt.NDArray[np.float32]]]]
AT_ONCE = 64


@dataclass(frozen=True)
class Rewiring:
    """Mean cosine of incoming vectors within ÷ between categories, its bootstrap interval, and its permuted null.

    `centred` is within − between of the same after each head's mean incoming vector is taken off, which shows small
    changes that a common direction hides; `centred_p` its one-sided permutation p. `n` counts prompts.
    """

    within: float
    between: float
    low: float
    high: float
    p: float
    null: float
    centred: float
    centred_p: float
    n: int

    @property
    def ratio(self) -> float:
        """Within ÷ between."""
        return self.within / self.between


def incoming(values: npt.NDArray[Any], mean: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float32]:
    """Return unit incoming vectors [prompt, target · source] of I [prompt, source, target].

    They are 0 for heads that read nothing. `mean` [source, target] is taken off first.
    """
    shifted = np.asarray(values if mean is None else values - mean, np.float32)
    size = np.sqrt((shifted**2).sum(1, keepdims=True))
    unit = np.divide(shifted, size, out=np.zeros_like(shifted), where=size > 0)
    return np.asarray(unit.transpose(0, 2, 1).reshape(len(unit), -1), np.float32)


def measure_rewiring(
    blocks: Blocks, prompts: Ints, category: Ints, *, n_resamples: int, n_permutations: int, seed: int
) -> Rewiring:
    """Compare incoming vectors within and between categories.

    Step 5. `blocks()` yields prompt ids and I [prompt, source, target]; it is called three times (once for the mean),
    and what is kept does not grow with the prompts but for a weight a prompt and resample.
    """
    generator = np.random.default_rng((seed, 5))
    n, n_groups = len(prompts), int(category.max()) + 1
    weights = np.ones((1 + n_resamples + n_permutations, n), np.float32)
    groups = np.broadcast_to(category, weights.shape).copy()
    for i in range(1, 1 + n_resamples):
        drawn = np.concatenate(
            [generator.choice(np.flatnonzero(category == g), (category == g).sum()) for g in range(n_groups)]
        )
        weights[i] = np.bincount(drawn, minlength=n)
    for i in range(1 + n_resamples, len(weights)):
        groups[i] = generator.permutation(category)
    mean = mean_interaction(blocks, prompts)
    within, between = pair_means(blocks, prompts, groups, weights, n_groups)
    null = slice(1 + n_resamples, None)
    picked = np.r_[0, np.arange(1 + n_resamples, len(weights))]
    inner, outer = pair_means(blocks, prompts, groups[picked], weights[picked], n_groups, mean=mean)
    ratio, gap = within / between, inner - outer
    low, high = np.quantile(ratio[1 : 1 + n_resamples], [0.025, 0.975]) if n_resamples else (np.nan, np.nan)
    return Rewiring(
        within=float(within[0]),
        between=float(between[0]),
        low=float(low),
        high=float(high),
        p=_p(ratio[0], ratio[null]),
        null=float(ratio[null].mean()) if n_permutations else 1.0,
        centred=float(gap[0]),
        centred_p=_p(gap[0], gap[1:]),
        n=n,
    )


def mean_interaction(blocks: Blocks, prompts: Ints) -> Floats:
    """Return the mean I [source, target] over prompts."""
    total: Any = 0.0
    for ids, values in blocks():
        total = total + values[np.isin(ids, prompts)].sum(0, dtype=np.float64)
    return np.asarray(total / len(prompts))


def pair_means(
    blocks: Blocks,
    prompts: Ints,
    groups: Ints,
    weights: npt.NDArray[np.float32],
    n_groups: int,
    *,
    mean: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Return mean cosines over pairs within and between groups, of each row of `groups` and `weights` [time, prompt].

    Cosines are averaged over the heads that read anything. A pair counts by the product of its prompts' weights.
    """
    place = {int(prompt): i for i, prompt in enumerate(prompts)}
    n_times = len(weights)
    sums: npt.NDArray[np.float32] | None = None  # [time · group, target · source]
    reading = np.zeros(len(prompts))  # heads that read anything, of each prompt
    for ids, values in blocks():
        kept = np.array([int(i) in place for i in ids], np.bool_)
        if not kept.any():
            continue
        unit = incoming(values[kept], mean)
        columns = np.array([place[int(i)] for i in ids[kept]])
        reading[columns] = (unit**2).sum(1)
        chosen = np.zeros((n_times * n_groups, len(columns)), np.float32)
        rows = np.arange(n_times)[:, None] * n_groups + groups[:, columns]
        chosen[rows, np.arange(len(columns))] = weights[:, columns]
        added = chosen @ unit
        sums = added if sums is None else np.add(sums, added, out=sums)
    if sums is None:
        return np.full(n_times, np.nan), np.full(n_times, np.nan)
    of_group = np.empty((n_times, n_groups))
    overall = np.empty(n_times)
    for begin in range(0, n_times, AT_ONCE):  # in float64, some at a time: a ratio near 1 asks for it
        some = slice(begin, begin + AT_ONCE)
        wide = sums.reshape(n_times, n_groups, -1)[some].astype(np.float64)
        of_group[some], overall[some] = (wide**2).sum(-1), (wide.sum(1) ** 2).sum(-1)
    doubles = weights.astype(np.float64)
    own = (doubles**2) @ reading  # what pairs of a prompt with itself add
    per_pair = float(np.median(reading))
    mass = np.stack([(doubles * (groups == g)).sum(1) for g in range(n_groups)], 1)
    n_within = (mass**2).sum(1) - (doubles**2).sum(1)
    n_between = mass.sum(1) ** 2 - (mass**2).sum(1)
    within = (of_group.sum(1) - own) / n_within / per_pair
    between = (overall - of_group.sum(1)) / n_between / per_pair
    return within, between


def _p(value: float, null: Floats) -> float:
    """Return the one-sided p of a value among permuted ones."""
    return float((1 + np.count_nonzero(null >= value)) / (1 + len(null)))
