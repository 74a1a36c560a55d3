"""Neighbour distance minimisation (arXiv 2508.01916): train a rotation, merge subspaces that tell of one another.

A training is a chain of phases. Within one the sizes stand, and `analyses.common.training.train` does the steps; at the
end of one the information of all pairs of subspaces is estimated and some are merged, and the next begins with a fresh
optimiser. A step's rows follow from the seed and its number, so a training that was killed goes on from its last state.
"""

import hashlib
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common import training as common
from analyses.common.program import note
from analyses.subspace_partition.buffer import Buffer
from analyses.subspace_partition.information import mutual_information, normalised
from analyses.subspace_partition.merging import Event, Pair, begin_anew, choose_pairs, merge_pairs
from analyses.subspace_partition.partition import Partition, Rotation, column_ranges, unit_sizes
from analyses.subspace_partition.search import find_nearest, take_rows

MERGE, BEGIN_ANEW, END = "merge", "begin anew", "end"
CHAIN = "chain.pt"
DIGEST_ROWS = 1024
PAIRS_SHARE = 8
"""At most one pair in so many subspaces is merged at once."""


@dataclass(frozen=True)
class Recipe:
    """How a rotation is trained; the defaults are the method's own for gpt2-small.

    `first_merge`, `merge_every` and `n_steps` say at which steps pairs are merged (before the last step: what is
    merged is trained on). `stop_at_n_subspaces` ends merging at that many, whatever the `threshold`; training goes
    on to the last step. `n_anew` events, the first ones, turn the worst pair at random instead of merging. `decays`
    lets the learning rate fall along a line to 0 within each phase: toys are trained at high rates.
    """

    unit: int = 32
    n_queries: int = 128
    n_key_blocks: int = 25
    learning_rate: float = 3e-4
    clip: float = 100.0
    first_merge: int = 20_000
    merge_every: int = 8_000
    n_steps: int = 100_000
    threshold: float = 0.04
    stop_at_n_subspaces: int | None = None
    n_anew: int = 0
    decays: bool = False
    information_keys: int = 98_304
    information_queries: int = 12_800
    save_every: int = 1_000

    def events(self) -> list[int]:
        """Return the steps at which pairs are looked at."""
        return list(range(self.first_merge, self.n_steps, self.merge_every))


@dataclass(frozen=True)
class Trained:
    """A trained partition, the loss of every step [step] and what was decided on the way."""

    partition: Partition
    losses: npt.NDArray[np.float32]
    events: tuple[Event, ...]

    @property
    def merges(self) -> tuple[Event, ...]:
        """The events at which pairs were merged."""
        return tuple(event for event in self.events if event.kind == MERGE)


def train_partition(
    buffer: Buffer,
    recipe: Recipe,
    *,
    seed: int,
    state: Path | None = None,
    device: str = "cpu",
    name: str = "partition",
) -> Trained:
    """Train a rotation on a buffer's rows and merge its subspaces until none qualifies, or the steps are done.

    `state` is a folder: the same call goes on from what a killed one left there, and ends with the same partition; one
    of another recipe, seed or data is refused with `SettingError`. On a terminal a bar shows the loss and the sizes.
    Costs a step one search over its keys, see `search.find_nearest`: n_keys · width · (width + n_queries)
    multiplications.
    """
    chain = _Chain(buffer.to(device), recipe, seed, state, name)
    while not chain.ended:
        chain.advance()
    return chain.result()


def partition_loss(
    basis: torch.Tensor, sizes: tuple[int, ...], queries: torch.Tensor, keys: list[torch.Tensor]
) -> torch.Tensor:
    """Return the mean over subspaces of the mean distance ‖q_s − n_s‖₂ of queries to their nearest keys, unsquared.

    The nearest are found without gradient; it flows through the basis on both sides.
    """
    index = find_nearest(queries, keys, basis, sizes).index
    found = take_rows(keys, index.reshape(-1)).view(*index.shape, -1)  # [subspace, query, width]
    apart = queries - found
    means = [
        torch.linalg.vector_norm(apart[i] @ basis[:, columns], dim=-1).mean()
        for i, columns in enumerate(column_ranges(sizes))
    ]
    return torch.stack(means).mean()


