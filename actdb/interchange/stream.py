"""Shuffled rows as a torch `IterableDataset`, shared out over DataLoader workers and distributed ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from actdb.selection import streams

if TYPE_CHECKING:
    from actdb.selection.view import Selection

Batch = dict[str, torch.Tensor]


class TorchStream(IterableDataset[Batch]):
    """Batches of random rows, each row once an epoch over all workers and ranks together; see
    `Selection.torch_dataset`.

    Picklable: workers that are spawned open the shards themselves.
    """

    def __init__(self, selection: "Selection", size: int, *, seed: int, epochs: int) -> None:
        selection.shuffled(size)  # refuses what cannot be shuffled
        self._stream = selection._stream()
        self._size, self._seed, self._epochs = size, seed, epochs
        self._rank: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:
        rank, n_ranks = self._rank or _distributed_rank()
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = (rank * n_workers + worker, n_ranks * n_workers)
        blocks = streams.shuffle(self._stream, self._size, seed=self._seed, epochs=self._epochs, worker=share)
        for block in blocks:
            batch = {"values": torch.from_numpy(block.values), "prompt": torch.from_numpy(block.prompt)}
            yield batch if block.pos is None else batch | {"pos": torch.from_numpy(block.pos)}

    def __getstate__(self) -> dict[str, Any]:
        """Take the rank along: a spawned worker does not belong to the process group."""
        return {**self.__dict__, "_rank": self._rank or _distributed_rank()}


def _distributed_rank() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) outside torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
