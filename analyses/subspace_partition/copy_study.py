"""The study of copy transformers: trained, partitioned, interpreted, their circuit drawn and checked by patching."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.program import note
from analyses.common.report import Claim
from analyses.subspace_partition import circuit_picture as picture
from analyses.subspace_partition import copy_claims as claiming
from analyses.subspace_partition.baseline import PCA, baselines
from analyses.subspace_partition.buffer import Buffer, fill_buffer
from analyses.subspace_partition.circuit import Graph, Plane, Route, find_routes, make_graph
from analyses.subspace_partition.copy_extent import Extent
from analyses.subspace_partition.copying import (
    HeadScore,
    Trained,
    exact_match,
    harvest_pairs,
    harvest_rows,
    score_heads,
    train_copier,
)
from analyses.subspace_partition.edge import STREAM, EdgeCheck, EdgeEffect, Pairs
from analyses.subspace_partition.evaluation import Geometry, measure_geometry
from analyses.subspace_partition.interpretation import (
    OFFSETS,
    Agreement,
    Attributes,
    Place,
    explained_variance,
    measure_agreement,
    name_subspaces,
)
from analyses.subspace_partition.partition import Partition, span_overlap, store_partition
from analyses.subspace_partition.training import Trained as Rotated
from analyses.subspace_partition.training import train_partition

SITE, LAYER, PARTITION = "resid_post", 0, "ndm"
VARIABLES = ("this token", "previous token", "token two back", "position")
N_EXPLAINED = 65_536
N_GEOMETRY_QUERIES = 2048
MEANS_SHARE = 0.95
"""A variable's own span are the directions that hold so much of the variance of its means."""
NEIGHBOUR_KEYS = 2
"""Neighbours are sought among so many times the few keys."""


@dataclass(frozen=True)
class Found:
    """What a part of the study found: claims for a run, sections of the report, captions by figure file."""

    run: str
    claims: list[Claim]
    text: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)


