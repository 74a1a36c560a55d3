"""Circuits between subspaces, from weights alone: a graph of what heads and MLPs carry from one subspace to another."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import actdb
from analyses.subspace_partition.partition import Partition
from analyses.subspace_partition.strength import N_NULL, Floats, HeadMaps, Strengths, measure_map, read_heads

PAIRED = ("OV", "QK", "MLP", "residual")
SIDES = ("query", "key", "value", "output")
DEPTHS = {"resid_pre": 0, "resid_post": 1}


@dataclass(frozen=True)
class Plane:
    """The residual stream at one place, `site` (resid_pre or resid_post) of `layer`, cut into subspaces.

    `names` say what each subspace holds, where that is known. Raises `SettingError` for another site.
    """

    site: str
    layer: int
    partition: Partition
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.site not in DEPTHS:
            raise actdb.SettingError(f"plane at {self.site!r}: choose one of {', '.join(DEPTHS)}")

    @classmethod
    def whole(cls, site: str, layer: int, width: int) -> "Plane":
        """Return a plane that is not cut: one subspace, the whole of it."""
        return cls(site, layer, Partition(np.eye(width, dtype=np.float32), (width,)), ("whole",))

    @property
    def depth(self) -> int:
        """Layers before the plane."""
        return self.layer + DEPTHS[self.site]

    def label(self, subspace: int) -> str:
        """A subspace's node, such as `resid_post 0: previous token`, or with its number."""
        return f"{self.site} {self.layer}: {self.names[subspace] if self.names else subspace}"


@dataclass(frozen=True)
class Edge:
    """What `via` (a head as L1H0, an MLP as MLP0, or residual) carries from one node to another.

    OV, MLP, residual: from a subspace to one of the next plane. QK: from the subspace of the key to that of the query,
    in one plane. query, key, value: from a subspace to a head; output: from a head to a subspace: the same maps, their
    other end whole. `null`, `spread` and `p` are those of `Strengths`; `effect` is the causal one where it was
    measured: a share of that of all subspaces together.
    """

    kind: str
    via: str
    source: str
    target: str
    strength: float
    null: float
    spread: float
    p: float
    effect: float | None = None

    @property
    def z(self) -> float:
        """Standard deviations that the strength lies above that of random subspaces; NaN where nothing is turned."""
        return (self.strength - self.null) / self.spread if self.spread > 0 else float("nan")


@dataclass(frozen=True)
class Graph:
    """A circuit: the planes and the edges between their subspaces; `about` says of what, and how."""

    planes: tuple[Plane, ...]
    edges: tuple[Edge, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def of(self, *kinds: str) -> list[Edge]:
        """Return the edges of some kinds, the greatest z first; those without a null come last."""
        chosen = [edge for edge in self.edges if edge.kind in kinds]
        return sorted(chosen, key=lambda edge: -edge.z if np.isfinite(edge.z) else np.inf)

    def with_effects(self, effects: Mapping[tuple[str, str, str], float]) -> "Graph":
        """Return the graph with the causal effects of some edges, by (kind, source, target)."""
        edges = (replace(e, effect=effects.get((e.kind, e.source, e.target), e.effect)) for e in self.edges)
        return replace(self, edges=tuple(edges))

    def write(self, path: Path) -> None:
        """Write the graph as JSON: `about`, `nodes` (subspaces with site, layer, size; components) and `edges`."""
        subspaces = [
            {"id": plane.label(i), "kind": "subspace", "site": plane.site, "layer": plane.layer, "size": size}
            for plane in self.planes
            for i, size in enumerate(plane.partition.sizes)
        ]
        components = [{"id": name, "kind": "component"} for name in dict.fromkeys(edge.via for edge in self.edges)]
        edges = [{name: _plain(value) for name, value in {**asdict(e), "z": e.z}.items()} for e in self.edges]
        content = {"about": dict(self.about), "nodes": [*subspaces, *components], "edges": edges}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Route:
    """Two heads joined by a subspace: `writer` puts there what `reader` takes on one side (query, key or value).

    `z` is the lesser of the two edges': a route is as strong as its weaker half.
    """

    writer: str
    subspace: str
    reader: str
    side: str
    z: float


def find_routes(graph: Graph) -> list[Route]:
    """Return all routes head → subspace → later head, the strongest first."""
    found = [
        Route(write.via, write.target, read.via, read.kind, min(write.z, read.z))
        for write in graph.of("output")
        for read in graph.of("query", "key", "value")
        if write.target == read.source and np.isfinite(write.z) and np.isfinite(read.z)
    ]
    return sorted(found, key=lambda route: -route.z)


def make_graph(
    run: actdb.Run,
    planes: Sequence[Plane],
    *,
    jacobians: Mapping[int, Floats] | None = None,
    seed: int,
    n_null: int = N_NULL,
) -> Graph:
    """Measure every edge between planes from the weights stored with a run.

    A component reads the last plane before its layer and writes the next one after it; layers that no two planes
    enclose are left out. `jacobians` are those of MLPs by layer: see `read_jacobians`.
    """
    ordered = tuple(sorted(planes, key=lambda plane: plane.depth))
    options: dict[str, Any] = {"seed": seed, "n_null": n_null}
    edges: list[Edge] = []
    for before, after in pairwise(ordered):
        for layer in range(before.depth, after.depth):
            for maps in read_heads(run, layer):
                edges += _head_edges(maps, before, after, options)
            if jacobians and layer in jacobians:
                found = measure_map(jacobians[layer], before.partition, after.partition, **options)
                edges += _edges("MLP", f"MLP{layer}", before, after, found)
        found = measure_map(np.eye(len(before.partition.rotation)), before.partition, after.partition, **options)
        edges += _edges("residual", "residual", before, after, found)
    about = {"run": run.name, "model": run.info.model.get("model"), "null": f"{n_null} random rotations", "seed": seed}
    return Graph(ordered, tuple(edges), about)


def _head_edges(maps: HeadMaps, before: Plane, after: Plane, options: Mapping[str, Any]) -> Iterator[Edge]:
    """The edges of one head: between subspaces, and between each subspace and the head."""
    found = measure_map(maps.ov, before.partition, after.partition, **options)
    yield from _edges("OV", maps.name, before, after, found)
    found = measure_map(maps.qk.T, before.partition, before.partition, joint=True, **options)  # [key, query]
    yield from _edges("QK", maps.name, before, before, found)
    sides: dict[str, tuple[Floats, Plane]] = {
        "query": (maps.qk, before),
        "key": (maps.qk.T, before),
        "value": (maps.ov, before),
        "output": (maps.ov.T, after),
    }
    whole = Plane.whole("resid_pre", 0, len(maps.ov)).partition
    for side, (matrix, plane) in sides.items():
        found = measure_map(matrix, plane.partition, whole, **options)
        for i in range(plane.partition.n_subspaces):
            ends = (maps.name, plane.label(i)) if side == "output" else (plane.label(i), maps.name)
            yield _edge(side, maps.name, *ends, found, (i, 0))


def _edges(kind: str, via: str, before: Plane, after: Plane, found: Strengths) -> Iterator[Edge]:
    for i, j in np.ndindex(*found.values.shape):
        yield _edge(kind, via, before.label(i), after.label(j), found, (i, j))


def _edge(kind: str, via: str, source: str, target: str, found: Strengths, at: tuple[int, int]) -> Edge:
    values = (float(part[at]) for part in (found.values, found.null, found.spread, found.p))
    return Edge(kind, via, source, target, *values)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
