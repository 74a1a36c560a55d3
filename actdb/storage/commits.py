"""Commits: one file a part, created if absent and written last, so that a part is there whole or not at all."""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
from crc32c import crc32c

from actdb.errors import DamageError
from actdb.schema import HEAD_DIMS, SITE_NAME, STATISTICS, AddedSite, Commit, FileRecord, RunInfo, digest, seal, unseal
from actdb.storage import codecs
from actdb.storage.folder import Folder, file_record

RUNS = "runs"
TABLES = "tables"
INDEXES = "indexes"
STATISTICS_FILE = re.compile(r"([0-9]{6,9})\.([a-z]+)\.json")
COMMIT_FILE = re.compile(r"[0-9]{6,9}\.json")
MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
MAX_CHUNK_BYTES = 2**31 - 1
MAX_LAYERS = 2**16
AXES = ("row", "entry", "prompt")
OUTER_DIMS = ((), ("layer",), *(("layer", dim) for dim in HEAD_DIMS), *((dim,) for dim in HEAD_DIMS))


def part_name(part: int) -> str:
    """Return a part's name in file names."""
    return f"{part:06d}"


def table_name(run: str, part: int, table: str) -> str:
    """Return the path of a part's statistics file."""
    return f"{RUNS}/{run}/parts/{part_name(part)}.{table}.parquet"


def commit_name(run: str, part: int) -> str:
    """Return the path of a part's commit file."""
    return f"{RUNS}/{run}/commits/{part_name(part)}.json"


def statistics_name(run: str, part: int, statistic: str) -> str:
    """Return the path of the commit of a part's statistics that were computed from stored arrays."""
    return f"{RUNS}/{run}/statistics/{part_name(part)}.{statistic}.json"


def added_folder(run: str) -> str:
    """Return the folder of the commits of sites that were added to a run, one file a site."""
    return f"{RUNS}/{run}/sites"


def added_name(run: str, site: str) -> str:
    """Return the path of the commit of a site that was added to a run."""
    return f"{added_folder(run)}/{site}.json"


def write_table(folder: Folder, run: str, part: int, table: str, content: Any) -> FileRecord:
    """Write a statistics table of a part as Parquet, durable under its name; an older file is replaced."""
    import pyarrow.parquet as pq

    name = table_name(run, part, table)
    folder.make_parent(name)
    with folder.temporary(name) as path:
        pq.write_table(content, path, compression="zstd")
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        record = file_record(path, name)
        folder.adopt(path, name)
    return record


def claim_run(folder: Folder, info: RunInfo) -> bool:
    """Create `run.json`; returns False where the name is taken already."""
    return folder.publish(f"{RUNS}/{info.name}/run.json", seal(info.to_json()), exclusive=True)


def read_run(folder: Folder, run: str) -> RunInfo:
    """Read a run's `run.json`; raises `DamageError` where it is missing or malformed."""
    name = f"{RUNS}/{run}/run.json"
    info = _parse_run(folder.read_bytes(name), str(folder.path(name)))
    if info.name != run:
        raise DamageError(f"{folder.path(name)} is damaged: it names run {info.name!r}")
    return info


@lru_cache(maxsize=1024)  # a process that harvests hundreds of checkpoints opens the database after each
def _parse_run(text: bytes, path: str) -> RunInfo:
    value = _parse_sealed(text, path)
    try:
        info = RunInfo.from_json(value)
        check_info(info)
    except MALFORMED as exc:
        raise DamageError(f"{path} is damaged: {exc}") from exc
    return info


def read_run_file(folder: Folder, info: RunInfo, name: str) -> bytes:
    """Read one of a run's own files whole, checked against the checksum in `run.json`."""
    record = next((record for record in info.files if record.path == name), None)
    try:
        content = folder.read_bytes(name)
        if record is not None and crc32c(content) != record.crc32c:
            raise DamageError(f"{folder.path(name)} does not match its checksum")
    except DamageError as exc:
        raise DamageError(f"{exc}; run the same harvest again to repair it") from exc
    return content


