"""Which features tell a prompt's category: magnitudes of heads, their interaction graph, both, or its length alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.contingency_tables import mcnemar

from analyses.common.significance import Comparison, Estimate, bootstrap_interval, paired_test

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
N_FOLDS = 5
N_COMPONENTS = 50


@dataclass(frozen=True)
class Accuracy:
    """Whether each held-out prompt was named rightly: `correct` [repeat, prompt]; `null` is with labels permuted."""

    correct: npt.NDArray[np.bool_]
    null: float

    def estimate(self, *, seed: int) -> Estimate:
        """Return the accuracy with its bootstrap interval over prompts."""
        return bootstrap_interval(self.correct.mean(0), seed=seed)


def classify(features: npt.NDArray[Any], category: Ints, *, n_repeats: int, n_null: int, seed: int) -> Accuracy:
    """Predict the category of held-out prompts: scaler, PCA and logistic regression fitted within each of 5 folds.

    Step 4. Stratified folds, repeated; the null is the same with labels permuted. PCA keeps up to 50 components.
    """
    correct = [_held_out(features, category, seed=seed + i) == category for i in range(n_repeats)]
    generator = np.random.default_rng((seed, 4))
    chance = []
    for i in range(n_null):
        shuffled = generator.permutation(category)
        chance.append(float((_held_out(features, shuffled, seed=seed + i) == shuffled).mean()))
    return Accuracy(np.array(correct), float(np.mean(chance)) if chance else float("nan"))


@dataclass(frozen=True)
class Gap:
    """The difference of two accuracies over the same prompts: a paired permutation test, and McNemar's exact p.

    `only_first` and `only_second` count the prompts that one of the two names rightly (in the first repeat).
    """

    test: Comparison
    low: float
    high: float
    mcnemar: float
    only_first: int
    only_second: int


def compare(first: Accuracy, second: Accuracy, *, seed: int) -> Gap:
    """Compare the second classifier with the first, prompt by prompt."""
    a, b = first.correct.mean(0), second.correct.mean(0)
    spread = bootstrap_interval(b - a, seed=seed)
    only_a = int((first.correct[0] & ~second.correct[0]).sum())
    only_b = int((second.correct[0] & ~first.correct[0]).sum())
    p = float(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)
    return Gap(paired_test(b, a, seed=seed), spread.low, spread.high, p, only_a, only_b)


def classify_all(
    features: Mapping[str, npt.NDArray[Any]], category: Ints, *, n_repeats: int, n_null: int, seed: int
) -> dict[str, Accuracy]:
    """Classify by each set of features, with the same folds."""
    return {
        name: classify(values, category, n_repeats=n_repeats, n_null=n_null, seed=seed)
        for name, values in features.items()
    }


def _held_out(features: npt.NDArray[Any], category: Ints, *, seed: int) -> Ints:
    """Return the category predicted of each prompt when its fold was held out."""
    predicted = np.empty(len(category), np.int64)
    for train, test in StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(features, category):
        varying = np.ptp(features[train], axis=0) > 0
        if not varying.any():  # nothing to go by: the commonest category
            predicted[test] = np.bincount(category[train]).argmax()
            continue
        n_components = min(N_COMPONENTS, int(varying.sum()), len(train) - 1)
        solver = "full" if n_components < N_COMPONENTS else "auto"
        steps = (
            StandardScaler(),
            PCA(n_components, svd_solver=solver, random_state=seed),
            LogisticRegression(max_iter=2000),
        )
        model = make_pipeline(*steps).fit(features[train][:, varying], category[train])
        predicted[test] = model.predict(features[test][:, varying])
    return predicted
