"""Where a model holds the numbers 0 … p − 1: embedding, mean residuals by number after each layer, unembedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import pdist, squareform

import actdb
from analyses.modular_arithmetic.model import ANSWER, answers, number_embedding
from analyses.modular_arithmetic.progress import read_predictions

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
RESIDUAL, MEMORY = "resid_post", "hook_memory"
N_NEAREST = 2
"""On a circle a number has two neighbours."""
ROWS_AT_A_TIME = 16384


@dataclass(frozen=True)
class Representation:
    """What a model holds of each number at one place: vectors [number, d_model]."""

    place: str
    vectors: Floats

    @property
    def modulus(self) -> int:
        """How many numbers there are."""
        return len(self.vectors)

    @cached_property
    def distances(self) -> Floats:
        """Euclidean distance [number, number]."""
        return np.asarray(squareform(pdist(self.vectors)), np.float64)

    @cached_property
    def norms(self) -> Floats:
        """Distance [number] from the mean of all numbers."""
        return np.asarray(np.linalg.norm(self.vectors - self.vectors.mean(0), axis=1), np.float64)

    @cached_property
    def cosines(self) -> Floats:
        """Cosine [number, number] of the vectors about their mean; 0 for one that is the mean."""
        centred, norms = self.vectors - self.vectors.mean(0), self.norms[:, None]
        unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
        return np.asarray(unit @ unit.T, np.float64)

    @cached_property
    def nearest(self) -> Integers:
        """The `N_NEAREST` most similar numbers of each number [number, nearest], the most similar first."""
        others = self.cosines - 3 * np.eye(self.modulus)
        return np.asarray(np.argsort(-others, axis=1, kind="stable")[:, :N_NEAREST], np.int64)

    def permuted(self, random: np.random.Generator) -> "Representation":
        """Return the same vectors under other numbers: the null of everything that rests on the numbers' order."""
        return Representation(f"{self.place}, permuted", self.vectors[random.permutation(self.modulus)])


def read_representations(run: actdb.Run, *, modulus: int) -> list[Representation]:
    """Return what a run's model holds of the numbers, place by place, in the model's order.

    `embedding`; after each layer the mean residual at the first position by the number that stands there (`operand`),
    and that at the end by the sum mod p (`answer`): at the last position of a causal model, over all positions of one
    that pools them; of a memory the mean vector of the pairs by their sum; `unembedding`. Residuals are read from the
    database, one scan a layer; a run that stores none has fewer places. Raises `RunError` where the run has not all p²
    pairs (a, b).
    """
    if run.n_prompts != modulus**2:
        raise actdb.RunError(
            f"run {run.name} has {run.n_prompts} prompts; the places of {modulus} numbers need all {modulus**2} pairs"
        )
    found = {"embedding": np.asarray(number_embedding(run), np.float64)[:modulus]}
    for layer in run.layers if RESIDUAL in run else ():
        found |= {f"layer {layer} {name}": rows for name, rows in _mean_residuals(run, layer, modulus).items()}
    if MEMORY in run:
        found["memory answer"] = group_means(run[MEMORY].numpy(), answers(modulus), modulus)
    found["unembedding"] = np.asarray(run.weight("W_U"), np.float64).T[:modulus]
    return [Representation(place, vectors) for place, vectors in found.items()]


def number_scores(run: actdb.Run, *, modulus: int) -> Mapping[str, Floats]:
    """Return how well each number fares [number], from the stored logits of all pairs; nothing where none are stored.

    `accuracy as operand`: over the pairs in which it stands in either place; `accuracy as answer` and `loss as answer`,
    nats: over the pairs that sum to it.
    """
    if ANSWER not in run:
        return {}
    found = read_predictions(run)
    right, by_answer = found.hits().astype(np.float64), answers(modulus)
    square = right.reshape(modulus, modulus)
    return {
        "accuracy as operand": (square.mean(0) + square.mean(1)) / 2,
        "accuracy as answer": group_means(right[:, None], by_answer, modulus)[:, 0],
        "loss as answer": group_means(found.losses()[:, None], by_answer, modulus)[:, 0],
    }


def group_means(rows: npt.NDArray[np.floating], numbers: Integers, modulus: int) -> Floats:
    """Return the mean row [number, d] of each number, of rows [row, d]."""
    sums = np.zeros((modulus, rows.shape[1]))
    np.add.at(sums, numbers, np.asarray(rows, np.float64))
    return sums / np.bincount(numbers, minlength=modulus)[:, None]


def _mean_residuals(run: actdb.Run, layer: int, modulus: int) -> dict[str, Floats]:
    """Mean residuals [number, d_model] by operand and by answer, in one scan."""
    selection = run[RESIDUAL].sel(layer=layer)
    last = len(run.tokens(0)) - 1
    sums = np.zeros((2, modulus, selection.shape[-1]))
    counts = np.zeros((2, modulus, 1))
    for block in selection.batches(ROWS_AT_A_TIME):
        a, b = np.divmod(block.prompt, modulus)
        end = block.pos == last if run.info.causal else np.ones(len(block), np.bool_)
        for part, (numbers, rows) in enumerate(((a, block.pos == 0), ((a + b) % modulus, end))):
            np.add.at(sums[part], numbers[rows], np.asarray(block.values[rows], np.float64))
            np.add.at(counts[part], numbers[rows], 1)
    operand, answer = sums / counts
    return {"operand": operand, "answer": answer}
