"""The concept graphs of several models, as plain values for `topology.json` and the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.modular_arithmetic.layout import DIMENSIONS, LAYOUTS, align, lay_out
from analyses.modular_arithmetic.progress import Measures, series
from analyses.modular_arithmetic.representation import Representation, number_scores, read_representations
from analyses.modular_arithmetic.topology import Shape, addition_edges, measure, neighbour_edges, similarity_edges

Floats = npt.NDArray[np.float64]
DIGITS = 4
MOST_CHECKPOINTS = 12
"""Checkpoints of a model that are drawn: so many at most, the first and the last among them."""
N_NULL_EARLIER = 19
"""Draws of the null at checkpoints before the last."""
OVER_CHECKPOINTS = ("circularity", "agreement of steps", "longest loop")
"""Measures of the embedding that stand beside the losses over the checkpoints."""
HISTORY = {
    "training loss": "train_loss",
    "held-out loss": "test_loss",
    "restricted loss": "restricted_loss",
    "excluded loss": "excluded_loss",
    "training accuracy": "train_accuracy",
    "held-out accuracy": "test_accuracy",
    "Gini of the embedding": "gini",
    "embedding in key frequencies": "key_share",
    "logits in their waves": "logit_share",
    "weight norm": "weight_norm",
}
"""Progress measures by the name that the page gives them."""


@dataclass(frozen=True)
class Subject:
    """A model to draw: its checkpoints' runs in the order of training, and what was measured at each of them.

    `history` holds a value a run of `runs` by name, such as losses.
    """

    name: str
    runs: Sequence[str]
    modulus: int
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """One place of one checkpoint: what the model holds there, its shape, and measures [number] of its own."""

    held: Representation
    shape: Shape
    numbers: Mapping[str, Floats]


def history_of(found: Sequence[Measures]) -> dict[str, list[float]]:
    """Return the progress measures of a subject's checkpoints as its history."""
    return {label: series(found, name).tolist() for label, name in HISTORY.items()}


def describe(db: actdb.Database, run: str, *, modulus: int, n_null: int, seed: int) -> dict[str, Shown]:
    """Return the places of a checkpoint with their shape, by name."""
    stored = db.run(run)
    scores = number_scores(stored, modulus=modulus)
    found = {}
    for held in read_representations(stored, modulus=modulus):
        shape = measure(held, n_null=n_null, seed=seed)
        found[held.place] = Shown(held, shape, {**scores, **_own(held, shape.order.step)})
    return found


def shown_runs(subject: Subject) -> list[int]:
    """Return which of a subject's runs are drawn: all, or `MOST_CHECKPOINTS` spread evenly."""
    n = len(subject.runs)
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, MOST_CHECKPOINTS))})


def draw_subject(
    db: actdb.Database, subject: Subject, *, n_null: int, seed: int
) -> tuple[dict[str, Shown], dict[str, Any]]:
    """Return the places of a subject's last checkpoint, and all drawn checkpoints as plain values."""
    checkpoints: list[dict[str, Any]] = []
    last: dict[str, Shown] = {}
    reference: dict[str, Any] = {}
    for i in reversed(shown_runs(subject)):
        run = subject.runs[i]
        draws = min(n_null, N_NULL_EARLIER) if last else n_null
        found = describe(db, run, modulus=subject.modulus, n_null=draws, seed=seed)
        places = [draw_place(each, reference.get(name, {}), seed=seed) for name, each in found.items()]
        reference = {place["place"]: place["layouts"] for place in places}
        checkpoints.insert(0, {"run": run, "epoch": db.run(run).step or 0, "places": places})
        last = last or found
    described = {
        "name": subject.name,
        "modulus": subject.modulus,
        "history": _history(db, subject, checkpoints),
        "checkpoints": checkpoints,
    }
    return last, described


def affinity_of(held: Representation) -> Floats:
    """Return how strongly numbers pull at each other in a layout [number, number]: the cosine above 0, squared."""
    return np.asarray(np.clip(held.cosines, 0, None) ** 2, np.float64)


def _own(held: Representation, step: int) -> dict[str, Floats]:
    """Measures [number] of a place: how far out a number lies, and how like its neighbours it is."""
    n = np.arange(held.modulus)
    degrees = np.bincount(np.array(similarity_edges(held))[:, :2].astype(np.int64).ravel(), minlength=held.modulus)
    return {
        "norm": held.norms,
        "cosine with n + 1": held.cosines[n, (n + 1) % held.modulus],
        "cosine with n + step": held.cosines[n, (n + step) % held.modulus],
        "similarity edges": degrees.astype(np.float64),
    }


def draw_place(shown: Shown, reference: Mapping[str, Mapping[str, Any]], *, seed: int) -> dict[str, Any]:
    """Return a place as plain values; its layouts are turned towards those of a reference, `layouts` of another."""
    held, step = shown.held, shown.shape.order.step
    affinity = affinity_of(held)
    layouts: dict[str, dict[str, Any]] = {}
    for name in LAYOUTS:
        layouts[name] = {}
        for dimension in DIMENSIONS:
            points = lay_out(name, held.vectors, affinity, dimension, seed=seed)
            if reference and name != "circular":
                points = align(points, np.asarray(reference[name][str(dimension)]))
            layouts[name][str(dimension)] = np.round(points, DIGITS).tolist()
    return {
        "place": held.place,
        "step": step,
        "measures": {name: plain(value) for name, value in shown.shape.measures().items()},
        "numbers": {name: [plain(value) for value in values.tolist()] for name, values in shown.numbers.items()},
        "layouts": layouts,
        "edges": {
            "neighbours": [[n, m] for n, m, _ in neighbour_edges(held.modulus)],
            "addition": [[n, m] for n, m, _ in addition_edges(held.modulus, step)],
            "similarity": [[n, m, plain(weight)] for n, m, weight in similarity_edges(held)],
        },
    }


def _history(
    db: actdb.Database, subject: Subject, checkpoints: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, list[Any]]]:
    """What was measured over the checkpoints: epochs and values by name."""
    epochs: list[Any] = [db.run(run).step or 0 for run in subject.runs]
    found = {name: {"epoch": epochs, "value": [plain(v) for v in values]} for name, values in subject.history.items()}
    for name in OVER_CHECKPOINTS:
        found[f"embedding: {name}"] = {
            "epoch": [each["epoch"] for each in checkpoints],
            "value": [each["places"][0]["measures"][name] for each in checkpoints],
        }
    return found


def plain(value: float) -> float | int | None:
    """Return a number as JSON has it: rounded to some digits, None for what is not finite."""
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.{DIGITS}g}")