class CopyStudy:
    """The steps of one copy transformer's study; `all` runs them in order."""

    def __init__(self, extent: Extent, *, db: Path, figures: Path, seed: int) -> None:
        self.extent, self.path, self.folder = extent, db, figures
        self.copier = replace(extent.copier, seed=seed)
        self.seed, self.name = seed, extent.copier.name
        self.claims: list[Claim] = []
        self.effects: list[EdgeEffect] = []
        self.figures: dict[str, str] = {}

    def all(self) -> Found:
        """Run every step; figures are written as they come."""
        note(f"{self.name}: training to repeat patterns, {self.copier.n_steps} steps")
        trained = train_copier(
            self.copier, self.path, checkpoints=self.extent.checkpoints, n_prompts=self.extent.n_prompts
        )
        heads = self.behave(trained)
        note(f"{self.name}: partitioning the residual stream after layer {LAYER}")
        rows = harvest_rows(trained, self.path, n_prompts=self.extent.n_row_prompts)
        partition = self.partition(rows)
        note(f"{self.name}: what the subspaces hold")
        names = self.interpret(rows, partition)
        note(f"{self.name}: circuit, and its edges patched")
        graph = self.connect(trained, partition, names, heads)
        return Found(trained.run, self.claims, {self.title: self._text(graph)}, self.figures)

    @property
    def title(self) -> str:
        """The heading of this model's section."""
        return f"Copy transformer: {self.name}"

    def behave(self, trained: Trained) -> list[HeadScore]:
        """Exact match and head scores at every checkpoint."""
        order = self.copier.task.first_known
        with actdb.open(self.path) as db:
            exact = {step: exact_match(db, run) for step, run in trained.runs.items()}
            heads = {step: score_heads(db, db.run(run), order=order) for step, run in trained.runs.items()}
            run = db.run(trained.run)
            steps = sorted(trained.runs)
            first, last = steps[0], steps[-1]
            prompt = min(range(run.n_prompts), key=lambda i: abs(len(run.tokens(i)) - 25))
            title = f"{self.name}: attention on prompt {prompt}"
            self._keep("patterns", picture.draw_patterns(self._path("patterns"), run, prompt, heads[last], title=title))
        curves: dict[str, list[float]] = {"exact match": [exact[step].value for step in steps]}
        for i, head in enumerate(heads[last]):
            mass = "induction" if head.layer else max(("previous", "two_back"), key=lambda m: getattr(head, m))
            curves[f"{head.name} {mass.replace('_', ' ')}"] = [getattr(heads[step][i], mass) for step in steps]
        title = f"{self.name}: training"
        self._keep("training", picture.draw_progress(self._path("training"), curves, steps, title=title))
        masses = ("previous", "induction") if order == 1 else ("previous", "two_back", "induction")
        self.claims += claiming.behaviour_claims(
            self.name, exact[last], exact[first], heads[last], heads[first], masses=masses
        )
        return heads[last]

    def partition(self, rows: actdb.Run) -> Partition:
        """Train the rotation, store the partition, measure it beside the baselines."""
        recipe, seed = self.extent.recipe, self.seed
        buffer = fill_buffer(rows[SITE].sel(layer=LAYER), seed=seed, block_rows=self.extent.block_rows)
        found = self._train(buffer)
        partition = found.partition
        with actdb.open(self.path, mode="a") as db:
            store_partition(db, rows, PARTITION, partition, site=SITE, layer=LAYER, steps=len(found.losses))
        values = buffer.rows[:N_EXPLAINED].float().numpy()
        others = baselines(values, partition.sizes, unit=recipe.unit, seed=seed)
        every = {"trained": partition, **{name: other for name, other in others.items() if name != PCA}}
        n_claimed = recipe.stop_at_n_subspaces or partition.n_subspaces
        for n_keys in (self.extent.n_keys, self.extent.n_few_keys):
            found_at = {name: self._measure(buffer, each, n_keys) for name, each in every.items()}
            self.claims += claiming.distance_claims(self.name, found_at, n_keys=n_keys, seed=seed)
        own = measure_geometry(
            buffer, partition, n_queries=recipe.information_queries, n_keys=recipe.information_keys, seed=seed
        )
        self.claims += claiming.size_claims(self.name, partition.sizes, n_claimed=n_claimed, seed=seed)
        self.claims += claiming.merge_claims(self.name, found.events, own.highest_normalised, seed=seed)
        return partition

    def _train(self, buffer: Buffer) -> Rotated:
        """Train from several seeds, and keep the nearest neighbours: a rotation may come to rest between two meanings.

        Distances are weighted by dimensions: the plain mean would favour a partition for one very small subspace.
        """
        starts = [
            train_partition(
                buffer,
                self.extent.recipe,
                seed=self.seed + i,
                state=self.path.parent / f"{self.name}-ndm-{i}",
                name=f"{self.name}, start {i}",
            )
            for i in range(self.extent.n_starts)
        ]
        return min(
            starts, key=lambda trained: self._measure(buffer, trained.partition, self.extent.n_few_keys).weighted
        )

    def _measure(self, buffer: Buffer, partition: Partition, n_keys: int) -> Geometry:
        """Distances alone, without information."""
        return measure_geometry(
            buffer, partition, n_queries=N_GEOMETRY_QUERIES, n_keys=n_keys, seed=self.seed, pairs=False
        )

    def interpret(self, rows: actdb.Run, partition: Partition) -> tuple[str, ...]:
        """Ask neighbours what they share; returns the names of the subspaces."""
        places = [Place(rows.name, SITE, LAYER, PARTITION, i) for i in range(partition.n_subspaces)]
        attributes = Attributes(rows, SITE)
        with actdb.open(self.path) as db:
            options: dict[str, Any] = {
                "n_queries": self.extent.n_queries,
                "where": self._few(attributes),
                "seed": self.seed,
            }
            agreements = [measure_agreement(db, place, attributes, **options) for place in places]
        names = name_subspaces(agreements)
        chosen = np.random.default_rng((self.seed, 38)).permutation(len(attributes))[:N_EXPLAINED]
        values = rows[SITE].sel(layer=LAYER).numpy()[chosen]
        groups = {name: attributes.values[name][chosen] for name in VARIABLES}
        explained = {name: explained_variance(values, partition, group).tolist() for name, group in groups.items()}
        overlaps = [
            _overlap(values, groups[agreement[0].attribute], partition.basis(i))
            for i, agreement in enumerate(agreements)
            if agreement[0].attribute in OFFSETS
        ]
        self.claims += claiming.content_claims(self.name, names, explained, agreements, overlaps, seed=self.seed)
        self._draw_agreement(names, agreements)
        return names

    def _few(self, attributes: Attributes) -> str:
        """The first prompts, with some thousand rows: among all, a row has neighbours that are its twins throughout."""
        last = min(NEIGHBOUR_KEYS * self.extent.n_few_keys, len(attributes) - 1)
        return f"prompt_id <= {int(attributes.prompt[last])}"

    def connect(self, trained: Trained, partition: Partition, names: tuple[str, ...], heads: list[HeadScore]) -> Graph:
        """Measure the circuit's edges from weights, patch them one by one, draw both."""
        width = self.copier.d_model
        middle = Plane(SITE, LAYER, partition, names)
        planes = (Plane.whole("resid_pre", 0, width), middle, Plane.whole(SITE, 1, width))
        pairs = harvest_pairs(trained, self.path, n_pairs=self.extent.n_pairs, length=self.extent.pair_length)
        graph = make_graph(pairs, planes, seed=self.seed, n_null=self.extent.n_null)
        writers, readers = ([head.name for head in heads if head.layer == layer] for layer in (0, 1))
        with actdb.open(self.path) as db:
            check = EdgeCheck(trained.model, Pairs.read(db, pairs), middle, seed=self.seed)
        self.effects = effects = [
            effect
            for reader in readers
            for source in (STREAM, *writers)
            for side in ("query", "key", "value")
            for effect in check.measure(source, reader, side)
        ]
        graph = graph.with_effects(_by_edge(effects))
        graph.write(self.folder.parent / f"{self.name}-circuit.json")
        routes = find_routes(graph)
        expected = _expected(heads, middle)
        self.claims += claiming.circuit_claims(self.name, graph, routes, expected=expected, seed=self.seed)
        self.claims += claiming.effect_claims(self.name, effects, seed=self.seed)
        for kind, draw in (("circuit", picture.draw_graph), ("strengths", picture.draw_strengths)):
            self._keep(kind, draw(self._path(kind), graph, title=f"{self.name}: {kind}"))
        title = f"{self.name}: edges patched"
        self._keep("effects", picture.draw_effects(self._path("effects"), effects, title=title))
        return graph

    def _draw_agreement(self, names: tuple[str, ...], agreements: list[list[Agreement]]) -> None:
        found = dict(zip(names, agreements, strict=True))
        title = f"{self.name}: what neighbours in a subspace share"
        self._keep("neighbours", picture.draw_agreement(self._path("neighbours"), found, title=title))

    def _text(self, graph: Graph) -> str:
        own = {entry.key.removeprefix(f"{self.name}."): entry for entry in self.claims}
        routes = find_routes(graph)[:3]
        lines = [
            f"Exact match {own['exact'].value:.3f}; mean distance to the nearest of {self.extent.n_keys} rows"
            f" {own['distance'].value:.3f} (random rotation {own['distance'].null:.3f}).",
            "Strongest routes from weights alone, by the z of their weaker edge: "
            + "; ".join(f"{r.writer} → {r.subspace} → {r.side} of {r.reader} ({r.z:.1f})" for r in routes)
            + ".",
        ]
        return "\n\n".join(lines)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.name}-{name}.png"

    def _keep(self, name: str, caption: str) -> None:
        self.figures[f"figures/{self.name}-{name}.png"] = f"{self.name}: {caption}"


