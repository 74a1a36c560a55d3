"""Features of sparse autoencoders, TopK and gated: trained from stored rows, read against a, b and the answer.

A feature is tuned to a label to the share of its variance over held-out pairs that lies between the label's values
(η², with as many random groups for comparison). The autoencoder is faithful where its reconstructions, put back in the
place of the state, keep the model's answers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import actdb
from analyses.common.autoencoder import Autoencoder, Trained, explained_variance, train_autoencoder, train_gated
from analyses.common.significance import Estimate, proportion_interval
from analyses.modular_arithmetic.grid import Booleans, Floats, Grid, Ints
from analyses.modular_arithmetic.state import Rows, State

LATENTS_A_DIMENSION, MOST_LATENTS = 4, 1024
BATCH_ROWS = 256
ACTIVE_SHARE, LEAST_ACTIVE = 8, 4
"""TopK: one latent in so many of the input's dimensions is active, at least so many."""
SPARSITY = 3.0
"""λ of the gated one, for rows of mean length √d_in."""
STEPS, FEW_STEPS = 2000, 400
LEAST_FIRED = 3
"""Held-out pairs that a latent must fire on to count."""
KINDS = ("TopK", "gated")


@dataclass(frozen=True)
class Features:
    """What one autoencoder found, on held-out pairs.

    `explained` is the share of the variance, `n_active` the mean number of latents above 0, `kept` the accuracy with
    reconstructions in the place of the state; `tuning` [label, latent] the η² of each live latent with a, b and the
    answer, `null` the mean of the same over permuted labels.
    """

    kind: str
    trained: Trained
    explained: float
    n_active: float
    n_live: int
    kept: Estimate
    tuning: Floats
    null: float

    @property
    def tuned(self) -> float:
        """Mean over latents of the η² with the label that each is tuned to best."""
        return float(self.tuning.max(0).mean()) if self.tuning.size else float("nan")

    @property
    def to_answer(self) -> float:
        """Share of the live latents that are tuned to the answer rather than to a or b."""
        return float((self.tuning.argmax(0) == LABELS.index("answer")).mean()) if self.tuning.size else float("nan")


LABELS = ("a", "b", "answer")


def train_features(grid: Grid, state: State, kind: str, *, fitted: Booleans, seed: int, small: bool) -> Features:
    """Train one kind of autoencoder on the fitted pairs' rows of a state, and read its features on the others.

    The state must have one position a pair, or several of which each is a row. Raises `SettingError` for another kind.
    """
    rows = grid.run[state.site].sel(
        layer=state.layer, pos=list(state.positions), prompt=np.flatnonzero(fitted).tolist()
    )
    trained = _train(rows, kind, seed=seed, small=small)
    n = len(state.positions)
    held = state.rows[~fitted].reshape(-1, rows.shape[-1])  # a row for each position
    latents = encode(trained.model, held)
    rebuilt = rebuild(trained.model, state.rows.reshape(-1, rows.shape[-1])).reshape(state.rows.shape)
    right = grid.right(grid.logits([state.put(rebuilt)]))[~fitted]
    pair = np.repeat(np.flatnonzero(~fitted), n)
    tuning, null = _tuning(grid, latents, pair, seed=seed)
    return Features(
        kind=kind,
        trained=trained,
        explained=explained_variance(trained.model, held),
        n_active=float((latents > 0).sum(1).mean()),
        n_live=tuning.shape[1],
        kept=proportion_interval(int(right.sum()), len(right)),
        tuning=tuning,
        null=null,
    )


def encode(model: Autoencoder, rows: Rows) -> Rows:
    """Return latents [row, latent] of rows [row, feature]."""
    with torch.inference_mode():
        return np.asarray(model.encode(torch.from_numpy(rows)).numpy())


def rebuild(model: Autoencoder, rows: Rows) -> Rows:
    """Return reconstructions [row, feature] of rows [row, feature]."""
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(rows)).numpy())


def _train(rows: actdb.Selection, kind: str, *, seed: int, small: bool) -> Trained:
    width = rows.shape[-1]
    batch = min(BATCH_ROWS, rows.n_rows)
    steps = FEW_STEPS if small else STEPS
    extent: dict[str, Any] = {
        "n_latents": min(LATENTS_A_DIMENSION * width, MOST_LATENTS),
        "epochs": max(1, steps // -(-rows.n_rows // batch)),
        "batch_rows": batch,
        "seed": seed,
    }
    if kind == "TopK":
        return train_autoencoder(rows, k=max(LEAST_ACTIVE, width // ACTIVE_SHARE), **extent)
    if kind == "gated":
        return train_gated(rows, sparsity=SPARSITY, **extent)
    raise actdb.SettingError(f"autoencoder {kind!r}: choose one of {', '.join(KINDS)}")


def _tuning(grid: Grid, latents: Rows, pair: Ints, *, seed: int) -> tuple[Floats, float]:
    """η² [label, latent] of the latents that fire, and its mean with the best of permuted labels."""
    live = latents[:, (latents > 0).sum(0) >= LEAST_FIRED]
    labels = [grid.a[pair], grid.b[pair], grid.answers[pair]]
    order = np.random.default_rng((seed, 43)).permutation(len(pair))
    found, null = (
        np.array([_between(live, values, grid.modulus) for values in given])
        for given in (labels, [values[order] for values in labels])
    )
    return found, float(null.max(0).mean()) if null.size else float("nan")


def _between(latents: Rows, labels: Ints, n: int) -> Floats:
    """Share of each latent's variance that lies between labels [latent]."""
    values = latents.astype(np.float64)
    values -= values.mean(0)
    sums = np.zeros((n, values.shape[1]))
    np.add.at(sums, labels, values)
    counts = np.maximum(np.bincount(labels, minlength=n), 1)[:, None]
    total = (values**2).sum(0)
    return np.asarray((sums**2 / counts).sum(0) / np.where(total > 0, total, 1.0), np.float64)
