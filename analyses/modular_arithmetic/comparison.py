"""Step 9: architectures and moduli side by side: what is answered rightly, and whether numbers lie on circles.

Each model is trained twice, on all pairs and on some: only pairs that were held out tell adding from remembering.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import actdb
from analyses.common.program import note
from analyses.modular_arithmetic.comparison_training import HELD_OUT, MIRRORED, UNSEEN, plan, run_name, train_all
from analyses.modular_arithmetic.fourier import n_top, spectrum
from analyses.modular_arithmetic.model import number_embedding
from analyses.modular_arithmetic.progress import read_predictions
from analyses.modular_arithmetic.representation import Representation
from analyses.modular_arithmetic.topology import Shape, measure

TRAIN_SHARE = 1 - 1.5 * HELD_OUT
"""Of the pairs, about: see `split_pairs`."""
N_NULL = 99


@dataclass(frozen=True)
class Entry:
    """An architecture at a modulus, for one seed.

    `all_accuracy`: over all pairs, trained on all. Trained on part: `mirrored_accuracy`, over pairs (a, b) of which
    (b, a) was learnt, and `unseen_accuracy`, over pairs of which neither was; the rest is of the embedding of this
    model: its key frequencies, the share of the `n_top` largest with that of random matrices, and its shape. `epochs`
    are those of the two trainings.
    """

    architecture: str
    modulus: int
    seed: int
    all_accuracy: float
    train_accuracy: float
    mirrored_accuracy: float
    unseen_accuracy: float
    n_mirrored: int
    n_unseen: int
    epochs: tuple[int, int]
    keys: tuple[int, ...]
    top_share: float
    null_top_share: float
    shape: Shape


STRUCTURE = {
    "top_share": ("share of its strongest frequencies", "random matrices"),
    "circularity": ("circularity", "numbers permuted"),
    "agreement": ("steps that agree", "numbers permuted"),
    "longest_loop": ("longest loop ÷ diameter", "clouds of the same covariance"),
}
"""Measures of an embedding: what each is, and its null."""


def structure(entry: Entry, name: str) -> tuple[float, float]:
    """Return a measure of an entry's embedding and its null, by a name of `STRUCTURE`."""
    shape = entry.shape
    if name == "top_share":
        return entry.top_share, entry.null_top_share
    if name == "longest_loop":
        return shape.loops.longest, shape.loops.expected
    return float(getattr(shape.order, name)), float(getattr(shape.null, name))


def compare(
    db: Path,
    *,
    architectures: Sequence[str],
    moduli: Sequence[int],
    seeds: Sequence[int],
    n_epochs: int | None = None,
    n_processes: int = 1,
) -> list[Entry]:
    """Train and measure every architecture at every modulus for every seed; trained ones are read from the database.

    `n_epochs` bounds the epochs of every recipe; `n_processes` train at a time.
    """
    pairs = [
        tuple(plan(name, modulus, seed=seed, share=share, n_epochs=n_epochs) for share in (1.0, TRAIN_SHARE))
        for name in architectures
        for modulus in moduli
        for seed in seeds
    ]
    note(f"comparing {len(architectures)} architectures at {len(moduli)} moduli: {2 * len(pairs)} trainings")
    train_all([training for pair in pairs for training in pair], db, n_processes=n_processes)
    with actdb.open(db) as database:
        return [
            measure_entry(database.run(run_name(whole)), database.run(run_name(part)), whole.architecture, whole.seed)
            for whole, part in pairs
        ]


def measure_entry(whole: actdb.Run, part: actdb.Run, architecture: str, seed: int) -> Entry:
    """Measure one model that was trained on all pairs (`whole`) and one that was trained on part of them."""
    found = read_predictions(part)
    embedding = np.asarray(number_embedding(part), np.float64)
    mirrored, unseen = (part.prompt_ids(f"kind = {kind}") for kind in (MIRRORED, UNSEEN))
    right, powers = found.hits(), spectrum(embedding, seed=seed)
    n = n_top(found.modulus)
    return Entry(
        architecture,
        found.modulus,
        seed,
        all_accuracy=float(read_predictions(whole).hits().mean()),
        train_accuracy=float(right[found.is_trained].mean()),
        mirrored_accuracy=float(right[mirrored].mean()),
        unseen_accuracy=float(right[unseen].mean()),
        n_mirrored=len(mirrored),
        n_unseen=len(unseen),
        epochs=(whole.step or 0, part.step or 0),
        keys=powers.keys,
        top_share=powers.top_share(n),
        null_top_share=powers.null_share(n),
        shape=measure(Representation("embedding", embedding), n_null=N_NULL, seed=seed),
    )
