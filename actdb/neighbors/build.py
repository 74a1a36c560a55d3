"""Building an index: rows streamed from the store in blocks, killed at any moment and gone on with.

An index that grows is written down now and then, under a name that says up to which row; the same call goes on there.
Some rows are held out until the end: the index is asked for their neighbours before it holds them, and searches as
widely as the recall aimed at needs, and as it takes to lead hardly a query astray.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import ActdbError, DamageError, SettingError
from actdb.neighbors import exact, library
from actdb.neighbors.device import choose_processor
from actdb.neighbors.exact import Excluded, Found
from actdb.neighbors.index import (
    IndexRecord,
    check_fresh,
    index_name,
    measure,
    number_order,
    read_record,
    write_record,
)
from actdb.neighbors.library import Design
from actdb.neighbors.row import Rows
from actdb.schema import digest
from actdb.storage.folder import Folder, file_record

CHECKPOINT_S = 30.0
SAVING_SHARE = 0.1
"""Share of the time that may go into writing it down."""
BLOCK_ROWS = 4096
HELD_ROWS, SCALED_ROWS = 512, 1024
ASTRAY = 0.01
"""Share of queries that may find less than half of what is aimed at: a graph misleads few, but those wholly."""
RECALL_K = 10
SEED = 0
UNFINISHED = re.compile(r"building-(?P<stamp>[0-9a-f]{12})-(?P<rows>[0-9]{12})\.faiss")
Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


def build_index(
    folder: Folder,
    rows: Rows,
    *,
    kind: str | None = None,
    recall: float = 0.95,
    progress: Progress | None = None,
) -> IndexRecord:
    """Make the index of a comparison of rows, or return the one that is there, if it fits and is whole.

    `kind` is flat, ivf, hnsw or ivfpq (None: by the number of rows), `recall` the recall@10 to aim at. `progress` is
    called with the rows added and all rows. Holds the index and some blocks of rows in memory; ivf and ivfpq a sample
    to train on. Raises `SettingError` where FAISS is not installed or the rows are too few.
    """
    if not 0 < recall <= 1:
        raise SettingError(f"recall {recall}: choose a share above 0, up to 1")
    if len(rows) < 2:
        raise SettingError(f"an index needs 2 rows at least; {rows.plane} has {len(rows)}")
    name = index_name(rows)
    design = library.make_design(kind, len(rows), rows.width)
    made = _existing(folder, name, rows)
    if made is not None and kind in (None, made.design.kind):
        widest = max(made.design.breadths, default=0)
        if made.recall >= recall or made.breadth == widest:
            return made
    return _Build(folder, rows, name, design, recall, progress).run()


def _existing(folder: Folder, name: str, rows: Rows) -> IndexRecord | None:
    """Return the record of an index that fits and is whole, None where one has to be made."""
    try:
        record = read_record(folder, name)
        if record is not None:
            check_fresh(folder, record, rows)
            folder.check(record.file)
    except ActdbError:
        return None  # what is there is replaced
    return record


@dataclass(frozen=True)
class _Build:
    """One build: where it writes, of what, and how."""

    folder: Folder
    rows: Rows
    name: str
    design: Design
    recall: float
    progress: Progress | None

    def run(self) -> IndexRecord:
        """Build, measure, publish; remove what is left of earlier builds."""
        started = time.monotonic()
        self.folder.sweep(self.name)
        index, n_done = self._resume()
        self._add_rows(index, n_done)
        breadth, recall = self._tune(index)
        index.add(self.rows.take(self.held) * self.scale)
        record = self._publish(index, breadth, recall, time.monotonic() - started)
        for file in self.folder.names(self.name):
            if UNFINISHED.fullmatch(file) or (file.endswith(".faiss") and not record.file.path.endswith(f"/{file}")):
                self.folder.path(f"{self.name}/{file}").unlink(missing_ok=True)
        return record

    @property
    def held(self) -> Ints:
        """The rows held out, ascending: the same in every process."""
        n = len(self.rows)
        chosen = np.random.default_rng(SEED).choice(n, max(1, min(HELD_ROWS, n // 10)), replace=False)
        return np.sort(chosen)

    @cached_property
    def scale(self) -> np.float32:
        """What rows are multiplied by: then their values are about 1, and fit float16."""
        chosen = np.random.default_rng(SEED + 2).choice(len(self.rows), min(SCALED_ROWS, len(self.rows)), replace=False)
        sample = self.rows.take(np.sort(chosen))
        size = np.sqrt(np.square(sample, dtype=np.float64).mean())
        return np.float32(1 / size if size > 0 else 1)

    @property
    def stamp(self) -> str:
        """What an interrupted build has to share to be gone on with."""
        return digest(
            [self.rows.digest, self.design.to_json(), library.HNSW_BREADTH, library.load_faiss().__version__]
        )[:12]

    def _resume(self) -> tuple[Any, int]:
        """Return the index so far, trained, and how many rows were added or held out."""
        files = [UNFINISHED.fullmatch(file) for file in self.folder.names(self.name)]
        found = sorted((int(m["rows"]), m[0]) for m in files if m and m["stamp"] == self.stamp)
        for n_done, file in reversed(found):
            try:
                return library.read_index(self.folder.inside(f"{self.name}/{file}"), self.design), n_done
            except DamageError:
                self.folder.path(f"{self.name}/{file}").unlink()
        index = library.make_index(self.design, self.rows.width, self.rows.metric)
        n_sampled = library.n_training_rows(self.design, len(self.rows) - len(self.held))
        if n_sampled:
            kept = number_order(len(self.rows), self.held)[: -len(self.held)]
            chosen = np.random.default_rng(SEED + 1).choice(kept, n_sampled, replace=False)
            index.train(self.rows.take(np.sort(chosen)) * self.scale)
            self._save(index, 0)
        return index, 0

    def _add_rows(self, index: Any, n_done: int) -> None:
        """Add the rows from `n_done` on, those held out left out, and write the index down now and then."""
        n = len(self.rows)
        held = np.zeros(n, np.bool_)
        held[self.held] = True
        saved, pause = time.monotonic(), CHECKPOINT_S
        for begin in range(n_done, n, BLOCK_ROWS):
            end = min(begin + BLOCK_ROWS, n)
            index.add(self.rows.read(begin, end)[~held[begin:end]] * self.scale)
            if self.progress is not None:
                self.progress(end, n)
            started = time.monotonic()
            if started - saved >= pause and end < n:
                self._save(index, end)
                saved = time.monotonic()
                pause = max(CHECKPOINT_S, (saved - started) / SAVING_SHARE)

    def _save(self, index: Any, n_done: int) -> None:
        """Write down an unfinished index, in place of the one before."""
        name = f"{self.name}/building-{self.stamp}-{n_done:012d}.faiss"
        self.folder.make_parent(name)
        with self.folder.temporary(name) as path:
            library.write_index(index, path)
            self.folder.adopt(path, name)
        for file in self.folder.names(self.name):
            if UNFINISHED.fullmatch(file) and not name.endswith(f"/{file}"):
                self.folder.path(f"{self.name}/{file}").unlink(missing_ok=True)

    def _tune(self, index: Any) -> tuple[int, float]:
        """Return the least breadth of search that reaches the recall aimed at, or the largest, and its recall."""
        n, held = len(self.rows), self.held
        k = min(RECALL_K, n - len(held))
        queries, order = self.rows.take(held), number_order(n, held)
        mask = np.zeros(n, np.bool_)
        mask[held] = True
        nobody = exact.nothing_excluded(len(held))
        excluded = Excluded(nobody.begins, nobody.ends, mask)
        truth = exact.search(self.rows, queries, k, excluded, choose_processor())
        truth = measure(self.rows, queries, truth.numbers, k)
        candidates = library.CANDIDATES.get(self.design.kind, 1)
        breadth, recalls = 0, np.zeros(1)
        for breadth in self.design.breadths or [0]:
            ids = library.search_index(index, self.design, queries * self.scale, k * candidates, breadth)
            found = measure(self.rows, queries, np.where(ids < 0, -1, order[ids]), k)
            recalls = recalls_of(found, truth)
            if recalls.mean() >= self.recall and (recalls < self.recall / 2).mean() <= ASTRAY:
                break
        return breadth, float(recalls.mean())

    def _publish(self, index: Any, breadth: int, recall: float, build_s: float) -> IndexRecord:
        """Write the index under its checksum and then its record, which makes it valid."""
        self.folder.make_parent(f"{self.name}/index.faiss")
        with self.folder.temporary(f"{self.name}/index.faiss") as path:
            library.write_index(index, path)
            found = file_record(path, self.name)
            file = replace(found, path=f"{self.name}/index-{found.crc32c:08x}.faiss")
            self.folder.adopt(path, file.path)
        record = IndexRecord(
            key=self.rows.key,
            where=self.rows.where,
            rows=self.rows.digest,
            plan_hash=self.rows.plane.run.info.plan_hash,
            n_rows=len(self.rows),
            width=self.rows.width,
            held=tuple(self.held.tolist()),
            design=self.design,
            scale=float(self.scale),
            breadth=breadth,
            recall=recall,
            build_s=build_s,
            file=file,
        )
        write_record(self.folder, self.name, record)
        return record


def recalls_of(found: Found, truth: Found) -> npt.NDArray[np.float64]:
    """Return each query's share of its true neighbours that was found; as near as the furthest true one counts."""
    furthest = truth.distances[:, -1:]
    near = found.distances <= furthest + 1e-6 * np.abs(furthest)
    return np.asarray(near[:, : truth.distances.shape[1]].mean(axis=1))
