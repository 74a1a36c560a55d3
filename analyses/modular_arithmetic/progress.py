"""Step 2: progress measures of every checkpoint, computed by scanning the database, after Nanda et al. (2023).

The logits of the whole grid are projected on the cosines and sines of 2πk(a + b)/p for the key frequencies k, those of
the last checkpoint. The *restricted* loss is that of the projection alone, with the mean logits; the *excluded* loss is
that of the logits without it, over the training pairs. A model that adds by these waves has a restricted loss near its
own and a high excluded loss; one that remembers pairs has neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import logsumexp

import actdb
from analyses.modular_arithmetic.fourier import Spectrum, n_frequencies, power, spectrum, sum_waves
from analyses.modular_arithmetic.fourier import gini as gini_of
from analyses.modular_arithmetic.model import ANSWER, answers, number_embedding

TABLE = "modular_progress"
LEARNT = 0.99
N_NULL = 20
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Predictions:
    """The answers' logits of a run over the whole grid [p², p], and which pairs were trained on [p²]."""

    logits: Floats
    is_trained: Flags

    @property
    def modulus(self) -> int:
        """The modulus p."""
        return int(self.logits.shape[1])

    @cached_property
    def right(self) -> npt.NDArray[np.int64]:
        """The right answers [p²]."""
        return answers(self.modulus)

    @property
    def held_out(self) -> Flags:
        """The pairs that accuracy is held out on: those not trained on, or all where none was left out."""
        return ~self.is_trained if not self.is_trained.all() else self.is_trained

    def losses(self, logits: Floats | None = None) -> Floats:
        """Cross-entropy of each pair's answer [p²], nats; of other logits of the same pairs where given."""
        values = self.logits if logits is None else logits
        return np.asarray(logsumexp(values, axis=1) - values[np.arange(len(values)), self.right])

    def hits(self, logits: Floats | None = None) -> Flags:
        """Whether each pair's answer is right [p²]."""
        values = self.logits if logits is None else logits
        return np.asarray(values.argmax(1) == self.right)

    def restricted(self, frequencies: Sequence[int]) -> Floats:
        """The logits' projection on the waves of a + b of some frequencies, with the mean logits [p², p]."""
        directions = sum_waves(self.modulus, frequencies)
        return np.asarray(directions.T @ (directions @ self.logits) + self.logits.mean(0))

    def excluded(self, frequencies: Sequence[int]) -> Floats:
        """The logits without that projection [p², p]."""
        directions = sum_waves(self.modulus, frequencies)
        return np.asarray(self.logits - directions.T @ (directions @ self.logits))


@dataclass(frozen=True)
class Measures:
    """One checkpoint: losses in nats, accuracies, and how far the embedding and the logits are made of key frequencies.

    `random_restricted` and `random_excluded` are the same losses for as many frequencies drawn among the others, means
    over `N_NULL` draws; NaN where too few are left. `weight_norm` is the root of the sum of all squared weights.
    """

    run: str
    step: int
    loss: float
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float
    restricted_loss: float
    excluded_loss: float
    random_restricted: float
    random_excluded: float
    logit_share: float
    gini: float
    key_share: float
    weight_norm: float
    modulus: int

    @property
    def chance_loss(self) -> float:
        """The loss of a model that knows nothing, nats: ln p."""
        return float(np.log(self.modulus))


@dataclass(frozen=True)
class Phases:
    """The epochs at which a training's phases end: pairs remembered, circuit formed, the rest cleaned up.

    `memorised` is the first checkpoint with 99 % of the training pairs right, `turning` the last before the held-out
    loss begins to fall for good (its maximum), `grokked` the first with 99 % of the held-out pairs right. None: never.
    """

    memorised: int | None
    turning: int | None
    grokked: int | None

    @property
    def are_distinct(self) -> bool:
        """Whether generalisation came after memorisation: grokking."""
        return self.memorised is not None and self.grokked is not None and self.grokked > self.memorised


def read_predictions(run: actdb.Run) -> Predictions:
    """Read a run's logits over the grid; raises `SelectionError` where the run is not over the whole grid in order."""
    values = run[ANSWER].numpy().astype(np.float64)
    modulus = values.shape[1]
    if len(values) != modulus**2:
        raise actdb.SelectionError(
            f"run {run.name!r} has {len(values)} prompts, not the {modulus**2} pairs of its modulus {modulus}"
        )
    trained = np.zeros(len(values), np.bool_)
    trained[run.prompt_ids("split = 'train'")] = True
    return Predictions(values, trained)


