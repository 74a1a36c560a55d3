"""Filling a catalog from a snapshot: everything, or what its predecessor lacks."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actdb.catalog.names import (
    CHECKSUMMED,
    NULL_TYPE,
    Labels,
    fold_case,
    label_columns,
    label_fields,
    nullable_text,
    printable,
    quote,
    sql_literal,
    user_names,
)
from actdb.catalog.statistics import attribute_heads, compact_top, statistics_rows
from actdb.catalog.tables import BUILT_IN, PART_TABLES, SCHEMA, Table
from actdb.catalog.views import VIEWS
from actdb.errors import DamageError
from actdb.schema import AddedSite, Commit, FileRecord, SiteSpec, digest
from actdb.storage.commits import RUNS, TABLES, RunSnapshot, Snapshot, read_commit, read_statistics, table_name
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import duckdb

CATALOG_VERSION = 1
"""Raised where the way of filling the tables changes; their columns enter the stamp by themselves."""
_FILES = (
    "read_parquet($files, filename = '_file', hive_partitioning = false) t"
    " JOIN (SELECT unnest($files) AS _file, unnest($owners) AS owner) s USING (_file)"
)
Items = frozenset[tuple[str, str, str]]
"""What a catalog is made from: (run, name, plan hash), (part, run, number), (statistic, run, part.statistic),
(site, run, site.digest) of added ones and (table, name, file)."""


def read_items(connection: "duckdb.DuckDBPyConnection") -> Items:
    """Return what an attached catalog was made from."""
    return frozenset(connection.execute("SELECT kind, name, item FROM actdb.internal.items").fetchall())


def catalog_version() -> str:
    """Return the version of the tables: raised by hand, and changed by any change of a column or view."""
    columns = [[table.name, [[c.name, c.type] for c in table.columns]] for table in SCHEMA]
    return f"{CATALOG_VERSION}-{digest([columns, [view.query for view in VIEWS]])[:16]}"


def snapshot_stamp(snapshot: Snapshot) -> tuple[str, str]:
    """Return what a catalog of a snapshot is stamped with: version and digest."""
    return catalog_version(), snapshot.digest


def snapshot_items(snapshot: Snapshot) -> Items:
    """Return what the catalog of a snapshot is made from."""
    runs = [("run", name, run.info.plan_hash) for name, run in snapshot.runs.items()]
    parts = [("part", name, str(part)) for name, run in snapshot.runs.items() for part in run.parts]
    tables = [("table", name, file) for name, files in _user_files(snapshot).items() for file in files]
    later = [("statistic", name, f"{part}.{kind}") for name, part, kind in _later(snapshot)]
    added = [
        ("site", run, f"{site}.{made}") for run, r in snapshot.runs.items() for site, made in r.added_digests.items()
    ]
    return frozenset(runs + parts + later + added + tables)


def _later(snapshot: Snapshot) -> list[tuple[str, int, str]]:
    """Return (run, part, statistic) of what was computed from the stored arrays of committed parts."""
    return [
        (name, part, kind)
        for name, run in snapshot.runs.items()
        for kind, parts in run.later.items()
        for part in parts
        if part in run.parts
    ]


def _user_files(snapshot: Snapshot) -> dict[str, list[str]]:
    """Return the Parquet files of each added table; names that are not text are left out."""
    files = {name: [file for file in found if file.endswith(".parquet")] for name, found in snapshot.tables.items()}
    return {name: found for name, found in files.items() if found and all(printable(n) == n for n in (name, *found))}


class Builder:
    """Fills an attached catalog from a snapshot: everything, or what its predecessor lacks."""

    def __init__(self, connection: "duckdb.DuckDBPyConnection", snapshot: Snapshot, stored: Items) -> None:
        self.connection = connection
        self.snapshot = snapshot
        self.stored = stored

    def sources(self) -> list[str]:
        """Return the real paths of every file that a build may read."""
        inside = self.snapshot.folder.inside
        files = [f"{RUNS}/{run}/prompts.parquet" for run in self._prompt_sets().values()]
        for run, part in self._new_parts():
            files += [f"{RUNS}/{run}/{name}.parquet" for name in ("prompts", "tokens")]
            files += [table_name(run, part, table.name) for table in _part_tables(self.snapshot.runs[run].harvested)]
        for run, part, kind in self._new_statistics():
            files += [table_name(run, part, table.name) for table in _part_tables((kind,))]
        for name, found in _user_files(self.snapshot).items():
            files += [f"{TABLES}/{name}/{file}" for file in found]
        return [inside(file) for file in dict.fromkeys(files)]

    def build(self) -> None:
        """Create the tables, or read what they hold already; then add what is missing, all in one transaction."""
        self.connection.execute("USE actdb")
        self.connection.execute("BEGIN")
        if self.stored:
            self.stored = read_items(self.connection)
        else:
            self._create()
        parts = self._new_parts()
        commits = {(run, part): read_commit(self.snapshot.folder, run, part) for run, part in parts}
        self._fill_runs()
        self._fill_sites(commits)
        self._fill_prompts()
        self._fill_rows(commits)
        self._fill_statistics(commits)
        self._fill_user_tables()
        self._make_views()
        self._insert("internal.items", ("VARCHAR",) * 3, sorted(snapshot_items(self.snapshot) - self.stored))
        self.connection.execute("DELETE FROM internal.stamp")
        self._insert("internal.stamp", ("VARCHAR", "VARCHAR"), [snapshot_stamp(self.snapshot)])
        self.connection.execute("COMMIT")

    def _create(self) -> None:
        for table in SCHEMA:
            self._define(table.name, [(c.name, c.type) for c in table.columns])
        self.connection.execute("CREATE SCHEMA internal")
        for name, columns in {
            "stamp": "version VARCHAR, digest VARCHAR",
            "items": "kind VARCHAR, name VARCHAR, item VARCHAR",
            "prompt_sets": "prompt_set VARCHAR, labels VARCHAR",
            "tallies": "run VARCHAR, site VARCHAR, raw_bytes BIGINT, stored_bytes BIGINT, max_abs_error DOUBLE",
        }.items():
            self.connection.execute(f"CREATE TABLE internal.{name} ({columns})")

    def _define(self, table: str, columns: Iterable[tuple[str, str]]) -> None:
        definition = ", ".join(f"{quote(name)} {kind}" for name, kind in columns)
        self.connection.execute(f"CREATE OR REPLACE TABLE {quote(table)} ({definition})")

    def _rows(self, query: str, parameters: Mapping[str, Any] | None = None) -> list[Any]:
        return self.connection.execute(query, parameters).fetchall()

    def _insert(self, table: str, types: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows as texts that DuckDB casts, null where it cannot: JSON files may hold any types."""
        texts = [[nullable_text(value) for value in row] for row in rows]
        if texts:
            casts = ", ".join(f"TRY_CAST(r[{i}] AS {kind})" for i, kind in enumerate(types, 1))
            query = f"INSERT INTO {table} SELECT {casts} FROM (SELECT unnest($rows::VARCHAR[][]) AS r)"
            self.connection.execute(query, {"rows": texts})

    def _replace(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        columns = BUILT_IN[table].columns
        self.connection.execute(f"DELETE FROM {table}")
        self._insert(table, [c.type for c in columns], [[row.get(c.name) for c in columns] for row in rows])

    def _make_views(self) -> None:
        """Make the views anew: their columns follow those of `prompts`."""
        own = {column.name for column in BUILT_IN["prompts"].columns}
        found = [name for (name,) in self._rows("SELECT column_name FROM (DESCRIBE prompts)") if name not in own]
        labels = "".join(f", p.{quote(name)} AS {quote(f'label_{name}')}" for name in found)
        for view in VIEWS:
            self.connection.execute(f"CREATE OR REPLACE VIEW {view.name} AS {view.query.format(labels=labels)}")

    def _new_parts(self) -> list[tuple[str, int]]:
        parts = {("part", name, str(part)): part for name, run in self.snapshot.runs.items() for part in run.parts}
        return sorted((key[1], part) for key, part in parts.items() if key not in self.stored)

    def _new_statistics(self) -> list[tuple[str, int, str]]:
        found = _later(self.snapshot)
        return sorted(key for key in found if ("statistic", key[0], f"{key[1]}.{key[2]}") not in self.stored)

    def _prompt_sets(self) -> dict[str, str]:
        """Return each prompt set's first run, of those with a committed part: others may have no prompts file yet."""
        sets: dict[str, str] = {}
        for name, run in self.snapshot.runs.items():
            if run.parts:
                sets.setdefault(str(run.info.plan.get("prompt_set")), name)
        return sets

    def _checked(self, name: str, records: Iterable[FileRecord]) -> str:
        """Return a file's real path after comparing it with its record; raises `DamageError`."""
        folder = self.snapshot.folder
        for record in records:
            if record.path == name:
                folder.check(record)
        path = folder.inside(name)
        if not os.path.isfile(path):
            raise DamageError(f"{folder.path(name)} is missing")
        return path

    def _run_file(self, run: str, table: str) -> str:
        return self._checked(f"{RUNS}/{run}/{table}.parquet", self.snapshot.runs[run].info.files)

    def _fill_runs(self) -> None:
        infos = [run.info for run in self.snapshot.runs.values()]
        models = {nullable_text(info.model.get("model")): info.model for info in reversed(infos)}
        self._replace("models", reversed(models.values()))
        self._replace("runs", map(_run_row, self.snapshot.runs.values()))

    def _fill_sites(self, commits: Mapping[tuple[str, int], Commit]) -> None:
        """Add the tallies of new parts, and write `sites` anew from their sums."""
        tallies = [
            (run, site, tally.raw_bytes, tally.stored_bytes, tally.max_abs_error)
            for (run, _), commit in commits.items()
            for site, tally in commit.sites.items()
        ]
        self._insert("internal.tallies", ("VARCHAR", "VARCHAR", "BIGINT", "BIGINT", "DOUBLE"), tallies)
        sums = "sum(raw_bytes), sum(stored_bytes), max(max_abs_error)"
        query = f"SELECT run, site, {sums} FROM internal.tallies GROUP BY ALL"
        totals = {(run, site): tuple(values) for run, site, *values in self._rows(query)}
        runs = self.snapshot.runs.items()
        totals |= {(r, name): _added_totals(site) for r, run in runs for name, site in run.added.items()}
        self._replace("sites", [_site_row(r, s, totals.get((r, s.name))) for r, run in runs for s in run.info.sites])

    def _fill_prompts(self) -> None:
        """Add new prompt sets; where their labels change the columns, fill the table anew."""
        sets = self._prompt_sets()
        known = {
            s: json.loads(labels) for s, labels in self._rows("SELECT prompt_set, labels FROM internal.prompt_sets")
        }
        paths = {s: self._run_file(run, "prompts") for s, run in sets.items() if s not in known}
        new = self._read_labels(paths)
        self._insert("internal.prompt_sets", ("VARCHAR", "VARCHAR"), new.items())
        labels: dict[str, Labels] = {s: {**known, **new}[s] for s in sets}
        columns = label_columns(labels.values())
        wanted = [(c.name, c.type) for c in BUILT_IN["prompts"].columns] + list(columns.values())
        if self._rows("SELECT column_name, column_type FROM (DESCRIBE prompts)") != wanted:
            self._define("prompts", wanted)
            paths = {s: self._run_file(run, "prompts") for s, run in sets.items()}
        layouts = {json.dumps(labels[s]): labels[s] for s in paths}
        for text, layout in layouts.items():
            alike = {s: path for s, path in paths.items() if json.dumps(labels[s]) == text}
            self._insert_prompts(alike, layout, columns)

    def _read_labels(self, paths: Mapping[str, str]) -> dict[str, Labels]:
        """Return the labels of prompt sets and their types, from the Parquet footers alone."""
        if not paths:
            return {}
        fields: dict[str, list[tuple[str, int, str]]] = {path: [] for path in paths.values()}
        query = "SELECT file_name, name, num_children, duckdb_type FROM parquet_schema($files)"
        for path, name, n_children, kind in self._rows(query, {"files": list(fields)}):
            fields[path].append((name, n_children or 0, kind))
        return {s: label_fields(fields[path]) for s, path in paths.items()}

    def _insert_prompts(self, paths: Mapping[str, str], layout: Labels, columns: Mapping[str, tuple[str, str]]) -> None:
        """Insert prompt sets that have the same labels; a label is found by its place, since names may clash."""
        targets = ["prompt_set", "prompt_id", "text"]
        values = ["s.owner", "t.prompt_id", "t.text"]
        for place, (label, stored) in enumerate(layout, 1):
            column, kind = columns[label]
            targets.append(quote(column))
            value = f"struct_extract_at(t.labels, {place})"
            values.append("NULL" if stored == NULL_TYPE else f"CAST({value} AS {kind})")
        query = f"INSERT INTO prompts ({', '.join(targets)}) SELECT {', '.join(values)} FROM {_FILES}"
        self._load(query, {path: s for s, path in paths.items()})

    def _fill_rows(self, commits: Mapping[tuple[str, int], Commit]) -> None:
        """Add the prompts and tokens of new parts, each table's files in one statement."""
        self.connection.execute("CREATE OR REPLACE TEMP TABLE fresh (run VARCHAR, part INTEGER)")
        self._insert("temp.fresh", ("VARCHAR", "INTEGER"), commits)
        runs = list(dict.fromkeys(run for run, _ in commits))
        self._load(
            f"INSERT INTO run_prompts SELECT {_selected('run_prompts')} FROM {_FILES} "
            "SEMI JOIN temp.fresh f ON f.run = s.owner AND f.part = t.part",
            {self._run_file(run, "prompts"): run for run in runs},
        )
        self._load(
            f"INSERT INTO tokens SELECT {_selected('tokens')} FROM {_FILES} "
            "SEMI JOIN (SELECT run, prompt_id FROM run_prompts SEMI JOIN temp.fresh USING (run, part)) f "
            "ON f.run = s.owner AND f.prompt_id = t.prompt_id",
            {self._run_file(run, "tokens"): run for run in runs},
        )
        self.connection.execute("DROP TABLE temp.fresh")

    def _fill_statistics(self, commits: Mapping[tuple[str, int], Commit]) -> None:
        """Add the statistics of new parts, and those computed since, each table's files in one statement."""
        new = [(run, commit, self.snapshot.runs[run].harvested) for (run, _), commit in commits.items()]
        for run, part, kind in self._new_statistics():
            new.append((run, read_statistics(self.snapshot.folder, run, part, kind), (kind,)))
        files: dict[str, dict[str, str]] = {}
        for run, commit, kinds in new:
            for table in _part_tables(kinds):
                path = self._checked(table_name(run, commit.part, table.name), commit.files)
                files.setdefault(table.name, {})[path] = run
        for name, owners in files.items():
            self._load(f"INSERT INTO {name} SELECT {_selected(name)} FROM {_FILES}", owners)
        if "neuron_top" in files:
            compact_top(self.connection, {run for run, _, kinds in new if "neurons" in kinds})
        if {"head_stats", "head_attribution"} & {*files}:
            attribute_heads(self.connection, {run for run, _, kinds in new if {"heads", "lens"} & {*kinds}})
        self._replace("statistics", statistics_rows(self.snapshot))

    def _load(self, query: str, owners: Mapping[str, str]) -> None:
        """Run an INSERT from Parquet files; `owners` names each path's run or prompt set."""
        if owners:
            self.connection.execute(query, {"files": list(owners), "owners": list(owners.values())})

    def _fill_user_tables(self) -> None:
        """Make added tables anew whose files or names changed."""
        files = _user_files(self.snapshot)
        old = user_names({name for kind, name, _ in self.stored if kind == "table"})
        new = user_names(files)
        for name, table in old.items():
            if new.get(name) != table:
                self.connection.execute(f"DROP TABLE {quote(table)}")
        for name, table in new.items():
            changed = any(("table", name, file) not in self.stored for file in files[name])
            if changed or old.get(name) != table:
                self._make_user_table(table, [f"{TABLES}/{name}/{file}" for file in files[name]])

    def _make_user_table(self, table: str, files: Sequence[str]) -> None:
        paths = [self._checked(file, _named_records(self.snapshot.folder, file)) for file in files]
        source = (
            f"read_parquet([{', '.join(map(sql_literal, paths))}], union_by_name = true, hive_partitioning = false)"
        )
        found = [name for (name,) in self._rows(f"SELECT column_name FROM (DESCRIBE SELECT * FROM {source})")]
        base = {fold_case(c.name): c for c in (BUILT_IN[table].columns if table == "results" else ())}
        present = {fold_case(name): name for name in found}
        columns = [
            quote(present[key]) if key in present else f"CAST(NULL AS {column.type}) AS {quote(column.name)}"
            for key, column in base.items()
        ]
        columns += [quote(name) for name in found if fold_case(name) not in base]
        query = f"CREATE OR REPLACE TABLE {quote(table)} AS SELECT {', '.join(columns)} FROM {source}"
        self.connection.execute(query)


def _part_tables(statistics: Sequence[str]) -> list[Table]:
    """Return the tables that a part has a file of for these kinds of statistics."""
    return [table for table in PART_TABLES if table.statistic in statistics]


def _selected(table: str) -> str:
    """Return a table's columns as read from files that know nothing of their run."""
    columns, derived = BUILT_IN[table].columns[1:], BUILT_IN[table].derived
    return ", ".join(["s.owner", *("NULL" if c.name in derived else f"t.{c.name}" for c in columns)])


def _run_row(run: RunSnapshot) -> dict[str, Any]:
    info = run.info
    return {
        **info.environment,
        **info.plan,
        "run": info.name,
        "model": info.model.get("model"),
        "status": "complete" if run.complete else "partial",
        "n_prompts": info.n_prompts,
        "n_rows": info.n_rows,
        "n_parts": info.n_parts,
        "n_committed": len(run.parts),
    }


def _added_totals(site: AddedSite) -> tuple[int, int, float]:
    tallies = [tally for commit in site.commits for tally in commit.sites.values()]
    raw_bytes, stored_bytes = sum(t.raw_bytes for t in tallies), sum(t.stored_bytes for t in tallies)
    return raw_bytes, stored_bytes, max((t.max_abs_error for t in tallies), default=0.0)


def _site_row(run: str, site: SiteSpec, totals: tuple[Any, ...] | None) -> dict[str, Any]:
    raw_bytes, stored_bytes, max_abs_error = totals or (0, 0, None)
    return {
        "run": run,
        "site": site.name,
        "dims": list(site.dims),
        "shape": list(site.shape),
        "dtype": site.dtype,
        "codec": site.codec,
        "raw_bytes": raw_bytes,
        "stored_bytes": stored_bytes,
        "max_abs_error": max_abs_error,
    }


def _named_records(folder: Folder, name: str) -> list[FileRecord]:
    """Return the record that an added table's file carries in its name, its size unknown."""
    match = CHECKSUMMED.search(name)
    with contextlib.suppress(OSError):
        size = os.path.getsize(folder.inside(name))
        return [FileRecord(name, size, int(match[1], 16))] if match else []
    return []
