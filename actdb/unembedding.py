"""From residual vectors to tokens with a run's own weights: final norm, then unembedding.

Applied to the residual stream of an earlier layer this is the logit lens (nostalgebraist, "interpreting GPT: the logit
lens", 2020); at the last layer it is the model's own output.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError

if TYPE_CHECKING:
    from actdb.run import Run

Floats = npt.NDArray[np.float32]
BLOCK_VALUES = 2**24
"""Logits held at once: 64 MiB."""
USUAL_EPS = 1e-5


class Unembedding:
    """The final norm and unembedding of a run, in float32.

    logits = norm(x) W_U + b_U, where norm(x) = (x − mean x) / √(var x + ε) · w + b for a LayerNorm,
    x / √(mean x² + ε) · w for an RMSNorm, and x where the model has none. Kind and ε are those recorded with the run;
    without a record, a norm with a bias is taken for a LayerNorm, and ε for 10⁻⁵. Holds W_U in memory.

    Raises `SelectionError` where the run keeps no unembedding, and for models that look both ways, whose heads for
    masked tokens transform the vectors further.
    """

    def __init__(self, run: "Run") -> None:
        if not run.info.causal:
            raise SelectionError(f"run {run.name!r}: its model looks both ways; the logit lens is for causal models")
        names = run.weight_names()
        self.matrix: Floats = np.ascontiguousarray(run.weight("W_U"), np.float32)
        self.offset = _vector(run, "unembed.b_U", names)
        self.scale = _vector(run, "ln_final.w", names)
        self.shift = _vector(run, "ln_final.b", names)
        kind = str(run.info.model.get("normalization"))
        self.centres = kind.startswith("LN") if kind.startswith(("LN", "RMS")) else self.shift is not None
        self.eps = float(run.info.model.get("norm_eps") or USUAL_EPS)

    @property
    def n_tokens(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.matrix.shape[1])

    def normalised(self, residual: Floats) -> Floats:
        """Return the final norm of residual vectors [row, d_model]."""
        if self.scale is None:
            return residual
        if self.centres:
            residual = residual - residual.mean(-1, keepdims=True)
        size = np.sqrt((residual * residual).mean(-1, keepdims=True) + np.float32(self.eps))
        scaled = residual / size * self.scale
        return np.asarray(scaled if self.shift is None else scaled + self.shift, np.float32)

    def logits(self, residual: Floats) -> Floats:
        """Return the logits [row, token] of residual vectors [row, d_model]."""
        logits = self.normalised(residual) @ self.matrix
        return logits if self.offset is None else logits + self.offset

    def top(self, residual: Floats, k: int) -> tuple[npt.NDArray[np.int32], Floats, Floats]:
        """Return the `k` likeliest tokens of residual vectors: ids, logits and probabilities [row, k], falling.

        Costs 2 · d_model · n_tokens operations a row, and at most some 200 MiB.
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


def _vector(run: "Run", name: str, names: tuple[str, ...]) -> Floats | None:
    return np.asarray(run.weight(name), np.float32) if name in names else None


def _every(block: Floats) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(block.shape[1]), block.shape)
