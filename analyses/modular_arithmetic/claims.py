"""The figures of steps 1 and 3 as claims: what was measured, beside its null and what the original says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import mean_interval, proportion_interval
from analyses.modular_arithmetic.ablation import Directions, Effect, iterate
from analyses.modular_arithmetic.fourier import Circle, NeuronSpectrum, Spectrum, n_top

TUNED = 0.85
"""Share of a neuron's variance above which Nanda et al. call it tuned to one frequency."""
CLAIMED_ABLATION = {"embed": 0.45, "attention 0": 0.23, "MLP 1": 0.31}
"""Constants in the original's plotting script, for its two-layer model."""
STORED_ABLATION = {"embed": 0.94, "positions": 0.02, "attention 0": 0.80}
"""What the original's stored results say of mean ablation."""
SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Fourier:
    """What step 1 found of one model; the nulls of `neurons` are those of the initial model where there is one."""

    spectrum: Spectrum
    circles: Sequence[Circle]
    neurons: Mapping[int, NeuronSpectrum]
    initial: Mapping[int, NeuronSpectrum]


def fourier_claims(found: Fourier, *, seed: int) -> list[Claim]:
    """Step 1: key frequencies, their share, circles, and the neurons' best frequencies."""
    spectrum, n = found.spectrum, len(found.spectrum.power)
    keys, k = spectrum.keys, n_top(2 * n)
    listed = ", ".join(map(str, keys)) or "none"
    null = spectrum.null_share(len(keys)) if keys else 0.0
    return [
        Claim(
            "fourier.alignment",
            1.0,
            null=1.0,
            verdict="no evidence",
            about=("the original's alignment: the share of the embedding in a complete basis, 1 for any matrix"),
        ),
        Claim(
            "fourier.n_keys",
            len(keys),
            n=n,
            seed=seed,
            null=0.0,
            about=(f"key frequencies of the embedding, of {n}: {listed}; null: random matrices, familywise 0.01"),
        ),
        Claim(
            "fourier.key_share",
            spectrum.key_share,
            seed=seed,
            null=null,
            about=("share of the embedding's variance in them; null: as many largest of a random matrix"),
        ),
        Claim(
            f"fourier.top{k}_share",
            spectrum.top_share(k),
            seed=seed,
            null=spectrum.null_share(k),
            about=(f"share of the {k} strongest frequencies; null: random matrices of the same shape"),
        ),
        Claim(
            "fourier.gini",
            spectrum.gini,
            seed=seed,
            null=spectrum.null_gini,
            about=("Gini coefficient of the Fourier power; null: random matrices"),
        ),
        *_circle_claims(found.circles, seed=seed),
        *(entry for layer in found.neurons for entry in _neuron_claims(found, layer, seed=seed)),
    ]


def _circle_claims(circles: Sequence[Circle], *, seed: int) -> list[Claim]:
    claims = []
    for circle in circles:
        key = f"circle.{circle.frequency}"
        about = f"in the order of frequency {circle.frequency}; null: random matrices at their best frequency"
        claims += [
            Claim(
                f"{key}.pearson",
                circle.pearson,
                seed=seed,
                null=circle.null_pearson,
                about=(f"Pearson's r of distances in the whole embedding with those around the circle {about}"),
            ),
            Claim(
                f"{key}.adjacency",
                circle.adjacency,
                seed=seed,
                null=circle.null_adjacency,
                verdict="neighbours closer" if circle.adjacency < circle.null_adjacency else "neighbours no closer",
                about=(f"mean distance of neighbours over that of all pairs {about}"),
            ),
        ]
    return claims


def _neuron_claims(found: Fourier, layer: int, *, seed: int) -> list[Claim]:
    neurons, keys, n_frequencies = found.neurons[layer], found.spectrum.keys, len(found.spectrum.power)
    explained = neurons.explained[neurons.active]
    null, beside = neurons.null, "white noise"
    tuned_null = 0.0
    if layer in found.initial:
        before = found.initial[layer]
        null, beside = float(before.explained[before.active].mean()), "the initial model"
        tuned_null = float((before.explained[before.active] > TUNED).mean())
    n = len(explained)
    at_keys = int(np.isin(neurons.frequency[neurons.active], keys).sum())
    return [
        claim(
            f"neurons.L{layer}.explained",
            mean_interval(explained, within=SHARE),
            seed=seed,
            null=null,
            about=(
                f"share of a neuron's variance over the grid that its best frequency explains, layer {layer}, mean of "
                f"active neurons; null: {beside}"
            ),
        ),
        claim(
            f"neurons.L{layer}.tuned",
            proportion_interval(int((explained > TUNED).sum()), n),
            null=tuned_null,
            about=(
                f"share of the active neurons of layer {layer} of which one frequency explains more than {TUNED:.0%}; "
                f"null: {beside}"
            ),
        ),
        claim(
            f"neurons.L{layer}.at_keys",
            proportion_interval(at_keys, n),
            null=len(keys) / n_frequencies,
            about=(
                "share of the active neurons whose best frequency is a key frequency of the embedding; null: by chance"
            ),
        ),
    ]


def ablation_claims(
    effects: Mapping[str, Mapping[str, Effect]], *, seed: int, claimed: Mapping[str, float], gold: Mapping[str, float]
) -> list[Claim]:
    """Step 3: falls of the accuracy and rises of the loss; `claimed` and `gold` are stated of mean ablation."""
    claims = []
    for kind, name, effect in iterate(effects):
        key = f"{kind}.{name.replace(' ', '_')}"
        stated = (claimed.get(name), gold.get(name)) if kind == "mean" else (None, None)
        how = f"{kind} ablation of {name}" if kind in ("zero", "mean") else f"{name} patched from {kind} pairs"
        about = f"fall of the accuracy over all pairs, {how}; loss {effect.rise.value:+.3g} nats"
        if np.isfinite(effect.carried):
            about += f"; {effect.carried:.0%} are then answered as the other pair should be"
        claims.append(claim(key, effect.fall, seed=seed, null=0.0, claimed=stated[0], gold=stated[1], about=about))
    return claims


def direction_claims(found: Directions, *, seed: int) -> list[Claim]:
    """Step 3: accuracy without the key frequencies' directions, and with nothing else."""
    about = f"accuracy over all pairs (whole: {found.clean:.3f}) with the embedding"
    n = found.n
    claims = [
        Claim(
            "directions.without_keys",
            found.key,
            n=n,
            seed=seed,
            null=found.random.value,
            about=(f"{about} without the {n} waves of the key frequencies; null: {n} random directions"),
        ),
        claim(
            "directions.without_random",
            found.random,
            seed=seed,
            null=found.clean,
            about=(f"{about} without {n} random directions, over draws; null: whole"),
        ),
        Claim(
            "directions.only_keys",
            found.only_key,
            n=n,
            seed=seed,
            null=found.only_random.value,
            about=(f"{about} in the key frequencies' waves alone; null: in as many random directions"),
        ),
    ]
    if found.others.n:
        claims.append(
            claim(
                "directions.without_others",
                found.others,
                seed=seed,
                null=found.clean,
                about=(f"{about} without as many other frequencies, over draws; null: whole"),
            )
        )
    return claims


def prefixed(prefix: str, claims: Sequence[Claim]) -> list[Claim]:
    """Return claims with a prefix to their keys: those of a control or of another model."""
    return [replace(entry, key=f"{prefix}.{entry.key}") for entry in claims]
