"""Trainings of the tiny model, each harvested at every checkpoint into one database as runs with `step`."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

import actdb
from analyses.common.metric import next_token_loss
from analyses.common.program import note
from analyses.common.training import harvest_steps, train
from analyses.feature_persistence.model import PostNormTransformer
from analyses.feature_persistence.task import N_TRAINING, PATTERNS, probe_prompts, training_sequences

BATCH = 32
STEPS_PER_EPOCH = -(-N_TRAINING // BATCH)
EPOCHS_BETWEEN = 2
ALL_SITES = ("mlp_post", "mlp_out", "resid_pre", "resid_mid", "resid_post", "z", "pattern")
N_PROCESSES = 2
TABLE = "trainings"
LOSSES = ("first_loss", "first_epoch_loss", "last_loss")


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
            stats=("heads", "neurons") if training.all_sites else (),
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
    """Run trainings in processes that share the database, and keep a table of them in it.

    Those that the table has already, with the same settings and all their runs complete, are not repeated.
    """
    known = finished_trainings(db)
    missing = [training for training in trainings if training not in known]
    note(f"training {len(missing)} of {len(trainings)} models and harvesting their checkpoints into {db}")
    if N_PROCESSES == 1:
        made = [run_training(training, db) for training in missing]
    else:
        context = get_context("spawn")  # a forked torch would inherit the threads of its parent
        with ProcessPoolExecutor(N_PROCESSES, mp_context=context, initializer=_use_one_thread) as pool:
            made = list(pool.map(run_training, missing, [db] * len(missing)))
    known |= {item.training: item for item in made}
    rows = [
        {**asdict(t.training), "name": t.training.name, **{key: getattr(t, key) for key in LOSSES}}
        for t in known.values()
    ]
    with actdb.open(db, mode="a") as database:
        database.add_table(TABLE, pa.Table.from_pylist(rows), replace=True)
    return [known[training] for training in trainings]


def finished_trainings(db: Path) -> dict[Training, Trained]:
    """Return the trainings of a database whose runs are all there and complete; none where it is none yet."""
    if not (db / "actdb.json").is_file():
        return {}
    with actdb.open(db) as database:
        if TABLE not in database.snapshot.tables:
            return {}
        complete = {run.name for run in database.runs() if run.status == "complete"}
        rows = database.sql(f"SELECT * FROM {TABLE}").df().to_dict("records")
    names = [field.name for field in fields(Training)]
    found = {}
    for row in rows:
        training = Training(**{**{name: row[name] for name in names}, "patterns": tuple(row["patterns"])})
        if complete.issuperset(training.runs):
            found[training] = Trained(training, *(float(row[key]) for key in LOSSES))
    return found


def losses_by_group(trained: Sequence[Trained]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the last losses by group of trainings."""
    groups: dict[str, list[float]] = {}
    for item in trained:
        groups.setdefault(item.training.group, []).append(item.last_loss)
    return {group: np.array(values) for group, values in groups.items()}


def _use_one_thread() -> None:
    """Matrices this small gain nothing from a second thread, which the other process needs."""
    torch.set_num_threads(1)
