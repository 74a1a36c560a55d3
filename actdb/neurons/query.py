"""Exact answers to two questions on neurons, after DeepEverest (He, Daum, Balazinska, VLDB 2022).

Where is a group highest, by the sum of its activations? Which rows are most like a given row, within the group? Each
way gives the rows of a full scan of the stored values, equal ones by the lower prompt and position:

1. The highest activations kept while harvesting (`neuron_top`): a row in none of the group's lists is at most the sum
   of their last values (the threshold of Fagin, Lotem, Naor 2003): they are enough where the k-th row found exceeds it.
2. The neuron-major copy of the layer (`actdb transpose`), read at the group's neurons alone.
3. One scan of the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actdb.catalog.context import rows_in_context
from actdb.errors import SelectionError, SettingError
from actdb.neurons.columns import open_columns, plane
from actdb.schema import N_TOP
from actdb.selection.plan import plan_reads
from actdb.selection.prompts import PromptIndex
from actdb.storage import codecs
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    from actdb.catalog import QueryResult
    from actdb.run import Run

METRICS = ("l2", "l1", "cosine")
SCAN_ROWS = 8192
ROUNDING = 1e-12
"""Share by which sums of the same numbers may differ."""
LISTED_SITE = "mlp_post"
"""The site whose highest activations are kept."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Score = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Group:
    """Neurons of one layer of a run's site."""

    folder: Folder
    run: "Run"
    site: str
    layer: int | None
    neurons: tuple[int, ...]

    @classmethod
    def make(
        cls,
        folder: Folder,
        run: "Run",
        site: str,
        layer: int | None,
        neurons: Sequence[int],
    ) -> "Group":
        """Check the group; raises `SelectionError` for a neuron or layer that the site lacks, and an empty group."""
        rows = plane(run, site, layer)
        if not len(neurons):
            raise SelectionError("the group holds no neuron")
        for neuron in neurons:
            if not 0 <= neuron < rows.shape[-1]:
                raise SelectionError(f"neuron {neuron}: {site} has neurons 0 to {rows.shape[-1] - 1}")
        if len(set(neurons)) != len(neurons):
            raise SelectionError(f"a neuron is named twice: {', '.join(map(str, neurons))}")
        return cls(folder, run, site, layer, tuple(int(neuron) for neuron in neurons))

    def row(self, prompt: int, pos: int) -> Floats:
        """Return the activations [neuron] of one row; raises `SelectionError` where there is none."""
        rows = plane(self.run, self.site, self.layer).sel(prompt=prompt, pos=pos, neuron=list(self.neurons))
        return np.asarray(rows.numpy(), np.float64)

    def rows(self, prompt: Ints, pos: Ints) -> Floats:
        """Return the activations [row, neuron] of stored rows, reading each chunk that holds some once."""
        index, reader = self.run.prompt_index, self.run.source(self.site).reader
        starts = index.row_start[prompt] + (0 if index.last_only else pos)
        number = 0 if self.layer is None else reader.spec.layers.index(self.layer)
        reads = plan_reads(reader.spec, starts, np.ones_like(starts))
        values = reader.read([number], reads, len(starts), np.array(self.neurons))[0]
        return np.asarray(values, np.float64)

    @property
    def n_rows(self) -> int:
        """Stored rows."""
        index = self.run.prompt_index
        return int(index.n_rows[index.stored].sum())

    def best(self, k: int, score: Score) -> "Best":
        """Return the `k` rows of the highest score, from the neuron-major copy or else by one scan."""
        best = Best(k)
        copy = open_columns(self.folder, self.run, self.site, self.layer)
        if copy is not None:
            best.offer_columns(copy.read(self.neurons), score, self.run.prompt_index)
            return best
        for block in plane(self.run, self.site, self.layer).sel(neuron=list(self.neurons)).batches(SCAN_ROWS):
            assert block.pos is not None, "a site of rows has positions"
            best.offer(score(np.asarray(block.values, np.float64)), block.prompt, block.pos)
        return best


class Best:
    """Keeps the `k` rows of the highest score, falling; equal ones by the lower prompt, then the lower position."""

    def __init__(self, k: int) -> None:
        self._k = k
        self.scores: Floats = np.empty(0)
        self.prompt: Ints = np.empty(0, np.int64)
        self.pos: Ints = np.empty(0, np.int64)

    def offer(self, scores: Floats, prompt: Ints, pos: Ints) -> None:
        """Take rows with their scores; those that are not numbers (of no direction, say) never count."""
        floor = self.scores[-1] if len(self.scores) == self._k else -np.inf
        kept = np.flatnonzero(scores >= floor)
        joined = [
            np.concatenate([old, new[kept]])
            for old, new in ((self.scores, scores), (self.prompt, prompt), (self.pos, pos))
        ]
        order = np.lexsort((joined[2], joined[1], -joined[0]))[: self._k]
        self.scores, self.prompt, self.pos = (column[order] for column in joined)

    def offer_columns(self, values: npt.NDArray[Any], score: Score, index: PromptIndex) -> None:
        """Take all stored rows as columns [neuron, row] in storage order."""
        n_rows = values.shape[1]
        scores = np.empty(n_rows)
        for begin in range(0, n_rows, SCAN_ROWS):
            rows = slice(begin, begin + SCAN_ROWS)
            scores[rows] = score(np.ascontiguousarray(values[:, rows].T, np.float64))
        known = scores[~np.isnan(scores)]
        floor = np.partition(known, len(known) - self._k)[len(known) - self._k] if len(known) > self._k else -np.inf
        rows_kept = np.flatnonzero(scores >= floor)
        prompts = index.in_storage_order(index.stored_ids())
        ends = np.cumsum(index.n_rows[prompts])
        owner = np.searchsorted(ends, rows_kept, side="right")
        prompt = prompts[owner]
        within = rows_kept - (ends - index.n_rows[prompts])[owner]
        pos = index.n_tokens[prompt] - 1 if index.last_only else within
        self.offer(scores[rows_kept], prompt, pos)