class _Chain:
    """The phases of one training, and where it stands."""

    def __init__(self, buffer: Buffer, recipe: Recipe, seed: int, state: Path | None, name: str) -> None:
        self.buffer, self.recipe, self.seed, self.state, self.name = buffer, recipe, seed, state, name
        width = buffer.width
        self.basis = torch.eye(width)
        self.sizes = unit_sizes(width, recipe.unit)
        self.losses: list[npt.NDArray[np.float32]] = []
        self.events: list[Event] = []
        self.ended = False
        self.identity = {**asdict(recipe), "seed": seed, "rows": len(buffer.rows), "rows_sum": _digest(buffer.rows)}
        if state is not None:
            self._restore(state)

    def advance(self) -> None:
        """Do one phase: its steps, then what is decided at its end."""
        begin = self.events[-1].step if self.events else 0
        end = self._end_of_phase(begin)
        rotation = Rotation(self.buffer.width, self.sizes, start=self.basis).to(self.buffer.rows.device)
        self.losses.append(self._train(rotation, begin, end))
        self.basis = rotation.basis.detach().cpu()
        self._decide(end)
        if self.state is not None:
            self._keep()

    def result(self) -> Trained:
        """Return what was trained."""
        partition = Rotation(self.buffer.width, self.sizes, start=self.basis).frozen()
        return Trained(partition, np.concatenate(self.losses), tuple(self.events))

    def _train(self, rotation: Rotation, begin: int, end: int) -> npt.NDArray[np.float32]:
        sizes = rotation.sizes
        optimizer = torch.optim.Adam(rotation.parameters(), lr=self.recipe.learning_rate)

        def loss_of(model: Any, step: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + begin + step)
            queries, keys = self.buffer.draw(self.recipe.n_queries, self.recipe.n_key_blocks, generator)
            return partition_loss(model.basis, sizes, queries, keys)

        return common.train(
            rotation,
            loss_of,
            optimizer=optimizer,
            schedule=_decay(optimizer, end - begin) if self.recipe.decays else None,
            n_steps=end - begin,
            clip=self.recipe.clip,
            state=None if self.state is None else self._phase_state(len(self.events)),
            save_every=self.recipe.save_every,
            identity={**self.identity, "begin": begin},
            name=self.name,
            show=lambda: {"sizes": sizes_text(sizes)},
        )

    def _decide(self, step: int) -> None:
        """Merge pairs, turn one at random, or go on; end where the steps are done or no pair qualifies."""
        recipe, sizes = self.recipe, self.sizes
        information = self._information(step)
        kind, pairs = self._choose(step, information)
        if kind == BEGIN_ANEW:
            self.basis = begin_anew(self.basis, sizes, pairs[0], seed=self.seed + step)
        elif kind == MERGE:
            self.basis, self.sizes = merge_pairs(self.basis, sizes, pairs)
        self.ended = kind == END
        self.events.append(Event(step, kind, sizes, information, pairs))
        note(f"{self.name}: step {step} of {recipe.n_steps}, {kind}, sizes {sizes_text(self.sizes)}")

    def _choose(self, step: int, information: npt.NDArray[np.float64]) -> tuple[str, tuple[Pair, ...]]:
        recipe, n = self.recipe, len(self.sizes)
        if step >= recipe.n_steps or n == 1:
            return END, ()
        if sum(event.kind == BEGIN_ANEW for event in self.events) < recipe.n_anew:
            return BEGIN_ANEW, choose_pairs(information, threshold=-np.inf, n_most=1)
        n_most = min(max(1, n // PAIRS_SHARE), n - (recipe.stop_at_n_subspaces or 1))
        pairs = choose_pairs(information, threshold=recipe.threshold, n_most=n_most)
        return (MERGE, pairs) if pairs else (END, ())

    def _end_of_phase(self, begin: int) -> int:
        """Return the step of the next event; where no more is to be merged, the last."""
        if len(self.sizes) <= (self.recipe.stop_at_n_subspaces or 1):
            return self.recipe.n_steps
        return next((step for step in self.recipe.events() if step > begin), self.recipe.n_steps)

    def _information(self, step: int) -> npt.NDArray[np.float64]:
        recipe = self.recipe
        queries, keys = self.buffer.sample(recipe.information_queries, recipe.information_keys, seed=self.seed + step)
        found = mutual_information(queries, keys, self.basis.to(keys.device), self.sizes, seed=self.seed)
        return normalised(found, self.sizes)

    def _keep(self) -> None:
        """Write where the chain stands, whole or not at all; the phase's own state is not needed any more."""
        assert self.state is not None
        events = [{**asdict(event), "information": torch.from_numpy(event.information)} for event in self.events]
        losses = torch.from_numpy(np.concatenate(self.losses))
        held = {"identity": self.identity, "basis": self.basis, "sizes": self.sizes, "losses": losses}
        path = self.state / CHAIN
        temporary = path.with_name(f"{CHAIN}.{os.getpid()}.tmp")
        torch.save({**held, "events": events, "ended": self.ended}, temporary)
        temporary.replace(path)
        self._phase_state(len(self.events) - 1).unlink(missing_ok=True)

    def _restore(self, state: Path) -> None:
        """Go on from what an earlier call kept; nothing but tensors and plain values is unpickled."""
        state.mkdir(parents=True, exist_ok=True)
        path = state / CHAIN
        if not path.exists():
            return
        held = torch.load(path, map_location="cpu", weights_only=True)
        if held["identity"] != self.identity:
            found = held["identity"]
            differing = sorted(key for key in {**found, **self.identity} if found.get(key) != self.identity.get(key))
            raise actdb.SettingError(f"{path} is of another training: {', '.join(differing)} differ; remove {state}")
        self.basis, self.sizes, self.ended = held["basis"], tuple(held["sizes"]), bool(held["ended"])
        self.losses = [held["losses"].numpy()]
        self.events = [_event(entry) for entry in held["events"]]

    def _phase_state(self, number: int) -> Path:
        assert self.state is not None
        return self.state / f"phase-{number:03d}.pt"


def _decay(optimizer: torch.optim.Optimizer, n_steps: int) -> common.Schedule:
    """A learning rate that falls along a line to 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)


def _event(entry: dict[str, Any]) -> Event:
    pairs = tuple((int(i), int(j)) for i, j in entry["pairs"])
    return Event(entry["step"], entry["kind"], tuple(entry["sizes"]), entry["information"].numpy(), pairs)


def _digest(rows: torch.Tensor) -> str:
    """A checksum of some of the rows, by which a state tells its own data from others."""
    chosen = rows[:: max(1, len(rows) // DIGEST_ROWS)].cpu().contiguous().numpy()
    return hashlib.sha256(chosen.tobytes()).hexdigest()[:16]


def sizes_text(sizes: tuple[int, ...]) -> str:
    """Sizes as text: 3×64+18×32."""
    return "+".join(f"{count}×{size}" if count > 1 else f"{size}" for size, count in Counter(sizes).items())