def measure(run: actdb.Run, frequencies: Sequence[int], *, seed: int) -> Measures:
    """Measure one checkpoint with the key frequencies given. Reads its answers and weights, no other activation."""
    grid = read_predictions(run)
    plain, hits = grid.losses(), grid.hits()
    shares = power(number_embedding(run))
    restricted, excluded = _losses(grid, frequencies)
    random = _random_losses(grid, frequencies, seed=seed)
    kept = grid.restricted(frequencies) - grid.logits.mean(0)
    centred = grid.logits - grid.logits.mean(0)
    return Measures(
        run=run.name,
        step=run.step or 0,
        loss=_mean(plain),
        train_loss=_mean(plain[grid.is_trained]),
        test_loss=_mean(plain[grid.held_out]),
        train_accuracy=_mean(hits[grid.is_trained]),
        test_accuracy=_mean(hits[grid.held_out]),
        restricted_loss=restricted,
        excluded_loss=excluded,
        random_restricted=float(random[0]),
        random_excluded=float(random[1]),
        logit_share=float((kept**2).sum() / max((centred**2).sum(), np.finfo(float).tiny)),
        gini=gini_of(shares),
        key_share=float(shares[[k - 1 for k in frequencies]].sum()) if frequencies else 0.0,
        weight_norm=weight_norm(run),
        modulus=grid.modulus,
    )


def follow(database: actdb.Database, runs: Sequence[str], *, seed: int) -> tuple[Spectrum, list[Measures]]:
    """Return the last checkpoint's spectrum, whose key frequencies are those of all, and the measures of every one."""
    final = spectrum(number_embedding(database.run(runs[-1])), seed=seed)
    return final, [measure(database.run(name), final.keys, seed=seed) for name in runs]


def phases(found: Sequence[Measures]) -> Phases:
    """Return the epochs at which the phases of a training end."""
    memorised = next((m.step for m in found if m.train_accuracy >= LEARNT), None)
    grokked = next((m.step for m in found if m.test_accuracy >= LEARNT), None)
    peak = max(found, key=lambda m: m.test_loss)
    turning = peak.step if grokked is not None and peak.step < grokked else None
    return Phases(memorised, turning, grokked)


def table(found: Sequence[Measures]) -> pa.Table:
    """Return measures as a table for SQL, a row a checkpoint."""
    return pa.Table.from_pylist([vars(entry) for entry in found])


def series(found: Sequence[Measures], name: str) -> Floats:
    """Return one measure over the checkpoints [checkpoint]."""
    return np.array([getattr(entry, name) for entry in found], np.float64)


def weight_norm(run: actdb.Run) -> float:
    """Return the root of the sum of all squared weights stored with a run."""
    places: list[int | None] = [None, *run.layers]
    names = [(name, layer) for layer in places for name in run.weight_names(layer=layer)]
    own = (run.weight(name.removeprefix(f"blocks.{layer}."), layer=layer) for name, layer in names)
    return float(np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in own)))


def _losses(grid: Predictions, frequencies: Sequence[int]) -> tuple[float, float]:
    """The restricted loss over all pairs and the excluded loss over the training pairs."""
    restricted = grid.losses(grid.restricted(frequencies))
    excluded = grid.losses(grid.excluded(frequencies))
    return _mean(restricted), _mean(excluded[grid.is_trained])


def _random_losses(grid: Predictions, frequencies: Sequence[int], *, seed: int) -> Floats:
    """Restricted and excluded loss of as many frequencies that are no key ones, means over draws."""
    others = sorted(set(range(1, n_frequencies(grid.modulus) + 1)) - set(frequencies))
    if not frequencies or len(others) < len(frequencies):
        return np.full(2, np.nan)
    generator = np.random.default_rng(seed)
    draws = [generator.choice(others, len(frequencies), replace=False).tolist() for _ in range(N_NULL)]
    return np.asarray(np.mean([_losses(grid, draw) for draw in draws], axis=0))


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")
