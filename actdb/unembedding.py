"""From residual vectors to tokens with a run's own weights: final norm, then unembedding.

Applied to the residual stream of an earlier layer this is the logit lens (nostalgebraist, "interpreting GPT: the logit
lens", 2020); at the last layer it is the model's own output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError

if TYPE_CHECKING:
    from actdb.run import Run

Floats = npt.NDArray[np.float32]
BLOCK_VALUES = 2**24
"""Logits held at once: 64 MiB."""
USUAL_EPS = 1e-5
UNEMBEDDING = "unembed.W_U"
NORM_WEIGHTS = ("ln_final.w", "ln_final.b")
READOUT_WEIGHTS = (*NORM_WEIGHTS, "unembed.b_U")


@dataclass(frozen=True)
class FinalNorm:
    """The final norm, its weights [d_model] or None as float32 arrays of NumPy or torch.

    norm(x) = (x − mean x) / √(var x + ε) · w + b for a LayerNorm (`centres`), x / √(mean x² + ε) · w for an RMSNorm,
    and x where the model has none (not `divides`).
    """

    scale: Any
    shift: Any
    divides: bool
    centres: bool
    eps: float

    @classmethod
    def make(cls, weights: Mapping[str, Any], model: Mapping[str, Any]) -> "FinalNorm":
        """Take weights by TransformerLens name, and the columns of `models` that tell the kind of norm and its ε.

        Without a record, a norm with a bias is taken for a LayerNorm, and ε for 10⁻⁵.
        """
        kind, scale, shift = str(model.get("normalization")), weights.get("ln_final.w"), weights.get("ln_final.b")
        known = kind.startswith(("LN", "RMS"))
        return cls(
            scale=scale,
            shift=shift,
            divides=known or scale is not None,
            centres=kind.startswith("LN") if known else shift is not None,
            eps=float(model.get("norm_eps") or USUAL_EPS),
        )

    @classmethod
    def of_run(cls, run: "Run") -> "FinalNorm":
        """Read the final norm from the weights kept with a run."""
        return cls.make(_stored(run, NORM_WEIGHTS, partial(_read_array, run)), run.info.model)

    def size(self, residual: Any) -> Any:
        """Return what residual vectors [row, d_model] are divided by: [row, 1], or 1."""
        if not self.divides:
            return 1
        return ((self.centred(residual) ** 2).mean(-1, keepdims=True) + self.eps) ** 0.5

    def centred(self, vectors: Any) -> Any:
        """Return vectors [row, d_model] less their means where the norm takes these off."""
        return vectors - vectors.mean(-1, keepdims=True) if self.centres else vectors

    def normalised(self, residual: Any) -> Any:
        """Return the norm of residual vectors [row, d_model]."""
        if not self.divides:
            return residual
        normalised = self.centred(residual) / self.size(residual)
        normalised = normalised if self.scale is None else normalised * self.scale
        return normalised if self.shift is None else normalised + self.shift


@dataclass(frozen=True)
class Readout:
    """Final norm and unembedding: W_U [d_model, d_vocab] and its offset [d_vocab] or None, in float32.

    Arrays are NumPy's or torch's, as those of the norm. logits = norm(x) W_U + b_U.
    """

    norm: FinalNorm
    matrix: Any
    offset: Any

    @classmethod
    def make(cls, weights: Mapping[str, Any], model: Mapping[str, Any]) -> "Readout":
        """Take weights by TransformerLens name, and the columns of `models`; see `FinalNorm.make`."""
        return cls(FinalNorm.make(weights, model), weights[UNEMBEDDING], weights.get("unembed.b_U"))

    @classmethod
    def of_run(cls, run: "Run", read: Callable[[str], Any] | None = None) -> "Readout":
        """Read norm and unembedding from the weights kept with a run. Holds W_U in memory.

        `read` returns a weight by name; by default as a NumPy array. Raises `SelectionError` where the run keeps no
        unembedding, and for models that look both ways, whose heads for masked tokens transform the vectors further.
        """
        if not run.info.causal:
            raise SelectionError(f"run {run.name!r}: its model looks both ways; the logit lens is for causal models")
        read = read or partial(_read_array, run)
        weights = _stored(run, READOUT_WEIGHTS, read)
        return cls.make({**weights, UNEMBEDDING: read("W_U")}, run.info.model)  # W_U of a tied model has no name

    @property
    def n_tokens(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.matrix.shape[1])

    def logits(self, residual: Any) -> Any:
        """Return the logits [row, token] of residual vectors [row, d_model]."""
        logits = self.norm.normalised(residual) @ self.matrix
        return logits if self.offset is None else logits + self.offset

    def top(self, residual: Floats, k: int) -> tuple[npt.NDArray[np.int32], Floats, Floats]:
        """Return the `k` likeliest tokens of residual vectors: ids, logits and probabilities [row, k], falling.

        For a readout of NumPy arrays. Costs 2 · d_model · n_tokens operations a row, and at most some 200 MiB.
        """
        ids = np.empty((len(residual), k), np.int32)
        logits, probabilities = np.empty(ids.shape, np.float32), np.empty(ids.shape, np.float32)
        size = max(1, BLOCK_VALUES // self.n_tokens)
        for begin in range(0, len(residual), size):
            rows = slice(begin, begin + size)
            block = self.logits(residual[rows])
            found = np.argpartition(-block, k - 1, axis=1)[:, :k] if k < self.n_tokens else _every(block)
            found = np.take_along_axis(found, np.argsort(-np.take_along_axis(block, found, 1), axis=1), 1)
            ids[rows], logits[rows] = found, np.take_along_axis(block, found, 1)
            block -= logits[rows, :1]
            np.exp(block, out=block)
            probabilities[rows] = np.take_along_axis(block, found, 1) / block.sum(1, keepdims=True)
        return ids, logits, probabilities


def _stored(run: "Run", names: Sequence[str], read: Callable[[str], Any]) -> dict[str, Any]:
    known = run.weight_names()
    return {name: read(name) for name in names if name in known}


def _read_array(run: "Run", name: str) -> Floats:
    return np.ascontiguousarray(run.weight(name), np.float32)


def _every(block: Floats) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(block.shape[1]), block.shape)
