"""The claims about copy transformers and external ones, from what was measured of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import Estimate
from analyses.subspace_partition.circuit import Graph, Route
from analyses.subspace_partition.copying import HeadScore
from analyses.subspace_partition.edge import EdgeEffect
from analyses.subspace_partition.evaluation import Geometry
from analyses.subspace_partition.external import HeadUse
from analyses.subspace_partition.interpretation import Agreement
from analyses.subspace_partition.merging import Event

EXACT, DISTANCE = 0.99, 0.10
"""What the method's authors and this study's specification ask of the copy transformer."""
THRESHOLD = 0.04
HEAD_MASS = 0.4
STRONG_Z = 2.0
MANY_KEYS = 4096
CARRIES = 0.25
"""An edge carries something where the interval of its share lies above this."""


def behaviour_claims(
    prefix: str,
    exact: Estimate,
    before: Estimate,
    heads: Sequence[HeadScore],
    untrained: Sequence[HeadScore],
    *,
    masses: Sequence[str],
) -> Iterator[Claim]:
    """Exact match, and each head's attention masses beside those of the untrained model."""
    reached = "reached" if exact.value >= EXACT else "not reached"
    about = "share of patterns repeated without a fault; null: the untrained model"
    yield claim(f"{prefix}.exact", exact, null=before.value, claimed=EXACT, verdict=reached, about=about)
    for head, raw in zip(heads, untrained, strict=True):
        for mass in masses:
            value, null = getattr(head, mass), getattr(raw, mass)
            about = f"attention of {head.name} to its {MASSES[mass]}; null: the untrained model"
            verdict = "a head for it" if value >= HEAD_MASS else "not its task"
            yield Claim(f"{prefix}.{mass}.{head.name}", value, null=null, verdict=verdict, about=about)


MASSES = {
    "previous": "previous token",
    "two_back": "token two back",
    "induction": "keys after an earlier copy of the present token",
}


def size_claims(prefix: str, sizes: Sequence[int], *, n_claimed: int, seed: int) -> Iterator[Claim]:
    """How many subspaces were found, and of which sizes."""
    verdict = f"{len(sizes)} of {', '.join(map(str, sizes))} dimensions"
    yield Claim(
        f"{prefix}.subspaces", len(sizes), claimed=n_claimed, seed=seed, verdict=verdict, about="subspaces found"
    )


def distance_claims(
    prefix: str, found: Mapping[str, Geometry], *, n_keys: int, seed: int, claimed: float = DISTANCE
) -> Iterator[Claim]:
    """The distance in the trained subspaces and in others of the same sizes, absolute and by the subspace's spread.

    More keys are nearer, in any subspace: few tell partitions apart, many are what the claimed distance was had with.
    """
    trained, random = found["trained"], found["random"]
    key = f"{prefix}.distance" if n_keys > MANY_KEYS else f"{prefix}.distance_of_{n_keys}"
    reached = "reached" if trained.unweighted <= claimed else "not reached"
    about = f"mean distance to the nearest of {n_keys} rows in a subspace; null: a random rotation"
    options: dict[str, Any] = {"null": random.unweighted, "claimed": claimed, "seed": seed}
    yield Claim(key, trained.unweighted, verdict=reached, about=about, **options)
    verdict = "less than chance" if trained.relative < random.relative else "no less than chance"
    about = "the same in units of the subspace's spread, which does not depend on the model's scale"
    yield Claim(f"{key}.relative", trained.relative, null=random.relative, seed=seed, verdict=verdict, about=about)
    for name, other in found.items():
        if name != "trained":
            verdict = "above the trained one" if other.unweighted > trained.unweighted else "not above the trained one"
            about = f"the same distance, {name}"
            yield Claim(f"{key}.{name.replace(' ', '_')}", other.unweighted, seed=seed, verdict=verdict, about=about)


def merge_claims(prefix: str, events: Sequence[Event], last: float, *, seed: int) -> Iterator[Claim]:
    """What the merge threshold does: the highest normalised information before each merge, and after the last."""
    merges = [event for event in events if event.kind == "merge"]
    for number, event in enumerate(merges, 1):
        sizes = "+".join(map(str, event.sizes))
        times = event.highest / THRESHOLD
        about = f"highest information of a pair a dimension, nats, of {sizes} before merge {number}; gold 0.40 to 0.45"
        verdict = f"{times:.0f} times the threshold of {THRESHOLD}"
        yield Claim(f"{prefix}.information.{number}", event.highest, seed=seed, verdict=verdict, about=about)
    above = "the threshold would merge them too" if last > THRESHOLD else "the threshold ends merging here"
    about = "the same of the subspaces at the end"
    yield Claim(f"{prefix}.information.end", last, null=THRESHOLD, seed=seed, verdict=above, about=about)


def content_claims(
    prefix: str,
    names: Sequence[str],
    explained: Mapping[str, Sequence[float]],
    agreements: Sequence[Sequence[Agreement]],
    overlaps: Sequence[float],
    *,
    seed: int,
) -> Iterator[Claim]:
    """What each subspace holds: variance that a variable explains, what neighbours share, the known subspace's span."""
    for i, (name, found) in enumerate(zip(names, agreements, strict=True)):
        best = max(found, key=lambda agreement: agreement.gain)
        about = f"neighbours in subspace {i} with their query's {best.attribute}; null: any two rows"
        slug = name.replace(" ", "_")
        yield claim(f"{prefix}.shared.{slug}", best.share, null=best.chance, seed=seed, about=about).judged()
        for variable, shares in explained.items():
            other = float(np.mean([share for j, share in enumerate(shares) if j != i])) if len(shares) > 1 else None
            about = (
                f"share of the variance of subspace {i} ({name}) that {variable} explains; null: the other subspaces"
            )
            key = f"{prefix}.explained.{slug}.{variable.replace(' ', '_')}"
            verdict = "its own" if shares[i] == max(shares) and variable == best.attribute else "not its own"
            yield Claim(key, shares[i], null=other, seed=seed, verdict=verdict, about=about)
        if i < len(overlaps):
            about = f"overlap of subspace {i} with the span of the rows' means by {best.attribute}; null: random"
            yield Claim(
                f"{prefix}.overlap.{slug}", overlaps[i], null=0.5, gold=1.0, seed=seed, verdict="measured", about=about
            )


