"""Trainings on (a + b) mod p with held-out pairs: resumable, and every checkpoint a run of one database."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.nn import functional

import actdb
from analyses.common.program import note
from analyses.common.training import harvest_steps, train
from analyses.modular_arithmetic.model import (
    ANSWER,
    ModularModel,
    Shape,
    answers,
    build,
    pair_ids,
    shape_of,
)

TABLE = "modular_trainings"
LOSS_TABLE = "modular_losses"
TRAIN, TEST = "train", "test"
SITES = (
    "embed",
    "hook_pos_embed",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "pattern",
    "mlp_post",
    ANSWER,
)
MEMORY_SITES = {
    "lookup": ("hook_memory", ANSWER),
    "hybrid": ("embed", "hook_memory", "hook_hidden", ANSWER),
}
EARLY = (10, 30, 100, 200)
BETAS = (0.9, 0.98)
SAVE_EVERY = 2000
SHOWN_LOSSES = 2000
"""Losses kept of a training in the table: at most so many, evenly spaced in the logarithm of the epoch."""


@dataclass(frozen=True)
class Training:
    """What one training is; `train_share` of the pairs are trained on, its runs are `<name>-step<epoch>`.

    An epoch is a step: batches are full. `stop_below` ends a training at the first checkpoint whose loss on held-out
    pairs is below it (0: never).
    """

    architecture: str = "one-layer"
    modulus: int = 113
    seed: int = 0
    train_share: float = 0.3
    n_epochs: int = 50_000
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    every: int = 1000
    stop_below: float = 0.0
    d_model: int = 0
    d_mlp: int = 0
    group: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.train_share <= 1:
            raise actdb.SettingError(f"share of the pairs to train on {self.train_share}: above 0 and at most 1")
        if self.n_epochs < 1 or self.every < 1:
            raise actdb.SettingError(f"{self.n_epochs} epochs, a checkpoint every {self.every}: at least 1")

    @property
    def name(self) -> str:
        """The model's name in the database."""
        return f"{self.group or self.architecture}-p{self.modulus}-seed{self.seed}"

    @property
    def shape(self) -> Shape:
        """The architecture's shape; sizes of 0 are the architecture's own."""
        given = {key: getattr(self, key) for key in ("d_model", "d_mlp") if getattr(self, key)}
        return shape_of(self.architecture, **given)

    @property
    def steps(self) -> tuple[int, ...]:
        """The epochs that are harvested: the initial model, a few early ones, and from there on every `every`."""
        early = (0, *(epoch for epoch in EARLY if epoch < min(self.every, self.n_epochs)))
        return (*early, *range(self.every, self.n_epochs, self.every), self.n_epochs)

    @property
    def identity(self) -> dict[str, Any]:
        """What a kept state must be of, in plain values; a longer training goes on from a shorter one's."""
        own = asdict(self)
        for key in ("n_epochs", "every", "stop_below"):
            del own[key]
        return own


@dataclass(frozen=True)
class Trained:
    """A training with its runs by epoch, and its training loss, nats, before the update of each of `epochs`."""

    training: Training
    runs: tuple[str, ...]
    epochs: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]

    @property
    def last(self) -> str:
        """The run of the last checkpoint."""
        return self.runs[-1]

    @property
    def first(self) -> str:
        """The run of the initial model."""
        return self.runs[0]


def split(training: Training) -> npt.NDArray[np.bool_]:
    """Return which pairs of the grid [p²] are trained on: drawn by the seed, `train_share` of them."""
    n = training.modulus**2
    chosen = np.random.default_rng([training.seed, training.modulus]).permutation(n)[: round(training.train_share * n)]
    found = np.zeros(n, np.bool_)
    found[chosen] = True
    return found


def grid_prompts(training: Training) -> list[dict[str, Any]]:
    """Return the p² prompts in (a, b) order, with labels a, b, answer and split (train or test)."""
    ids = pair_ids(training.modulus, equals=training.shape.equals)
    rows = zip(ids.tolist(), answers(training.modulus).tolist(), split(training).tolist(), strict=True)
    return [
        {"tokens": tokens, "a": tokens[0], "b": tokens[1], "answer": answer, "split": TRAIN if trained else TEST}
        for tokens, answer, trained in rows
    ]


