"""Sparse autoencoders, TopK and gated, trained from the shuffled rows of a database.

TopK is the recipe of Gao et al. (2024), "Scaling and evaluating sparse autoencoders":

    latents = TopK(W_enc (x − b_dec) + b_enc),  x̂ = W_dec latents + b_dec

with W_dec's columns of length 1 (renormalised after each step, the gradient's part along them taken out before), W_enc
begun as W_decᵀ, b_dec as the mean of the first batch, loss ‖x − x̂‖² over the variance, and an auxiliary loss that lets
the latents that have not fired for some while explain what is left over (no resampling). TopK needs no L1 weight: the
number of active latents is `k`. Rows are scaled to a mean length of √d before.

Gated is that of Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse autoencoders": whether a
latent fires and how much are computed apart, so that the L1 penalty, which acts on the first alone, shrinks nothing:

    g = W_enc (x − b_dec) + b_gate,  m = exp(r) ⊙ (W_enc (x − b_dec)) + b_mag,  latents = 1[g > 0] ⊙ ReLU(m)
    loss = ‖x − x̂(latents)‖² + λ ‖ReLU(g)‖₁ + ‖x − x̂_frozen(ReLU(g))‖²

The step function has no gradient; the last term, the auxiliary loss, gives the gate one. Its decoder gets none from it.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

import actdb

AUXILIARY_WEIGHT = 1 / 32
LEARNING_RATE = 1e-3
BATCH_ROWS = 1024
DEAD_AFTER_ROWS = 20_000
WARM_UP = 0.1
"""Share of the steps over which the gate's penalty grows to its full weight."""


class Autoencoder(nn.Module):
    """What both kinds share: a decoder with columns of length 1, an encoder begun as its transpose, and a scale.

    `scale` brings rows to a mean length of √d_in, and is undone when decoding.
    """

    scale: torch.Tensor

    def __init__(self, d_in: int, n_latents: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        columns = nn.functional.normalize(torch.randn(n_latents, d_in, generator=generator), dim=1)
        self.decoder = nn.Parameter(columns)  # [latent, d_in]
        self.encoder = nn.Parameter(columns.T.clone())  # [d_in, latent]
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        self.decoder_bias = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, d_in] as stored → latents [row, latent], 0 or more."""
        raise NotImplementedError

    def objective(self, rows: torch.Tensor, silent: torch.Tensor, progress: float) -> "Objective":
        """Scaled rows [row, d_in] → what a step minimises.

        `silent` [latent] counts rows since each latent fired; `progress` goes from 0 to 1 over the training.
        """
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [row, latent] → rows [row, d_in] as stored."""
        return self.decode_scaled(latents) / self.scale

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [row, latent] → scaled rows [row, d_in]."""
        return latents @ self.decoder + self.decoder_bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, d_in] as stored → their reconstruction."""
        return self.decode(self.encode(rows))


@dataclass(frozen=True)
class Objective:
    """Of a batch: the unexplained share of its variance, what is minimised, and which latents fired [latent]."""

    loss: torch.Tensor
    total: torch.Tensor
    fired: torch.Tensor


