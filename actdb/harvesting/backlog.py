"""A thread that does jobs in order behind the one that gives them, with a bound on what is under way."""

import queue
import threading
from collections import Counter
from collections.abc import Callable

Job = Callable[[], None]


class Backlog:
    """Jobs of one thread. After an error the rest is left out, and the error is raised at the giver's next call.

    What is under way is counted by kind (bytes, parts): `reserve` before a job is made, given back when it is done.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Job, str, int] | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._reserved = Counter[str]()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def reserved(self, kind: str) -> int:
        """Return how much of a kind is under way."""
        return self._reserved[kind]

    def reserve(self, kind: str, size: int, *, limit: int) -> None:
        """Count `size` in, waiting while `limit` or more is under way."""
        with self._room:
            self._room.wait_for(lambda: self._reserved[kind] < limit or self._error is not None)
            self.check()
            self._reserved[kind] += size

    def put(self, job: Job, *, kind: str = "", size: int = 0) -> None:
        """Do a job after those given before; then what was reserved for it is free again."""
        self._queue.put((job, kind, size))

    def check(self) -> None:
        """Raise what went wrong in a job."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Wait until every job given is done; no further one may be given."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            job, kind, size = entry
            try:
                if self._error is None:
                    job()
            except BaseException as exc:
                self._error = exc
            finally:
                del job, entry  # their arrays are free before the next is waited for
                with self._room:
                    self._reserved[kind] -= size
                    self._room.notify()
