"""What writes to the residual stream, and what reads of it: the nodes and possible edges of a circuit."""

from dataclasses import dataclass

import torch

import actdb
from analyses.common.intervention import Place, hook_name
from analyses.modular_arithmetic.grid import Grid

EMBED, HEAD, MLP, OUTPUT = "embed", "head", "mlp", "output"
Edge = tuple[str, str]
"""Names of a sender and of a receiver."""


@dataclass(frozen=True)
class Component:
    """A node: the embedding at one position, a head, an MLP, or the output.

    It reads what components of a lower `depth` wrote. `writes` is where its own activation is (None for the output):
    a head's is z, before W_O. `reads` are the places that see what reaches it.
    """

    name: str
    kind: str
    depth: int
    layer: int | None = None
    writes: Place | None = None
    reads: tuple[Place, ...] = ()


def components_of(grid: Grid) -> tuple[Component, ...]:
    """Return the nodes of a model in the order in which they compute: embeddings, heads, MLPs, the output.

    Raises `SiteError` for a run without what the patches need, `SelectionError` for grouped queries or blocks whose
    attention and MLP read the same residual.
    """
    run, model = grid.run, grid.run.info.model
    if model.get("n_kv_heads") not in (None, model.get("n_heads")) or model.get("parallel_attn_mlp"):
        raise actdb.SelectionError(
            f"run {run.name!r}: circuits are of heads with keys of their own, in blocks that compute one after another"
        )
    embed = hook_name(run, "embed")
    nodes = [Component(f"embed {_letter(pos)}", EMBED, 0, None, Place(embed, pos=pos)) for pos in grid.varying]
    for i, layer in enumerate(run["z"].layers):
        nodes += [_head(grid, layer, head, depth=1 + 2 * i) for head in range(run["z"].shape[1])]
        written = Place(hook_name(run, "mlp_out", layer=layer))
        nodes.append(Component(f"MLP{layer}", MLP, 2 + 2 * i, layer, written, (Place(f"blocks.{layer}.mlp.hook_pre"),)))
    last = Place(hook_name(run, "resid_post", layer=grid.last_layer))
    return (*nodes, Component("output", OUTPUT, 2 * len(run["z"].layers) + 1, None, None, (last,)))


def edges_of(nodes: tuple[Component, ...]) -> tuple[Edge, ...]:
    """Return every edge that there can be: from each component to each that comes after it."""
    return tuple((s.name, r.name) for s in nodes for r in nodes if s.depth < r.depth)


def written_by(component: Component, activations: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a component's part [pair, …] of the activations that it writes to, by hook name."""
    at = component.writes
    assert at is not None, component.name
    values = activations[at.hook]
    if at.head is not None:
        return values[:, :, at.head]  # [pair, pos, d_head]
    return values if at.pos is None else values[:, at.pos]


def _head(grid: Grid, layer: int, head: int, *, depth: int) -> Component:
    reads = tuple(Place(f"blocks.{layer}.attn.hook_{letter}", head=head) for letter in "qkv")
    written = Place(hook_name(grid.run, "z", layer=layer), head=head)
    return Component(f"L{layer}H{head}", HEAD, depth, layer, written, reads)


def _letter(pos: int) -> str:
    return "ab"[pos] if pos < 2 else str(pos)
