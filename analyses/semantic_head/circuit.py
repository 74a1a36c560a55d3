"""A head's bilinear form W = W_Q W_Kᵀ: its symmetric and skew parts, their eigenvalues, and what scaling these does."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb

Floats = npt.NDArray[np.float64]
ZERO = 1e-9
"""Eigenvalues below this share of the largest are zero but for rounding."""


@dataclass(frozen=True)
class Circuit:
    """W_Q and W_K [d_model, d_head] of one head, float64, biases ignored; `scale` is what attention divides by."""

    query: Floats
    key: Floats
    scale: float

    @property
    def form(self) -> Floats:
        """W = W_Q W_Kᵀ [d_model, d_model]."""
        return self.query @ self.key.T

    @property
    def symmetric(self) -> Floats:
        """S = (W + Wᵀ)/2 [d_model, d_model]."""
        return (self.form + self.form.T) / 2

    @property
    def skew(self) -> Floats:
        """A = (W − Wᵀ)/2 [d_model, d_model]: W = S + A."""
        return (self.form - self.form.T) / 2

    @property
    def bound(self) -> int:
        """The rank that S and A cannot exceed: 2·d_head, or d_model."""
        return int(min(2 * self.query.shape[1], self.query.shape[0]))

    @cached_property
    def _basis(self) -> Floats:
        """Orthonormal columns that span those of W_Q and W_K: S and A vanish outside of them."""
        return np.asarray(np.linalg.qr(np.concatenate([self.query, self.key], 1))[0])

    @cached_property
    def spectrum(self) -> "Spectrum":
        """Eigenvalues and eigenvectors of S, computed in the span of W_Q and W_K: others are exactly 0."""
        left, right = self._basis.T @ self.query, self._basis.T @ self.key
        small = left @ right.T
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        return Spectrum(values, self._basis @ vectors)

    @cached_property
    def skew_values(self) -> npt.NDArray[np.complex128]:
        """Eigenvalues of A in the span of W_Q and W_K: imaginary, in pairs ±iω."""
        left, right = self._basis.T @ self.query, self._basis.T @ self.key
        small = left @ right.T
        return np.asarray(1j * np.linalg.eigvalsh(-1j * (small - small.T) / 2))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues [n] of S, ascending, and eigenvectors [d_model, n]; n is the bound of its rank."""

    values: Floats
    vectors: Floats

    @property
    def nonzero(self) -> npt.NDArray[np.bool_]:
        """Which eigenvalues differ from zero by more than rounding."""
        return np.asarray(np.abs(self.values) > ZERO * np.abs(self.values).max(initial=0.0))

    @property
    def rank(self) -> int:
        """Rank of S."""
        return int(self.nonzero.sum())

    @property
    def n_negative(self) -> int:
        """Negative eigenvalues."""
        return int((self.nonzero & (self.values < 0)).sum())

    def largest(self, n: int) -> Floats:
        """Return the `n` eigenvalues largest in magnitude."""
        return self.values[np.argsort(-np.abs(self.values), kind="stable")[:n]]


def read_circuit(run: actdb.Run, *, layer: int, head: int) -> Circuit:
    """Read a head's W_Q and W_K from the weights stored with a run; under grouped queries its shared key's."""
    query, key = (np.asarray(run.weight(name, layer=layer), np.float64) for name in ("W_Q", "W_K"))
    if not 0 <= head < len(query):
        raise actdb.SelectionError(f"--head {head}: layer {layer} has heads 0 to {len(query) - 1}")
    shared = key[head * len(key) // len(query)]
    return Circuit(query[head], shared, float(query.shape[-1]) ** 0.5)


def random_circuit(like: Circuit, *, seed: int) -> Circuit:
    """Return W_Q and W_K with independent normal entries, scaled to the norm of W: the control of every spectrum."""
    generator = np.random.default_rng((seed, 21))
    query, key = (generator.standard_normal(part.shape) for part in (like.query, like.key))
    factor = (np.linalg.norm(like.form) / np.linalg.norm(query @ key.T)) ** 0.5
    return Circuit(query * factor, key * factor, like.scale)


@dataclass(frozen=True)
class TokenScores:
    """Attention scores between tokens that stand alone, and what changing eigenvalues of S makes of them.

    `base` [query, key] is E W Eᵀ/√d_head; `projected` [token, eigenvalue] is E in the eigenvectors of S, divided by
    the square root of √d_head, so that E S Eᵀ/√d_head = projected · diag(λ) · projectedᵀ.
    """

    base: npt.NDArray[np.float32]
    projected: npt.NDArray[np.float32]
    values: Floats

    def scaled(self, factors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the scores with each eigenvalue of S multiplied by a factor [eigenvalue]; A stays as it is.

        Costs a product of rank as many as are changed.
        """
        change = self.values * (np.asarray(factors) - 1)
        chosen = np.flatnonzero(change)
        part = self.projected[:, chosen]
        return np.asarray(self.base + (part * change[chosen].astype(np.float32)) @ part.T)


def token_scores(inputs: npt.NDArray[Any], circuit: Circuit) -> TokenScores:
    """Return the scores between all tokens of E [token, d_model]; 4 bytes a pair."""
    rows = inputs.astype(np.float32)
    base = (rows @ (circuit.query / circuit.scale).astype(np.float32)) @ (rows @ circuit.key.astype(np.float32)).T
    projected = rows @ (circuit.spectrum.vectors / circuit.scale**0.5).astype(np.float32)
    return TokenScores(base, projected, circuit.spectrum.values)
