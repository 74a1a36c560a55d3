"""Path patching: what a component's change does to the answer along one edge, and along every path to a receiver.

After Wang et al. (2022), appendix B, and Goldowsky-Dill et al. (2023): the sender gets another pair's activation. In
the *direct* effect all components between stay at their clean values, so that the change reaches the receiver through
the residual stream alone; in the *total* effect they respond. Either way the receiver alone gets what arrived, and
everything after it computes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from analyses.common.intervention import Hook, Route, path_patch, replace
from analyses.common.significance import Estimate, mean_interval, proportion_interval
from analyses.modular_arithmetic.component import Component, components_of
from analyses.modular_arithmetic.grid import Floats, Grid, Ints


@dataclass(frozen=True)
class Change:
    """What an intervention does to every pair: `lost` [pair], 1 where a right answer becomes wrong and −1 the other way
    round; `rise` [pair], how much the loss of the right answer grows, in nats."""

    lost: Floats
    rise: Floats

    @property
    def accuracy_lost(self) -> Estimate:
        """Accuracy without the intervention minus accuracy with it."""
        return share_lost(self.lost)

    @property
    def loss_rise(self) -> Estimate:
        """Mean growth of the loss in nats."""
        return mean_interval(self.rise)


@dataclass(frozen=True)
class PathEffect:
    """An edge from sender to receiver, and the effect of the sender's change along it and along all paths to there."""

    sender: str
    receiver: str
    direct: Change
    total: Change


def share_lost(lost: Floats) -> Estimate:
    """Return the mean of `lost` [pair]: Wilson's interval where pairs are only lost, Student's where some are won."""
    if lost.min(initial=0.0) >= 0:
        return proportion_interval(int(lost.sum()), len(lost))
    return mean_interval(lost, within=(-1.0, 1.0))


def change(grid: Grid, logits: torch.Tensor) -> Change:
    """Compare logits [pair, number] with those of the model as it is."""
    lost = grid.right(grid.clean).astype(np.float64) - grid.right(logits)
    return Change(lost, grid.losses(logits) - grid.losses(grid.clean))


def sender_hook(component: Component, activations: Mapping[str, torch.Tensor], source: Ints) -> Hook:
    """Return the intervention that gives a component's place the activation of each pair's source pair."""
    assert component.writes is not None, component.name
    return replace(component.writes, activations[component.writes.hook][torch.from_numpy(source)])


def patch_components(grid: Grid, source: Ints) -> dict[str, Change]:
    """Return what patching each component of its own does, the rest responding: activation patching by name."""
    activations = grid.written
    senders = [component for component in components_of(grid) if component.writes]
    return {c.name: change(grid, grid.logits([sender_hook(c, activations, source)])) for c in senders}


def path_effects(grid: Grid, source: Ints) -> Iterator[PathEffect]:
    """Yield every edge with the direct and total effect of giving its sender the source pairs' activations.

    `source` [pair] as from `corruption`. Costs four forward passes of the whole grid an edge, or two where nothing
    lies between.
    """
    nodes, activations = components_of(grid), grid.written
    embeds = {component.writes.hook for component in nodes if component.writes and component.layer is None}
    frozen = {name: values for name, values in activations.items() if name not in embeds}
    patched = partial(_patched, grid)
    for sender in nodes:
        if sender.writes is None:
            continue
        hook = sender_hook(sender, activations, source)
        for receiver in (node for node in nodes if node.depth > sender.depth):
            direct = patched(receiver, hook, frozen)
            between = any(sender.depth < node.depth < receiver.depth for node in nodes)
            yield PathEffect(sender.name, receiver.name, direct, patched(receiver, hook, {}) if between else direct)


def strengths(effects: Sequence[PathEffect]) -> dict[tuple[str, str], float]:
    """Return the direct effect of every edge on the loss, in nats: how edges are ranked."""
    return {(effect.sender, effect.receiver): effect.direct.loss_rise.value for effect in effects}


def _patched(grid: Grid, receiver: Component, sender: Hook, frozen: Mapping[str, torch.Tensor]) -> Change:
    route = Route(sender, receiver.reads, frozen)
    return change(grid, grid.read(path_patch(grid.model, grid.ids, route)))
