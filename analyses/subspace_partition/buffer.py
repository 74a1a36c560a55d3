"""Rows to train on: shuffled blocks in half precision, filled from a database's row stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb

BUFFER_ROWS = 2048**2
BLOCK_ROWS = 16_384
READ_ROWS = 65_536


@dataclass(frozen=True)
class Buffer:
    """Shuffled rows [row, width] of one site and layer, cut into blocks.

    A step's keys are some blocks, its queries rows of another one: no query is its own nearest key.
    """

    rows: torch.Tensor
    block_rows: int = BLOCK_ROWS

    def __post_init__(self) -> None:
        if self.n_blocks < 2:
            needed = 2 * self.block_rows
            raise actdb.SettingError(
                f"{len(self.rows)} rows: a training needs two blocks of {self.block_rows}, {needed} rows; "
                "harvest more prompts or choose smaller blocks"
            )

    @property
    def n_blocks(self) -> int:
        """Number of whole blocks."""
        return len(self.rows) // self.block_rows

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.rows.shape[1]

    def block(self, number: int) -> torch.Tensor:
        """Return a block [row, width], not copied."""
        return self.rows[number * self.block_rows : (number + 1) * self.block_rows]

    def draw(
        self, n_queries: int, n_key_blocks: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Draw queries [query, width] in float32 from one block, and other blocks as keys; fewer where there are."""
        order = torch.randperm(self.n_blocks, generator=generator).tolist()
        first, others = order[0], order[1 : 1 + n_key_blocks]
        chosen = torch.randint(self.block_rows, (n_queries,), generator=generator)
        return self.block(first)[chosen.to(self.rows.device)].to(torch.float32), [self.block(k) for k in others]

    def sample(self, n_queries: int, n_keys: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw queries and keys, all different rows, for an estimate; fewer keys where there are not as many."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.rows), generator=generator)[: n_queries + n_keys].to(self.rows.device)
        n = min(n_queries, len(order) // 4)
        return self.rows[order[:n]].to(torch.float32), self.rows[order[n:]].to(torch.float32)

    def to(self, device: str) -> "Buffer":
        """Return the buffer on a device."""
        return Buffer(self.rows.to(device), self.block_rows)


def fill_buffer(
    selection: actdb.Selection,
    *,
    seed: int,
    n_rows: int = BUFFER_ROWS,
    block_rows: int = BLOCK_ROWS,
    dtype: torch.dtype | None = None,
) -> Buffer:
    """Fill a buffer from one layer's rows in random order without replacement, up to `n_rows`.

    Rows keep the dtype that they are stored in, half precision by a harvest's default, unless `dtype` says otherwise.
    Reads what it keeps, and no more than a shuffling buffer beyond. Where the selection has fewer rows than two blocks,
    blocks are smaller. Raises `SettingError` for rows that `dtype` cannot hold.
    """
    wanted = min(n_rows, selection.n_rows)
    kept = dtype or torch.from_numpy(np.empty(0, selection.dtype)).dtype
    rows = torch.empty(wanted, selection.shape[-1], dtype=kept)
    begin = 0
    for block in selection.shuffled(READ_ROWS, seed=seed):
        taken = torch.from_numpy(np.asarray(block.values)[: wanted - begin]).to(kept)
        if not taken.isfinite().all():
            raise actdb.SettingError(f"rows do not fit into {kept}: keep them in float32")
        rows[begin : begin + len(taken)] = taken
        begin += len(taken)
        if begin == wanted:
            break
    return Buffer(rows, min(block_rows, max(1, wanted // 2)))


def as_buffer(rows: npt.NDArray[Any] | torch.Tensor, *, seed: int, block_rows: int = BLOCK_ROWS) -> Buffer:
    """Make a buffer of rows [row, width] held in memory, shuffled; their dtype is kept."""
    given = torch.as_tensor(rows)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
    return Buffer(given[order], min(block_rows, max(1, len(given) // 2)))
