"""The five experiments on a random network, from stored rows: each figure with what chance gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.selectivity import CellSums
from analyses.common.significance import significant
from analyses.feature_persistence.selection import KINDS, LEVEL, measure
from analyses.feature_persistence.task import read_kinds

Floats = npt.NDArray[np.float64]
N_TOP_INPUTS = 16
N_SHUFFLES = 200
TARGET_TOKEN, TARGET_POS = 5, 2
STRONG = 0.8


@dataclass(frozen=True)
class Rows:
    """All rows of `mlp_post` of a run, small enough to hold: values [row, neuron], layers side by side."""

    values: Floats
    token: npt.NDArray[np.int64]
    prompt: npt.NDArray[np.int64]
    pos: npt.NDArray[np.int64]

    @property
    def varying(self) -> Floats:
        """Values of the neurons that vary at all."""
        return self.values[:, np.ptp(self.values, axis=0) > 0]


def read_rows(run: actdb.Run) -> Rows:
    """Read a small run whole."""
    selection = run["mlp_post"]
    values = np.concatenate(list(selection.numpy().astype(np.float64)), axis=1)
    token = np.concatenate([run.tokens(prompt) for prompt in range(run.n_prompts)]).astype(np.int64)
    return Rows(values, token, selection.prompt, selection.pos)


@dataclass(frozen=True)
class Finding:
    """A figure of an experiment and the same under its null."""

    value: float
    null: float
    n: int


def detect_features(db: actdb.Database, run: actdb.Run, *, seed: int) -> Finding:
    """Feature detection: of the 16 inputs that activate a neuron most, the share that is one token; mean over neurons.

    The inputs come from the table `neuron_top`, which the harvest filled. Null: as many rows drawn at random.
    """
    tops = db.sql(
        "SELECT layer, neuron, token_id, count(*) AS n FROM neuron_top JOIN tokens USING (run, prompt_id, pos)"
        " WHERE run = $1 AND rank < $2 AND value > 0 GROUP BY ALL",
        [run.name, N_TOP_INPUTS],
    ).df()
    by_neuron = tops.groupby(["layer", "neuron"]).n
    purity = (by_neuron.max() / by_neuron.sum()).to_numpy()
    tokens = np.concatenate([run.tokens(prompt) for prompt in range(run.n_prompts)])
    drawn = np.random.default_rng((seed, 7)).choice(tokens, (N_SHUFFLES, N_TOP_INPUTS))
    null = np.mean([np.bincount(row).max() / N_TOP_INPUTS for row in drawn])
    return Finding(float(purity.mean()), float(null), len(purity))


def weigh_hypothesis(rows: Rows, *, seed: int) -> tuple[Finding, Finding]:
    """Hypothesis testing: one token at one position against all other rows, by Cohen's d of every neuron.

    Returns the greatest |d| beside its mean under shuffled rows, and the share of neurons that tell the target apart:
    those with |d| above the greatest of all neurons in 99 % of the shuffles, which allows one false positive among all
    neurons in a hundred networks. n is the number of target rows, of neurons.
    """
    target = (rows.token == TARGET_TOKEN) & (rows.pos == TARGET_POS)
    values = rows.varying
    generator = np.random.default_rng((seed, 8))
    null = [np.abs(_effect_size(values, generator.permutation(target))).max() for _ in range(N_SHUFFLES)]
    sizes = np.abs(_effect_size(values, target))
    telling = sizes > np.quantile(null, 1 - LEVEL)
    return (
        Finding(float(sizes.max()), float(np.mean(null)), int(target.sum())),
        Finding(float(telling.mean()), LEVEL / len(telling), len(telling)),
    )


def map_selectivity(run: actdb.Run) -> dict[str, Finding]:
    """Systematic mapping: by kind, the share of neurons that are selective; null: the level of the test."""
    found = measure(run)
    flags = {kind: found.selective(kind) for kind in KINDS}
    return {kind: Finding(float(flag.mean()), LEVEL / flag.shape[1], flag.size) for kind, flag in flags.items()}


@dataclass(frozen=True)
class Circuits:
    """Pairs of neurons with r > 0.8 (correlated) and r < −0.8 (opposed), as shares of all pairs.

    By default over the rows of all positions; `first` over those of position 0 alone, as the original had it, where a
    causal network without other inputs knows but one vector a token.
    """

    correlated: Finding
    opposed: Finding
    first_correlated: float
    first_opposed: float
    n_distinct_first: int


def discover_circuits(rows: Rows, *, seed: int) -> Circuits:
    """Circuit discovery: strongly correlated and opposed pairs of neurons. Null: rows permuted neuron by neuron."""
    values = rows.varying
    generator = np.random.default_rng((seed, 9))
    shares = _strong_pairs(values)
    null = _strong_pairs(generator.permuted(values, axis=0))
    first = rows.values[rows.pos == 0]
    n_pairs = values.shape[1] * (values.shape[1] - 1) // 2
    first_shares = _strong_pairs(first[:, np.ptp(first, axis=0) > 0])
    return Circuits(
        correlated=Finding(shares[0], null[0], n_pairs),
        opposed=Finding(shares[1], null[1], n_pairs),
        first_correlated=first_shares[0],
        first_opposed=first_shares[1],
        n_distinct_first=len(np.unique(first, axis=0)),
    )


def compare_structures(rows: Rows, kinds: Sequence[Any], *, seed: int) -> dict[str, Finding]:
    """Structured inputs: share of neurons whose activation over a prompt differs between kinds of sequence.

    One observation a prompt, since positions of one prompt are not independent: its mean over positions, and its
    standard deviation. One-way analysis of variance, p < 0.01 after Bonferroni. Null: kinds shuffled among prompts.
    """
    counts = np.bincount(rows.prompt)[:, None]
    columns = rows.varying.T
    mean = np.stack([np.bincount(rows.prompt, column) for column in columns], axis=1) / counts
    square = np.stack([np.bincount(rows.prompt, column**2) for column in columns], axis=1) / counts
    observed = {"mean": mean, "deviation": np.sqrt(np.maximum(square - mean**2, 0))}
    labels = np.unique(np.asarray(kinds), return_inverse=True)[1]
    shuffled = np.random.default_rng((seed, 10)).permutation(labels)
    return {
        name: Finding(_differing(values, labels), _differing(values, shuffled), len(values))
        for name, values in observed.items()
    }


@dataclass(frozen=True)
class Experiments:
    """The five experiments on one network."""

    purity: Finding
    effect: Finding
    telling: Finding
    mapping: dict[str, Finding]
    circuits: Circuits
    structures: dict[str, Finding]


def run_experiments(db: actdb.Database, probe: actdb.Run, structured: actdb.Run, *, seed: int) -> Experiments:
    """Run all five on a network's runs over random and over structured sequences, labelled by `kind`."""
    rows = read_rows(probe)
    effect, telling = weigh_hypothesis(rows, seed=seed)
    return Experiments(
        purity=detect_features(db, probe, seed=seed),
        effect=effect,
        telling=telling,
        mapping=map_selectivity(probe),
        circuits=discover_circuits(rows, seed=seed),
        structures=compare_structures(read_rows(structured), read_kinds(db, structured.name), seed=seed),
    )


def _differing(values: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Share of columns that differ between labels; one that does not vary at all does not."""
    sums = CellSums(int(labels.max()) + 1)
    sums.add(values[None], labels)
    return float(significant(sums.one_way().p[0], level=LEVEL).mean())


def _effect_size(values: Floats, target: npt.NDArray[np.bool_]) -> Floats:
    """Cohen's d [neuron]: difference of the means over the pooled standard deviation."""
    a, b = values[target], values[~target]
    pooled = ((len(a) - 1) * a.var(0, ddof=1) + (len(b) - 1) * b.var(0, ddof=1)) / (len(values) - 2)
    return np.asarray((a.mean(0) - b.mean(0)) / np.sqrt(np.maximum(pooled, 1e-30)), np.float64)


def _strong_pairs(values: Floats) -> tuple[float, float]:
    """Shares of the pairs of columns with r > 0.8 and with r < −0.8."""
    r = np.asarray(np.corrcoef(values, rowvar=False))[np.triu_indices(values.shape[1], 1)]
    return float((r > STRONG).mean()), float((r < -STRONG).mean())
