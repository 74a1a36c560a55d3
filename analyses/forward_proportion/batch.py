"""Batches of prompts of several lengths for the live model, right-padded; what is stored is laid out alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, logits_of
from analyses.forward_proportion.interaction import prompt_blocks

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """Prompts side by side: ids [batch, pos] padded at the end, and how long each is."""

    run: actdb.Run
    prompts: tuple[int, ...]
    ids: torch.Tensor
    lengths: npt.NDArray[np.int64]

    @property
    def last(self) -> torch.Tensor:
        """The last position of each prompt."""
        return torch.from_numpy(self.lengths - 1)

    def last_logits(self, model: Any, hooks: Sequence[Hook] = ()) -> torch.Tensor:
        """Run the model and return the logits at each prompt's last position [batch, token]."""
        return self.at_last(logits_of(model, self.ids, hooks))

    def at_last(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, pos, token] at each prompt's last position."""
        return logits[torch.arange(len(self.prompts)), self.last].float()

    def stored(self, site: str, *, layer: int, head: int) -> torch.Tensor:
        """Read one head's activation from the database: [batch, pos, d_head], 0 in the pads."""
        rows = self.run[site].sel(layer=layer, head=head, prompt=list(self.prompts)).numpy().astype(np.float32)
        out = torch.zeros(*self.ids.shape, rows.shape[-1])
        owner = np.repeat(np.arange(len(self.prompts)), self.lengths)
        pos = np.concatenate([np.arange(n) for n in self.lengths])
        out[torch.from_numpy(owner), torch.from_numpy(pos)] = torch.from_numpy(rows)
        return out


def make_batch(run: actdb.Run, prompts: Sequence[int]) -> Batch:
    """Lay prompts side by side. Attention looks back only, so that what follows a prompt does not change it."""
    tokens = [run.tokens(int(prompt)) for prompt in prompts]
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    ids = np.zeros((len(tokens), int(lengths.max())), np.int64)
    for row, found in zip(ids, tokens, strict=True):
        row[: len(found)] = found
    return Batch(run, tuple(int(prompt) for prompt in prompts), torch.from_numpy(ids), lengths)


def batches(run: actdb.Run, prompts: Sequence[int]) -> Iterator[tuple[npt.NDArray[np.int64], Batch]]:
    """Cut prompts into batches of like lengths; yields the places of each batch's prompts among those given."""
    lengths = run.prompt_index.n_tokens[np.asarray(prompts, np.int64)]
    order = np.argsort(lengths, kind="stable")
    for places, block in prompt_blocks(run, np.asarray(prompts)[order].tolist(), block_tokens=BATCH_TOKENS):
        yield order[places], make_batch(run, block)
