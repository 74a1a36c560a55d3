"""The figures of the study as claims, each with its null."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from analyses.common.autoencoder import Trained
from analyses.common.report import Claim, claim
from analyses.common.significance import Estimate, mean_interval
from analyses.semantic_head.attention import CUTOFFS, CosineCurve, SelfAttention, Suppression
from analyses.semantic_head.behaviour import Change
from analyses.semantic_head.circuit import Circuit
from analyses.semantic_head.community import Clustering, Communities
from analyses.semantic_head.feature import FeatureComparison
from analyses.semantic_head.score import PermutationNull, Ranked

Floats = npt.NDArray[Any]
LEVEL = 0.01
SIGNIFICANT = 0.01
N_LARGEST = 64
LEAST_P = 1e-6
"""A normal tail is not to be trusted further out."""
SEMANTIC, RESTS, RESTORED = "semantic", "the score rests on it", "self-attention restored"
LEAST_ADVANTAGE = 0.1
"""Nats by which a head must do better than with categories shuffled to be called semantic."""


def score_claims(found: Ranked, null: PermutationNull, *, n_heads: int, seed: int) -> Iterator[Claim]:
    """Step 1: the head's score, against categories permuted; `n_heads` were chosen from."""
    half = stats.t.ppf(0.975, max(found.n - 1, 1)) * found.error
    spread = float(null.permuted.std(ddof=1))
    advantage = float(null.permuted.mean()) - null.score
    p = min(1.0, n_heads * float(stats.norm.sf(advantage / spread))) if spread else 1.0
    verdict = SEMANTIC if p < LEVEL and advantage > LEAST_ADVANTAGE else "no effect"
    about = f"semantic score of {found.name} in nats, 0 is best; null: categories permuted over the words"
    yield Claim(
        "score", found.score, found.score - half, found.score + half, found.n, seed, float(null.permuted.mean()),
        verdict=verdict, about=about,
    )  # fmt: skip
    chance = f"p = {p:.2g}" if p > LEAST_P else f"p < {LEAST_P:g}"
    about = f"nats better than with categories permuted; {chance}, corrected for {n_heads} heads"
    yield Claim(
        "score.advantage", advantage, advantage - 2 * spread, advantage + 2 * spread, len(null.permuted), seed, 0.0,
        verdict=verdict, about=about,
    )  # fmt: skip


def ranking_claims(ranked: Sequence[Ranked], *, seed: int, n: int = 3) -> Iterator[Claim]:
    """Step 1: the best heads by score."""
    for place, found in enumerate(ranked[:n], 1):
        half = stats.t.ppf(0.975, max(found.n - 1, 1)) * found.error
        about = f"score of {found.name}, {place}. of {len(ranked)} heads; null: categories shuffled"
        ends = (found.score - half, found.score + half)
        yield Claim(
            f"ranking.{place}",
            found.score,
            *ends,
            n=found.n,
            seed=seed,
            null=found.shuffled,
            verdict="measured",
            about=about,
        )


def ablation_claims(scores: Mapping[str, Floats], null: float, *, seed: int) -> Iterator[Claim]:
    """Step 2: median score over prompts with one component of the head's input at its mean.

    The score rests on a component where it is worse without it by more than `LEAST_ADVANTAGE`, prompt by prompt.
    """
    plain = scores["none"]
    for name, values in scores.items():
        low, high = median_ends(values)
        worse = mean_interval(values - plain).low > LEAST_ADVANTAGE
        verdict = "measured" if name == "none" else RESTS if worse else "changes little"
        about = "median score over prompts, nothing ablated" if name == "none" else f"median score without {name}"
        key = f"ablate.{name.replace(' ', '')}"
        yield Claim(key, float(np.median(values)), low, high, len(values), seed, null, verdict=verdict, about=about)


def median_ends(values: Floats) -> tuple[float, float]:
    """Return the distribution-free 95 % interval of a median: order statistics by the binomial."""
    ordered = np.sort(values)
    low = int(stats.binom.ppf(0.025, len(values), 0.5))
    high = min(int(stats.binom.ppf(0.975, len(values), 0.5)), len(values) - 1)
    return float(ordered[low]), float(ordered[high])


