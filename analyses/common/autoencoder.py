"""A TopK sparse autoencoder, trained from the shuffled rows of a database.

The recipe is that of Gao et al. (2024), "Scaling and evaluating sparse autoencoders":

    latents = TopK(W_enc (x − b_dec) + b_enc),  x̂ = W_dec latents + b_dec

with W_dec's columns of length 1 (renormalised after each step, the gradient's part along them taken out before), W_enc
begun as W_decᵀ, b_dec as the mean of the first batch, loss ‖x − x̂‖² over the variance, and an auxiliary loss that lets
the latents that have not fired for some while explain what is left over (no resampling). TopK needs no L1 weight: the
number of active latents is `k`. Rows are scaled to a mean length of √d before.
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


class SparseAutoencoder(nn.Module):
    """The encoder and decoder; `scale` brings rows to a mean length of √d_in, and is undone when decoding."""

    scale: torch.Tensor

    def __init__(self, d_in: int, n_latents: int, k: int, *, seed: int) -> None:
        super().__init__()
        if not 1 <= k <= n_latents:
            raise actdb.SettingError(f"k {k}: choose 1 to the number of latents, {n_latents}")
        generator = torch.Generator().manual_seed(seed)
        columns = nn.functional.normalize(torch.randn(n_latents, d_in, generator=generator), dim=1)
        self.k = k
        self.decoder = nn.Parameter(columns)  # [latent, d_in]
        self.encoder = nn.Parameter(columns.T.clone())  # [d_in, latent]
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        self.decoder_bias = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    def pre_activations(self, rows: torch.Tensor) -> torch.Tensor:
        """Scaled rows [row, d_in] → [row, latent] before TopK."""
        return (rows - self.decoder_bias) @ self.encoder + self.encoder_bias

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, d_in] as stored → latents [row, latent], at most `k` of a row above 0."""
        return top_k(self.pre_activations(rows * self.scale), self.k)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [row, latent] → rows [row, d_in] as stored."""
        return (latents @ self.decoder + self.decoder_bias) / self.scale

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, d_in] as stored → their reconstruction."""
        return self.decode(self.encode(rows))


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

    model: SparseAutoencoder
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
    """Train on the rows [row, d_in] of a selection (one layer of a site), shuffled anew each epoch.

    Deterministic for a seed on one machine and number of threads. Adam, its rate falling to 0 over the last fifth.
    Costs about 6·d_in·n_latents multiplications a row and epoch, more by half while latents are dead.
    """
    width = selection.shape[-1]
    n_steps = epochs * math.ceil(selection.n_rows / batch_rows)
    model = SparseAutoencoder(width, n_latents, k, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (n_steps - step) / (0.2 * n_steps)))
    losses: list[float] = []
    silent = torch.zeros(n_latents, dtype=torch.long)  # rows since a latent fired
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
            losses.append(_step(model, optimizer, rows, silent))
            schedule.step()
            compute_s += time.perf_counter() - begin
            bar.update()
    n_dead = int((silent >= DEAD_AFTER_ROWS).sum())
    return Trained(model, np.array(losses, np.float32), read_s, compute_s, selection.n_rows, n_dead)


def explained_variance(model: SparseAutoencoder, rows: npt.NDArray[Any]) -> float:
    """Return 1 − ‖x − x̂‖² ÷ ‖x − mean‖² over rows [row, d_in] that it was not trained on."""
    with torch.inference_mode():
        given = torch.from_numpy(np.asarray(rows, np.float32))
        left = (given - model(given)).square().sum()
        return float(1 - left / (given - given.mean(0)).square().sum())


def _begin(model: SparseAutoencoder, rows: torch.Tensor) -> None:
    """Take the scale and the decoder's bias from the first batch."""
    with torch.no_grad():
        model.scale.copy_(math.sqrt(rows.shape[1]) / rows.norm(dim=1).mean().clamp_min(1e-12))
        model.decoder_bias.copy_(rows.mean(0) * model.scale)


def _step(
    model: SparseAutoencoder, optimizer: torch.optim.Optimizer, given: torch.Tensor, silent: torch.Tensor
) -> float:
    """One update; returns the unexplained share of the batch's variance. `silent` is brought up to date."""
    rows = given * model.scale
    before = model.pre_activations(rows)
    latents = top_k(before, model.k)
    left = rows - (latents @ model.decoder + model.decoder_bias)
    variance = (rows - rows.mean(0)).square().sum().clamp_min(1e-12)
    loss = left.square().sum() / variance
    silent += len(rows)
    silent[(latents.detach() > 0).any(0)] = 0
    dead = torch.nonzero(silent >= DEAD_AFTER_ROWS).squeeze(1)
    total = loss
    if len(dead):
        revived = top_k(before[:, dead], min(2 * model.k, len(dead))) @ model.decoder[dead]
        # what the dead latents are to explain is what is left over, as it stands
        auxiliary = (left.detach() - revived).square().sum() / left.detach().square().sum().clamp_min(1e-12)
        total = loss + AUXILIARY_WEIGHT * auxiliary
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    with torch.no_grad():
        gradient = model.decoder.grad
        assert gradient is not None
        gradient -= (gradient * model.decoder).sum(1, keepdim=True) * model.decoder
        optimizer.step()
        model.decoder.copy_(nn.functional.normalize(model.decoder, dim=1))
    return float(loss.detach())
