"""A trainer for toy models: resumable, with progress, and with its checkpoints harvested as a run's steps.

The data of a step must follow from its number alone (a generator seeded by seed and step, or an index into a fixed
table). Then a training that was killed goes on from its last saved state and ends with the same weights.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

import actdb

Loss = Callable[[Any, int], torch.Tensor]
Visit = Callable[[int], bool | None]
Schedule = torch.optim.lr_scheduler.LRScheduler
SHOW_EVERY = 50


def train(
    model: torch.nn.Module,
    loss_of: Loss,
    *,
    optimizer: torch.optim.Optimizer,
    n_steps: int,
    checkpoints: Collection[int] = (),
    visit: Visit | None = None,
    schedule: Schedule | None = None,
    clip: float | None = None,
    state: Path | None = None,
    save_every: int = 1000,
    identity: Mapping[str, Any] | None = None,
    name: str = "training",
    show: Callable[[], Mapping[str, Any]] | None = None,
) -> npt.NDArray[np.float32]:
    """Train a model in place for `n_steps`; returns the loss of every step [step], each before that step's update.

    `loss_of(model, step)` returns the scalar to minimise, step counting from 0. `visit(step)` is called, with dropout
    out, when `step` updates are done, for each step in `checkpoints` (0: the initial model; n_steps: the final one);
    where it returns True, training ends there. `clip` bounds the norm of the gradient.

    `state` is a file in which everything is kept at checkpoints and every `save_every` steps: the same call goes on
    from it, and calls `visit` again for the step saved last. `identity` says what is trained, in plain values; a state
    of another, or one beyond `n_steps`, is refused with `SettingError`. On a terminal a progress bar shows the loss,
    and what `show` returns.
    """
    kept = State(state, model, optimizer, schedule, dict(identity or {}))
    begin, losses = kept.load(n_steps)

    def ends(step: int) -> bool:
        """Save and visit where this step asks for it; whether training ends here."""
        if step in checkpoints:
            kept.save(step, losses)
            return visit is not None and _visit(model, visit, step)
        if step == n_steps or (step > begin and step % save_every == 0):
            kept.save(step, losses)
        return False

    if ends(begin):
        return losses[:begin].numpy()
    with tqdm(total=n_steps, initial=begin, desc=name, unit="step", disable=None, leave=False) as bar:
        for step in range(begin, n_steps):
            losses[step] = _update(model, loss_of, step, optimizer=optimizer, schedule=schedule, clip=clip)
            bar.update()
            if step % SHOW_EVERY == 0 and not bar.disable:
                bar.set_postfix(loss=f"{losses[step]:.4f}", refresh=False, **(show() if show else {}))
            if ends(step + 1):
                return losses[: step + 1].numpy()
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


@dataclass(frozen=True)
class State:
    """What a training needs to go on, and the file that it is kept in (None: not kept)."""

    path: Path | None
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule | None
    identity: dict[str, Any]

    def save(self, step: int, losses: torch.Tensor) -> None:
        """Write the state whole or not at all: a killed process leaves the one before."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        held = {name: None if part is None else part.state_dict() for name, part in self._parts().items()}
        torch.save({**held, "step": step, "losses": losses[:step].clone(), "identity": self.identity}, temporary)
        temporary.replace(self.path)

    def load(self, n_steps: int) -> tuple[int, torch.Tensor]:
        """Restore a kept state; returns the steps done and losses [n_steps], those done filled in.

        Nothing but tensors and plain values is unpickled.
        """
        losses = torch.zeros(n_steps)
        if self.path is None or not self.path.exists():
            return 0, losses
        held = torch.load(self.path, map_location="cpu", weights_only=True)
        found, step = held["identity"], int(held["step"])
        if found != self.identity:
            differing = sorted(key for key in {**found, **self.identity} if found.get(key) != self.identity.get(key))
            raise actdb.SettingError(f"{self.path} is of another training: {', '.join(differing)} differ; remove it")
        if step > n_steps:
            raise actdb.SettingError(f"{self.path} is at step {step}, beyond the {n_steps} asked for; remove it")
        for name, part in self._parts().items():
            if part is not None and held[name] is not None:
                part.load_state_dict(held[name])
        losses[:step] = held["losses"]
        return step, losses

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}


def _update(
    model: torch.nn.Module,
    loss_of: Loss,
    step: int,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule | None,
    clip: float | None,
) -> torch.Tensor:
    loss = loss_of(model, step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    return loss.detach()


def _visit(model: torch.nn.Module, visit: Visit, step: int) -> bool:
    was_training = model.training
    model.eval()
    try:
        return bool(visit(step))
    finally:
        model.train(was_training)
