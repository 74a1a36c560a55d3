"""How much of the divergence of outputs a distance of states explains: R² out of sample, isotonic and linear."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GroupKFold

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
N_FOLDS = 5
N_RESAMPLES = 1000
KINDS = ("isotonic", "linear")


@dataclass(frozen=True)
class Explained:
    """R² of held-out pairs with its bootstrap interval over prompts, and its mean after permuting the divergences."""

    r2: float
    low: float
    high: float
    null: float
    n: int


def explain(x: Floats, y: Floats, group: Ints, *, kind: str, seed: int, n_null: int = 3) -> Explained:
    """Predict y [pair] from x [pair], pairs of one `group` (a prompt) held out together.

    `kind` is isotonic (rising) or linear. R² = 1 − Σ (y − ŷ)² ÷ Σ (y − mean y)² over all held-out pairs. Groups are
    resampled for the interval, the fits kept.
    """
    error = (y - held_out(x[:, None], y, group, kind=kind)) ** 2
    generator = np.random.default_rng((seed, 9))
    low, high = np.quantile(_resampled(error, y, group, generator), [0.025, 0.975])
    null = []
    for _ in range(n_null):
        shuffled = generator.permutation(y)
        null.append(r_squared((shuffled - held_out(x[:, None], shuffled, group, kind=kind)) ** 2, shuffled))
    return Explained(r_squared(error, y), float(low), float(high), float(np.mean(null)) if null else np.nan, len(y))


def held_out(x: Floats, y: Floats, group: Ints, *, kind: str) -> Floats:
    """Return y predicted from x [pair, 1] by fits that have not seen the pair's group."""
    predicted = np.empty(len(y))
    n_folds = min(N_FOLDS, len(np.unique(group)))
    for train, test in GroupKFold(n_folds).split(x, y, group):
        model: Any = IsotonicRegression(out_of_bounds="clip") if kind == "isotonic" else LinearRegression()
        predicted[test] = model.fit(x[train], y[train]).predict(x[test])
    return predicted


def r_squared(error: Floats, y: Floats) -> float:
    """Return 1 − the mean squared error ÷ the variance; 0 where nothing varies."""
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - error.sum() / total) if total > 0 else 0.0


def _resampled(error: Floats, y: Floats, group: Ints, generator: np.random.Generator) -> Floats:
    """Return R² of groups drawn with replacement, from sums by group."""
    _, number = np.unique(group, return_inverse=True)
    n = int(number.max()) + 1
    sums = [np.bincount(number, values, n) for values in (error, y, y**2, np.ones_like(y))]
    drawn = generator.multinomial(n, np.full(n, 1 / n), N_RESAMPLES)
    errors, totals, squares, counts = (drawn @ values for values in sums)
    return np.asarray(1 - errors / np.maximum(squares - totals**2 / counts, 1e-300))


@dataclass(frozen=True)
class Swept:
    """R² by `k` [k] of the part of Δ inside the top-k singular directions of W_U, and of the rest outside them."""

    k: Ints
    inside: Floats
    outside: Floats


def singular_directions(unembedding: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Return the singular directions of W_U [d_model, token] in the residual stream [d_model, rank], and values.

    From the eigenvectors of W_U W_Uᵀ: tokens are summed over, so the cost is 2 · d_model² · tokens.
    """
    wide = np.asarray(unembedding, np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def sweep(delta: Floats, directions: Floats, y: Floats, group: Ints, *, ks: Sequence[int]) -> Swept:
    """Predict y from ‖Δ inside the top k directions‖ and from ‖Δ outside‖ (isotonic), for each k."""
    along = (delta @ directions) ** 2  # [pair, direction]
    total = along.sum(1)
    inside: list[float] = []
    outside: list[float] = []
    for k in ks:
        within = along[:, :k].sum(1)
        for found, part in ((inside, within), (outside, np.maximum(total - within, 0))):
            x = np.sqrt(part)
            found.append(r_squared((y - held_out(x[:, None], y, group, kind="isotonic")) ** 2, y))
    return Swept(np.array(ks), np.array(inside), np.array(outside))


def powers_of_two(width: int) -> list[int]:
    """Return 1, 2, 4, … below the width, and the width."""
    return [*(2**i for i in range(int(np.ceil(np.log2(max(width, 2))))) if 2**i < width), width]
