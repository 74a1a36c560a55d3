"""What persistence goes along with: initial η², the training's settings, and how much a neuron matters for the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, Place, effects, replace, stored_mean
from analyses.common.metric import next_token_loss
from analyses.common.significance import Estimate, mean_interval, rank_correlation
from analyses.feature_persistence.model import restore
from analyses.feature_persistence.selection import KINDS
from analyses.feature_persistence.task import training_sequences
from analyses.feature_persistence.tracking import History, chance_persistence, is_persistent, persistence

Floats = npt.NDArray[np.float64]
N_SEQUENCES = 200
N_SHUFFLES = 50


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ of initial η² within each training, as mean over trainings with its interval.

    With final η², and with whether the neuron persists; `chance` is the latter where training shuffles neurons: below
    zero, since a high η² is harder to keep by luck.
    """

    with_final: Estimate
    with_persistence: Estimate
    chance: float


def correlate(histories: Sequence[History], kind: str, *, layer: int, seed: int) -> Correlation:
    """Correlate the initial η² of all neurons of a layer with what became of them."""
    generator = np.random.default_rng((seed, 12))
    pairs = [(history.eta[kind][0, layer], history.eta[kind][-1, layer]) for history in histories]
    turned = [(before, generator.permutation(after)) for before, after in pairs for _ in range(N_SHUFFLES)]
    return Correlation(
        mean_interval([rank_correlation(before, after) for before, after in pairs]),
        mean_interval([rank_correlation(before, is_persistent(before, after)) for before, after in pairs]),
        mean_interval([rank_correlation(before, is_persistent(before, after)) for before, after in turned]).value,
    )


@dataclass(frozen=True)
class Share:
    """The share of top neurons that persist, over trainings, and the same if neurons were shuffled meanwhile."""

    persisting: Estimate
    chance: float


def share_by_group(histories: Mapping[str, Sequence[History]], *, seed: int) -> dict[str, dict[str, Share]]:
    """Return the share of top neurons that persist, both layers together, by group of trainings and kind."""
    return {
        group: {
            kind: Share(
                mean_interval([float(persistence(h, kind).mean()) for h in found], within=(0.0, 1.0)),
                float(np.mean([chance_persistence(h, kind, seed=seed) for h in found])),
            )
            for kind in KINDS
        }
        for group, found in histories.items()
    }


def importance(run: actdb.Run, *, seed: int) -> Floats:
    """Return how much the loss rises, in nats a token, when each neuron [layer, neuron] is held at its stored mean.

    The model is rebuilt from the weights stored with the run, and its loss taken on 200 new training sequences. One
    forward pass a neuron.
    """
    model = restore(run)
    ids = torch.from_numpy(training_sequences(seed + 1000, n=N_SEQUENCES))
    means = {layer: stored_mean(run, "mlp_post", layer=layer) for layer in run.layers}
    hooks: dict[str, list[Hook]] = {
        f"{layer}.{neuron}": [replace(Place(f"blocks.{layer}.mlp.hook_post", neuron=neuron), mean)]
        for layer, mean in means.items()
        for neuron in range(len(mean))
    }
    found = effects(model, ids, hooks, lambda logits: next_token_loss(logits, ids).mean())
    return np.array([float(value) for value in found.values()]).reshape(len(means), -1)


@dataclass(frozen=True)
class ImportanceOfFeatures:
    """How importance goes with selectivity: Spearman's ρ with η² after training, and the importance of groups.

    `persistent` and `others` are the mean rise of the loss, in nats, of the neurons that persisted and of all others.
    """

    with_eta: Estimate
    persistent: Estimate
    others: Estimate


def relate_importance(histories: Sequence[History], importances: Sequence[Floats], kind: str) -> ImportanceOfFeatures:
    """Relate the importance of every neuron to its selectivity, training by training, both layers together."""
    with_eta, persistent, others = [], [], []
    for history, rise in zip(histories, importances, strict=True):
        initial, final = history.eta[kind][0], history.eta[kind][-1]
        with_eta.append(float(np.mean([rank_correlation(*pair) for pair in zip(rise, final, strict=True)])))
        kept = is_persistent(initial, final) & (initial > np.median(initial))
        persistent.append(float(rise[kept].mean()) if kept.any() else np.nan)
        others.append(float(rise[~kept].mean()))
    return ImportanceOfFeatures(mean_interval(with_eta), mean_interval(persistent), mean_interval(others))
