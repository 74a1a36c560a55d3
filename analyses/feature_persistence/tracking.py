"""Neurons followed through training: which keep the selectivity that they had at initialisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import actdb
from analyses.feature_persistence.selection import KINDS, measure

Floats = npt.NDArray[np.float64]
N_TOP = 5
FLOOR = 0.05  # η² below which a feature counts as gone
N_SHUFFLES = 1000


@dataclass(frozen=True)
class History:
    """η² of every neuron of one training, by kind: [step, layer, neuron]; `runs` are its runs, at training `steps`."""

    runs: tuple[str, ...]
    steps: tuple[int, ...]
    eta: dict[str, Floats]

    def top(self, kind: str, *, n: int = N_TOP) -> npt.NDArray[np.int64]:
        """Return the `n` neurons of each layer [layer, n] with the highest η² at the first step."""
        return np.argsort(-self.eta[kind][0], axis=-1, kind="stable")[:, :n]

    def of(self, kind: str, neurons: npt.NDArray[np.int64]) -> Floats:
        """Return η² [step, layer, n] of chosen neurons [layer, n]."""
        return np.take_along_axis(self.eta[kind], neurons[None], axis=2)

    def table(self) -> pa.Table:
        """Return η² as rows run, step, layer, neuron, kind, eta_squared."""
        parts = []
        for kind, values in self.eta.items():
            step, layer, neuron = (axis.ravel() for axis in np.indices(values.shape))
            columns = {
                "run": np.array(self.runs)[step],
                "step": np.array(self.steps)[step],
                "layer": layer,
                "neuron": neuron,
            }
            parts.append(pa.table({**columns, "kind": [kind] * values.size, "eta_squared": values.ravel()}))
        return pa.concat_tables(parts)


@dataclass(frozen=True)
class Fate:
    """Of some neurons: how many kept their selectivity, how many have another now, how many lost it."""

    maintained: int
    changed: int
    lost: int

    @property
    def n(self) -> int:
        """Neurons in all."""
        return self.maintained + self.changed + self.lost


def follow(db: actdb.Database, runs: Sequence[str]) -> History:
    """Measure the runs of one training, one streaming pass each, in the order given."""
    found = [measure(db.run(name)) for name in runs]
    steps = tuple(int(db.run(name).step or 0) for name in runs)
    return History(
        tuple(runs), steps, {kind: np.stack([item.by_kind(kind).eta_squared for item in found]) for kind in KINDS}
    )


def is_maintained(initial: Floats, final: Floats) -> npt.NDArray[np.bool_]:
    """The original's criterion of one training: final η² > 0.05 and |Δη²| / η²₀ < 0.5, in either direction."""
    return np.asarray((final > FLOOR) & (np.abs(final - initial) < 0.5 * initial))


def is_persistent(initial: Floats, final: Floats) -> npt.NDArray[np.bool_]:
    """The original's criterion over seeds: final η² > 0.05 and more than half of the initial."""
    return np.asarray((final > FLOOR) & (final > 0.5 * initial))


def fate(initial: Floats, final: Floats) -> Fate:
    """Sort neurons into maintained, changed (still above 0.05) and lost."""
    kept, gone = is_maintained(initial, final), final <= FLOOR
    return Fate(int(kept.sum()), int((~kept & ~gone).sum()), int(gone.sum()))


def persistence(history: History, kind: str, *, top: bool = True) -> Floats:
    """Return the share of neurons that persist, by layer [layer]: of the top ones at initialisation, or of all."""
    values = history.of(kind, history.top(kind)) if top else history.eta[kind]
    return np.asarray(is_persistent(values[0], values[-1]).mean(-1), np.float64)


def chance_persistence(history: History, kind: str, *, seed: int) -> Floats:
    """Return the share of the top neurons that would persist if training shuffled the neurons of a layer, [layer].

    What is left of persistence when its cause, that a neuron remains the same neuron, is taken away: how selective
    neurons are after training at all.
    """
    generator = np.random.default_rng((seed, 5))
    initial = history.of(kind, history.top(kind))[0]  # [layer, n]
    final = history.eta[kind][-1]  # [layer, neuron]
    draws = generator.integers(0, final.shape[1], (N_SHUFFLES, *initial.shape))
    drawn = np.take_along_axis(np.broadcast_to(final, (N_SHUFFLES, *final.shape)), draws, axis=2)
    return np.asarray(is_persistent(initial[None], drawn).mean((0, 2)), np.float64)
