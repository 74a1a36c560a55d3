"""Step 9: the comparison of architectures as claims, one table and a figure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from analyses.common.report import Claim, claim
from analyses.common.significance import Estimate, mean_interval, proportion_interval
from analyses.modular_arithmetic.comparison import STRUCTURE, Entry, compare, structure
from analyses.modular_arithmetic.comparison_picture import Groups, draw_comparison
from analyses.modular_arithmetic.comparison_training import RECIPES
from analyses.modular_arithmetic.finding import Findings
from analyses.modular_arithmetic.model import MEMORIES

TRANSFORMER = "pooled"
CLAIMED = {7: 1.0, 13: 0.34, 17: 0.29, 23: 0.23}
"""Accuracy of the transformer by modulus, as the original reports it; of memories it reports 1."""
MODULI, LARGER = (7, 13, 17, 23), 31
SMALL_MODULI, SMALL_EPOCHS = (7, 11), 200
N_SEEDS = 3
N_PROCESSES = 2
SHARE = (0.0, 1.0)
FIGURE = "figures/comparison.png"
CLAIMED_STRUCTURE = ("top_share", "longest_loop")
"""Of the structure these are claims; the table has all."""
ABOUT = """\
Each architecture is trained on all pairs, and again on part of them: 15 % of the unordered pairs are held out in both
orders (unseen), as many in one (mirrored: the model has learnt (b, a)). The Fourier and topology measures are of the
embedding of the second, in brackets their nulls (random matrices; permuted numbers; clouds of the same covariance),
means over the seeds. Chance is 1 / p. A memory cannot answer what it has not seen: accuracy on all pairs tells nothing
about how a model adds, and accuracy on mirrored pairs no more than that it takes a + b for b + a. Epochs: trained on
all, on part."""
HEADINGS = (
    "model", "p", "all pairs", "claimed", "mirrored", "unseen", "epochs", "key frequencies",
    *(title for title, _ in STRUCTURE.values()),
)  # fmt: skip


def study_comparison(db: Path, *, folder: Path, seed: int, small: bool = False) -> Findings:
    """Train and compare all architectures at all moduli; models that the database has are not trained again.

    `small`: two moduli, one seed and few epochs, for a first look.
    """
    entries = compare(
        db,
        architectures=list(RECIPES),
        moduli=SMALL_MODULI if small else (*MODULI, LARGER),
        seeds=range(seed, seed + (1 if small else N_SEEDS)),
        n_epochs=SMALL_EPOCHS if small else None,
        n_processes=1 if small else N_PROCESSES,
    )
    groups = grouped(entries)
    caption = draw_comparison(folder / FIGURE, groups, claimed=CLAIMED)
    return Findings(
        tuple(entry for group in groups.values() for entry in comparison_claims(group, seed=seed)),
        {"Architectures compared": f"{ABOUT}\n\n{comparison_table(groups)}"},
        {FIGURE: caption},
    )


def grouped(entries: Sequence[Entry]) -> dict[tuple[str, int], list[Entry]]:
    """Return the entries of each architecture and modulus, over seeds."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.architecture, entry.modulus), []).append(entry)
    return found


def claimed_accuracy(architecture: str, modulus: int) -> float | None:
    """Return the accuracy that the original reports of an architecture at a modulus; None where it reports none."""
    if architecture in MEMORIES:
        return 1.0 if modulus in CLAIMED else None
    return CLAIMED.get(modulus) if architecture == TRANSFORMER else None


def comparison_claims(group: Sequence[Entry], *, seed: int) -> list[Claim]:
    """Return the claims of one architecture at one modulus: accuracies, and the embedding's structure with its null."""
    first = group[0]
    key = f"comparison.{first.architecture}.p{first.modulus}"
    stated = claimed_accuracy(first.architecture, first.modulus)
    accuracies = {
        "all_pairs": ([entry.all_accuracy for entry in group], first.modulus**2, "all pairs, trained on all"),
        "mirrored": ([entry.mirrored_accuracy for entry in group], first.n_mirrored, "held-out (a, b), (b, a) learnt"),
        "unseen": ([entry.unseen_accuracy for entry in group], first.n_unseen, "pairs unseen in either order"),
    }
    found = [
        claim(
            f"{key}.{name}",
            _accuracy(values, n_pairs),
            seed=seed,
            null=1 / first.modulus,
            claimed=stated if name == "all_pairs" else None,
            about=f"accuracy on {n_pairs} pairs: {what}; n seeds, or pairs of one",
        ).judged(tolerance=0.005)
        for name, (values, n_pairs, what) in accuracies.items()
    ]
    return [*found, *(_structure_claim(key, name, group, seed=seed) for name in CLAIMED_STRUCTURE)]


def comparison_table(groups: Groups) -> str:
    """Return one table of all architectures and moduli, in Markdown."""
    rows = [f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * len(HEADINGS)}"]
    for (architecture, modulus), group in groups.items():
        stated = claimed_accuracy(architecture, modulus)
        epochs = np.mean([entry.epochs for entry in group], axis=0)
        cells = [
            architecture,
            str(modulus),
            _percent([entry.all_accuracy for entry in group]),
            "" if stated is None else f"{stated:.0%}",
            _percent([entry.mirrored_accuracy for entry in group]),
            _percent([entry.unseen_accuracy for entry in group]),
            f"{epochs[0]:.0f}, {epochs[1]:.0f}",
            f"{np.mean([len(entry.keys) for entry in group]):.1f}",
            *(_with_null(group, name) for name in STRUCTURE),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _accuracy(values: Sequence[float], n_pairs: int) -> Estimate:
    """The mean over seeds; its interval holds that of their pairs too: seeds that agree on four pairs say little."""
    pairs = proportion_interval(round(sum(values) * n_pairs), len(values) * n_pairs)
    if len(values) == 1:
        return pairs
    seeds = mean_interval(values, within=SHARE)
    return replace(seeds, low=min(seeds.low, pairs.low), high=max(seeds.high, pairs.high))


def _structure_claim(key: str, name: str, group: Sequence[Entry], *, seed: int) -> Claim:
    measured, null = np.array([structure(entry, name) for entry in group]).T
    title, chance = STRUCTURE[name]
    about = f"embedding: {title}; null: {chance}; n seeds"
    found = claim(
        f"{key}.{name}", mean_interval(measured, within=SHARE), seed=seed, null=float(null.mean()), about=about
    )
    return found.judged() if len(group) > 1 else replace(found, verdict="one seed, not judged")


def _percent(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{np.mean(values):.0%}"
    return mean if high - low < 0.005 else f"{mean} ({low:.0%}–{high:.0%})"


def _with_null(group: Sequence[Entry], name: str) -> str:
    measured, null = np.array([structure(entry, name) for entry in group]).mean(0)
    return f"{measured:.2f} ({null:.2f})"
