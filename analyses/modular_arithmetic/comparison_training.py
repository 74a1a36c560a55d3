"""The trainings of the comparison: small models, each harvested once, when it has learnt or its epochs are over."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.training import train
from analyses.modular_arithmetic.model import ANSWER, MEMORIES, ModularModel, build
from analyses.modular_arithmetic.representation import RESIDUAL
from analyses.modular_arithmetic.training import (
    TEST,
    TRAIN,
    Training,
    answer_loss,
    grid_prompts,
    optimizer_of,
    tensors,
)

LEARNT = 1e-2
"""A training ends where its loss, over the unseen pairs where there are any, is below so many nats."""
RECIPES: dict[str, dict[str, Any]] = {
    "pooled": {"n_epochs": 1000, "weight_decay": 0.01},
    "one-layer": {"n_epochs": 4000, "weight_decay": 1.0, "d_model": 64, "d_mlp": 256},
    "lookup": {"n_epochs": 1000, "weight_decay": 0.01},
    "hybrid": {"n_epochs": 1000, "weight_decay": 0.01},
}
"""The specification's, but for the one-layer model: smaller and fewer epochs, so that all together take minutes."""
EVERY = 100
HELD_OUT = 0.15
"""Of the unordered pairs: held out in both orders; as many more in one."""
TRAINED, MIRRORED, UNSEEN = 0, 1, 2


def plan(architecture: str, modulus: int, *, seed: int, share: float, n_epochs: int | None = None) -> Training:
    """Return the training of one model on a share of the pairs; `n_epochs` bounds its epochs.

    Raises `SettingError` for an unknown architecture.
    """
    if architecture not in RECIPES:
        raise actdb.SettingError(f"architecture {architecture!r}: choose one of {', '.join(RECIPES)}")
    recipe = dict(RECIPES[architecture])
    recipe["n_epochs"] = min(recipe["n_epochs"], n_epochs or recipe["n_epochs"])
    return Training(
        architecture=architecture,
        modulus=modulus,
        seed=seed,
        train_share=share,
        every=EVERY,
        stop_below=LEARNT,
        group=f"compare-{architecture}-{round(100 * share)}",
        **recipe,
    )


def run_name(training: Training) -> str:
    """Return the name of a training's one run: its step is the epochs that were needed, of those allowed."""
    return f"{training.name}-of{training.n_epochs}"


def split_pairs(training: Training) -> npt.NDArray[np.int64]:
    """Return what each pair of the grid [p²] is: `TRAINED` on, held out but `MIRRORED`, or `UNSEEN`.

    A model that looks at the two numbers alike knows (b, a) where it has learnt (a, b): pairs held out singly let it
    pass for one that adds. Of the unordered pairs `HELD_OUT` are held out whole (unseen), and as many of those with
    a ≠ b in one order (mirrored: the other is trained on).
    """
    p = training.modulus
    kinds = np.full((p, p), TRAINED)
    if training.train_share < 1:
        random = np.random.default_rng([training.seed, p])
        pairs = random.permutation(np.stack(np.triu_indices(p), axis=1))  # [unordered pair, 2]
        n = round(HELD_OUT * len(pairs))
        rest = pairs[n:]
        single = random.permuted(rest[rest[:, 0] != rest[:, 1]][:n], axis=1)  # in one order or the other
        kinds[tuple(single.T)] = MIRRORED
        kinds[tuple(pairs[:n].T)] = kinds[tuple(pairs[:n, ::-1].T)] = UNSEEN
    return np.asarray(kinds.ravel(), np.int64)


def train_all(trainings: Sequence[Training], db: Path, *, n_processes: int = 1) -> None:
    """Train what the database does not have yet, in processes that share it."""
    missing = [training for training in trainings if run_name(training) not in _complete_runs(db)]
    if n_processes == 1 or len(missing) < 2:
        for training in missing:
            train_once(training, db)
        return
    missing.sort(key=lambda training: -training.modulus)  # the longest first, so that no process waits at the end
    context = get_context("spawn")  # a forked torch would inherit the threads of its parent
    with ProcessPoolExecutor(n_processes, mp_context=context, initializer=partial(torch.set_num_threads, 1)) as pool:
        list(pool.map(train_once, missing, [db] * len(missing)))


def train_once(training: Training, db: Path) -> None:
    """Train a model and harvest it when it has done."""
    model = build(training.shape, training.modulus, seed=training.seed, name=training.name)
    ids, wanted = tensors(training)
    kinds = torch.from_numpy(split_pairs(training))
    chosen, unseen = kinds == TRAINED, kinds == UNSEEN
    watched = unseen if unseen.any() else chosen
    inputs, outputs = ids[chosen], wanted[chosen]
    losses = train(
        model,
        lambda module, step: answer_loss(module(inputs), outputs).mean(),
        optimizer=optimizer_of(model, training),
        n_steps=training.n_epochs,
        checkpoints=range(EVERY, training.n_epochs, EVERY),
        visit=partial(_has_learnt, model, ids[watched], wanted[watched]),
        name=training.name,
    )
    actdb.harvest(
        model,
        _prompts(training, kinds.tolist()),
        out=db,
        run=run_name(training),
        step=len(losses),
        sites=(ANSWER,) if training.architecture in MEMORIES else (RESIDUAL, ANSWER),
        stats=(),
        store="float32",
    )


def _prompts(training: Training, kinds: Iterable[int]) -> list[dict[str, Any]]:
    rows = zip(grid_prompts(training), kinds, strict=True)
    return [{**prompt, "split": TRAIN if kind == TRAINED else TEST, "kind": kind} for prompt, kind in rows]


def _complete_runs(db: Path) -> set[str]:
    if not (db / "actdb.json").is_file():
        return set()
    with actdb.open(db) as database:
        return {run.name for run in database.runs() if run.status == "complete"}


def _has_learnt(model: ModularModel, ids: torch.Tensor, wanted: torch.Tensor, step: int) -> bool:
    with torch.inference_mode():
        return float(answer_loss(model(ids), wanted).mean()) < LEARNT
