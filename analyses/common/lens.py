"""The logit lens over stored residuals (nostalgebraist, "interpreting GPT: the logit lens", 2020); runs no model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.metric import kl_divergence

Decode = Callable[[torch.Tensor], torch.Tensor]
ROW_BLOCK = 8192


@dataclass(frozen=True)
class Lens:
    """What each layer's residual says of the next token, means over rows, [layer] each.

    `agreement` is the share of rows whose likeliest token is that of the last layer, `accuracy` that of rows whose
    likeliest token comes next, `rank` the rank of the next token (from 0), `kl` KL(last ‖ lens) in nats. `n_rows`
    counts rows with a next token.
    """

    layers: tuple[int, ...]
    agreement: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    rank: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    n_rows: int


def logit_lens(run: actdb.Run, decode: Decode, *, site: str = "resid_post", block_rows: int = ROW_BLOCK) -> Lens:
    """Decode every layer of `resid_post` (or another residual site) and compare it with the last layer.

    `decode` maps residual vectors [row, d_model], float32, to logits [row, token]: the model's final norm and
    unembedding. One pass over the stored rows; memory is some blocks of logits.
    """
    selection = run[site]
    tokens = [run.tokens(prompt) for prompt in range(run.n_prompts)]
    following = np.concatenate([np.append(ids[1:], -1) for ids in tokens])
    starts = np.cumsum([0, *map(len, tokens)])
    totals = np.zeros((4, len(selection.layers)))
    n_rows = n_predicting = 0
    for block in selection.batches(block_rows):
        target = torch.from_numpy(following[starts[block.prompt] + block.pos].astype(np.int64))
        known = target >= 0
        residuals = torch.from_numpy(np.array(block.values, np.float32))  # [layer, row, d_model]
        with torch.inference_mode():
            final = decode(residuals[-1])
            for layer, residual in enumerate(residuals):
                totals[:, layer] += _compare(decode(residual), final, target, known)
        n_rows, n_predicting = n_rows + len(block), n_predicting + int(known.sum())
    agreement, kl = totals[0] / max(n_rows, 1), totals[3] / max(n_rows, 1)
    accuracy, rank = totals[1] / max(n_predicting, 1), totals[2] / max(n_predicting, 1)
    return Lens(selection.layers, agreement, accuracy, rank, kl, n_predicting)


def _compare(logits: torch.Tensor, final: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> Any:
    """Sums over rows of: agreement, accuracy, rank of the target, KL(final ‖ lens)."""
    agreement = (logits.argmax(-1) == final.argmax(-1)).sum()
    own = logits[known].gather(1, target[known, None])
    rank = (logits[known] > own).sum(-1)
    return [float(agreement), float((rank == 0).sum()), float(rank.sum()), float(kl_divergence(final, logits).sum())]
