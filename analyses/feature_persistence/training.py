"""Trainings of the tiny model, each harvested at every checkpoint into one database as runs with `step`."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

import actdb
from analyses.common.metric import next_token_loss
from analyses.common.training import harvest_steps, train
from analyses.feature_persistence.model import PostNormTransformer
from analyses.feature_persistence.task import N_TRAINING, PATTERNS, probe_prompts, training_sequences

BATCH = 32
STEPS_PER_EPOCH = -(-N_TRAINING // BATCH)
EPOCHS_BETWEEN = 2
ALL_SITES = ("mlp_post", "mlp_out", "resid_pre", "resid_mid", "resid_post", "z", "pattern")
N_PROCESSES = 2
TABLE = "trainings"


@dataclass(frozen=True)
class Training:
    """What one training is: `group` names the comparison that it belongs to, its runs are `<name>-step<step>`."""

    group: str
    seed: int
    scheme: str = "default"
    learning_rate: float = 1e-3
    n_epochs: int = 10
    patterns: tuple[str, ...] = PATTERNS
    causal: bool = False
    every_checkpoint: bool = True
    all_sites: bool = False

    @property
    def name(self) -> str:
        """The model's name in the database."""
        return f"{self.group}-seed{self.seed}"

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are harvested: the initial model, then every two epochs, or the last alone."""
        epochs = range(0, self.n_epochs + 1, EPOCHS_BETWEEN) if self.every_checkpoint else (0, self.n_epochs)
        return tuple(epoch * STEPS_PER_EPOCH for epoch in epochs)

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of its runs, by step."""
        return tuple(f"{self.name}-step{step}" for step in self.steps)


@dataclass(frozen=True)
class Trained:
    """Losses in nats a token: of the first batch, before any update, and means of the first and last epoch."""

    training: Training
    first_loss: float
    first_epoch_loss: float
    last_loss: float


def run_training(training: Training, db: Path) -> Trained:
    """Train one model and harvest its checkpoints; what is in the database already is only checked.

    Adam, batches of 32 in the order of the data, the same every epoch; cross-entropy of the next token at all positions
    but the last.
    """
    ids = torch.from_numpy(training_sequences(training.seed, patterns=training.patterns))
    model = PostNormTransformer(seed=training.seed, scheme=training.scheme, causal=training.causal, name=training.name)

    def loss_of(module: PostNormTransformer, step: int) -> torch.Tensor:
        return batch_loss(module, ids, step)

    losses = train(
        model,
        loss_of,
        optimizer=torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=True),
        n_steps=training.n_epochs * STEPS_PER_EPOCH,
        checkpoints=training.steps,
        visit=harvest_steps(
            model,
            probe_prompts(),
            db,
            run=training.name,
            sites=ALL_SITES if training.all_sites else ("mlp_post",),
            stats=("heads", "neurons") if training.all_sites else ("neurons",) if training.every_checkpoint else (),
            store="float32",
        ),
        name=training.name,
    )
    epochs = (float(losses[epoch].mean()) for epoch in (slice(STEPS_PER_EPOCH), slice(-STEPS_PER_EPOCH, None)))
    return Trained(training, float(losses[0]), *epochs)


def batch_loss(model: PostNormTransformer, ids: torch.Tensor, step: int) -> torch.Tensor:
    """Return the mean loss of a step's batch of sequences [sequence, pos]: in their order, every epoch the same."""
    begin = step % STEPS_PER_EPOCH * BATCH
    batch = ids[begin : begin + BATCH]
    return next_token_loss(model(batch), batch).mean()


def run_trainings(trainings: Sequence[Training], db: Path) -> list[Trained]:
    """Run trainings in processes that share the database, and keep a table of them in it."""
    if N_PROCESSES == 1:
        trained = [run_training(training, db) for training in trainings]
    else:
        context = get_context("spawn")  # a forked torch would inherit the threads of its parent
        with ProcessPoolExecutor(N_PROCESSES, mp_context=context, initializer=_use_one_thread) as pool:
            trained = list(pool.map(run_training, trainings, [db] * len(trainings)))
    losses = ("first_loss", "first_epoch_loss", "last_loss")
    rows = [
        {**asdict(t.training), "name": t.training.name, **{name: getattr(t, name) for name in losses}} for t in trained
    ]
    with actdb.open(db, mode="a") as database:
        database.add_table(TABLE, pa.Table.from_pylist(rows), replace=True)
    return trained


def losses_by_group(trained: Sequence[Trained]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the last losses by group of trainings."""
    groups: dict[str, list[float]] = {}
    for item in trained:
        groups.setdefault(item.training.group, []).append(item.last_loss)
    return {group: np.array(values) for group, values in groups.items()}


def _use_one_thread() -> None:
    """Matrices this small gain nothing from a second thread, which the other process needs."""
    torch.set_num_threads(1)