def find_top(group: Group, k: int, sql: Callable[..., "QueryResult"]) -> "QueryResult":
    """Return the rows where the group is highest; see `Database.top`."""
    _check_k(k, group.n_rows)
    best = _listed(group, k, sql)
    if best is None:
        best = group.best(k, lambda values: values.sum(1))
    values: dict[str, tuple[str, Sequence[Any]]] = {"value": ("FLOAT", best.scores.tolist())}
    if len(group.neurons) > 1:
        values["activations"] = ("FLOAT[]", group.rows(best.prompt, best.pos).tolist())
    return rows_in_context(sql, group.run.name, best.prompt.tolist(), best.pos.tolist(), values)


def find_similar(
    group: Group, prompt: int, pos: int, k: int, metric: str, sql: Callable[..., "QueryResult"]
) -> "QueryResult":
    """Return the rows most like a row within the group; see `Database.most_similar`."""
    _check_k(k, group.n_rows - 1)
    if metric not in METRICS:
        raise SettingError(f"metric {metric!r}: choose one of {', '.join(METRICS)}")
    wanted = group.row(prompt, pos)
    own = pos if pos >= 0 else int(group.run.prompt_index.n_tokens[prompt]) + pos
    if metric == "cosine" and not wanted.any():
        raise SettingError(f"the group is silent at prompt {prompt}, pos {own}: it has no direction; choose l2 or l1")
    best = group.best(k + 1, lambda values: -distances(values, wanted, metric))
    others = np.flatnonzero((best.prompt != prompt) | (best.pos != own))[:k]
    columns: dict[str, tuple[str, Sequence[Any]]] = {"distance": ("FLOAT", (-best.scores[others]).tolist())}
    return rows_in_context(sql, group.run.name, best.prompt[others].tolist(), best.pos[others].tolist(), columns)


def distances(values: Floats, wanted: Floats, metric: str) -> Floats:
    """Return the distance [row] of rows [row, neuron] from a row [neuron]; NaN for zeros under cosine.

    l2 is Euclidean, l1 the sum of absolute differences, cosine 1 − cos.
    """
    if metric == "l2":
        return np.asarray(np.sqrt(((values - wanted) ** 2).sum(1)))
    if metric == "l1":
        return np.asarray(np.abs(values - wanted).sum(1))
    with np.errstate(invalid="ignore"):
        cosine = values @ wanted / (np.linalg.norm(values, axis=1) * np.linalg.norm(wanted))
    return np.asarray(1 - cosine)


def _listed(group: Group, k: int, sql: Callable[..., "QueryResult"]) -> Best | None:
    """Answer from the highest activations kept of each neuron; None where they are not enough to be sure."""
    run, index = group.run, group.run.prompt_index
    if group.site != LISTED_SITE or k >= N_TOP or not _is_listed(run):
        return None
    found = sql(
        "SELECT neuron, value, prompt_id, pos FROM neuron_top WHERE run = $run AND layer = $layer"
        " AND neuron IN (SELECT unnest($neurons::INTEGER[])) ORDER BY neuron, rank",
        {"run": run.name, "layer": group.layer, "neurons": list(group.neurons)},
    ).fetchall()
    lowest = {neuron: _as_stored(value, group) for neuron, value, _, _ in found}  # the last, since they fall
    places = sorted({(row[2], row[3]) for row in found if not index.last_only or row[3] == index.n_tokens[row[2]] - 1})
    best = Best(k)
    if places:
        prompt, pos = np.array(places, np.int64).T
        best.offer(group.rows(prompt, pos).sum(1), prompt, pos)
    threshold = sum(lowest.values())
    slack = ROUNDING * sum(map(abs, lowest.values()))
    sure = len(best.scores) == k and best.scores[-1] > threshold + slack
    return best if sure or len(places) == group.n_rows else None


def _is_listed(run: "Run") -> bool:
    """Whether the lists cover every committed part."""
    snapshot = run.snapshot
    return "neurons" in snapshot.harvested or {*snapshot.parts} <= {*snapshot.later.get("neurons", ())}


def _as_stored(value: float, group: Group) -> float:
    """Return what an activation became on disk; rounding keeps order, so that of a bound is a bound."""
    spec = group.run.info.site(group.site)
    assert spec is not None
    stored = np.array([value], np.float32).astype(spec.dtype)
    if spec.precision is not None:
        stored, _ = codecs.round_mantissas(stored, spec.precision)
    return float(stored[0])


def _check_k(k: int, n_rows: int) -> None:
    if k < 1:
        raise SettingError(f"k {k}: must be at least 1")
    if k > n_rows:
        raise SettingError(f"k {k}: there are {n_rows} rows to choose from")
