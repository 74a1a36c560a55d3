"""The concept graph of the numbers 0 … p − 1: its edges, and how much of a circle the numbers lie on."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analyses.modular_arithmetic import fourier
from analyses.modular_arithmetic.homology import Homology, find_loops
from analyses.modular_arithmetic.representation import Integers, Representation

Floats = npt.NDArray[np.float64]
Edge = tuple[int, int, float]
N_NULL = 99


def neighbour_edges(modulus: int) -> list[Edge]:
    """Return the edges n — n + 1 mod p, of weight 1."""
    return addition_edges(modulus, 1)


def addition_edges(modulus: int, step: int) -> list[Edge]:
    """Return the edges n — n + step mod p, each once, of weight 1."""
    pairs = {(min(n, m), max(n, m)) for n in range(modulus) for m in ((n + step) % modulus,) if n != m}
    return [(n, m, 1.0) for n, m in sorted(pairs)]


def similarity_edges(held: Representation) -> list[Edge]:
    """Return the edges from each number to the most similar ones, each once, with their cosine."""
    pairs = {(min(n, m), max(n, m)) for n, row in enumerate(held.nearest.tolist()) for m in row}
    return [(n, m, float(held.cosines[n, m])) for n, m in sorted(pairs)]


def circular_distance(difference: npt.NDArray[np.int64], modulus: int) -> Integers:
    """Return the distance round the circle of p numbers, of differences of any sign."""
    around = np.mod(difference, modulus)
    return np.asarray(np.minimum(around, modulus - around), np.int64)


def step_of(frequency: int, modulus: int) -> int:
    """Return the s in 1 … p // 2 for which frequency · s is nearest to 0 mod p: the frequency's inverse, up to sign.

    n and n + s are neighbours on the circle of that frequency.
    """
    steps = np.arange(1, modulus // 2 + 1)
    return int(steps[np.argmin(circular_distance(frequency * steps, modulus))])


def agreement(nearest: Integers) -> float:
    """Return the share of each number's nearest ones [number, nearest] that lie at the commonest distance in number.

    1 where the picture looks the same from every number, as an embedding of one frequency does, and one of several.
    """
    modulus = len(nearest)
    steps = circular_distance(nearest - np.arange(modulus)[:, None], modulus)
    return float(np.bincount(steps.ravel()).max() / steps.size)


@dataclass(frozen=True)
class Order:
    """How far the numbers' places follow their order: the strongest frequency and what it explains."""

    frequency: int
    step: int
    share: float
    circularity: float
    adjacency: float
    agreement: float


@dataclass(frozen=True)
class Shape:
    """What was measured at one place: the order of the numbers, the mean of the same over permuted numbers, the loops.

    `circularity_p` and `agreement_p` are the chances of at least as much with the numbers permuted.
    """

    order: Order
    null: Order
    circularity_p: float
    agreement_p: float
    loops: Homology

    def measures(self) -> dict[str, float]:
        """Return the figures by name, for a table or a page."""
        return {
            "strongest frequency": self.order.frequency,
            "step to the next on its circle": self.order.step,
            "its share of the variance": self.order.share,
            "share, null": self.null.share,
            "circularity": self.order.circularity,
            "circularity, null": self.null.circularity,
            "distance of a step": self.order.adjacency,
            "distance of a step, null": self.null.adjacency,
            "agreement of steps": self.order.agreement,
            "agreement of steps, null": self.null.agreement,
            "longest loop": self.loops.longest,
            "longest loop, null": self.loops.expected,
            "loops beyond the null": self.loops.n_loops,
        }


def order_of(held: Representation) -> Order:
    """Return how far the numbers follow the circle of their strongest frequency."""
    shares = fourier.power(held.vectors)
    frequency = int(shares.argmax()) + 1
    circle = fourier.circularity(held.vectors, frequency, seed=None)
    return Order(
        frequency,
        step_of(frequency, held.modulus),
        float(shares.max()),
        circle.pearson,
        circle.adjacency,
        agreement(held.nearest),
    )


def measure(held: Representation, *, n_null: int = N_NULL, seed: int) -> Shape:
    """Return the shape of a place. The null permutes the numbers `n_null` times, and chooses its own frequency too.

    That of the loops is a cloud of the same covariance instead: see `homology`.
    """
    random = np.random.default_rng(seed)
    order = order_of(held)
    null = [order_of(held.permuted(random)) for _ in range(n_null)]

    def p(name: str) -> float:
        values = np.array([getattr(each, name) for each in null])
        return float((1 + np.sum(values >= getattr(order, name))) / (1 + n_null))

    means = {
        name: float(np.mean([getattr(each, name) for each in null]))
        for name in ("share", "circularity", "adjacency", "agreement")
    }
    return Shape(
        order=order,
        null=Order(0, 0, **means),
        circularity_p=p("circularity"),
        agreement_p=p("agreement"),
        loops=find_loops(held.vectors, n_null=n_null, seed=seed),
    )
