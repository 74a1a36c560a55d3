"""The figures of step 2 as claims: the last checkpoint's measures, and how they came about."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import Estimate, proportion_interval
from analyses.modular_arithmetic.progress import Measures, Phases

NEAR = 0.05
"""Nats by which a restricted loss may exceed the model's own and count as near it."""
NEEDED = 0.75
"""Share of ln p from which on an excluded loss counts as that of a model that knows nothing any more."""


def progress_claims(found: Sequence[Measures], ends: Phases, *, n_pairs: tuple[int, int], seed: int) -> list[Claim]:
    """Step 2: the last checkpoint's measures and how they came about; `n_pairs` are trained on and held out."""
    last = found[-1]
    claims = [
        claim("accuracy.train", _share(last.train_accuracy, n_pairs[0]), about="training pairs answered rightly"),
        Claim("loss.all", last.loss, about="loss on all pairs, nats"),
        Claim("loss.train", last.train_loss, about="loss on training pairs, nats"),
        Claim(
            "loss.restricted",
            last.restricted_loss,
            null=last.random_restricted,
            seed=seed,
            verdict=_near(last),
            about=("loss of the logits' part in the waves of a + b of the key frequencies, nats; null: as many others"),
        ),
        Claim(
            "loss.excluded",
            last.excluded_loss,
            null=last.random_excluded,
            seed=seed,
            verdict=_needs(last),
            about=("loss without that part, training pairs, nats; null: without as many others"),
        ),
        Claim(
            "logits.key_share", last.logit_share, about=("share of the logits' variance over the grid in those waves")
        ),
    ]
    if n_pairs[1]:
        share = _share(last.test_accuracy, n_pairs[1])
        claims += [
            claim("accuracy.test", share, null=1 / last.modulus, about="held-out pairs answered rightly; null: chance"),
            Claim("loss.test", last.test_loss, null=last.chance_loss, about="loss on held-out pairs, nats; null: ln p"),
        ]
    if len(found) > 1:
        claims += _change_claims(found, ends if n_pairs[1] else replace(ends, turning=None, grokked=None), n_pairs[1])
    return claims


def _change_claims(found: Sequence[Measures], ends: Phases, n_held_out: int) -> list[Claim]:
    first, last = found[0], found[-1]
    claims = []
    epochs: list[tuple[str, int | None, str]] = [
        ("memorised", ends.memorised, "first checkpoint with 99 % of the training pairs right")
    ]
    if n_held_out:
        epochs.append(
            ("turning", ends.turning, "checkpoint with the highest loss on held-out pairs, before they are right")
        )
        epochs.append(("grokked", ends.grokked, "first checkpoint with 99 % of the held-out pairs right"))
    for name, epoch, about in epochs:
        verdict = "never" if epoch is None else "measured"
        claims.append(Claim(f"epoch.{name}", float("nan") if epoch is None else epoch, verdict=verdict, about=about))
    highest = max(m.weight_norm for m in found)
    fallen = "fallen" if last.weight_norm < 0.98 * highest else "at its highest"
    about = "root of the sum of all squared weights at the end; null: its highest over the checkpoints"
    claims.append(Claim("weight_norm.last", last.weight_norm, null=highest, verdict=fallen, about=about))
    claims.append(Claim("gini.first", first.gini, about="Gini coefficient of the initial embedding's Fourier power"))
    if ends.are_distinct:
        claims += _formation_claims(found, ends)
    return claims


def _formation_claims(found: Sequence[Measures], ends: Phases) -> list[Claim]:
    """How far the circuit had formed while the loss on held-out pairs was still at its highest."""
    remembered = next(m for m in found if m.step == ends.memorised)
    turning = next((m for m in found if m.step == ends.turning and m.step > remembered.step), remembered)
    where = f"at epoch {turning.step}, where the held-out loss is highest; null: at epoch {remembered.step}, memorised"
    claims = []
    for name, grows in (("restricted_loss", False), ("excluded_loss", True), ("gini", True)):
        before, value = getattr(remembered, name), getattr(turning, name)
        moved = value > before if grows else value < before
        verdict = ("risen" if grows else "fallen") if moved else "not yet"
        claims.append(Claim(f"formed.{name}", value, null=before, verdict=verdict, about=f"{name} {where}"))
    about = f"held-out accuracy at epoch {turning.step}"
    return [*claims, Claim("formed.test_accuracy", turning.test_accuracy, about=about)]


def _share(accuracy: float, n: int) -> Estimate:
    return proportion_interval(round(accuracy * n) if np.isfinite(accuracy) else 0, n)


def _near(last: Measures) -> str:
    """Whether the waves alone do as well as the model, and better than chance."""
    if last.restricted_loss >= last.chance_loss:
        return "no better than chance"
    return "near its own loss" if last.restricted_loss <= last.loss + NEAR else "above its own loss"


def _needs(last: Measures) -> str:
    """Whether the training pairs are lost without the waves: their loss as chance has it, or higher at least."""
    if last.excluded_loss >= NEEDED * last.chance_loss:
        return "needs them"
    return "needs them in part" if last.excluded_loss > last.train_loss + NEAR else "does without them"