def cosine_claims(curve: CosineCurve, control: Sequence[CosineCurve], *, seed: int) -> Iterator[Claim]:
    """Step 3: where other tokens begin to get more attention than the token itself, and where most."""
    cosine, height = curve.peak
    n = int(curve.counts.sum())
    null = float(np.nanmean([other.peak[0] for other in control]))
    about = "cosine of inputs at which attention is highest; null: random weights of the same norm"
    yield Claim("cosine.peak", cosine, n=n, seed=seed, null=null, verdict="measured", about=about)
    yield Claim(
        "cosine.crossing", curve.crossing, n=n, seed=seed, verdict="measured" if height > 0 else "never crosses",
        about="cosine from which on others get more attention than the token itself",
    )  # fmt: skip
    heights = [other.peak[1] for other in control]
    about = "nats of attention at the peak above the token itself; null: random weights"
    verdict = _outside(height, heights)
    yield Claim("cosine.height", height, n=n, seed=seed, null=float(np.mean(heights)), verdict=verdict, about=about)


def community_claims(
    found: Clustering, controls: Sequence[Clustering], rewired: Communities, *, seed: int
) -> Iterator[Claim]:
    """Step 4: how well the token graph is cut, and how well its communities fit the categories.

    Graphs of strongest keys are modular by their geometry, so the null is that of random circuits, beside rewiring.
    """
    cut, n = found.communities, len(found.communities.member)
    others = [each.communities.modularity for each in controls]
    about = f"modularity of {len(cut.sizes)} communities of {n} tokens; null: random circuits; rewired: "
    about += f"{rewired.modularity:.3f}"
    verdict, null = _outside(cut.modularity, [*others, rewired.modularity]), float(np.mean(others))
    yield Claim("community.modularity", cut.modularity, n=n, seed=seed, null=null, verdict=verdict, about=about)
    agrees = [each.agreement for each in controls]
    about = "adjusted Rand index of communities and categories, over categorised tokens; null: random circuits"
    verdict, null = _outside(found.agreement, agrees), float(np.mean(agrees))
    yield Claim("community.agreement", found.agreement, n=n, seed=seed, null=null, verdict=verdict, about=about)


def spectrum_claims(circuit: Circuit, controls: Sequence[Circuit], *, seed: int) -> Iterator[Claim]:
    """Step 5: the eigenvalues of the symmetric part and the norms of both, beside random weights of W's norm."""
    figures = [_spectrum_figures(each) for each in (circuit, *controls)]
    abouts = {
        "symmetric.rank": f"rank of S; the bound is {circuit.bound}",
        "symmetric.n_positive": "positive eigenvalues of S",
        "symmetric.n_negative": "negative eigenvalues of S",
        "symmetric.n_negative_of_largest": f"negative ones of the {N_LARGEST} largest in magnitude",
        "symmetric.lowest": "lowest eigenvalue of S",
        "symmetric.highest": "highest eigenvalue of S",
        "symmetric.norm": "Frobenius norm of S",
        "skew.norm": "Frobenius norm of A",
        "symmetric.share": "‖S‖² ÷ ‖W‖²",
        "trace": "trace of W, the sum of S's eigenvalues",
    }
    for key, about in abouts.items():
        values = [entry[key] for entry in figures[1:]]
        verdict = "measured" if np.ptp(values) < 1e-9 else _outside(figures[0][key], values)
        yield Claim(
            key, figures[0][key], n=len(circuit.spectrum.values), seed=seed, null=float(np.mean(values)),
            verdict=verdict, about=f"{about}; null: {len(values)} random circuits",
        )  # fmt: skip