def answer_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each answer, nats [batch], in float64: float32 has no losses below 1e-7."""
    return functional.cross_entropy(logits.double(), wanted, reduction="none")


def run_training(training: Training, db: Path, *, state: Path | None = None) -> Trained:
    """Train one model and harvest its checkpoints over the whole grid; what is there already is only checked.

    AdamW on all training pairs at once. `state` is the file in which a killed training goes on. Where the database has
    the whole training nothing is trained.
    """
    if (known := finished(db, training)) is not None:
        return known
    model = build(training.shape, training.modulus, seed=training.seed, name=training.name)
    ids, wanted = tensors(training)
    chosen = torch.from_numpy(split(training))
    trained_ids, trained_answers = ids[chosen], wanted[chosen]
    held_out = (trained_ids, trained_answers) if bool(chosen.all()) else (ids[~chosen], wanted[~chosen])
    losses = train(
        model,
        lambda module, step: answer_loss(module(trained_ids), trained_answers).mean(),
        optimizer=optimizer_of(model, training),
        n_steps=training.n_epochs,
        checkpoints=training.steps,
        visit=_visits(model, training, db, held_out),
        state=state,
        save_every=SAVE_EVERY,
        identity=training.identity,
        name=training.name,
    )
    epochs = loss_epochs(len(losses))
    runs = tuple(f"{training.name}-step{step}" for step in training.steps if step <= len(losses))
    found = Trained(training, runs, epochs, losses[epochs].astype(np.float64))
    _keep(found, db)
    return found


def optimizer_of(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return AdamW over the weights that are trained."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=BETAS,
        fused=True,
    )


def tensors(training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grid's ids [p², n_ctx] and answers [p²]."""
    ids = pair_ids(training.modulus, equals=training.shape.equals)
    return torch.from_numpy(ids), torch.from_numpy(answers(training.modulus))


def run_trainings(trainings: Sequence[Training], db: Path, *, states: Path) -> list[Trained]:
    """Run trainings one after the other; their states are kept in a folder while they run."""
    found = []
    for number, training in enumerate(trainings, 1):
        if finished(db, training) is None:
            note(f"training {number} of {len(trainings)}: {training.name}, {training.n_epochs} epochs")
        found.append(run_training(training, db, state=states / f"{training.name}.pt"))
    return found


def finished(db: Path, training: Training) -> Trained | None:
    """Return a training as the database has it, whole and with these settings; None otherwise."""
    if not (db / "actdb.json").is_file():
        return None
    with actdb.open(db) as database:
        return next((item for item in trainings_of(database) if item.training == training), None)


def trainings_of(database: actdb.Database) -> list[Trained]:
    """Return the trainings that a database has a record of, and all runs of; raises nothing where it has none."""
    if TABLE not in database.snapshot.tables or LOSS_TABLE not in database.snapshot.tables:
        return []
    complete = {run.name for run in database.runs() if run.status == "complete"}
    names = list(Training.__dataclass_fields__)
    found = []
    for row in database.sql(f"SELECT * FROM {TABLE} ORDER BY name").arrow().to_pylist():
        runs = tuple(row["runs"])
        if complete.issuperset(runs):
            query = f"SELECT epoch, loss FROM {LOSS_TABLE} WHERE name = ? ORDER BY epoch"
            kept = database.sql(query, [row["name"]]).df()
            training = Training(**{key: row[key] for key in names})
            found.append(Trained(training, runs, kept["epoch"].to_numpy(), kept["loss"].to_numpy()))
    return found


def loss_epochs(n_epochs: int) -> npt.NDArray[np.int64]:
    """Return the epochs whose loss is kept: all of a short training, of a long one evenly spaced in the logarithm."""
    if n_epochs <= SHOWN_LOSSES:
        return np.arange(n_epochs)
    return np.unique(np.geomspace(1, n_epochs, SHOWN_LOSSES).round().astype(np.int64)) - 1


def _visits(
    model: ModularModel, training: Training, db: Path, held_out: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[int], bool]:
    """Harvest each checkpoint; end where the held-out pairs are learnt."""
    sites = MEMORY_SITES.get(training.architecture, SITES)
    harvest = harvest_steps(
        model, grid_prompts(training), db, run=training.name, sites=sites, stats=(), store="float32"
    )

    def visit(step: int) -> bool:
        harvest(step)
        with torch.inference_mode():
            return float(answer_loss(model(held_out[0]), held_out[1]).mean()) < training.stop_below

    return visit


def _keep(found: Trained, db: Path) -> None:
    """Keep the record of a training and its losses as tables, beside those of others."""
    row = {**asdict(found.training), "name": found.training.name, "runs": list(found.runs)}
    losses = [
        {"name": found.training.name, "epoch": int(epoch), "loss": float(loss)}
        for epoch, loss in zip(found.epochs, found.losses, strict=True)
    ]
    with actdb.open(db, mode="a") as database:
        for table, rows in ((TABLE, [row]), (LOSS_TABLE, losses)):
            kept = _others(database, table, found.training.name)
            database.add_table(table, pa.Table.from_pylist([*kept, *rows]), replace=True)


def _others(database: actdb.Database, table: str, name: str) -> list[dict[str, Any]]:
    """The rows of a table that speak of other trainings."""
    if table not in database.snapshot.tables:
        return []
    return list(database.sql(f"SELECT * FROM {table} WHERE name <> ?", [name]).arrow().to_pylist())
