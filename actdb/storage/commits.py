"""Commits: one file a part, created if absent and written last, so that a part is there whole or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from actdb.errors import DamageError
from actdb.schema import Commit, RunInfo, digest, seal, unseal
from actdb.storage.folder import Folder

RUNS = "runs"
TABLES = "tables"


def part_name(part: int) -> str:
    """Return a part's name in file names."""
    return f"{part:06d}"


def table_name(run: str, part: int, table: str) -> str:
    """Return the path of a part's statistics file."""
    return f"{RUNS}/{run}/parts/{part_name(part)}.{table}.parquet"


def commit_name(run: str, part: int) -> str:
    """Return the path of a part's commit file."""
    return f"{RUNS}/{run}/commits/{part_name(part)}.json"


def claim_run(folder: Folder, info: RunInfo) -> bool:
    """Create `run.json`; returns False where the name is taken already."""
    return folder.publish(f"{RUNS}/{info.name}/run.json", seal(info.to_json()), exclusive=True)


def read_run(folder: Folder, run: str) -> RunInfo:
    """Read a run's `run.json`; raises `DamageError` where it is missing or malformed."""
    name = f"{RUNS}/{run}/run.json"
    value = unseal(folder.read_bytes(name), str(folder.path(name)))
    try:
        info = RunInfo.from_json(value)
    except (KeyError, TypeError, ValueError) as exc:
        raise DamageError(f"{folder.path(name)} is damaged: {exc}") from exc
    if info.name != run:
        raise DamageError(f"{folder.path(name)} is damaged: it names run {info.name!r}")
    return info


def run_names(folder: Folder) -> list[str]:
    """Return the names of the runs that have a `run.json`."""
    return [name for name in folder.names(RUNS) if folder.exists(f"{RUNS}/{name}/run.json")]


def write_commit(folder: Folder, run: str, commit: Commit) -> bool:
    """Commit a part; returns False where it was committed already (by a worker that made the same bytes)."""
    return folder.publish(commit_name(run, commit.part), seal(commit.to_json()), exclusive=True)


def committed_parts(folder: Folder, run: str) -> list[int]:
    """Return the numbers of the committed parts, from file names alone."""
    names = folder.names(f"{RUNS}/{run}/commits")
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def read_commit(folder: Folder, run: str, part: int) -> Commit:
    """Read one commit; raises `DamageError` where it is missing or malformed."""
    name = commit_name(run, part)
    value = unseal(folder.read_bytes(name), str(folder.path(name)))
    try:
        return Commit.from_json(value)
    except (KeyError, TypeError, ValueError) as exc:
        raise DamageError(f"{folder.path(name)} is damaged: {exc}") from exc


@dataclass(frozen=True)
class RunSnapshot:
    """A run and the parts that were committed when the snapshot was taken."""

    info: RunInfo
    parts: tuple[int, ...]

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
        runs = {name: [run.info.plan_hash, list(run.parts)] for name, run in self.runs.items()}
        return digest({"runs": runs, "tables": {name: list(files) for name, files in self.tables.items()}})


def take_snapshot(folder: Folder) -> Snapshot:
    """List runs, commits and tables; costs one small file read a run."""
    runs: dict[str, RunSnapshot] = {}
    damaged: dict[str, str] = {}
    for name in run_names(folder):
        try:
            runs[name] = RunSnapshot(read_run(folder, name), tuple(committed_parts(folder, name)))
        except DamageError as exc:
            damaged[name] = str(exc)
    tables = {name: tuple(folder.names(f"{TABLES}/{name}")) for name in folder.names(TABLES)}
    return Snapshot(folder, runs, tables, damaged)
