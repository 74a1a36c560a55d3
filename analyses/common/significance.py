"""Intervals and tests, by scipy and statsmodels; each takes a seed where it draws.

The functions say which interval fits which figure: `mean_interval` for means over few seeds (Student's t),
`proportion_interval` for counts out of n (Wilson), `bootstrap_interval` for any other statistic of many observations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
N_RESAMPLES = 2000
METHODS = {"bonferroni": "bonferroni", "benjamini-hochberg": "fdr_bh", "holm": "holm"}


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}], n = {self.n}"


@dataclass(frozen=True)
class Comparison:
    """An observed statistic, its two-sided p, and the mean of the statistic under the null."""

    value: float
    p: float
    null: float


def mean_interval(
    values: Sequence[float] | npt.NDArray[Any], *, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Return the mean with Student's t interval; NaNs are left out, and one value has an interval without end.

    `within` are bounds of what is measured, such as (0, 1) for shares, at which the interval is cut.
    """
    kept = _finite(values)
    mean = float(kept.mean()) if len(kept) else np.nan
    if len(kept) < 2:
        return Estimate(mean, *within, len(kept))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(kept) - 1) * kept.std(ddof=1) / np.sqrt(len(kept)))
    return Estimate(mean, max(mean - half, within[0]), min(mean + half, within[1]), len(kept))


def proportion_interval(n_true: int, n: int) -> Estimate:
    """Return a proportion with Wilson's interval; of nothing, NaN between 0 and 1."""
    if n == 0:
        return Estimate(np.nan, 0.0, 1.0, 0)
    low, high = proportion_confint(n_true, n, alpha=1 - CONFIDENCE, method="wilson")
    return Estimate(n_true / n, float(low), float(high), n)


def bootstrap_interval(
    *samples: Sequence[float] | npt.NDArray[Any],
    statistic: Callable[..., Any] = np.mean,
    paired: bool = False,
    seed: int,
) -> Estimate:
    """Return `statistic(*samples)` with its percentile bootstrap interval.

    `paired` resamples several samples together. Costs `N_RESAMPLES` calls of the statistic.
    """
    arrays = [np.asarray(sample, np.float64) for sample in samples]
    result = stats.bootstrap(
        arrays,
        lambda *chosen: float(statistic(*chosen)),
        paired=paired,
        vectorized=False,
        n_resamples=N_RESAMPLES,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Estimate(float(statistic(*arrays)), float(low), float(high), min(map(len, arrays)))


def ratio_interval(
    a: Sequence[float] | npt.NDArray[Any], b: Sequence[float] | npt.NDArray[Any], *, seed: int
) -> Estimate:
    """Return Σ a ÷ Σ b of paired values with its bootstrap interval over pairs; one pair has an interval without end.

    NaN where Σ b is 0.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def ratio(above: Floats, below: Floats) -> float:
        total = float(np.sum(below))
        return float(np.sum(above)) / total if total else np.nan

    if len(x) < 2:
        return Estimate(ratio(x, y), -np.inf, np.inf, len(x))
    return bootstrap_interval(x, y, statistic=ratio, paired=True, seed=seed)


def difference_test(
    a: Sequence[float] | npt.NDArray[Any], b: Sequence[float] | npt.NDArray[Any], *, seed: int
) -> Comparison:
    """Test whether two independent samples differ in their mean, by permuting which sample a value belongs to."""
    return _permute(
        (a, b), lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis), kind="independent", seed=seed
    )


def paired_test(
    a: Sequence[float] | npt.NDArray[Any], b: Sequence[float] | npt.NDArray[Any], *, seed: int
) -> Comparison:
    """Test whether paired values differ in their mean, by permuting which of the two is which, pair by pair."""
    return _permute((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), kind="samples", seed=seed)


def correlation_test(
    a: Sequence[float] | npt.NDArray[Any], b: Sequence[float] | npt.NDArray[Any], *, seed: int
) -> Comparison:
    """Test Spearman's rank correlation of paired values, by permuting the pairing; NaN where a sample is constant."""
    ranks = [stats.rankdata(np.asarray(sample, np.float64)) for sample in (a, b)]
    if min(float(np.ptp(rank)) for rank in ranks) == 0:
        return Comparison(np.nan, 1.0, 0.0)
    x, y = ((rank - rank.mean()) / rank.std() for rank in ranks)
    # Permuting one of the two is enough; scipy permutes whichever is given first.
    return _permute((x,), lambda chosen, axis: np.mean(chosen * y, axis=axis), kind="pairings", seed=seed)


def rank_correlation(a: Any, b: Any) -> float:
    """Return Spearman's rank correlation of two samples; NaN where one is constant."""
    x, y = stats.rankdata(a), stats.rankdata(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def significant(p: npt.NDArray[Any], *, level: float = 0.01, method: str = "bonferroni") -> npt.NDArray[np.bool_]:
    """Return which of several tests [...] are significant at `level` after correction over all of them.

    `method` is one of `METHODS`: bonferroni and holm bound the chance of any false positive, benjamini-hochberg the
    share of false ones. A NaN, of a test that could not be made, counts as not significant.
    """
    flat = np.nan_to_num(np.asarray(p, np.float64).ravel(), nan=1.0)
    if not len(flat):
        return np.zeros(np.shape(p), np.bool_)
    rejected = multipletests(flat, alpha=level, method=METHODS[method])[0]
    return np.asarray(rejected, np.bool_).reshape(np.shape(p))


def _permute(samples: Sequence[Any], statistic: Callable[..., Any], *, kind: str, seed: int) -> Comparison:
    arrays = [np.asarray(sample, np.float64) for sample in samples]
    result = stats.permutation_test(
        arrays,
        statistic,
        permutation_type=kind,
        vectorized=True,
        n_resamples=N_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return Comparison(float(result.statistic), float(result.pvalue), float(np.mean(result.null_distribution)))


def _finite(values: Any) -> Floats:
    array = np.asarray(values, np.float64).ravel()
    return array[np.isfinite(array)]