def _spectrum_figures(circuit: Circuit) -> dict[str, float]:
    spectrum = circuit.spectrum
    symmetric, skew = float(np.linalg.norm(circuit.symmetric)), float(np.linalg.norm(circuit.skew))
    return {
        "symmetric.rank": spectrum.rank,
        "symmetric.n_positive": spectrum.rank - spectrum.n_negative,
        "symmetric.n_negative": spectrum.n_negative,
        "symmetric.n_negative_of_largest": int((spectrum.largest(N_LARGEST) < 0).sum()),
        "symmetric.lowest": float(spectrum.values[0]),
        "symmetric.highest": float(spectrum.values[-1]),
        "symmetric.norm": symmetric,
        "skew.norm": skew,
        "symmetric.share": symmetric**2 / (symmetric**2 + skew**2),
        "trace": float(spectrum.values.sum()),
    }


def suppression_claims(found: Suppression, controls: Sequence[Suppression], *, n: int, seed: int) -> Iterator[Claim]:
    """Step 5: the diagonal of E S Eᵀ against its rows; that of E A Eᵀ is zero."""
    for key, of in (("all", "all other tokens"), ("same", "others of its category")):
        values = [getattr(other, key) for other in controls]
        own, verdict = float(getattr(found, key)), _outside(getattr(found, key), values)
        about = f"own score in E S Eᵀ minus that of {of}, in deviations of the row; null: random circuits"
        yield Claim(
            f"suppression.{key}", own, n=n, seed=seed, null=float(np.mean(values)), verdict=verdict, about=about
        )


def is_suppressed(found: Suppression, controls: Sequence[Suppression]) -> bool:
    """Whether a token scores lower among its category than with any of the random circuits, and below the others."""
    return found.same < min(0.0, *(other.same for other in controls))


def scaling_claims(
    found: Mapping[float, SelfAttention],
    control: Mapping[float, SelfAttention],
    *,
    n: int,
    suppressed: bool,
    seed: int,
) -> Iterator[Claim]:
    """Step 6: how a token ranks among its own keys with the negative eigenvalues scaled.

    `suppressed` says that there is something to restore: a token scores below the others of its category.
    """
    for factor, measured in found.items():
        other, base = control[factor], f"negative eigenvalues × {factor:g}; null: random circuit"
        figures = {"mean_rank": f"mean rank of the token itself, of {n}", "reciprocal_rank": "mean reciprocal rank"}
        figures |= {"spearman": "rank correlation of a row with the unchanged one"}
        for name, about in figures.items():
            value, null = getattr(measured, name), getattr(other, name)
            yield _plain(f"scale.{factor:g}.{name}", value, n, seed, null, f"{about}, {base}")
        for cutoff in (cutoff for cutoff in CUTOFFS if cutoff < n):
            about = f"share of tokens among their own first {cutoff} keys, {base}"
            value, null = measured.accuracy[cutoff], other.accuracy[cutoff]
            yield _plain(f"scale.{factor:g}.accuracy_{cutoff}", value, n, seed, null, about)
    chance = SelfAttention.chance(n).mean_rank
    before, after = found[1.0].mean_rank, found[0.0].mean_rank
    restored = after < chance / 2 and after < before / 2
    about = f"mean rank with negative eigenvalues at 0, as a share of that before; chance is rank {chance:g}"
    yield Claim(
        "scale.restored", after / before, n=n, seed=seed, null=control[0.0].mean_rank / control[1.0].mean_rank,
        verdict="nothing was suppressed" if not suppressed else RESTORED if restored else "not restored", about=about,
    )  # fmt: skip


def rank_ablation_claims(
    found: Mapping[int, Mapping[float, SelfAttention]],
    control: Mapping[int, Mapping[float, SelfAttention]],
    *,
    n: int,
    seed: int,
) -> Iterator[Claim]:
    """Step 7: the mean rank with the k most negative eigenvalues at 0, and the least k that halves it."""
    for number, curve in found.items():
        about = f"mean rank of the token itself with the {number} most negative eigenvalues at 0; null: random circuit"
        yield _plain(f"rank_ablation.{number}", curve[0.0].mean_rank, n, seed, control[number][0.0].mean_rank, about)
    halving = [k for k, curve in found.items() if curve[0.0].mean_rank < curve[1.0].mean_rank / 2]
    about = "least number of negative eigenvalues that must be 0 to halve the mean rank; not measurable: none does"
    yield Claim("rank_ablation.halving", float(halving[0]) if halving else math.nan, n=n, seed=seed, about=about)