def check_info(info: RunInfo) -> None:
    """Raise `ValueError` unless a run's plan and arrays hang together, so that no reader is led astray by them."""
    if type(info.plan.get("causal")) is not bool:
        raise ValueError("its plan does not say whether attention is causal")
    if len({site.name for site in info.sites}) != len(info.sites):
        raise ValueError("a site is named twice")
    for site in info.sites:
        if [dim in AXES for dim in site.dims].count(True) != 1 or site.codec not in codecs.CODECS:
            raise ValueError(f"malformed site {site.name!r}")
        outer, planes = site.dims[: site.axis], site.planes
        if (
            outer not in OUTER_DIMS
            or site.shard_shape[: site.axis] != planes
            or prod(site.chunk_shape[: site.axis]) != 1
        ):
            raise ValueError(f"malformed axes of site {site.name!r}")
        if not site.feature == site.shard_shape[site.axis + 1 :] == site.chunk_shape[site.axis + 1 :]:
            raise ValueError(f"malformed features of site {site.name!r}")
        if prod(site.chunk_shape) * np.dtype(site.dtype).itemsize > MAX_CHUNK_BYTES:
            raise ValueError(f"chunks of site {site.name!r} are too large")
        layers = list(site.layers)
        if layers and (site.dims[0] != "layer" or len(layers) != planes[0] or layers != sorted({*layers})):
            raise ValueError(f"malformed layers of site {site.name!r}")
        if layers and not 0 <= layers[0] <= layers[-1] < MAX_LAYERS:
            raise ValueError(f"malformed layers of site {site.name!r}")


def run_names(folder: Folder) -> list[str]:
    """Return the names of the runs that have a `run.json`."""
    return [name for name in folder.names(RUNS) if folder.exists(f"{RUNS}/{name}/run.json")]


def write_commit(folder: Folder, run: str, commit: Commit) -> bool:
    """Commit a part; returns False where it was committed already (by a worker that made the same bytes)."""
    return folder.publish(commit_name(run, commit.part), seal(commit.to_json()), exclusive=True)


def write_statistics(folder: Folder, run: str, statistic: str, commit: Commit) -> None:
    """Commit a part's statistics that were computed from stored arrays; replaces a damaged commit."""
    name = statistics_name(run, commit.part, statistic)
    folder.path(name).unlink(missing_ok=True)
    folder.publish(name, seal(commit.to_json()), exclusive=True)


def committed_statistics(folder: Folder, run: str) -> dict[str, list[int]]:
    """Return the parts by statistic that were computed from stored arrays, from file names alone."""
    found: dict[str, list[int]] = {}
    for name in sorted(folder.names(f"{RUNS}/{run}/statistics")):
        if match := STATISTICS_FILE.fullmatch(name):
            found.setdefault(match[2], []).append(int(match[1]))
    return found


def added_names(folder: Folder, run: str) -> list[str]:
    """Return the names of the sites that were added to a run, from file names alone."""
    names = [name.removesuffix(".json") for name in folder.names(added_folder(run)) if name.endswith(".json")]
    return [name for name in names if SITE_NAME.fullmatch(name)]


def write_added(folder: Folder, run: str, added: AddedSite) -> None:
    """Commit an added site, all its parts at once."""
    folder.publish(added_name(run, added.spec.name), seal(added.to_json()))


def read_added(folder: Folder, info: RunInfo, site: str) -> AddedSite:
    """Read the commit of an added site; raises `DamageError` where it is malformed or does not fit its run."""
    name = added_name(info.name, site)
    path = str(folder.path(name))
    value = _parse_sealed(folder.read_bytes(name), path)
    try:
        added = AddedSite.from_json(value)
        if added.spec.name != site or added.plan_hash != info.plan_hash or not added.spec.added:
            raise ValueError(f"it is not site {site!r} of run {info.name!r} as it is now")
        if len(added.spec.feature) > 1:
            raise ValueError(f"site {site!r} has several axes after its rows")
        check_info(replace(info, sites=(*info.sites, added.spec)))
    except MALFORMED as exc:
        raise DamageError(f"{path} is damaged: {exc}") from exc
    return added


def read_added_sites(folder: Folder, info: RunInfo) -> dict[str, AddedSite]:
    """Return the sites that were added to a run; those whose commit is damaged are left out (`verify` names them)."""
    found = {}
    for name in added_names(folder, info.name):
        with contextlib.suppress(DamageError):
            found[name] = read_added(folder, info, name)
    return found


