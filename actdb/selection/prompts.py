"""Where each prompt of a run is stored, from `prompts.parquet`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import DamageError, SelectionError
from actdb.schema import RunInfo, SiteSpec
from actdb.storage.commits import RUNS, read_run_file
from actdb.storage.folder import Folder

COLUMNS = ("n_tokens", "part", "row_start", "n_rows", "entry_start", "n_entries")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptIndex:
    """Arrays by prompt_id; `stored` says whether the prompt's part was committed at the snapshot."""

    run: str
    n_tokens: Ints
    part: Ints
    row_start: Ints
    n_rows: Ints
    entry_start: Ints
    n_entries: Ints
    stored: npt.NDArray[np.bool_]
    last_only: bool

    def __len__(self) -> int:
        return len(self.n_tokens)

    def check(self, prompt_id: int) -> int:
        """Return a prompt id that is stored, or raise `SelectionError` with the range."""
        if not 0 <= prompt_id < len(self):
            raise SelectionError(f"prompt {prompt_id}: run {self.run!r} has prompts 0 to {len(self) - 1}")
        if not self.stored[prompt_id]:
            raise SelectionError(f"prompt {prompt_id} of run {self.run!r} is not stored yet: the run is partial")
        return prompt_id

    def stored_ids(self) -> Ints:
        """Return the ids of the stored prompts, ascending."""
        return np.flatnonzero(self.stored)

    def in_storage_order(self, ids: Ints | None = None) -> Ints:
        """Return the ids, by default those of all prompts, in the order in which their rows are stored."""
        ids = np.arange(len(self)) if ids is None else ids
        return ids[np.argsort(self.row_start[ids], kind="stable")]

    def prompt_rows(self, spec: SiteSpec) -> Ints:
        """Return the index of every prompt along a prompt-level site's axis: its place within its part."""
        order = np.lexsort((self.row_start, self.part))
        rank = np.empty(len(self), np.int64)
        firsts = np.searchsorted(self.part[order], self.part[order])
        rank[order] = np.arange(len(self)) - firsts
        return rank + self.part * spec.capacity


def read_prompt_index(folder: Folder, info: RunInfo, parts: tuple[int, ...]) -> PromptIndex:
    """Read a run's prompt table; raises `DamageError` where it is missing or does not fit the run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{RUNS}/{info.name}/prompts.parquet"
    content = read_run_file(folder, info, name)
    try:
        table = pq.read_table(pa.BufferReader(content), columns=list(COLUMNS))
        columns = [_integers(table.column(column)) for column in COLUMNS]
    except (pa.ArrowException, OSError, KeyError, ValueError) as exc:
        raise DamageError(f"{folder.path(name)} is damaged; run the same harvest again to repair it") from exc
    if len(columns[0]) != info.n_prompts:
        raise DamageError(f"{folder.path(name)} is damaged: {len(columns[0])} prompts instead of {info.n_prompts}")
    stored = np.isin(columns[1], np.asarray([part for part in parts if part < info.n_parts < 2**31], np.int64))
    last_only = info.plan.get("positions") == "last"
    index = PromptIndex(run=info.name, **dict(zip(COLUMNS, columns, strict=True)), stored=stored, last_only=last_only)
    if not _fits(index, info):
        raise DamageError(f"{folder.path(name)} is damaged: it does not fit the run; run the same harvest again")
    return index


def _integers(column: Any) -> Ints:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{column.type} with {column.null_count} nulls")
    return np.asarray(column.to_numpy(), np.int64)


def _fits(index: PromptIndex, info: RunInfo) -> bool:
    """Whether every prompt has as many rows and entries as its length asks for, all within its part."""
    n = index.n_tokens
    if len(n) and (n.min() < 1 or n.max() >= 2**31 or index.part.min() < 0 or index.part.max() >= info.n_parts):
        return False
    n_entries = n if index.last_only else n * (n + 1) // 2 if info.causal else n * n
    n_rows = np.ones_like(n) if index.last_only else n
    if not np.array_equal(index.n_rows, n_rows) or not np.array_equal(index.n_entries, n_entries):
        return False
    places = {"row": (index.row_start, n_rows), "entry": (index.entry_start, n_entries)}
    for spec in info.sites:
        if spec.dims[spec.axis] == "prompt":
            start, count = index.prompt_rows(spec), np.ones_like(n)
        else:
            start, count = places[spec.dims[spec.axis]]
        within = start - index.part * spec.capacity
        if (within < 0).any() or (within > spec.capacity - count).any():
            return False
    return True
