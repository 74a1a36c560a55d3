"""The model with some of its edges cut: every component sees its senders' values, or their means where an edge is cut.

A component's value in a circuit is what it computes when each kept edge carries its sender's value in the circuit, and
each cut one the sender's mean over all pairs (at the position): ACDC's semantics (Conmy et al. 2023) with mean
ablation. It is found with the model itself, a forward pass for each set of components that see the same: all writing
places are held at what is to be seen, and what the component writes is recorded. So it is exact for norms too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from analyses.common.intervention import Hook, Place, logits_of, replace
from analyses.modular_arithmetic.component import (
    EMBED,
    OUTPUT,
    Component,
    Edge,
    components_of,
    edges_of,
    written_by,
)
from analyses.modular_arithmetic.grid import Grid


@dataclass(frozen=True)
class Computed:
    """What a circuit computed: the kept edges, `values` [pair, …] by component, and the logits [pair, number]."""

    edges: frozenset[Edge]
    values: Mapping[str, torch.Tensor]
    logits: torch.Tensor


@dataclass(frozen=True)
class Wiring:
    """The components and edges of a model, and what circuits of them compute."""

    grid: Grid

    @cached_property
    def nodes(self) -> tuple[Component, ...]:
        """All components, in the order in which they compute."""
        return components_of(self.grid)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge there is."""
        return edges_of(self.nodes)

    @cached_property
    def whole(self) -> Computed:
        """What the model computes with no edge cut."""
        values = {c.name: written_by(c, self.grid.written) for c in self.nodes if c.writes}
        return Computed(frozenset(self.edges), values, self.grid.clean)

    def compute(self, edges: Collection[Edge], *, known: Computed | None = None) -> Computed:
        """Compute the circuit of the edges that are kept.

        `known` is what another circuit computed: components with the same edges before them take their values from it.
        Costs a forward pass of all pairs for each other component at most.
        """
        kept, known = frozenset(edges), known or self.whole
        changed: set[str] = set()
        values = dict(known.values)
        logits = known.logits
        groups: dict[tuple[int, frozenset[str]], list[Component]] = {}
        for node in self.nodes:
            groups.setdefault((node.depth, _seen(node, kept)), []).append(node)
        for (_, seen), group in groups.items():
            same = all(_seen(node, known.edges) == seen for node in group)
            if group[0].kind == EMBED or (same and not seen & changed):
                continue
            recorded, out = self._run(group, seen, values)
            values |= recorded
            changed |= set(recorded)
            logits = out if group[0].kind == OUTPUT else logits
        return Computed(kept, values, logits)

    def live(self, edges: Collection[Edge]) -> frozenset[Edge]:
        """Return the edges that lie on a path from an embedding to the output.

        Of the others the receiver is read by nothing, or the sender sees nothing but means: it writes a constant, which
        becomes its own mean where the edge is cut.
        """
        kept = set(edges)
        kinds = {node.name: node.kind for node in self.nodes}
        while True:
            fed = {receiver for _, receiver in kept} | {name for name, kind in kinds.items() if kind == EMBED}
            read = {sender for sender, _ in kept} | {"output"}
            left = {(sender, receiver) for sender, receiver in kept if sender in fed and receiver in read}
            if left == kept:
                return frozenset(kept)
            kept = left

    @cached_property
    def _means(self) -> dict[str, torch.Tensor]:
        """What every place holds on average [1, pos, …], by hook name."""
        return {name: values.mean(0, keepdim=True) for name, values in self.grid.written.items()}

    def _run(
        self, group: list[Component], seen: frozenset[str], values: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Run the model with what a group sees; returns the values that the group writes, and the logits."""
        found: dict[str, torch.Tensor] = {}

        def record(activation: torch.Tensor, hook: Any, name: str) -> None:
            found.setdefault(name, activation.clone())

        own = {node.writes.hook for node in group if node.writes}
        recording: list[Hook] = [(name, partial(record, name=name)) for name in own]
        out = logits_of(self.grid.model, self.grid.ids, [*recording, *self._holding(group[0].depth, seen, values)])
        return {node.name: written_by(node, found) for node in group if node.writes}, self.grid.read(out)

    def _holding(self, depth: int, seen: frozenset[str], values: Mapping[str, torch.Tensor]) -> list[Hook]:
        """Hold what lies before a depth at the values seen there: those of senders in `seen`, means of others."""
        held = {name: mean.expand_as(self.grid.written[name]).clone() for name, mean in self._means.items()}
        for node in self.nodes:
            if node.depth < depth and node.writes and node.name in seen:
                written_by(node, held).copy_(values[node.name])  # a view of what is held
        before = {node.writes.hook for node in self.nodes if node.depth < depth and node.writes}
        return [replace(Place(name), held[name]) for name in sorted(before)]


def _seen(node: Component, edges: Collection[Edge]) -> frozenset[str]:
    return frozenset(sender for sender, receiver in edges if receiver == node.name)