def circuit_claims(
    prefix: str, graph: Graph, routes: Sequence[Route], *, expected: Route | None, seed: int
) -> Iterator[Claim]:
    """The route that the circuit must have, by the z of its weaker edge, and the strongest other one."""
    if expected is not None:
        found = next((route for route in routes if _same(route, expected)), None)
        rank = 1 + next((i for i, route in enumerate(routes) if _same(route, expected)), len(routes))
        value = found.z if found else float("nan")
        about = f"{expected.writer} → {expected.subspace} → {expected.side} of {expected.reader}: z of the weaker edge"
        verdict = (
            "recovered, the strongest route" if rank == 1 and value > STRONG_Z else f"route {rank} of {len(routes)}"
        )
        yield Claim(f"{prefix}.route", value, n=len(routes), null=0.0, seed=seed, verdict=verdict, about=about)
    others = [route for route in routes if expected is None or not _same(route, expected)]
    if others:
        best = others[0]
        about = f"the strongest other route: {best.writer} → {best.subspace} → {best.side} of {best.reader}"
        verdict = "strong" if best.z > STRONG_Z else "weak"
        yield Claim(f"{prefix}.route.other", best.z, n=len(others), null=0.0, seed=seed, verdict=verdict, about=about)
    for edge in (edge for edge in graph.of("OV", "QK", "MLP") if edge.z > STRONG_Z):
        about = f"{edge.kind} of {edge.via} from {edge.source} to {edge.target}; null: random subspaces"
        key = f"{prefix}.{edge.kind.lower()}.{edge.via}.{_slug(edge.source)}.{_slug(edge.target)}"
        yield Claim(key, edge.strength, null=edge.null, seed=seed, verdict=f"z {edge.z:.1f}", about=about)


def effect_claims(prefix: str, effects: Sequence[EdgeEffect], *, seed: int) -> Iterator[Claim]:
    """The causal share of each edge that carries something, and the greatest of those that do not."""
    carrying = [effect for effect in effects if effect.fall.low / effect.whole > CARRIES]
    for effect in carrying:
        fall, whole = effect.fall, effect.whole
        share = Estimate(fall.value / whole, fall.low / whole, fall.high / whole, fall.n)
        about = f"effect of {_path(effect)}, share of the whole stream's; null: random subspaces of this size"
        key = f"{prefix}.edge.{effect.source}.{_slug(effect.subspace)}.{effect.reader or 'all'}.{effect.side}"
        verdict = "above random subspaces" if share.low > effect.null_share else "as random subspaces"
        yield claim(key, share, seed=seed, null=effect.null_share, verdict=verdict, about=about)
    others = [effect for effect in effects if effect not in carrying]
    if others:
        worst = max(others, key=lambda effect: abs(effect.share))
        about = f"greatest share of the {len(others)} other edges: {_path(worst)}; null: random subspaces of this size"
        options: dict[str, Any] = {"n": worst.fall.n, "seed": seed, "null": worst.null_share}
        yield Claim(f"{prefix}.edge.others", abs(worst.share), verdict="carry little", about=about, **options)


def external_claims(
    prefix: str,
    steps: Mapping[str, Estimate],
    ranges: Mapping[tuple[int, int], tuple[Estimate, float | None]],
    heads: Sequence[HeadUse],
    *,
    seed: int,
) -> Iterator[Claim]:
    """Accuracy of the steps and by length, beside what the folder states; each head's task, and copying without it."""
    for run, exact in steps.items():
        yield claim(f"{prefix}.exact.{run}", exact, seed=seed, verdict="measured", about=f"lists copied exactly, {run}")
    for (low, high), (exact, stated) in ranges.items():
        about = f"lists of {low} to {high} tokens copied exactly; claimed: as the folder states"
        yield claim(f"{prefix}.exact.{low}-{high}", exact, claimed=stated, seed=seed, about=about).judged(
            tolerance=0.005
        )
    for use in heads:
        score = use.score
        for mass in ("previous", "induction"):
            about = f"attention of {score.name} to its {MASSES[mass]}"
            yield Claim(
                f"{prefix}.{mass}.{score.name}", getattr(score, mass), seed=seed, verdict=use.verdict, about=about
            )
        about = f"lists copied exactly with {score.name} at its mean; null: the model as it is"
        null = use.intact.value
        yield claim(
            f"{prefix}.without.{score.name}", use.without, null=null, seed=seed, verdict=use.verdict, about=about
        )


def _path(effect: EdgeEffect) -> str:
    to = f"{effect.side} of {effect.reader}" if effect.reader else "all that follows"
    return f"{effect.source} through {effect.subspace} on {to}"


def _same(route: Route, other: Route) -> bool:
    return (route.writer, route.subspace, route.reader, route.side) == (
        other.writer, other.subspace, other.reader, other.side,
    )  # fmt: skip


def _slug(label: str) -> str:
    return (label.partition(": ")[2] or label).replace(" ", "_")
