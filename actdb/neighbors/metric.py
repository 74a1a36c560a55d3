"""Metrics as inner products: vectors extended so that a larger product means nearer.

l2 is the Euclidean distance, cosine is 1 − cos, ip is −⟨x, y⟩. With h(x) = −|x|²/2, the product of (x, h(x), 1) and
(y, 1, h(y)) is −|x − y|²/2, so one matrix product ranks a whole block, in both directions. Cosine distances are half
the squared distances of unit vectors. Neither changes when the same vector is taken off all: near the queries the
products are small, and so is their rounding.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError

METRICS = ("l2", "cosine", "ip")
WIDENED = 2**16
HALF_BITS = np.int32(-(2**31) + 0x0FFFE000)
"""Where float32 holds the sign and the 15 bits of a float16's magnitude; between them come copies of the sign."""
HALF_SCALE = np.float32(2.0**112)
Floats = npt.NDArray[np.float32]


def check_metric(metric: str) -> str:
    """Return the metric, or raise `SettingError` with those that there are."""
    if metric not in METRICS:
        raise SettingError(f"metric {metric!r}: choose one of {', '.join(METRICS)}")
    return metric


@dataclass(frozen=True)
class Space:
    """A metric over vectors [row, width], for cosine of unit length; `shift` [width] is taken off each (not for ip)."""

    metric: str
    shift: Floats

    def width(self, width: int) -> int:
        """Return how wide vectors are once extended."""
        return width if self.metric == "ip" else width + 2

    def extend(self, vectors: Floats, out: Floats | None = None) -> Floats:
        """Return (y, 1, h(y)) [row, width + 2] of shifted vectors y; for ip the vectors as they are."""
        extended = np.empty((len(vectors), self.width(vectors.shape[1])), np.float32) if out is None else out
        if self.metric == "ip":
            extended[...] = vectors
            return extended
        shifted = extended[:, :-2]
        np.subtract(vectors, self.shift, out=shifted)
        extended[:, -2] = 1
        extended[:, -1] = np.einsum("rd,rd->r", shifted, shifted) * np.float32(-0.5)
        return extended

    def turn(self, extended: Floats) -> Floats:
        """Return (x, h(x), 1) of (x, 1, h(x)), a copy: the other side of the product."""
        turned = extended.copy()
        if self.metric != "ip":
            turned[:, -2:] = extended[:, :-3:-1]
        return turned

    def distances(self, products: Floats) -> Floats:
        """Return the distances that products stand for; −inf, which stands for none, becomes inf."""
        if self.metric == "ip":
            return -products
        halves = np.maximum(-products, 0)
        return halves if self.metric == "cosine" else np.sqrt(2 * halves)

    def product(self, distance: float) -> float:
        """Return the product that a distance stands for."""
        if self.metric == "l2":
            return -(distance**2) / 2
        return -distance


def distances_between(metric: str, first: Floats, second: Floats) -> Floats:
    """Return the distance of each pair of rows [row, width], for cosine of unit length, from their differences."""
    if metric == "ip":
        return np.asarray(-np.einsum("rd,rd->r", first, second), np.float32)
    difference = first - second
    squares = np.einsum("rd,rd->r", difference, difference)
    return np.asarray(np.sqrt(squares) if metric == "l2" else squares / 2, np.float32)


def widen(values: npt.NDArray[Any]) -> Floats:
    """Return values as float32: those of float16, which must be finite, five times as fast as NumPy casts them.

    Sign and magnitude of a float16 are moved to where float32 has them, 13 bits up; the number then read is too small
    by 2¹¹², the difference of the exponents' biases, for subnormal ones too. Blocks that stay in the cache take turns.
    """
    if values.dtype != np.float16:
        return np.asarray(values, np.float32)
    out = np.empty(values.shape, np.float32)
    source, target = np.ascontiguousarray(values).reshape(-1).view(np.int16), out.reshape(-1)
    for begin in range(0, len(source), WIDENED):
        block = target[begin : begin + WIDENED]
        bits = block.view(np.int32)
        np.left_shift(source[begin : begin + WIDENED], 13, out=bits, dtype=np.int32)
        np.bitwise_and(bits, HALF_BITS, out=bits)
        np.multiply(block, HALF_SCALE, out=block)
    return out


def zero_rows(vectors: Floats) -> npt.NDArray[np.int64]:
    """Return the numbers of the rows that are zero, which have no direction."""
    return np.flatnonzero(~vectors.any(axis=1))


def unit(vectors: Floats) -> Floats:
    """Return vectors [row, width] divided by their lengths; none may be zero."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)  # squares of tiny vectors would be zero
    scaled = vectors / largest
    return np.asarray(scaled / np.sqrt(np.einsum("rd,rd->r", scaled, scaled))[:, None], np.float32)
