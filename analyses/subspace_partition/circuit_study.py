"""The circuit of a run whose partitions are stored: its planes from the database, its edges from the stored weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import actdb
from analyses.common.program import Options, Study
from analyses.common.report import Claim
from analyses.subspace_partition import circuit_picture as picture
from analyses.subspace_partition.circuit import DEPTHS, Edge, Graph, Plane, find_routes, make_graph
from analyses.subspace_partition.copy_claims import STRONG_Z
from analyses.subspace_partition.copy_study import Found
from analyses.subspace_partition.partition import SOURCES, Partition
from analyses.subspace_partition.strength import N_NULL, read_jacobians

N_SHOWN = 12
"""Edges that become claims, the strongest ones."""
N_JACOBIAN_PROMPTS = 64
SMALL_NULL = 50


def run_circuit(options: Options) -> Study:
    """Study the circuit of the run that `--db` and `--run` name, whose partitions are stored; heads alone."""
    if not options.given_db:
        raise actdb.SettingError(f"--circuit: {options.db} is no database; name one whose run has stored partitions")
    with actdb.open(options.db) as db:
        name = db.run(options.run).name
    n_null = SMALL_NULL if options.small else N_NULL
    found = study_circuit(options.db, name, figures=options.figures, seed=options.seed, n_null=n_null)
    return Study(found.run, found.claims, text=found.text, figures=found.figures)


def read_planes(db: actdb.Database, run: actdb.Run, *, names: Sequence[str] = ()) -> list[Plane]:
    """Return the planes of a run that partitions cut, by site and layer, between the uncut first and last.

    They are the stored partitions of these `names` (default: all) of the residual stream. Raises `SettingError` where
    there is none, and for two of one place: name one of them.
    """
    tables = {name for (name,) in db.sql("SELECT table_name FROM duckdb_tables()").fetchall()}
    query = f"SELECT partition, site, layer FROM {SOURCES} WHERE run = ? ORDER BY layer, site, partition"
    rows = db.sql(query, [run.name]).fetchall() if SOURCES in tables else []
    chosen = [row for row in rows if row[1] in DEPTHS and (not names or row[0] in names)]
    found: dict[int, Plane] = {}
    for name, site, layer in chosen:
        plane = Plane(site, int(layer), Partition.read(db, run, name))
        if plane.depth in found:
            raise actdb.SettingError(f"run {run.name!r} has two partitions of {site} {layer}: name one of them")
        found[plane.depth] = plane
    if not found:
        held = ", ".join(name for name, *_ in rows) or "none"
        raise actdb.SettingError(f"run {run.name!r} has no such partition of its residual stream; it has {held}")
    width, last = int(run.info.model["d_model"]), max(run.layers) + 1  # of layers harvested the weights are stored
    found.setdefault(0, Plane.whole("resid_pre", 0, width))
    found.setdefault(last, Plane.whole("resid_post", last - 1, width))
    return [found[depth] for depth in sorted(found)]


def study_circuit(
    db: Path,
    run_name: str,
    *,
    figures: Path,
    seed: int,
    names: Sequence[str] = (),
    model: Any = None,
    n_null: int = N_NULL,
) -> Found:
    """Measure, export and draw the circuit of a run with stored partitions; claims of its strongest edges and routes.

    With the model and the site `resid_mid`, MLPs are measured too; otherwise the edges are those of heads and of the
    residual stream.
    """
    with actdb.open(db) as held:
        run = held.run(run_name)
        planes = read_planes(held, run, names=names)
        prompts = run.prompt_ids()[:N_JACOBIAN_PROMPTS]
        jacobians = read_jacobians(model, run, prompts=prompts) if model is not None else {}
        graph = make_graph(run, planes, jacobians=jacobians, seed=seed, n_null=n_null)
    graph.write(figures.parent / f"{run.name}-circuit.json")
    captions = {}
    for kind, draw in (("circuit", picture.draw_graph), ("strengths", picture.draw_strengths)):
        name = f"{run.name}-{kind}.png"
        captions[f"figures/{name}"] = draw(figures / name, graph, title=f"{run.name}: {kind}")
    return Found(run.name, edge_claims(graph, seed=seed), {f"Circuit of {run.name}": _text(graph)}, captions)


def edge_claims(graph: Graph, *, seed: int) -> list[Claim]:
    """Return the strongest edges between subspaces, those well above their null, as claims."""
    edges = [edge for edge in graph.of("OV", "QK", "MLP") if edge.z > STRONG_Z][:N_SHOWN]
    return [
        Claim(
            f"edge.{edge.kind.lower()}.{number}",
            edge.strength,
            null=edge.null,
            seed=seed,
            verdict=f"z {edge.z:.1f}, p {edge.p:.2g}",
            about=_words(edge),
        )
        for number, edge in enumerate(edges, 1)
    ]


def _words(edge: Edge) -> str:
    return f"{edge.kind} of {edge.via} from {edge.source} to {edge.target}; null: random subspaces"


def _text(graph: Graph) -> str:
    lines = ["| writer | subspace | reader | side | z |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {route.writer} | {route.subspace} | {route.reader} | {route.side} | {route.z:.1f} |"
        for route in find_routes(graph)[:N_SHOWN]
    ]
    return "\n".join(["Strongest routes between heads, by the z of their weaker edge:", "", *lines])