def committed_parts(folder: Folder, run: str) -> list[int]:
    """Return the numbers of the committed parts, from file names alone."""
    names = folder.names(f"{RUNS}/{run}/commits")
    return sorted(int(name[:-5]) for name in names if COMMIT_FILE.fullmatch(name))


def read_commit(folder: Folder, run: str, part: int) -> Commit:
    """Read one commit; raises `DamageError` where it is missing or malformed."""
    return _read_commit(folder, commit_name(run, part))


def read_statistics(folder: Folder, run: str, part: int, statistic: str) -> Commit:
    """Read the commit of a part's later statistics; raises `DamageError` where it is missing or malformed."""
    return _read_commit(folder, statistics_name(run, part, statistic))


def _read_commit(folder: Folder, name: str) -> Commit:
    value = _parse_sealed(folder.read_bytes(name), str(folder.path(name)))
    try:
        return Commit.from_json(value)
    except MALFORMED as exc:
        raise DamageError(f"{folder.path(name)} is damaged: {exc}") from exc


@dataclass(frozen=True)
class RunSnapshot:
    """A run and the parts that were committed when the snapshot was taken.

    `later` holds the parts of each kind of statistics that was computed from stored arrays, `added` the sites that
    were added since; `info.sites` has those too, after the ones that were harvested.
    """

    info: RunInfo
    parts: tuple[int, ...]
    later: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Mapping[str, AddedSite] = field(default_factory=dict)

    @property
    def harvested(self) -> tuple[str, ...]:
        """Kinds of statistics that were computed in the forward pass."""
        names = self.info.plan.get("statistics")
        return tuple(map(str, names)) if isinstance(names, list | tuple) else ()

    @cached_property
    def added_digests(self) -> dict[str, str]:
        """Digest of the commit of each added site."""
        return {name: digest(site.to_json()) for name, site in self.added.items()}

    @property
    def complete(self) -> bool:
        """Whether every planned part is committed."""
        return len(self.parts) == self.info.n_parts


@dataclass(frozen=True)
class Snapshot:
    """What a database held at one moment: runs with their committed parts, tables with their files.

    `damaged` names runs whose `run.json` cannot be read, with the reason.
    """

    folder: Folder
    runs: Mapping[str, RunSnapshot]
    tables: Mapping[str, tuple[str, ...]]
    damaged: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """Digest of what the catalog is made from; equal digests mean equal catalogs."""
        runs = {
            name: [run.info.plan_hash, list(run.parts), run.later, run.added_digests] for name, run in self.runs.items()
        }
        return digest({"runs": runs, "tables": {name: list(files) for name, files in self.tables.items()}})


def _parse_sealed(text: bytes, path: str) -> dict[str, Any]:
    value = unseal(text, path)
    if seal(value) != text:  # the same value in other letters: 1E-7, \u00E9
        raise DamageError(f"{path} is not the JSON that was written")
    return value


def take_run_snapshot(folder: Folder, name: str) -> RunSnapshot | None:
    """Read one run and list its commits; None while it has nothing to show, `DamageError` where it is damaged."""
    info = read_run(folder, name)
    parts = [part for part in committed_parts(folder, name) if part < info.n_parts]
    if not parts and not all(folder.exists(record.path) for record in info.files):
        return None
    later = {k: tuple(p) for k, p in committed_statistics(folder, name).items() if k in STATISTICS}
    added = read_added_sites(folder, info)
    info = replace(info, sites=(*info.sites, *(site.spec for site in added.values()))) if added else info
    return RunSnapshot(info, tuple(parts), later, added)


def take_snapshot(folder: Folder) -> Snapshot:
    """List runs, commits and tables; costs one small file read a run, and one an added site.

    A run whose name was claimed, but whose own files are not all there yet, has nothing to show and is left out.
    """
    runs: dict[str, RunSnapshot] = {}
    damaged: dict[str, str] = {}
    for name in run_names(folder):
        try:
            run = take_run_snapshot(folder, name)
            if run is not None:
                runs[name] = run
        except DamageError as exc:
            damaged[name] = str(exc)
    tables = {name: tuple(folder.names(f"{TABLES}/{name}")) for name in folder.names(TABLES)}
    return Snapshot(folder, runs, tables, damaged)
