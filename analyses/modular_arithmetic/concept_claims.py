"""Claims of concept extraction: clusters, probes with control tasks, sparse autoencoders."""

from collections.abc import Iterator, Sequence

import numpy as np

from analyses.common.report import Claim, claim
from analyses.modular_arithmetic.concept import Clusters, Probed
from analyses.modular_arithmetic.feature import Features
from analyses.modular_arithmetic.state import State

READ, MEMORISED = "read off, and of unseen values", "read off seen values alone"
ABSENT = "no more than control or random weights"
LEAST_SELECTIVITY, LEAST_UNSEEN = 0.1, 0.75


def cluster_claims(found: Sequence[Clusters], *, n: int, seed: int) -> Iterator[Claim]:
    """Step 7: for each label, the state whose clusters agree with it best."""
    for label in dict.fromkeys(entry.label for entry in found):
        best = max((entry for entry in found if entry.label == label), key=lambda entry: entry.agreement)
        about = f"adjusted Rand index of k-means clusters and {label}, in the best state: {best.state}; null: permuted"
        clear = best.agreement > best.null + LEAST_SELECTIVITY
        yield Claim(
            f"cluster.{label}", best.agreement, n=n, seed=seed, null=best.null,
            verdict="above chance" if clear else "no effect", about=about,
        )  # fmt: skip


def probe_claims(found: Sequence[Probed], control: Sequence[Probed], *, seed: int) -> Iterator[Claim]:
    """Step 7: for each property, the state where a probe is most selective; null: the same of random weights."""
    for name in dict.fromkeys(entry.concept for entry in found):
        best = max((e for e in found if e.concept == name), key=lambda e: e.accuracy - float(np.mean(e.controls)))
        of_random = [e for e in control if e.concept == name]
        null = max((float(np.mean(e.accuracy - e.controls)) for e in of_random), default=0.0)
        about = f"balanced accuracy of a probe of “{name}” minus that of its control task, held-out pairs, best state: "
        about += f"{best.state}; accuracy {best.accuracy:.3f}, control {float(np.mean(best.controls)):.3f}"
        about += f", unseen values {best.unseen:.3f}" if np.isfinite(best.unseen) else ""
        about += "; null: random weights" if of_random else "; null: 0"
        yield claim(
            f"probe.{name}", best.selectivity, seed=seed, null=null, verdict=verdict_of(best, null), about=about
        )


def verdict_of(best: Probed, null: float) -> str:
    """Say whether a property is read off: more than its control and than in random weights, and of unseen values."""
    if best.selectivity.low <= max(0.0, null) or best.selectivity.value < LEAST_SELECTIVITY:
        return ABSENT
    if np.isfinite(best.unseen) and best.unseen < LEAST_UNSEEN:
        return MEMORISED
    return READ if np.isfinite(best.unseen) else "read off"


def feature_claims(
    found: Sequence[Features], state: State, *, whole: float, chance: float, seed: int
) -> Iterator[Claim]:
    """Step 7: what each autoencoder explains and keeps of the state's rows, and what its features are tuned to."""
    for entry in found:
        trained = entry.trained
        about = f"{entry.kind} autoencoder of {state.name}: held-out variance explained, with {entry.n_active:.1f} of "
        about += f"{len(trained.model.decoder)} latents active, {entry.n_live} of them ever; null: the mean"
        key = f"features.{entry.kind}"
        n = entry.kept.n
        yield Claim(f"{key}.explained", entry.explained, n=n, seed=seed, null=0.0, verdict="measured", about=about)
        about = f"held-out accuracy with {state.name} rebuilt from the {entry.kind} features; the model has {whole:.4g}"
        verdict = "faithful" if entry.kept.value >= 0.95 * whole else "partly"
        yield claim(f"{key}.kept", entry.kept, seed=seed, null=chance, verdict=verdict, about=about)
        about = (
            f"mean η² of a {entry.kind} feature with the label it is tuned to best; {entry.to_answer:.0%} are tuned to "
        )
        about += "the answer rather than to a or b; null: permuted labels"
        clear = entry.tuned > entry.null + LEAST_SELECTIVITY
        yield Claim(
            f"{key}.tuned", entry.tuned, n=entry.n_live, seed=seed, null=entry.null,
            verdict="above chance" if clear else "no effect", about=about,
        )  # fmt: skip
