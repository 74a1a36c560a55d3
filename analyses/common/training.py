"""A trainer for toy models: resumable, with progress, and with its checkpoints harvested as a run's steps.

The data of a step must follow from its number alone (a generator seeded by seed and step, or an index into a fixed
table). Then a training that was killed goes on from its last saved state and ends with the same weights.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

import actdb

Loss = Callable[[Any, int], torch.Tensor]
Visit = Callable[[int], None]
SHOW_EVERY = 50


def train(
    model: torch.nn.Module,
    loss_of: Loss,
    *,
    optimizer: torch.optim.Optimizer,
    n_steps: int,
    checkpoints: Collection[int] = (),
    visit: Visit | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
    state: Path | None = None,
    save_every: int = 1000,
    identity: Mapping[str, Any] | None = None,
    name: str = "training",
) -> npt.NDArray[np.float32]:
    """Train a model in place for `n_steps`; returns the loss of every step [step], each before that step's update.

    `loss_of(model, step)` returns the scalar to minimise, step counting from 0. `visit(step)` is called, with dropout
    out, when `step` updates are done, for each step in `checkpoints` (0: the initial model; n_steps: the final one).
    `clip` bounds the norm of the gradient. `state` is a file in which everything is kept at checkpoints and every
    `save_every` steps: the same call goes on from it, and calls `visit` again for the step saved last. `identity` says
    what is trained, in plain values; a state of another, or one beyond `n_steps`, is refused with `SettingError`. Shows
    a progress bar with the loss on a terminal.
    """
    begin, losses = 0, torch.zeros(n_steps)
    if state is not None and state.exists():
        begin, kept = _load(state, model, optimizer, schedule, dict(identity or {}))
        if begin > n_steps:
            raise actdb.SettingError(f"{state} is at step {begin}, beyond the {n_steps} asked for; remove it")
        losses[:begin] = kept
    stops = {step for step in checkpoints if begin <= step <= n_steps}

    def save(step: int) -> None:
        if state is not None:
            _save(state, model, optimizer, schedule, step, losses[:step], dict(identity or {}))

    def stop(step: int) -> None:
        if step in stops:
            save(step)
            if visit is not None:
                _visit(model, visit, step)
        elif step == n_steps or (step > begin and step % save_every == 0):
            save(step)

    stop(begin)
    with tqdm(total=n_steps, initial=begin, desc=name, unit="step", disable=None, leave=False) as bar:
        for step in range(begin, n_steps):
            loss = loss_of(model, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses[step] = loss.detach()
            bar.update()
            if step % SHOW_EVERY == 0 and not bar.disable:
                bar.set_postfix(loss=f"{losses[step]:.4f}", refresh=False)
            stop(step + 1)
    return losses.numpy()


def harvest_steps(
    model: torch.nn.Module, prompts: Iterable[Mapping[str, Any]], db: Path, *, run: str, **options: Any
) -> Visit:
    """Return a `visit` for `train` that harvests each checkpoint into a database as run `<run>-step<step>`.

    `options` are those of `actdb.harvest`. A checkpoint that is there already is only checked, so a training that was
    resumed goes on where it was.
    """
    kept = list(prompts)

    def visit(step: int) -> None:
        actdb.harvest(model, kept, out=db, run=f"{run}-step{step}", step=step, **options)

    return visit


def _visit(model: torch.nn.Module, visit: Visit, step: int) -> None:
    was_training = model.training
    model.eval()
    try:
        visit(step)
    finally:
        model.train(was_training)


def _save(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    step: int,
    losses: torch.Tensor,
    identity: dict[str, Any],
) -> None:
    """Write the state whole or not at all: a killed process leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "losses": losses.clone()}
    held |= {"schedule": None if schedule is None else schedule.state_dict(), "identity": identity}
    torch.save(held, temporary)
    temporary.replace(path)


def _load(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    identity: dict[str, Any],
) -> tuple[int, torch.Tensor]:
    """Restore a state; nothing but tensors and plain values is unpickled."""
    held = torch.load(path, map_location="cpu", weights_only=True)
    if held["identity"] != identity:
        differing = [key for key in {**identity, **held["identity"]} if identity.get(key) != held["identity"].get(key)]
        raise actdb.SettingError(f"{path} is of another training: {', '.join(sorted(differing))} differ; remove it")
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    if schedule is not None and held["schedule"] is not None:
        schedule.load_state_dict(held["schedule"])
    return int(held["step"]), held["losses"]
