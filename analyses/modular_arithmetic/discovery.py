"""The minimal circuit: the edges without any of which the model, all else mean-ablated, no longer answers as well.

Edges are cut one after another from the weakest on; a cut stays where the circuit still has `KEPT` of the accuracy, and
passes are repeated until no single edge can go. After ACDC (Conmy et al. 2023), with the accuracy in the place of a
threshold on each edge. Where components stand in for each other, what is found depends on what is cut first, so two
orders are tried and the smaller circuit is kept: edges by path patching from other pairs; and whole components before
edges, both by path patching from the mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analyses.common.intervention import replace
from analyses.common.significance import Estimate
from analyses.modular_arithmetic.component import Edge, components_of
from analyses.modular_arithmetic.grid import Floats, Grid
from analyses.modular_arithmetic.path import Change, PathEffect, change, strengths
from analyses.modular_arithmetic.wiring import Computed, Wiring

KEPT = 0.95
N_RANDOM = 20


@dataclass(frozen=True)
class Circuit:
    """What was found: the kept edges, and accuracies over all pairs.

    `accuracy` is that of the circuit, `whole` that of the model, `rest` that of all other edges with the circuit's cut,
    `random` [draw] that of circuits with as many edges left by cutting at random. `components` are those that the
    circuit passes through, in the order in which they compute.
    """

    edges: tuple[Edge, ...]
    components: tuple[str, ...]
    n_edges: int
    accuracy: float
    whole: float
    rest: float
    random: Floats
    threshold: float


def importances(grid: Grid) -> dict[str, Change]:
    """Return what setting each component to its mean over all pairs (by position) does, by name."""
    means = {name: values.mean(0, keepdim=True) for name, values in grid.written.items()}
    places = {node.name: node.writes for node in components_of(grid) if node.writes}
    return {name: change(grid, grid.logits([replace(at, means[at.hook])])) for name, at in places.items()}


def find_circuit(
    wiring: Wiring, effects: Sequence[PathEffect], *, kept: float = KEPT, n_random: int = N_RANDOM, seed: int
) -> Circuit:
    """Return the minimal circuit that keeps a share of the accuracy.

    Costs up to as many forward passes of all pairs as there are components for each edge and pass; most edges need few,
    since what lies before them stays as it was.
    """
    by_patch, by_cut = (
        sorted(wiring.edges, key=effect.__getitem__) for effect in (strengths(effects), _cut_effects(wiring))
    )
    whole = _accuracy(wiring, wiring.whole)
    least = kept * whole
    tried = (
        _prune(wiring, wiring.whole, by_patch, least=least),
        _prune(wiring, _drop_components(wiring, least=least), by_cut, least=least),
    )
    found = min(tried, key=lambda computed: len(computed.edges))
    generator = np.random.default_rng((seed, 61))
    random = [_accuracy(wiring, _random_circuit(wiring, len(found.edges), generator)) for _ in range(n_random)]
    names = {name for edge in found.edges for name in edge}
    return Circuit(
        edges=tuple(edge for edge in wiring.edges if edge in found.edges),
        components=tuple(node.name for node in wiring.nodes if node.name in names),
        n_edges=len(wiring.edges),
        accuracy=_accuracy(wiring, found),
        whole=whole,
        rest=_accuracy(wiring, wiring.compute(set(wiring.edges) - found.edges)),
        random=np.array(random),
        threshold=kept,
    )


def write_circuit(
    path: Path, circuit: Circuit, wiring: Wiring, effects: Sequence[PathEffect], importance: Mapping[str, Change]
) -> None:
    """Write nodes and edges as JSON: effects are on the accuracy, and on the loss in nats."""
    grid = wiring.grid
    nodes = [
        {"name": node.name, "kind": node.kind, "layer": node.layer, "in_circuit": node.name in circuit.components}
        | ({"mean_ablated": _summary(importance[node.name])} if node.name in importance else {})
        for node in wiring.nodes
    ]
    edges = [
        {"sender": effect.sender, "receiver": effect.receiver}
        | {"in_circuit": (effect.sender, effect.receiver) in circuit.edges}
        | {"direct": _summary(effect.direct), "total": _summary(effect.total)}
        for effect in effects
    ]
    accuracy = {"circuit": circuit.accuracy, "model": circuit.whole, "rest": circuit.rest}
    content: dict[str, Any] = {
        "run": grid.run.name,
        "modulus": grid.modulus,
        "share_kept": circuit.threshold,
        "accuracy": accuracy | {"random_circuits": circuit.random.tolist(), "chance": 1 / grid.modulus},
        "nodes": nodes,
        "edges": edges,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _cut_effects(wiring: Wiring) -> dict[Edge, float]:
    """How much cutting each edge alone, a path patch from the mean, adds to the loss."""
    edges = frozenset(wiring.edges)
    return {edge: _loss(wiring, wiring.compute(edges - {edge})) for edge in wiring.edges}


def _drop_components(wiring: Wiring, *, least: float) -> Computed:
    """Cut components wherever the accuracy stays, those first whose mean adds least to the loss."""
    rises = {name: found.loss_rise.value for name, found in importances(wiring.grid).items()}
    found = wiring.whole
    for name in sorted(rises, key=lambda name: rises[name]):
        left = wiring.live(frozenset(edge for edge in found.edges if name not in edge))
        tried = wiring.compute(left, known=found)
        if _accuracy(wiring, tried) >= least:
            found = tried
    return found


def _prune(wiring: Wiring, found: Computed, order: Sequence[Edge], *, least: float) -> Computed:
    """Cut edges of a circuit in order wherever the accuracy stays, over and over until none can go."""
    while True:
        before = found.edges
        for edge in order:
            if edge not in found.edges:
                continue
            tried = wiring.compute(wiring.live(found.edges - {edge}), known=found)
            if _accuracy(wiring, tried) >= least:
                found = tried
        if found.edges == before:
            return found


def _random_circuit(wiring: Wiring, n_edges: int, generator: np.random.Generator) -> Computed:
    """A circuit of `n_edges` edges or fewer, by cutting at random what carries something."""
    kept = frozenset(wiring.edges)
    while len(kept) > n_edges:
        cut = sorted(kept)[int(generator.integers(len(kept)))]
        kept = wiring.live(kept - {cut})
    return wiring.compute(kept)


def _accuracy(wiring: Wiring, computed: Computed) -> float:
    return float(wiring.grid.right(computed.logits).mean())


def _loss(wiring: Wiring, computed: Computed) -> float:
    return float(wiring.grid.losses(computed.logits).mean())


def _summary(found: Change) -> dict[str, list[float | None]]:
    return {name: _ends(estimate) for name, estimate in _estimates(found)}


def _estimates(found: Change) -> tuple[tuple[str, Estimate], ...]:
    return ("accuracy_lost", found.accuracy_lost), ("loss_rise", found.loss_rise)


def _ends(estimate: Estimate) -> list[float | None]:
    """Value, low and high; None where there is no end."""
    return [end if np.isfinite(end) else None for end in (estimate.value, estimate.low, estimate.high)]