class SparseAutoencoder(Autoencoder):
    """TopK: at most `k` latents of a row are above 0."""

    def __init__(self, d_in: int, n_latents: int, k: int, *, seed: int) -> None:
        super().__init__(d_in, n_latents, seed=seed)
        if not 1 <= k <= n_latents:
            raise actdb.SettingError(f"k {k}: choose 1 to the number of latents, {n_latents}")
        self.k = k

    def pre_activations(self, rows: torch.Tensor) -> torch.Tensor:
        """Scaled rows [row, d_in] → [row, latent] before TopK."""
        return (rows - self.decoder_bias) @ self.encoder + self.encoder_bias

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, d_in] as stored → latents [row, latent], at most `k` of a row above 0."""
        return top_k(self.pre_activations(rows * self.scale), self.k)

    def objective(self, rows: torch.Tensor, silent: torch.Tensor, progress: float) -> Objective:
        """The reconstruction, and dead latents on what it leaves over; see `Autoencoder.objective`."""
        before = self.pre_activations(rows)
        latents = top_k(before, self.k)
        left = rows - self.decode_scaled(latents)
        loss = left.square().sum() / _variance(rows)
        fired = (latents.detach() > 0).any(0)
        dead = torch.nonzero((silent + len(rows) >= DEAD_AFTER_ROWS) & ~fired).squeeze(1)
        if not len(dead):
            return Objective(loss, loss, fired)
        revived = top_k(before[:, dead], min(2 * self.k, len(dead))) @ self.decoder[dead]
        # what the dead latents are to explain is what is left over, as it stands
        auxiliary = (left.detach() - revived).square().sum() / left.detach().square().sum().clamp_min(1e-12)
        return Objective(loss, loss + AUXILIARY_WEIGHT * auxiliary, fired)


class GatedAutoencoder(Autoencoder):
    """Gated: `sparsity` is λ, the weight of the gate's L1 penalty, for rows of mean length √d_in.

    `encoder_bias` is the gate's; the magnitudes have a factor exp(`magnitude_scale`) and a bias of their own.
    """

    def __init__(self, d_in: int, n_latents: int, sparsity: float, *, seed: int) -> None:
        super().__init__(d_in, n_latents, seed=seed)
        if not sparsity >= 0:
            raise actdb.SettingError(f"sparsity {sparsity}: choose 0 or more")
        self.sparsity = sparsity
        self.magnitude_scale = nn.Parameter(torch.zeros(n_latents))
        self.magnitude_bias = nn.Parameter(torch.zeros(n_latents))

    def gate(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled rows [row, d_in] → the gate before its step, and the latents [row, latent]."""
        projected = (rows - self.decoder_bias) @ self.encoder
        gate = projected + self.encoder_bias
        magnitude = projected * self.magnitude_scale.exp() + self.magnitude_bias
        return gate, (gate > 0) * magnitude.relu()

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, d_in] as stored → latents [row, latent]."""
        return self.gate(rows * self.scale)[1]

    def objective(self, rows: torch.Tensor, silent: torch.Tensor, progress: float) -> Objective:
        """Reconstruction, penalty on the gate, and the gate's own reconstruction; see `Autoencoder.objective`."""
        gate, latents = self.gate(rows)
        opened = gate.relu()
        left = (rows - self.decode_scaled(latents)).square().sum()
        own = (rows - (opened @ self.decoder.detach() + self.decoder_bias.detach())).square().sum()
        penalty = self.sparsity * min(1.0, progress / WARM_UP) * opened.sum()
        variance = _variance(rows)
        return Objective(left / variance, (left + penalty + own) / variance, (latents.detach() > 0).any(0))


def top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """Keep each row's `k` largest values, those above 0, and set the others to 0."""
    kept = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, kept.indices, kept.values.relu())


@dataclass(frozen=True)
class Trained:
    """An autoencoder with how its training went.

    `losses` [step] are shares of the variance left unexplained; `read_s` and `compute_s` the seconds spent waiting for
    rows and computing; `n_dead` the latents silent over the last `DEAD_AFTER_ROWS` rows.
    """

    model: Autoencoder
    losses: npt.NDArray[np.float32]
    read_s: float
    compute_s: float
    n_rows: int
    n_dead: int

    @property
    def compute_share(self) -> float:
        """Share of the time in computation rather than in reading."""
        return self.compute_s / max(self.compute_s + self.read_s, 1e-9)


def train_autoencoder(
    selection: actdb.Selection,
    *,
    n_latents: int,
    k: int,
    epochs: int,
    seed: int,
    batch_rows: int = BATCH_ROWS,
    learning_rate: float = LEARNING_RATE,
    name: str = "autoencoder",
) -> Trained:
    """Train a TopK autoencoder on the rows [row, d_in] of a selection (one layer of a site), shuffled anew each epoch.

    Deterministic for a seed on one machine and number of threads. Adam, its rate falling to 0 over the last fifth.
    Costs about 6·d_in·n_latents multiplications a row and epoch, more by half while latents are dead.
    """
    model = SparseAutoencoder(selection.shape[-1], n_latents, k, seed=seed)
    return _train(model, selection, (epochs, batch_rows), seed=seed, learning_rate=learning_rate, name=name)


