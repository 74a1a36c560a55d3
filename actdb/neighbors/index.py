"""Indexes of a database: what each was made of, whether it still fits, and searching one.

    indexes/<run>/neighbors/<name>/index.json           what it was made of, its recall, the checksum of the other
    indexes/<run>/neighbors/<name>/index-<crc>.faiss    the index
    indexes/<run>/neighbors/<name>/building-*.faiss     what an interrupted build goes on from

An index numbers rows in storage order, those held out to measure its recall last.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from actdb.errors import DamageError, SettingError, StaleIndexError
from actdb.neighbors import library
from actdb.neighbors.exact import Excluded, Found, check_k
from actdb.neighbors.library import Design
from actdb.neighbors.map import map_label, subspace_options
from actdb.neighbors.metric import distances_between
from actdb.neighbors.row import Rows
from actdb.schema import FileRecord, digest, seal, unseal
from actdb.storage.commits import INDEXES
from actdb.storage.folder import Folder

NEIGHBORS = "neighbors"
RECORD = "index.json"
MEASURED_ROWS = 4096
WIDER = 16
"""How many times as widely as a batch one query searches: it costs milliseconds, and misses hardly anything."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IndexRecord:
    """The content of `index.json`.

    `key` is what is compared and how, `where` the condition on prompts, `rows` a digest of which rows of which plan it
    holds, `held` the rows held out, `scale` what rows are multiplied by, which orders them no otherwise, `breadth` how
    widely it searches (0: all), with the `recall` at 10 measured so.
    """

    key: Mapping[str, Any]
    where: str | None
    rows: str
    plan_hash: str
    n_rows: int
    width: int
    held: tuple[int, ...]
    design: Design
    scale: float
    breadth: int
    recall: float
    build_s: float
    file: FileRecord

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "IndexRecord":
        """Read and check a stored record; raises `KeyError`, `TypeError` or `ValueError` on anything malformed."""
        design = Design(**value["design"])
        if design.kind not in library.KINDS or min(design.n_lists, design.code_bytes) < 0:
            raise ValueError(f"unknown kind {design.kind!r}")
        return cls(
            key=dict(value["key"]),
            where=None if value["where"] is None else str(value["where"]),
            rows=str(value["rows"]),
            plan_hash=str(value["plan_hash"]),
            n_rows=int(value["n_rows"]),
            width=int(value["width"]),
            held=tuple(int(row) for row in value["held"]),
            design=design,
            scale=float(value["scale"]),
            breadth=int(value["breadth"]),
            recall=float(value["recall"]),
            build_s=float(value["build_s"]),
            file=FileRecord.from_json(value["file"]),
        )

    def __str__(self) -> str:
        layer, head = (self.key[name] for name in ("layer", "head"))
        place = (
            self.key["site"] + ("" if layer is None else f" layer {layer}") + ("" if head is None else f" head {head}")
        )
        label = map_label(self.key["map"])
        mapped = f" of {label}" if label else ""
        where = f" where {self.where}" if self.where else ""
        return f"{place} {self.key['metric']}{mapped}{where}: {self.design.kind}, recall@10 {self.recall:.3f}"


def index_name(rows: Rows) -> str:
    """Return the folder of the index of such a comparison: one for each, and for each name of a partition."""
    mapped = rows.map.key
    if "partition" in mapped:  # its content may change: an index of another then is stale, not unknown
        mapped = {**mapped, "subspace": None}
    key = digest([{**rows.key, "map": mapped}, rows.where])
    return f"{INDEXES}/{rows.plane.run.name}/{NEIGHBORS}/{rows.plane.site}-{key[:12]}"


def rebuild_command(folder: Folder, key: Mapping[str, Any], where: str | None) -> str:
    """Return the command that makes an index anew."""
    words = ["actdb index", str(folder.root), str(key["site"]), f"--run {key['run']}", f"--metric {key['metric']}"]
    words += [f"--{name} {key[name]}" for name in ("layer", "head") if key[name] is not None]
    if key["map"]["maps"]:
        words.append(f"--map {','.join(key['map']['maps'])}")
    words += subspace_options(key["map"])
    return " ".join(words) + (f' --where "{where}"' if where else "")


def read_record(folder: Folder, name: str) -> IndexRecord | None:
    """Read the record of an index, None where there is none; raises `DamageError` where it is malformed."""
    path = f"{name}/{RECORD}"
    if not folder.exists(path):
        return None
    value = unseal(folder.read_bytes(path), str(folder.path(path)))
    try:
        return IndexRecord.from_json(value)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise DamageError(f"{folder.path(path)} is damaged: {exc}; delete {folder.path(name)}") from exc


def write_record(folder: Folder, name: str, record: IndexRecord) -> None:
    """Write the record of an index, which makes it one."""
    folder.publish(f"{name}/{RECORD}", seal(record.to_json()))


def check_fresh(folder: Folder, record: IndexRecord, rows: Rows) -> None:
    """Raise `StaleIndexError`, with the command that makes it anew, unless an index holds exactly these rows."""
    command = rebuild_command(folder, rows.key, rows.where)
    if record.key != rows.key or record.plan_hash != rows.plane.run.info.plan_hash:
        other = "partition" if record.plan_hash == rows.plane.run.info.plan_hash else "harvest"
        raise StaleIndexError(f"the index of {rows.plane} was made of another {other}; make it anew: {command}")
    if record.rows != rows.digest:
        raise StaleIndexError(
            f"the index of {rows.plane} holds {record.n_rows} rows, and there are other ones now ({len(rows)});"
            f" make it anew: {command}"
        )


