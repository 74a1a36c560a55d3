"""The nearest seen so far of each of many vectors, while blocks of products stream by."""

import numpy as np
import numpy.typing as npt

from actdb.scratch import Scratch

GROUPS = 8
FOLDED = 64
"""Vectors at once whose products are folded to groups: few enough to stay in the cache."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Best:
    """Keeps the `k` largest products of each of `n` vectors, and the numbers of the rows that they belong to.

    A block costs two passes over it: a comparison with each vector's worst kept product, and a search for what passed,
    which after the first blocks is little.
    """

    def __init__(self, n: int, k: int) -> None:
        self._products = np.full((n, k), -np.inf, np.float32)
        self._numbers = np.full((n, k), -1, np.int64)
        self._floor = np.full(n, -np.inf, np.float32)
        self._scratch = Scratch()

    def offer(self, begin: int, products: Floats, first: int, *, axis: int) -> None:
        """Take the products of a block.

        With `axis` 1, row i holds the products of vector `begin` + i with the rows `first`, `first` + 1, …; with `axis`
        0, column i does.
        """
        n, k = products.shape[1 - axis], self._products.shape[1]
        floor = self._floor[begin : begin + n]
        if (floor == -np.inf).any():
            floor = np.maximum(floor, _lower_bound(products, k, axis))
        passed = self._scratch.array(products.shape, np.bool_)
        places = np.flatnonzero(np.greater(products, floor[:, None] if axis == 1 else floor, out=passed))
        if len(places) == 0:
            return
        rows, columns = np.divmod(places, products.shape[1])
        mine, other = (rows, columns) if axis == 1 else (columns, rows)
        self._merge(mine + begin, other + first, products[rows, columns])

    def found(self) -> tuple[Ints, Floats]:
        """Return the numbers and products [vector, k], the largest first; −1 and −∞ where there were fewer."""
        return self._numbers, self._products

    def _merge(self, mine: Ints, numbers: Ints, products: Floats) -> None:
        """Join products, each of one vector, to those kept."""
        k = self._products.shape[1]
        order = np.lexsort((numbers, -products, mine))
        mine, numbers, products = mine[order], numbers[order], products[order]
        begins = np.flatnonzero(np.concatenate([[True], mine[1:] != mine[:-1]]))
        group = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(mine))))
        place = np.arange(len(mine)) - begins[group]
        kept = place < k
        hit = mine[begins]
        joined = np.full((len(hit), 2 * k), -np.inf, np.float32)
        joined_numbers = np.full((len(hit), 2 * k), -1, np.int64)
        joined[:, :k], joined_numbers[:, :k] = self._products[hit], self._numbers[hit]
        joined[group[kept], k + place[kept]] = products[kept]
        joined_numbers[group[kept], k + place[kept]] = numbers[kept]
        best = np.argsort(-joined, axis=1, kind="stable")[:, :k]
        self._products[hit] = np.take_along_axis(joined, best, 1)
        self._numbers[hit] = np.take_along_axis(joined_numbers, best, 1)
        self._floor[hit] = self._products[hit, -1]


def _lower_bound(products: Floats, k: int, axis: int) -> Floats:
    """Return for each vector a value that at least `k` of its products exceed, −∞ where a block is too small to tell.

    That is just below the k-th largest of the maxima of disjoint groups, since each maximum is one of the products.
    """
    vectors, least = products if axis == 1 else products.T, GROUPS * k
    kth = np.full(len(vectors), -np.inf, np.float32)
    if vectors.shape[1] < 2 * least:
        return kth
    for begin in range(0, len(vectors), FOLDED):
        maxima = vectors[begin : begin + FOLDED]  # [vector, group], of one row each at first
        while (half := maxima.shape[1] // 2) >= least:
            maxima = np.maximum(maxima[:, :half], maxima[:, half : 2 * half])
        kth[begin : begin + FOLDED] = np.partition(maxima, -k, axis=1)[:, -k]
    return np.nextafter(kth, np.float32(-np.inf))