def steering_claims(changes: Mapping[float, Change], *, seed: int) -> Iterator[Claim]:
    """Step 8: self-attention and losses after a gradient step on tr(W_Q W_Kᵀ) in the live model."""
    for rate, change in changes.items():
        word = f"{'boost' if rate > 0 else 'suppress'} {abs(rate):g}"
        for name, found, about in (
            ("self_attention", change.self_mass, "change of self-attention on words"),
            ("text_loss", change.text, "rise of the text loss in nats"),
        ):
            key, verdict = f"steer.{word.replace(' ', '.')}.{name}", _direction(found)
            yield claim(key, found, seed=seed, null=0.0, about=f"{about}, {word}", verdict=verdict)


def removal_claims(changes: Mapping[int, Change], head: int, *, seed: int) -> Iterator[Claim]:
    """Step 9: losses with the head's z at its mean; the null is the mean of other heads of its layer."""
    for key, words in (("text", "loss over text"), ("succession", "loss of the next in a known order")):
        others = [getattr(change, key).value for other, change in changes.items() if other != head]
        found: Estimate = getattr(changes[head], key)
        about = f"rise of the {words} in nats with the head at its mean; null: {len(others)} other heads"
        null = float(np.mean(others)) if others else 0.0
        yield claim(f"remove.{key}", found, seed=seed, null=null, about=about, verdict=_direction(found))


def autoencoder_claims(trained: Trained, explained: float, found: FeatureComparison, *, seed: int) -> Iterator[Claim]:
    """Step 10: how well the autoencoder explains rows, where its time went, and what its features say."""
    n_latents, n, k = len(trained.model.decoder), found.n_features, trained.model.k
    about = f"variance explained of text that it was not trained on, {k} of {n_latents} latents a row"
    yield _plain("autoencoder.explained", explained, trained.n_rows, seed, None, about)
    about = f"share of the {n_latents} latents silent at the end"
    yield _plain("autoencoder.dead", trained.n_dead / n_latents, trained.n_rows, seed, None, about)
    about = "share of the training's time in computing rather than reading"
    enough = "at least 0.8" if trained.compute_share >= 0.8 else "below 0.8"
    steps = len(trained.losses)
    yield Claim("autoencoder.compute_share", trained.compute_share, n=steps, seed=seed, verdict=enough, about=about)
    about = "commonest category's share of the words where a feature fires most; null: words permuted"
    yield _plain("feature.purity", found.purity, n, seed, found.null_purity, about)
    about = "cosine of two words' features, of one category minus of two; null: words permuted"
    verdict = _significance(found.overlap_p)
    yield Claim("feature.overlap", found.overlap, n=n, seed=seed, null=found.null_overlap, verdict=verdict, about=about)
    about = "Spearman's correlation of that cosine and the head's score; null: words permuted"
    verdict, null = _significance(found.correlation_p), found.null_correlation
    yield Claim("feature.correlation", found.correlation, n=n, seed=seed, null=null, verdict=verdict, about=about)


def prefix_claims(prefix: str, entries: Sequence[Claim]) -> list[Claim]:
    """Return claims under names of their own."""
    return [replace(entry, key=f"{prefix}.{entry.key}") for entry in entries]


def _plain(key: str, value: float, n: int, seed: int, null: float | None, about: str) -> Claim:
    """A figure that no verdict is passed on: its null stands beside."""
    return Claim(key, value, n=n, seed=seed, null=null, verdict="measured", about=about)


def _direction(change: Estimate) -> str:
    return "raised" if change.low > 0 else "lowered" if change.high < 0 else "no effect"


def _significance(p: float) -> str:
    return f"above chance, p = {p:.2g}" if p <= SIGNIFICANT else f"no effect, p = {p:.2g}"


def _outside(value: float, null: Sequence[Any]) -> str:
    """Whether a value lies outside all of the null's, or among them."""
    low, high = float(np.nanmin(null)), float(np.nanmax(null))
    return "above the controls" if value > high else "below the controls" if value < low else "among the controls"
