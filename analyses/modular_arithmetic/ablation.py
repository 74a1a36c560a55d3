"""Step 3: what each component is worth to the answers: ablation, patching, and directions of the embedding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from analyses.common.intervention import Hook, Place, hook_name, mean_ablation, place, replace, stored, zero_ablation
from analyses.common.significance import Estimate, mean_interval
from analyses.modular_arithmetic.fourier import n_frequencies, waves
from analyses.modular_arithmetic.grid import Grid, corruption

Floats = npt.NDArray[np.float64]
PATCHES = ("shifted", "shuffled", "random")
"""Corruptions of a patch: (a + 1, b), a permutation of all pairs, any pair with another answer."""
POSITIONS = "hook_pos_embed"
N_RANDOM = 20
SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Target:
    """A component that is ablated: a site at a layer, and one head of it where `head` is given."""

    name: str
    site: str
    layer: int | None = None
    head: int | None = None

    @property
    def parts(self) -> dict[str, int]:
        """The part of the site that it is."""
        return {} if self.head is None else {"head": self.head}


@dataclass(frozen=True)
class Effect:
    """What an intervention does over all pairs: the fall of the accuracy and the rise of the loss, nats.

    `carried` is the share of the pairs that are answered as the pair that was patched in should be (NaN for ablations).
    Intervals are over pairs.
    """

    fall: Estimate
    rise: Estimate
    carried: float = float("nan")


@dataclass(frozen=True)
class Directions:
    """Accuracy over all pairs with directions over the numbers taken out of the embedding, or nothing else left.

    `key` and `only_key` are of the key frequencies' waves, `random` and `only_random` of as many random directions, and
    `others` of as many other frequencies, with intervals over draws (NaN where too few frequencies are left).
    """

    n: int
    clean: float
    key: float
    random: Estimate
    others: Estimate
    only_key: float
    only_random: Estimate


def targets(grid: Grid) -> list[Target]:
    """Return what is ablated of a model: its embeddings, positions, attention and MLP of each layer, every head."""
    run = grid.run
    found = [Target("embed", "embed")]
    if POSITIONS in run:
        found.append(Target("positions", POSITIONS))
    for layer in run.layers:
        found += [Target(f"attention {layer}", "attn_out", layer), Target(f"MLP {layer}", "mlp_out", layer)]
    heads = range(run["z"].shape[1]) if "z" in run else ()
    return [*found, *(Target(f"head {layer}.{head}", "z", layer, head) for layer in run.layers for head in heads)]


def ablate(grid: Grid) -> dict[str, dict[str, Effect]]:
    """Return the effect of zero and mean ablation of each component {kind: {component: effect}}.

    A mean is that over all pairs at each position, so that what is lost is what differs between pairs; that of the
    positions, which are the same in all pairs, is over positions.
    """
    return {
        kind: {target.name: _effect(grid, _ablation(grid, target, kind)) for target in targets(grid)}
        for kind in ("zero", "mean")
    }


def patch(grid: Grid, *, seed: int, kinds: Sequence[str] = PATCHES) -> dict[str, dict[str, Effect]]:
    """Return the effect of patching each component with what the run stored of other pairs {kind: {component: …}}."""
    varying = [target for target in targets(grid) if target.site != POSITIONS]
    found: dict[str, dict[str, Effect]] = {}
    for kind in kinds:
        others = corruption(grid, kind, seed=seed)
        wanted = grid.answers[others]
        found[kind] = {target.name: _effect(grid, _patch(grid, target, others), wanted) for target in varying}
    return found


def ablate_directions(grid: Grid, frequencies: Sequence[int], *, seed: int) -> Directions:
    """Take the key frequencies' waves out of the embedding, and, as controls, as many random directions."""
    p, generator = grid.modulus, np.random.default_rng(seed)
    key = waves(p, frequencies)
    drawn = [_random_directions(p, len(key), generator) for _ in range(N_RANDOM)]
    rest = sorted(set(range(1, n_frequencies(p) + 1)) - set(frequencies))
    enough = frequencies and len(rest) >= len(frequencies)
    choices = [generator.choice(rest, len(frequencies), replace=False) for _ in range(N_RANDOM)] if enough else []
    return Directions(
        n=len(key),
        clean=grid.accuracy(),
        key=grid.accuracy([without(grid, key)]),
        random=_over(grid, drawn),
        others=_over(grid, [waves(p, choice.tolist()) for choice in choices]),
        only_key=grid.accuracy([without(grid, _complement(key, p))]),
        only_random=_over(grid, [_complement(directions, p) for directions in drawn]),
    )


def without(grid: Grid, directions: Floats) -> Hook:
    """Return the intervention that takes directions over the numbers [n, p], orthonormal, out of the embedding.

    W_E [p, d] becomes (1 − DᵀD) W_E; the row of `=` stays.
    """
    table = torch.from_numpy(np.array(grid.run.weight("W_E"))).double()
    over = torch.from_numpy(np.asarray(directions, np.float64))
    numbers = table[: grid.modulus]
    left = torch.cat([numbers - over.T @ (over @ numbers), table[grid.modulus :]])
    return replace(Place(hook_name(grid.run, "embed")), left.float()[grid.ids])


def falls(found: Mapping[str, Mapping[str, Effect]], kind: str) -> dict[str, tuple[float, float, float]]:
    """Return the fall of the accuracy with its interval by component, for drawing."""
    return {name: (effect.fall.value, effect.fall.low, effect.fall.high) for name, effect in found[kind].items()}


def _ablation(grid: Grid, target: Target, kind: str) -> Hook:
    if kind == "zero":
        return zero_ablation(place(grid.run, target.site, layer=target.layer, **target.parts))
    return mean_ablation(grid.run, target.site, layer=target.layer, by_pos=target.site != POSITIONS, **target.parts)


def _patch(grid: Grid, target: Target, others: npt.NDArray[np.int64]) -> Hook:
    at = place(grid.run, target.site, layer=target.layer, **target.parts)
    return replace(at, stored(grid.run, at.hook, range(grid.n_pairs))[torch.from_numpy(others)])


def _effect(grid: Grid, hook: Hook, wanted: npt.NDArray[Any] | None = None) -> Effect:
    logits = grid.logits([hook])
    fall = grid.right(grid.clean).astype(np.float64) - grid.right(logits)
    rise = grid.losses(logits) - grid.losses(grid.clean)
    carried = float("nan") if wanted is None else float((logits.argmax(-1).cpu().numpy() == wanted).mean())
    return Effect(mean_interval(fall, within=(-1.0, 1.0)), mean_interval(rise), carried)


def _over(grid: Grid, choices: Sequence[Floats]) -> Estimate:
    return mean_interval([grid.accuracy([without(grid, directions)]) for directions in choices], within=SHARE)


def _random_directions(modulus: int, n: int, generator: np.random.Generator) -> Floats:
    """Random orthonormal directions over the numbers [n, p], orthogonal to the constant, as waves are."""
    drawn = generator.standard_normal((modulus, n))
    return np.linalg.qr(drawn - drawn.mean(0))[0].T


def _complement(directions: Floats, modulus: int) -> Floats:
    """All directions over the numbers orthogonal to these and to the constant, which stays in the embedding."""
    held = np.concatenate([np.full((1, modulus), modulus**-0.5), directions])
    return np.linalg.svd(held)[2][len(held) :]


def iterate(found: Mapping[str, Mapping[str, Effect]]) -> Iterator[tuple[str, str, Effect]]:
    """Yield (kind, component, effect) of all effects."""
    for kind, by_name in found.items():
        for name, effect in by_name.items():
            yield kind, name, effect
