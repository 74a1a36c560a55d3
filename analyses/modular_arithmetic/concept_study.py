"""Step 7 for one model: clusters, probes with control tasks, sparse autoencoders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analyses.common.program import note
from analyses.common.report import Claim
from analyses.modular_arithmetic import concept_claims as claiming
from analyses.modular_arithmetic import concept_picture as picture
from analyses.modular_arithmetic.concept import Clusters, Probed, cluster_all, probe_all
from analyses.modular_arithmetic.feature import KINDS, Features, train_features
from analyses.modular_arithmetic.finding import Findings
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.state import read_state, read_states, split_pairs


@dataclass(frozen=True)
class Concepts:
    """What was found in one model; `untrained` are the probes of the control, where there is one."""

    clusters: Sequence[Clusters]
    probed: Sequence[Probed]
    untrained: Sequence[Probed]
    features: Sequence[Features]


def study_concepts(
    grid: Grid, *, control: Grid | None = None, folder: Path, seed: int, name: str, small: bool = False
) -> Findings:
    """Do step 7 on a model; `control` is the same shape with random weights, the null of the probes.

    Keys of claims begin with `name`; figures are written to `folder`. Costs eight linear discriminants a property and
    state, and two autoencoders; `small` trains these for a fifth of the steps.
    """
    found = _extract(grid, control, seed=seed, name=name, small=small)
    readings = list(claiming.probe_claims(found.probed, found.untrained, seed=seed))
    last = read_state(grid, "resid_post", layer=grid.last_layer)
    whole = float(grid.right(grid.clean)[~split_pairs(grid.modulus, seed=seed)].mean())
    claims = [
        *claiming.cluster_claims(found.clusters, n=grid.n_pairs, seed=seed),
        *readings,
        *claiming.feature_claims(found.features, last, whole=whole, chance=1 / grid.modulus, seed=seed),
    ]
    return Findings(
        tuple(replace(entry, key=f"{name}.{entry.key}".replace(" ", "_")) for entry in claims),
        {f"Concepts of {name}": describe(readings)},
        _draw(found, folder, run=grid.run.name, name=name),
    )


def describe(readings: Sequence[Claim]) -> str:
    """What the probes read, in words: properties by verdict."""
    groups: dict[str, list[str]] = {}
    for entry in readings:
        groups.setdefault(entry.verdict, []).append(entry.key.removeprefix("probe."))
    said = (f"{verdict.capitalize()}: {', '.join(names)}." for verdict, names in groups.items())
    return " ".join(("Linear probes.", *said))


def _extract(grid: Grid, control: Grid | None, *, seed: int, name: str, small: bool) -> Concepts:
    fitted = split_pairs(grid.modulus, seed=seed)
    states = read_states(grid)
    note(f"{name}: clusters and probes of {len(states)} states")
    clusters = list(cluster_all(grid, states, seed=seed))
    probed = list(probe_all(grid, states, fitted=fitted, seed=seed))
    untrained: list[Probed] = []
    if control is not None:
        untrained = list(probe_all(control, read_states(control), fitted=fitted, seed=seed))
    note(f"{name}: sparse autoencoders")
    last = read_state(grid, "resid_post", layer=grid.last_layer)
    features = [train_features(grid, last, kind, fitted=fitted, seed=seed, small=small) for kind in KINDS]
    return Concepts(clusters, probed, untrained, features)


def _draw(found: Concepts, folder: Path, *, run: str, name: str) -> dict[str, str]:
    files = [f"{kind}_{name}.png" for kind in ("probes", "clusters", "features")]
    captions = (
        picture.draw_probes(folder / files[0], found.probed, title=f"{run}: linear probes"),
        picture.draw_clusters(folder / files[1], found.clusters, title=f"{run}: clusters of states"),
        picture.draw_features(folder / files[2], found.features, title=f"{run}: sparse autoencoders"),
    )
    return {f"{folder.name}/{file}": caption for file, caption in zip(files, captions, strict=True)}
