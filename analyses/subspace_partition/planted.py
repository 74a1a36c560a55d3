"""Toy (a): two groups of mutually exclusive features in superposition, whose subspaces are known; and the null.

The model is ReLU(x W Wᵀ + b) with 40 features in 12 dimensions, trained to give back its input. Of each group of 20 no
feature is on with probability 0.25, else one, drawn evenly, with a value drawn evenly from 0 to 1. Features of one
group may share directions, since they are never on together; those of two groups may not. So the model gives each group
a subspace of its own, which is what a partition should find. The null is rows without any structure: isotropic noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import nn

import actdb
from analyses.common.training import train
from analyses.subspace_partition.partition import Partition, span_overlap

N_GROUPS, GROUP_SIZE, WIDTH = 2, 20, 12
OFF_PROBABILITY = 0.25
PROMPT_ROWS = 128
SITE, HOOK = "resid_post", "blocks.0.hook_resid_post"
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class SuperpositionModel(nn.Module):
    """x [row, feature] → h = x W [row, width] → ReLU(h Wᵀ + b) [row, feature]."""

    def __init__(self, *, seed: int, n_features: int = N_GROUPS * GROUP_SIZE, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(torch.randn(n_features, width, generator=generator) / width**0.5)
        self.b = nn.Parameter(torch.zeros(n_features))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Features [row, feature] → the hidden row [row, width]."""
        return x @ self.W

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden rows [row, width] → features [row, feature]."""
        return (hidden @ self.W.T + self.b).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [row, feature] → the same, as far as the hidden row holds them."""
        return self.read(self.hidden(x))

    def group_rows(self, group: int) -> Floats:
        """Return the directions of a group's features [feature, width]."""
        rows: Floats = self.W.detach().numpy()[group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
        return rows

    def group_span(self, group: int, n: int) -> Floats:
        """Return the `n` directions [width, n] in which most of a group's features lie: singular vectors of its W."""
        right = np.linalg.svd(self.group_rows(group), full_matrices=True)[2]
        return np.ascontiguousarray(right[:n].T)


@dataclass(frozen=True)
class Sample:
    """Inputs: the feature of each group that is on [row, group], GROUP_SIZE where none is, and values [row, group]."""

    feature: Ints
    value: Floats

    def inputs(self) -> torch.Tensor:
        """Return x [row, feature]."""
        n = len(self.feature)
        padded = np.zeros((n, N_GROUPS, GROUP_SIZE + 1), np.float32)
        np.put_along_axis(padded, self.feature[:, :, None], self.value[:, :, None], axis=2)
        return torch.from_numpy(padded[:, :, :GROUP_SIZE].reshape(n, -1))

    def tokens(self) -> Ints:
        """Return a token id for each row that says which features are on: their numbers in base GROUP_SIZE + 1."""
        return self.feature @ ((GROUP_SIZE + 1) ** np.arange(N_GROUPS)[::-1])


def draw_sample(n: int, generator: np.random.Generator) -> Sample:
    """Draw `n` inputs."""
    feature = generator.integers(0, GROUP_SIZE, (n, N_GROUPS))
    off = generator.random((n, N_GROUPS)) < OFF_PROBABILITY
    value = generator.random((n, N_GROUPS), np.float32)
    return Sample(np.where(off, GROUP_SIZE, feature), np.where(off, 0, value).astype(np.float32))


def train_model(
    *, seed: int, n_steps: int = 6000, batch: int = 1024, learning_rate: float = 3e-3, state: Path | None = None
) -> SuperpositionModel:
    """Train the model on fresh inputs each step, its loss the squared error summed over features."""
    model = SuperpositionModel(seed=seed)

    def loss_of(model: Any, step: int) -> torch.Tensor:
        x = draw_sample(batch, np.random.default_rng((seed, 41, step))).inputs()
        error: torch.Tensor = (model(x) - x).square().sum(1).mean()
        return error

    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    train(
        model,
        loss_of,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / n_steps, 0.01)),
        n_steps=n_steps,
        state=state,
        identity={"seed": seed, "batch": batch, "learning_rate": learning_rate},
        name=f"toy (a), seed {seed}",
    )
    return model.eval().requires_grad_(False)


def orthogonal_model(*, seed: int) -> SuperpositionModel:
    """Return a model built by hand whose groups lie in orthogonal spans of half the dimensions each, nothing beside.

    A trained one leaves some of each group in the other's span, and noise-free rows then tell of one another by that.
    """
    model, generator = SuperpositionModel(seed=seed), np.random.default_rng((seed, 46))
    basis = np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0]
    with torch.no_grad():
        for group, own in enumerate(np.split(basis, N_GROUPS, axis=1)):
            rows = generator.standard_normal((GROUP_SIZE, own.shape[1])) @ own.T
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            model.W[group * GROUP_SIZE : (group + 1) * GROUP_SIZE] = torch.from_numpy(rows)
    return model.eval().requires_grad_(False)


