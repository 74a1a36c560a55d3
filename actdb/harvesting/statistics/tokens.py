"""Token statistics: how well the model predicts each next token, in nats.

At position q of a prompt of n tokens t, with the model's probabilities p over the vocabulary: loss = −ln p[t[q+1]],
rank = the number of tokens with a higher logit than t[q+1], entropy = −Σ p ln p. Loss and rank are null at the last
position, which predicts nothing that is known.
"""

from typing import Any

import numpy as np
import torch
from transformer_lens.hook_points import HookPoint

from actdb.errors import OverflowingError
from actdb.harvesting.capture import NO_TOKEN, PaddedBatch
from actdb.harvesting.statistics import Hook

NO_RANK = -1


def prediction_statistics(
    logits: torch.Tensor, following: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[row, token] logits and the ids [row] that follow → loss, entropy, rank [row]; NaN and −1 where none follows."""
    values = logits.to(torch.float32)
    total = values.logsumexp(-1)
    entropy = total - (values.sub(total[:, None]).exp_() * values).sum(-1)
    known = following != NO_TOKEN
    target = values.gather(1, following.clamp_min(0)[:, None])
    loss = torch.where(known, total - target[:, 0], torch.nan)
    rank = torch.where(known, (values > target).sum(-1), NO_RANK)
    return loss, entropy, rank


class TokenStatistics:
    """Collects the token statistics of one part from the logits, a prompt at a time."""

    def __init__(self, logits: HookPoint) -> None:
        self._point = logits
        self._seen: list[tuple[torch.Tensor, ...]] = []
        self._prompts: list[int] = []

    def hooks(self, batch: PaddedBatch) -> list[Hook]:
        """Return a hook on the logits [batch, pos, token]."""
        self._prompts += batch.prompt_ids
        following = batch.following()

        def on_logits(tensor: torch.Tensor) -> None:
            begin = 0
            for row, n in enumerate(batch.lengths):
                self._seen.append(prediction_statistics(tensor[row, :n], following[begin : begin + n]))
                begin += n

        return [(self._point, on_logits)]

    def collect(self) -> None:
        """Nothing is left to do: the hook takes each prompt up."""

    def tables(self) -> dict[str, Any]:
        """Return `token_stats`, sorted by prompt and position; raises `OverflowingError` for logits not finite."""
        import pyarrow as pa

        order = np.argsort(np.asarray(self._prompts), kind="stable")
        columns = [np.concatenate([self._seen[i][c].cpu().numpy() for i in order]) for c in range(3)]
        lengths = np.array([len(self._seen[i][0]) for i in order])
        loss, entropy, rank = columns
        if not np.isfinite(entropy).all():
            raise OverflowingError("the logits are not finite: the model itself overflows; try --dtype float32")
        ends = np.cumsum(lengths)
        return {
            "token_stats": pa.table(
                {
                    "prompt_id": np.repeat(np.asarray(self._prompts, np.int32)[order], lengths),
                    "pos": (np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)).astype(np.int32),
                    "loss": pa.array(loss, mask=rank == NO_RANK),
                    "entropy": entropy,
                    "rank": pa.array(rank.astype(np.int32), mask=rank == NO_RANK),
                }
            )
        }
