"""Statistics computed while the model runs, on its device, in float32, before anything is rounded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from transformer_lens.hook_points import HookPoint

from actdb.harvesting.capture import PaddedBatch

Hook = tuple[HookPoint, Callable[[torch.Tensor], None]]


class PartStatistic(Protocol):
    """Collects one kind of statistics over the batches of one part.

    What a batch gives stays on the device until `tables`, which the writer thread calls at the part's end: nothing
    waits for the device in between.
    """

    def hooks(self, batch: PaddedBatch) -> Sequence[Hook]:
        """Return the hooks for a batch that is about to run."""
        ...

    def collect(self) -> None:
        """Take up what the hooks saw of the batch that has run."""
        ...

    def tables(self) -> Mapping[str, Any]:
        """Return pyarrow tables by name, each sorted by its keys; raises `OverflowingError` for values not finite."""
        ...