def _expected(heads: list[HeadScore], plane: Plane) -> Route | None:
    """The route of copying: previous-token head, subspace of the previous token, keys of the induction head."""
    if "previous token" not in plane.names:
        return None
    writer = max((head for head in heads if head.layer == 0), key=lambda head: head.previous)
    reader = max((head for head in heads if head.layer == 1), key=lambda head: head.induction)
    return Route(writer.name, plane.label(plane.names.index("previous token")), reader.name, "key", float("nan"))


def _by_edge(effects: list[EdgeEffect]) -> dict[tuple[str, str, str], float]:
    """Causal shares of the edges from subspaces to heads: those of the whole stream."""
    return {
        (effect.side, effect.subspace, effect.reader): effect.share
        for effect in effects
        if effect.source == STREAM and effect.reader is not None
    }


def _overlap(rows: npt.NDArray[np.float32], groups: npt.NDArray[np.int64], basis: npt.NDArray[np.float32]) -> float:
    """Overlap of a subspace with the leading directions of the rows' means by group: see `MEANS_SHARE`."""
    centred = rows - rows.mean(0)
    codes = np.unique(groups, return_inverse=True)[1]
    sums = np.zeros((codes.max() + 1, rows.shape[1]))
    np.add.at(sums, codes, centred)
    means = sums / np.sqrt(np.bincount(codes))[:, None]  # weighted by the root of their number
    _, values, right = np.linalg.svd(means, full_matrices=False)
    held = np.cumsum(values**2) / np.sum(values**2)
    n = min(int(np.searchsorted(held, MEANS_SHARE)) + 1, basis.shape[1])
    return span_overlap(right[:n].T, basis)
