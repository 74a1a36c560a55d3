"""From what was measured to claims: the figure, its interval, its null, and what the original said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import mean_interval, significant
from analyses.forward_proportion.finding import Heads, Shares, States
from analyses.forward_proportion.patching import ALL
from analyses.forward_proportion.perturbation import Perturbed
from analyses.forward_proportion.prediction import Explained
from analyses.forward_proportion.ring import Ring
from analyses.forward_proportion.subject import Subject

CLAIMED_MODULARITY = 0.536
CLAIMED_ACCURACY = {"magnitudes": 53 / 60, "interactions": 55 / 60}
CLAIMED_RATIO, CLAIMED_DISRUPTION = 1.002, 0.035
CLAIMED_UNEXPLAINED = {"cosine": 0.42, "unembed": 0.273}
DISTANCES = {
    "cosine": "1 − cos(resid)",
    "final_norm": "1 − cos(ln_final(resid))",
    "unembed": "‖W_Uᵀ Δ ln_final(resid)‖",
}
FEATURES = {
    "length": "prompt length, marks and digits alone",
    "magnitudes": "fingerprints",
    "interactions": "interaction graphs",
    "both": "fingerprints and interaction graphs",
}
LEVEL = 0.05


def head_claims(subject: Subject, heads: Heads, *, seed: int) -> list[Claim]:
    """Steps 2, 4 and 5."""
    return [
        *_community_claims(subject, heads, seed=seed),
        *_accuracy_claims(subject, heads, seed=seed),
        *_rewiring_claims(heads, seed=seed),
    ]


def _community_claims(subject: Subject, heads: Heads, *, seed: int) -> list[Claim]:
    found = heads.communities
    p = (1 + np.count_nonzero(found.null >= found.modularity)) / (1 + len(found.null))
    about = f"modularity of the co-activation graph; p = {p:.2g} against {len(found.null)} permutations of each head"
    modularity = claim("communities.modularity", heads.spread, seed=seed, claimed=CLAIMED_MODULARITY, about=about)
    beside = "above its null" if p <= LEVEL else "not above its null"
    claims = [
        replace(modularity, null=float(found.null.mean()), verdict=f"{modularity.judged().verdict}, {beside}"),
        Claim("communities.n", found.n, n=len(found.member), seed=seed, about="communities of the best cut; n heads"),
        claim(
            "communities.stability",
            mean_interval(found.agreements, within=(-1.0, 1.0)),
            seed=seed,
            null=0.0,
            about="adjusted Rand index between cuts of different seeds; n pairs of seeds",
        ),
    ]
    tests = heads.separation.tests
    kept = significant(np.array([test.p for test in tests]), level=LEVEL, method="holm")
    names = np.array(subject.head_names())
    for i, (test, clear) in enumerate(zip(tests, kept, strict=True)):
        members = names[found.member == i]
        shown = ", ".join(members[:8]) + (" …" if len(members) > 8 else "")
        about = (
            f"symbolic − other prompts in mean z-score of community {i} ({len(members)} heads: {shown}), p {test.p:.2g}"
        )
        verdict = ("separates" if clear else "does not separate") + " (Holm)"
        claims.append(
            Claim(
                f"communities.{i}.symbolic",
                test.value,
                n=len(subject.prompts),
                seed=seed,
                null=0.0,
                verdict=verdict,
                about=about,
            )
        )
    return claims


def _accuracy_claims(subject: Subject, heads: Heads, *, seed: int) -> list[Claim]:
    claims = []
    chance = np.bincount(subject.category).max() / len(subject.category)
    for name, found in heads.accuracies.items():
        about = (
            f"accuracy of {FEATURES[name]} on held-out prompts, {len(subject.names)} categories; majority {chance:.2f}"
        )
        claims.append(
            claim(
                f"predict.{name}",
                found.estimate(seed=seed),
                seed=seed,
                null=found.null,
                claimed=CLAIMED_ACCURACY.get(name),
                about=about,
            )
        )
    gap = heads.gap
    about = (
        f"interactions − magnitudes; permutation p {gap.test.p:.2g}, McNemar p {gap.mcnemar:.2g} ({gap.only_second} "
        f"prompts named by interactions alone, {gap.only_first} by magnitudes); claimed: 2 prompts of 60"
    )
    claims.append(
        Claim(
            "predict.gap",
            gap.test.value,
            gap.low,
            gap.high,
            len(subject.prompts),
            seed,
            null=0.0,
            claimed=2 / 60,
            verdict="no difference" if gap.test.p > LEVEL else "differ",
            about=about,
        )
    )
    return claims


def _rewiring_claims(heads: Heads, *, seed: int) -> list[Claim]:
    found = heads.rewiring
    about = f"cosine of heads' incoming vectors within ÷ between categories; permutation p {found.p:.2g}"
    ratio = Claim(
        "rewiring.ratio",
        found.ratio,
        found.low,
        found.high,
        found.n,
        seed,
        null=found.null,
        claimed=CLAIMED_RATIO,
        about=about,
    )
    about = f"within − between after taking each head's mean incoming vector off; permutation p {found.centred_p:.2g}"
    verdict = "context changes what is read" if found.centred_p <= LEVEL else "no effect"
    return [
        ratio,
        Claim("rewiring.centred", found.centred, n=found.n, seed=seed, null=0.0, verdict=verdict, about=about),
    ]


def perturbation_claims(found: Mapping[str, Perturbed], *, seed: int) -> list[Claim]:
    """Step 6."""
    claims = []
    for kind, item in found.items():
        n = item.ablation.size
        for name, values in (("ablation", item.ablation), ("disruption", item.disruption)):
            estimate = mean_interval(values.mean(1), within=(0.0, np.inf))
            what = "both heads ablated" if name == "ablation" else "A's contribution taken out of B's q, k, v"
            about = f"KL(clean ‖ intervened), nats, {what}: mean over {len(item.pairs)} {kind} pairs, {n} runs"
            claims.append(claim(f"perturb.{kind}.{name}", estimate, seed=seed, about=about))
        about = f"disruption ÷ ablation over {kind} pairs; n pairs"
        claimed = CLAIMED_DISRUPTION if kind == "strongest" else None
        claims.append(claim(f"perturb.{kind}.ratio", item.ratio(seed=seed), seed=seed, claimed=claimed, about=about))
    return claims


def state_claims(found: Sequence[States], *, seed: int) -> list[Claim]:
    """Step 7: unexplained = 1 − R² of held-out pairs; the claim is set beside the middle layer's."""
    claims = []
    middle = found[len(found) // 2].layer
    for item in found:
        name = f"state.L{item.layer}"
        for (kind, distance, fit), one in item.explained.items():
            about = f"unexplained share of KL by {DISTANCES[distance]} at layer {item.layer}, {fit}, {kind} pairs"
            claimed = CLAIMED_UNEXPLAINED.get(distance) if (item.layer, kind) == (middle, "near") else None
            claims.append(_unexplained(f"{name}.{kind}.{distance}.{fit}", one, claimed=claimed, about=about, seed=seed))
        for distance, one in item.explained_js.items():
            about = f"unexplained share of the Jensen–Shannon divergence by {DISTANCES[distance]}, layer {item.layer}"
            claims.append(_unexplained(f"{name}.near.{distance}.js", one, claimed=None, about=about, seed=seed))
        swept = item.swept
        best = int(np.argmax(swept.inside))
        where = f"k = {swept.k[best]} of {swept.k[-1]}"
        about = f"greatest R² of Δ inside the top k singular directions: {where}; null: the rest"
        inside, rest = float(swept.inside[best]), float(swept.outside[best])
        verdict = "inside tells more" if inside > rest else "the rest tells more"
        claims.append(
            Claim(f"{name}.sweep", inside, n=len(item.near), seed=seed, null=rest, verdict=verdict, about=about)
        )
    return claims


def _unexplained(key: str, found: Explained, *, claimed: float | None, about: str, seed: int) -> Claim:
    """Return 1 − R² with its interval turned round; where nothing is claimed, whether anything is explained."""
    entry = Claim(key, 1 - found.r2, 1 - found.high, 1 - found.low, found.n, seed, 1 - found.null, None, claimed)
    explains = "explains some of it" if 1 - found.low < min(1.0, 1 - found.null) else "explains nothing"
    return replace(entry, about=about, verdict="" if claimed is not None else explains)


def share_claims(found: Shares, *, seed: int) -> list[Claim]:
    """Step 8."""
    claims = []
    last = max(layer for layer, _ in found.by_layer)
    for (layer, kind), item in found.by_layer.items():
        about = f"share of KL(A ‖ B) that A's last state explains when put into B at layer {layer}, {kind} pairs"
        gold = 1.0 if layer == last else None
        claims.append(
            claim(f"patch.L{layer}.{kind}", item.share(seed=seed), seed=seed, gold=gold, null=0.0, about=about).judged(
                tolerance=0.01
            )
        )
    for (m, kind), item in found.by_positions.items():
        text = "all shared" if m == ALL else f"last {m}"
        about = f"the same at layer {found.middle} with the {text} positions patched, {kind} pairs"
        key = f"patch.positions.{'all' if m == ALL else m}.{kind}"
        claims.append(claim(key, item.share(seed=seed), seed=seed, null=0.0, about=about))
    return claims


def ring_claims(found: Mapping[tuple[int, str], Ring], *, seed: int) -> list[Claim]:
    """Step 9: how many clouds are rounder, or have a longer loop, than matched Gaussians, after Holm's correction."""
    items = list(found.values())
    claims = []
    for name, what in (("circularity", "circularity"), ("persistence", "persistent H1")):
        p = np.array([getattr(item, f"{name}_p") for item in items])
        clear = significant(p, level=LEVEL, method="holm")
        excess = [getattr(item, name) - getattr(item, f"{name}_null") for item in items]
        where = ", ".join(f"layer {layer} {kind}" for (layer, kind), good in zip(found, clear, strict=True) if good)
        about = f"clouds (layer × category) with more {what} than matched Gaussians, Holm at {LEVEL}: {where or 'none'}"
        verdict = "no rings" if not clear.any() else "some clouds"
        claims.append(
            Claim(
                f"ring.{name}.n_significant",
                int(clear.sum()),
                n=len(items),
                seed=seed,
                null=0.0,
                verdict=verdict,
                about=about,
            )
        )
        share = float(np.mean(p <= LEVEL))
        about = f"{what} − that of matched Gaussians, mean over clouds; {share:.0%} have p ≤ {LEVEL} uncorrected"
        claims.append(claim(f"ring.{name}.excess", mean_interval(excess), seed=seed, null=0.0, about=about))
    return claims