def store_rows(model: SuperpositionModel, db: Path, run: str, *, n_rows: int, seed: int) -> Sample:
    """Store hidden rows as `resid_post` of layer 0 of a run, `PROMPT_ROWS` a prompt; returns what they were made of.

    A row's token id says which features are on, see `Sample.tokens`.
    """
    sample = draw_sample(n_rows // PROMPT_ROWS * PROMPT_ROWS, np.random.default_rng((seed, 42)))
    _import(model.hidden(sample.inputs()).detach(), sample.tokens(), db, run)
    return sample


def store_noise(db: Path, run: str, *, n_rows: int, seed: int, width: int = WIDTH) -> None:
    """Store isotropic Gaussian rows as `resid_post` of layer 0 of a run: rows without a preferred partition."""
    n = n_rows // PROMPT_ROWS * PROMPT_ROWS
    values = np.random.default_rng((seed, 43)).standard_normal((n, width), np.float32)
    _import(torch.from_numpy(values), np.zeros(n, np.int64), db, run)


@dataclass(frozen=True)
class Recovery:
    """How well two subspaces are those of the two groups; a partition into another number recovers nothing.

    `overlap` [group] is the mean squared cosine of the principal angles between a group's span and the subspace that
    is matched with it; `variance` [group] the share of the group's variance that lies there; NaN without a match.
    """

    n_subspaces: int
    overlap: tuple[float, ...]
    variance: tuple[float, ...]
    match: tuple[int, ...]

    def holds(self, least: float = 0.95) -> bool:
        """Whether both groups' spans are recovered."""
        return self.n_subspaces == N_GROUPS and min(self.overlap) >= least


def measure_recovery(model: SuperpositionModel, partition: Partition) -> Recovery:
    """Match the two largest subspaces with the groups, and compare their spans.

    A group's span has as many dimensions as its subspace: those in which most of its features lie.
    """
    n = partition.n_subspaces
    if n < N_GROUPS:
        nothing = (float("nan"),) * N_GROUPS
        return Recovery(n, nothing, nothing, ())
    largest = np.argsort([-size for size in partition.sizes], kind="stable")[:N_GROUPS].tolist()
    found = [_compare(model, partition, match) for match in (tuple(largest), tuple(largest[::-1]))]
    return max(found, key=lambda recovery: sum(recovery.overlap))


def chance_overlap(partition: Partition) -> float:
    """Return the overlap that random spans have, matched by chance: a subspace's share of the dimensions."""
    return float(np.mean([size / sum(partition.sizes) for size in partition.sizes]))


def patch_effects(model: SuperpositionModel, partition: Partition, *, n_pairs: int, seed: int) -> npt.NDArray[Any]:
    """Return what patching each subspace does to a feature that is read from the row, [pair, subspace].

    In clean rows a feature of one group (each group in turn) is on, in the corrupted ones another, and another of the
    other group; the effect is the fall of the read value of the clean feature, clean − patched.
    """
    clean, corrupted = _draw_pairs(n_pairs, np.random.default_rng((seed, 44)))
    group = np.arange(n_pairs) % N_GROUPS
    asked = torch.from_numpy(group * GROUP_SIZE + clean.feature[np.arange(n_pairs), group])
    rows, others = model.hidden(clean.inputs()), model.hidden(corrupted.inputs())

    def value(hidden: torch.Tensor) -> torch.Tensor:
        return model.read(hidden).gather(1, asked[:, None])[:, 0]

    with torch.no_grad():
        effects = []
        for i in range(partition.n_subspaces):
            basis = torch.from_numpy(np.ascontiguousarray(partition.basis(i)))
            effects.append(value(rows) - value(rows + (others - rows) @ basis @ basis.T))
    return torch.stack(effects, 1).double().numpy()


def _draw_pairs(n: int, generator: np.random.Generator) -> tuple[Sample, Sample]:
    """Draw rows with a feature of each group on at full value, and partners with other features on."""
    feature = generator.integers(0, GROUP_SIZE, (n, N_GROUPS))
    other = (feature + generator.integers(1, GROUP_SIZE, (n, N_GROUPS))) % GROUP_SIZE
    on = np.ones((n, N_GROUPS), np.float32)
    return Sample(feature, on), Sample(other, on)


def _compare(model: SuperpositionModel, partition: Partition, match: tuple[int, ...]) -> Recovery:
    overlap, variance = [], []
    for group, subspace in enumerate(match):
        basis, rows = partition.basis(subspace), model.group_rows(group)
        overlap.append(span_overlap(basis, model.group_span(group, basis.shape[1])))
        variance.append(float(((rows @ basis) ** 2).sum() / (rows**2).sum()))
    return Recovery(partition.n_subspaces, tuple(overlap), tuple(variance), match)


def _import(rows: torch.Tensor, tokens: Ints, db: Path, run: str) -> None:
    """Import rows [row, width] into a database as those of a model would be."""
    db.parent.mkdir(parents=True, exist_ok=True)
    file = db.parent / f"{run}.safetensors"
    n_prompts = len(rows) // PROMPT_ROWS
    save_file({HOOK: rows.reshape(n_prompts, PROMPT_ROWS, -1).contiguous()}, file)
    try:
        prompts = [{"tokens": prompt} for prompt in tokens.reshape(n_prompts, PROMPT_ROWS).tolist()]
        actdb.import_activations(file, prompts, out=db, run=run, sites=[SITE], store="float32")
    finally:
        file.unlink(missing_ok=True)
