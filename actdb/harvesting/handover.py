"""Handing packed blocks from the model's device to the writers, in order, without holding the model up.

On a CPU a block is already where it is needed: it goes to the writers at once, and the model waits while it is encoded
(see `Writers`). From an accelerator it is copied into pinned memory on a side stream while the model goes on; a thread
takes each copy up when it has arrived. Bytes under way are bounded there too.
"""

import queue
import threading
from collections.abc import Callable

import torch

from actdb.harvesting.pipeline import PartWriter, Writers

HELD_BYTES = 8 * 1024**2


class Handover:
    """Takes blocks [head, row or entry, …] of any device for a part writer; an error of its thread is raised later."""

    def __init__(self, device: torch.device, writers: Writers) -> None:
        self._writers = writers
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asynchronous = device.type != "cpu"
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending = 0
        self._error: BaseException | None = None
        self._room = threading.Condition()
        self._thread: threading.Thread | None = None
        if self._asynchronous:
            self._thread = threading.Thread(target=self._run, name="actdb-handover", daemon=True)
            self._thread.start()

    def append(self, part: PartWriter, site: str, layer_index: int, block: torch.Tensor) -> None:
        """Take one layer's block of a batch; waits while too many bytes are on their way."""
        if not self._asynchronous:
            part.append(site, layer_index, block.numpy())
            self._writers.settle(least_bytes=HELD_BYTES)
            return
        size = block.nbytes
        with self._room:
            self._room.wait_for(lambda: self._pending < self._writers.pending_bytes or self._error is not None)
            self._raise()
            self._pending += size
        host, arrived = self._copy(block)
        self._queue.put(lambda: self._append(part, site, layer_index, host, arrived, size))

    def finish(self, finish: Callable[[], None]) -> None:
        """Call `finish` after every block taken before."""
        if not self._asynchronous:
            finish()
            return
        self._raise()
        self._queue.put(finish)

    def close(self) -> None:
        """Wait for everything that was taken; raises what went wrong."""
        self.abort()
        self._raise()

    def abort(self) -> None:
        """Stop after what is under way."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

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

    def _append(
        self,
        part: PartWriter,
        site: str,
        layer_index: int,
        host: torch.Tensor,
        arrived: Callable[[], None],
        size: int,
    ) -> None:
        try:
            arrived()
            if self._error is None:
                part.append(site, layer_index, host.numpy())
        finally:
            with self._room:
                self._pending -= size
                self._room.notify()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except BaseException as exc:
                with self._room:
                    self._error = self._error or exc
                    self._room.notify()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