def train_gated(
    selection: actdb.Selection,
    *,
    n_latents: int,
    sparsity: float,
    epochs: int,
    seed: int,
    batch_rows: int = BATCH_ROWS,
    learning_rate: float = LEARNING_RATE,
    name: str = "gated autoencoder",
) -> Trained:
    """Train a gated autoencoder on the rows of a selection, as `train_autoencoder` does a TopK one.

    The penalty `sparsity` grows to its full weight over the first tenth of the steps. Costs about 8·d_in·n_latents
    multiplications a row and epoch.
    """
    model = GatedAutoencoder(selection.shape[-1], n_latents, sparsity, seed=seed)
    return _train(model, selection, (epochs, batch_rows), seed=seed, learning_rate=learning_rate, name=name)


def explained_variance(model: Autoencoder, rows: npt.NDArray[Any]) -> float:
    """Return 1 − ‖x − x̂‖² ÷ ‖x − mean‖² over rows [row, d_in] that it was not trained on."""
    with torch.inference_mode():
        given = torch.from_numpy(np.asarray(rows, np.float32))
        left = (given - model(given)).square().sum()
        return float(1 - left / (given - given.mean(0)).square().sum())


def _train(
    model: Autoencoder,
    selection: actdb.Selection,
    extent: tuple[int, int],
    *,
    seed: int,
    learning_rate: float,
    name: str,
) -> Trained:
    """Train a model for so many epochs in batches of so many rows."""
    epochs, batch_rows = extent
    n_steps = epochs * math.ceil(selection.n_rows / batch_rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (n_steps - step) / (0.2 * n_steps)))
    losses: list[float] = []
    silent = torch.zeros(len(model.decoder), dtype=torch.long)  # rows since a latent fired
    read_s = compute_s = 0.0
    stream = selection.shuffled(batch_rows, seed=seed, epochs=epochs)
    with tqdm(total=n_steps, desc=name, unit="step", disable=None, leave=False) as bar:
        while True:
            begin = time.perf_counter()
            block = next(stream, None)
            read_s += time.perf_counter() - begin
            if block is None:
                break
            begin = time.perf_counter()
            rows = torch.from_numpy(np.asarray(block.values, np.float32))
            if not losses:
                _begin(model, rows)
            losses.append(_step(model, optimizer, rows, silent, progress=len(losses) / n_steps))
            schedule.step()
            compute_s += time.perf_counter() - begin
            bar.update()
    n_dead = int((silent >= DEAD_AFTER_ROWS).sum())
    return Trained(model, np.array(losses, np.float32), read_s, compute_s, selection.n_rows, n_dead)


def _begin(model: Autoencoder, rows: torch.Tensor) -> None:
    """Take the scale and the decoder's bias from the first batch."""
    with torch.no_grad():
        model.scale.copy_(math.sqrt(rows.shape[1]) / rows.norm(dim=1).mean().clamp_min(1e-12))
        model.decoder_bias.copy_(rows.mean(0) * model.scale)


def _step(
    model: Autoencoder, optimizer: torch.optim.Optimizer, given: torch.Tensor, silent: torch.Tensor, *, progress: float
) -> float:
    """One update; returns the unexplained share of the batch's variance. `silent` is brought up to date."""
    found = model.objective(given * model.scale, silent, progress)
    silent += len(given)
    silent[found.fired] = 0
    optimizer.zero_grad(set_to_none=True)
    found.total.backward()
    with torch.no_grad():
        gradient = model.decoder.grad
        assert gradient is not None
        gradient -= (gradient * model.decoder).sum(1, keepdim=True) * model.decoder
        optimizer.step()
        model.decoder.copy_(nn.functional.normalize(model.decoder, dim=1))
    return float(found.loss.detach())


def _variance(rows: torch.Tensor) -> torch.Tensor:
    """Σ‖x − mean‖² of a batch [row, d_in]."""
    return (rows - rows.mean(0)).square().sum().clamp_min(1e-12)