def open_index(folder: Folder, rows: Rows) -> "Index | None":
    """Return the index made for such a comparison of these rows, None where there is none.

    Reads it whole and checks it against its checksum, once a process. Raises `StaleIndexError` where it does not fit
    the rows any more, `DamageError` where it is damaged, each with the command that makes it anew.
    """
    name = index_name(rows)
    record = read_record(folder, name)
    if record is None:
        return None
    check_fresh(folder, record, rows)
    try:
        return Index(record, rows, _load(folder, record))
    except DamageError as exc:
        raise DamageError(f"{exc}; make it anew: {rebuild_command(folder, rows.key, rows.where)}") from exc


def list_records(folder: Folder, run: str) -> Iterator[tuple[str, IndexRecord | DamageError]]:
    """Yield the path of every index of a run with its record, or why that cannot be read."""
    for file in folder.names(f"{INDEXES}/{run}/{NEIGHBORS}"):
        name = f"{INDEXES}/{run}/{NEIGHBORS}/{file}"
        try:
            record = read_record(folder, name)
        except DamageError as exc:
            yield name, exc
        else:
            if record is not None:
                yield name, record


def check_indexes(folder: Folder, run: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each damaged index of a run, and what is wrong, with the command that makes it anew."""
    for name, record in list_records(folder, run):
        if isinstance(record, DamageError):
            yield f"{name}/{RECORD}", str(record)
            continue
        try:
            folder.check(record.file)
        except DamageError as exc:
            yield record.file.path, f"{exc}; make it anew: {rebuild_command(folder, record.key, record.where)}"


def number_order(n_rows: int, held: Ints) -> Ints:
    """Return the number of the row under each id of an index: storage order, those held out last."""
    kept = np.ones(n_rows, np.bool_)
    kept[held] = False
    return np.concatenate([np.flatnonzero(kept), held])


@dataclass(frozen=True)
class Index:
    """A loaded index over rows."""

    record: IndexRecord
    rows: Rows
    loaded: Any

    @cached_property
    def order(self) -> Ints:
        """The number of the row under each id."""
        return number_order(len(self.rows), np.array(self.record.held, np.int64))

    def search(self, queries: Floats, k: int, excluded: Excluded) -> Found:
        """Return the `k` nearest rows of each prepared query [query, width] that the index finds.

        Their distances are computed from stored rows, and order them. Raises `SettingError` where a query has fewer
        than `k` rows to find.
        """
        check_k(k, len(self.rows), excluded)
        return measure(self.rows, queries, self.find(queries, k, excluded), k)

    def find(self, queries: Floats, k: int, excluded: Excluded) -> Ints:
        """Return `k` numbers of rows [query, k] or some more, in no order and −1 for none, that are not excluded.

        A batch searches as widely as the recall was measured with, one query wider, and so does one that finds fewer
        than `k`.
        """
        design, least = self.record.design, self.record.breadth * (WIDER if len(queries) == 1 else 1)
        n = k * library.CANDIDATES.get(design.kind, 1)
        fetch = n + int((excluded.ends - excluded.begins).max(initial=0))
        scaled = queries * np.float32(self.record.scale)
        for breadth in [b for b in design.breadths if b >= least] or design.breadths[-1:] or [0]:
            ids = library.search_index(self.loaded, design, scaled, fetch, breadth)
            numbers = np.where(ids < 0, -1, self.order[ids])
            barred = (numbers >= excluded.begins[:, None]) & (numbers < excluded.ends[:, None])
            numbers[barred] = -1
            if ((numbers >= 0).sum(axis=1) >= k).all():
                first = np.argsort(numbers < 0, axis=1, kind="stable")[:, :n]
                return np.take_along_axis(numbers, first, 1)
        raise SettingError(
            f"the index of {self.rows.plane} finds fewer than {k} rows: search with --exact (exact=True)"
        )


def measure(rows: Rows, queries: Floats, numbers: Ints, k: int) -> Found:
    """Compute the distances of found rows [query, candidate] (−1: none) to their queries; keep the `k` nearest."""
    distances = np.full(numbers.shape, np.inf, np.float32)
    query, place = np.nonzero(numbers >= 0)
    distinct, which = np.unique(numbers[query, place], return_inverse=True)
    values = rows.take(distinct)
    for begin in range(0, len(query), MEASURED_ROWS):
        part = slice(begin, begin + MEASURED_ROWS)
        distances[query[part], place[part]] = distances_between(rows.metric, queries[query[part]], values[which[part]])
    order = np.lexsort((numbers, distances))[:, :k]
    return Found(np.take_along_axis(numbers, order, 1), np.take_along_axis(distances, order, 1))


def _load(folder: Folder, record: IndexRecord) -> Any:
    stat = folder.path(record.file.path).stat() if folder.exists(record.file.path) else None
    return _loaded(folder, record.file, record.design, None if stat is None else (stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=2)
def _loaded(folder: Folder, file: FileRecord, design: Design, seen: tuple[int, int] | None) -> Any:
    """Read an index; kept while its file stays the same."""
    folder.check(file)
    return library.read_index(folder.inside(file.path), design)
