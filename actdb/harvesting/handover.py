"""Handing packed blocks from the model's device to the writers, in order, without holding the model up.

On a CPU a block is already where it is needed: it goes to the writers at once, and when these hold a quarter of what
may be under way, the model waits while that is encoded (see `Writers`). It waits seldom, since each time the threads of
the model's last operation go on for milliseconds, waiting for the next one, on cores that encoders want: by 32 MiB
instead of 8 a harvest takes 0.96 of the time; by 128 MiB 0.92, but 240 MiB more memory.

From an accelerator a block is copied into pinned memory on a side stream while the model goes on; a thread takes each
copy up when it has arrived. Bytes under way are bounded there too.
"""

from collections.abc import Callable

import torch

from actdb.harvesting.backlog import Backlog
from actdb.harvesting.pipeline import PartWriter, Writers


class Handover:
    """Takes blocks [head, row or entry, …] of any device for a part writer; an error of its thread is raised later."""

    def __init__(self, device: torch.device, writers: Writers) -> None:
        self._writers = writers
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._backlog = None if device.type == "cpu" else Backlog("actdb-handover")

    def append(self, part: PartWriter, site: str, layer_index: int, block: torch.Tensor) -> None:
        """Take one layer's block of a batch; waits while too many bytes are on their way."""
        if self._backlog is None:
            part.append(site, layer_index, block.numpy())
            self._writers.settle(least_bytes=self._writers.pending_bytes // 4)
            return
        self._backlog.reserve("bytes", block.nbytes, limit=self._writers.pending_bytes)
        host, arrived = self._copy(block)

        def take_up() -> None:
            arrived()
            part.append(site, layer_index, host.numpy())

        self._backlog.put(take_up, kind="bytes", size=block.nbytes)

    def finish(self, finish: Callable[[], None]) -> None:
        """Call `finish` after every block taken before."""
        if self._backlog is None:
            finish()
            return
        self._backlog.check()
        self._backlog.put(finish)

    def close(self) -> None:
        """Wait for everything that was taken; raises what went wrong."""
        self.abort()
        if self._backlog is not None:
            self._backlog.check()

    def abort(self) -> None:
        """Stop after what is under way."""
        if self._backlog is not None:
            self._backlog.stop()

    def _copy(self, block: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Begin the copy to the host; returns where it will lie and what waits for it."""
        if self._side is None:
            return block.cpu(), lambda: None
        self._side.wait_stream(torch.cuda.current_stream(block.device))
        with torch.cuda.stream(self._side):
            host = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
            host.copy_(block, non_blocking=True)
            block.record_stream(self._side)  # its memory must not be given out again before the copy has read it
            arrived = torch.cuda.Event()
            arrived.record(self._side)
        return host, arrived.synchronize
