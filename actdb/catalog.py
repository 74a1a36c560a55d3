"""The catalog: native DuckDB tables derived from a database's Parquet files, and the only way SQL reaches them.

`catalog.duckdb` holds nothing that cannot be made again. It is stamped with the digest of the snapshot that it was made
from; a reader that finds it stale copies it, adds what is new and renames the copy into place, or builds it in memory
where the folder cannot be written. Connections given out read it with DuckDB's external access off, so that no query,
and no view that a hostile catalog may hold, reads or writes a file.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actdb.errors import DamageError, SettingError, SqlError
from actdb.schema import Commit, FileRecord, SiteSpec, digest
from actdb.storage.commits import RUNS, TABLES, RunSnapshot, Snapshot, read_commit, table_name, take_snapshot
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa

CATALOG = "catalog.duckdb"
CATALOG_VERSION = 1
"""Raised where the way of filling the tables changes; their columns enter the stamp by themselves."""

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "allow_community_extensions": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
_SEARCH_PATH = "SET search_path = 'actdb.main,memory.main'"
_FILES = (
    "read_parquet($files, filename = '_file', hive_partitioning = false) t"
    " JOIN (SELECT unnest($files) AS _file, unnest($owners) AS owner) s USING (_file)"
)
_WAL_SUFFIXES = (".wal", ".wal.checkpoint", ".wal.recovery")
_USABLE_NAME = re.compile(r"\w[\w.-]{0,99}")
_CHECKSUMMED = re.compile(r"-([0-9a-f]{8})\.parquet")
_NUMERIC = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\)")
_PLAIN_TYPE = re.compile(r"[A-Z][A-Z0-9_ ]*(\(\d+, ?\d+\))?(\[\])*")
_NULL_TYPE = '"NULL"'

Labels = Sequence[Sequence[str]]
"""The labels of a prompt set: name and DuckDB type of each, in order."""
Items = frozenset[tuple[str, str, str]]
"""What a catalog is made from: (run, name, plan hash), (part, run, number) and (table, name, file)."""


@dataclass(frozen=True)
class Column:
    """A column of the catalog: its DuckDB type and what it means, with units and formula."""

    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table of the catalog. `statistic` is the name in a plan's `statistics` of one filled from each part's file."""

    name: str
    meaning: str
    columns: tuple[Column, ...]
    statistic: str | None = None


def _columns(text: str) -> tuple[Column, ...]:
    """Parse lines of `name TYPE meaning`."""
    return tuple(Column(*line.split(maxsplit=2)) for line in text.strip().splitlines())


SCHEMA: tuple[Table, ...] = (
    Table(
        "models",
        "one row a model that was harvested",
        _columns("""
            model VARCHAR name or folder that the model was loaded from
            architecture VARCHAR the model's class in its configuration
            n_layers INTEGER number of layers
            n_heads INTEGER query heads a layer
            n_kv_heads INTEGER key and value heads a layer; fewer than n_heads under grouped queries
            d_model INTEGER width of the residual stream
            d_head INTEGER width of a head
            d_mlp INTEGER neurons of an MLP layer; null without MLPs
            d_vocab INTEGER tokens in the vocabulary
            n_ctx INTEGER longest context, in tokens
        """),
    ),
    Table(
        "runs",
        "one row a run: one harvest of one model over one prompt set",
        _columns("""
            run VARCHAR name of the run, its key
            model VARCHAR the model harvested: models.model
            prompt_set VARCHAR content hash of the prompts: prompts.prompt_set
            step BIGINT training step, null where none was given
            status VARCHAR complete, or partial while parts are missing
            random_seed BIGINT seed of a randomly initialised model, null for trained weights
            weights_sha256 VARCHAR hash of the weights
            processing VARCHAR raw, or folded as the old HookedTransformer did
            fold_ln BOOLEAN layer norms folded into the next weights
            center_writing_weights BOOLEAN weights that write to the residual stream centred
            center_unembed BOOLEAN the unembedding centred
            bos BOOLEAN a beginning-of-sequence token was prepended
            dtype VARCHAR dtype the model computed in
            store VARCHAR dtype that is stored
            positions VARCHAR positions that were stored: all or last
            pattern VARCHAR how attention patterns are stored: full, topk:N or none
            hooks_id VARCHAR name given to interventions during the harvest, null without any
            n_prompts BIGINT prompts planned
            n_rows BIGINT rows planned; a row is one (prompt, position)
            n_parts INTEGER parts planned
            n_committed INTEGER parts committed so far
            device VARCHAR device harvested on
            created_at TIMESTAMP when the run was begun, UTC
            actdb_version VARCHAR version of actdb
            torch_version VARCHAR version of PyTorch
            transformer_lens_version VARCHAR version of TransformerLens
        """),
    ),
    Table(
        "sites",
        "one row a run and kind of activation; sizes are of the parts committed so far",
        _columns("""
            run VARCHAR runs.run
            site VARCHAR name of the site
            dims VARCHAR[] names of the array's axes
            shape BIGINT[] extents of the array when the run is complete
            dtype VARCHAR stored dtype
            codec VARCHAR lz4 or raw
            raw_bytes BIGINT bytes before encoding
            stored_bytes BIGINT bytes on disk
            max_abs_error DOUBLE largest absolute difference between computed and stored values
        """),
    ),
    Table(
        "prompts",
        "one row a prompt of each prompt set, with one more column a label",
        _columns("""
            prompt_set VARCHAR content hash of the prompts
            prompt_id INTEGER number of the prompt in its set, from 0
            text VARCHAR the prompt; null where tokens were given
        """),
    ),
    Table(
        "run_prompts",
        "one row a run and prompt of its committed parts: where its activations lie",
        _columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            n_tokens INTEGER tokens of the prompt that were run, BOS included
            truncated INTEGER tokens cut to fit the context, 0 if none
            part INTEGER the part that holds it
            row_start BIGINT first row in arrays with an axis row
            n_rows INTEGER rows stored: n_tokens, or 1 with positions last
            entry_start BIGINT first entry in arrays with an axis entry (patterns)
            n_entries BIGINT entries stored: n (n + 1) / 2 of causal patterns, n² of others
        """),
    ),
    Table(
        "tokens",
        "one row a token of each prompt of committed parts",
        _columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            pos INTEGER position in the prompt, from 0
            token_id INTEGER id in the vocabulary
            token VARCHAR the token's text; null without a tokenizer
        """),
    ),
    Table(
        "head_stats",
        "one row a run, prompt, layer and head; with w[q, k] the pattern, t the tokens, means over queries q",
        _columns("""
            run VARCHAR runs.run
            prompt_id INTEGER prompts.prompt_id
            layer INTEGER the model's layer number, from 0
            head INTEGER query head, from 0
            entropy FLOAT mean over all q of −Σ_k w[q, k] ln w[q, k], in nats
            first_mass FLOAT mean over q ≥ 1 of w[q, 0]; null for one token
            prev_mass FLOAT mean over q ≥ 1 of w[q, q − 1]; null for one token
            self_mass FLOAT mean over all q of w[q, q]
            duplicate_mass FLOAT mean of Σ_k w[q, k], k < q, t[k] = t[q], over the q that have such a k; else null
            induction_mass FLOAT mean of Σ_k w[q, k], 1 ≤ k ≤ q, t[k − 1] = t[q], over the q that have one; else null
            mean_distance FLOAT mean over all q of Σ_k w[q, k] (q − k), in positions
            max_weight FLOAT mean over all q of max_k w[q, k]
            z_norm FLOAT mean over all q of ‖z[q]‖₂, the head's output before W_O
            result_norm FLOAT mean over all q of ‖z[q] W_O‖₂, the head's output in the residual stream; may be null
        """),
        statistic="heads",
    ),
    Table(
        "results",
        "what analyses wrote back; further columns as they were written",
        _columns("""
            analysis VARCHAR name of the analysis
            run VARCHAR runs.run
            key VARCHAR what was measured
            value DOUBLE the value
        """),
    ),
)
"""Every built-in table; the tables are created from it and `actdb sql --schema` prints it."""

_TABLES: Mapping[str, Table] = {table.name: table for table in SCHEMA}
_PART_TABLES = tuple(table for table in SCHEMA if table.statistic)


def schema_text(table: str | None = None) -> str:
    """Return the documentation of one built-in table or all; raises `SqlError` on a name that is none."""
    if table is not None and table not in _TABLES:
        raise SqlError(f"no built-in table {table!r}; choose from {', '.join(_TABLES)}")
    return "\n\n".join(_describe(t) for t in SCHEMA if table in (None, t.name))


def _describe(table: Table) -> str:
    names, types = (max(len(getattr(c, key)) for c in table.columns) for key in ("name", "type"))
    lines = [f"  {c.name:<{names}}  {c.type:<{types}}  {c.meaning}" for c in table.columns]
    return "\n".join([f"{table.name}: {table.meaning}", *lines])


# Connections


def connect(snapshot: Snapshot) -> "duckdb.DuckDBPyConnection":
    """Return a locked connection to the catalog of a snapshot, refreshing the file where it is stale.

    A fresh catalog costs one DuckDB start and two small reads, and nothing is written. A catalog that is newer than the
    snapshot is left alone. The connection goes on to see this snapshot when the file is replaced later. Views, macros
    and Python functions may be added to it in the schema `memory.main`; use `cursor` for cursors that see the tables.
    Raises `DamageError` where a file that the catalog is made from is missing or altered.
    """
    import duckdb

    folder, stored = snapshot.folder, _open_stored(snapshot.folder)
    if stored is not None and stored.stamp == _stamp(snapshot):
        return _lock(stored.connection)
    items = frozenset() if stored is None else stored.close()
    ahead = not items <= _items(snapshot)
    if (ahead and items <= _items(take_snapshot(folder))) or not folder.writable():
        return _in_memory(snapshot)
    for predecessor in [items, frozenset()] if items and not ahead else [frozenset()]:
        try:
            return _publish(snapshot, predecessor)
        except DamageError:
            raise
        except (duckdb.Error, OSError):
            continue  # a damaged copy, or no space left: the next way asks for less
    return _in_memory(snapshot)


def cursor(connection: "duckdb.DuckDBPyConnection") -> "duckdb.DuckDBPyConnection":
    """Return a cursor that sees the catalog's tables and what was added in memory; threads need one each."""
    duplicate = connection.cursor()
    duplicate.execute(_SEARCH_PATH)
    return duplicate


def check_catalog(folder: Folder) -> None:
    """Read the whole stored catalog, if there is one; raises `DamageError` where it cannot be read."""
    import duckdb

    if not os.path.lexists(folder.path(CATALOG)):
        return
    stored = _open_stored(folder)
    if stored is None:
        raise _damaged_catalog(folder, "it cannot be opened")
    try:
        names = stored.connection.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'main'")
        for (name,) in names.fetchall():
            stored.connection.execute(f"SELECT count(hash(t)) FROM {quote(name)} t").fetchall()
    except duckdb.Error as exc:
        raise _damaged_catalog(folder, one_line(exc)) from exc
    finally:
        stored.connection.close()


def discard(folder: Folder) -> None:
    """Remove the stored catalog; the next `connect` makes it again."""
    for name in (CATALOG, f"{CATALOG}.wal"):
        with contextlib.suppress(FileNotFoundError):
            folder.path(name).unlink()


@dataclass(frozen=True)
class _Stored:
    """A catalog file that could be opened, and what it says it was made from."""

    connection: "duckdb.DuckDBPyConnection"
    stamp: tuple[str, str]

    def close(self) -> Items:
        """Close it and return what it holds; nothing where another version wrote it or it is damaged."""
        import duckdb

        try:
            return _read_items(self.connection) if self.stamp[0] == _version() else frozenset()
        except duckdb.Error:
            return frozenset()
        finally:
            self.connection.close()


def _read_items(connection: "duckdb.DuckDBPyConnection") -> Items:
    return frozenset(connection.execute("SELECT kind, name, item FROM actdb.internal.items").fetchall())


def _version() -> str:
    columns = [[table.name, [[c.name, c.type] for c in table.columns]] for table in SCHEMA]
    return f"{CATALOG_VERSION}-{digest(columns)[:16]}"


def _stamp(snapshot: Snapshot) -> tuple[str, str]:
    return _version(), snapshot.digest


def _items(snapshot: Snapshot) -> Items:
    runs = [("run", name, run.info.plan_hash) for name, run in snapshot.runs.items()]
    parts = [("part", name, str(part)) for name, run in snapshot.runs.items() for part in run.parts]
    tables = [("table", name, file) for name, files in _user_files(snapshot).items() for file in files]
    return frozenset(runs + parts + tables)


def _user_files(snapshot: Snapshot) -> dict[str, list[str]]:
    """Return the Parquet files of each added table; names that are not text are left out."""
    files = {name: [file for file in found if file.endswith(".parquet")] for name, found in snapshot.tables.items()}
    return {name: found for name, found in files.items() if found and all(_printable(n) == n for n in (name, *found))}


def _engine() -> "duckdb.DuckDBPyConnection":
    """Start a DuckDB in memory; unless told, it would spill into the working folder."""
    import duckdb

    spill = os.path.join(tempfile.gettempdir(), f"actdb-{os.getpid()}-{secrets.token_hex(4)}")
    return duckdb.connect(":memory:", config={**_SETTINGS, "temp_directory": spill})


def _lock(connection: "duckdb.DuckDBPyConnection") -> "duckdb.DuckDBPyConnection":
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    connection.execute(_SEARCH_PATH)
    return connection


def _attach(path: str) -> "duckdb.DuckDBPyConnection":
    """Attach a catalog file for reading; external access is off before anything in it is looked at."""
    connection = _engine()
    try:
        connection.execute(f"ATTACH {_literal(path)} AS actdb (TYPE duckdb, READ_ONLY)")
        connection.execute("SET enable_external_access = false")
        connection.execute(_SEARCH_PATH)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_stored(folder: Folder) -> _Stored | None:
    """Open the stored catalog; None where there is none or it is damaged."""
    import duckdb

    try:
        path = folder.inside(CATALOG)
        if not os.path.isfile(path) or os.path.lexists(f"{path}.wal"):
            return None
        connection = _attach(path)
    except (duckdb.Error, OSError):
        return None
    try:
        ((version, content),) = connection.execute("SELECT version, digest FROM actdb.internal.stamp").fetchall()
        return _Stored(connection, (str(version), str(content)))
    except (duckdb.Error, ValueError):
        connection.close()
        return None


def _publish(snapshot: Snapshot, predecessor: Items) -> "duckdb.DuckDBPyConnection":
    """Write a catalog file, attach it, and give it its name; the connection outlives the temporary one."""
    folder = snapshot.folder
    with folder.temporary(f"{secrets.token_hex(4)}-{CATALOG}") as path:
        try:
            if predecessor:
                shutil.copyfile(folder.inside(CATALOG), path)
            _write(snapshot, str(path), predecessor)
            connection = _lock(_attach(str(path)))
        finally:
            for suffix in _WAL_SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{path}{suffix}")
        with contextlib.suppress(OSError):
            if os.path.lexists(folder.path(f"{CATALOG}.wal")):
                folder.path(f"{CATALOG}.wal").unlink()
            folder.adopt(path, CATALOG)
    return connection


def _write(snapshot: Snapshot, path: str, predecessor: Items) -> None:
    """Fill a new catalog file, or bring the copy of a predecessor up to date, and sync it."""
    connection = _engine()
    try:
        builder = _Builder(connection, snapshot, predecessor)
        if predecessor:  # a copy may be hostile: its views shall reach nothing but the files that are read anyway
            names = [path, *(f"{path}{suffix}" for suffix in _WAL_SUFFIXES), *builder.sources()]
            connection.execute(f"SET allowed_paths = [{', '.join(map(_literal, names))}]")
            connection.execute("SET enable_external_access = false")
        connection.execute(f"ATTACH {_literal(path)} AS actdb (TYPE duckdb)")
        builder.build()
        connection.execute("CHECKPOINT actdb")
    finally:
        connection.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _in_memory(snapshot: Snapshot) -> "duckdb.DuckDBPyConnection":
    """Build the whole catalog in memory."""
    import duckdb

    connection = _engine()
    try:
        connection.execute("ATTACH ':memory:' AS actdb")
        _Builder(connection, snapshot, frozenset()).build()
        return _lock(connection)
    except duckdb.Error as exc:
        connection.close()
        reason = one_line(exc)
        raise DamageError(f"no catalog can be made of {snapshot.folder.root}: {reason}; run `actdb verify`") from exc
    except BaseException:
        connection.close()
        raise


def _damaged_catalog(folder: Folder, reason: str) -> DamageError:
    return DamageError(f"{folder.path(CATALOG)} is damaged ({reason}); delete it and it is made again")


# Building


class _Builder:
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
            files += [table_name(run, part, table.name) for table in _part_tables(self.snapshot.runs[run])]
        for name, found in _user_files(self.snapshot).items():
            files += [f"{TABLES}/{name}/{file}" for file in found]
        return [inside(file) for file in dict.fromkeys(files)]

    def build(self) -> None:
        """Create the tables, or read what they hold already; then add what is missing, all in one transaction."""
        self.connection.execute("USE actdb")
        self.connection.execute("BEGIN")
        if self.stored:
            self.stored = _read_items(self.connection)
        else:
            self._create()
        parts = self._new_parts()
        commits = {(run, part): read_commit(self.snapshot.folder, run, part) for run, part in parts}
        self._fill_runs()
        self._fill_sites(commits)
        self._fill_prompts()
        self._fill_rows(commits)
        self._fill_user_tables()
        self._insert("internal.items", ("VARCHAR",) * 3, sorted(_items(self.snapshot) - self.stored))
        self.connection.execute("DELETE FROM internal.stamp")
        self._insert("internal.stamp", ("VARCHAR", "VARCHAR"), [_stamp(self.snapshot)])
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
        texts = [[_text(value) for value in row] for row in rows]
        if texts:
            casts = ", ".join(f"TRY_CAST(r[{i}] AS {kind})" for i, kind in enumerate(types, 1))
            query = f"INSERT INTO {table} SELECT {casts} FROM (SELECT unnest($rows::VARCHAR[][]) AS r)"
            self.connection.execute(query, {"rows": texts})

    def _replace(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        columns = _TABLES[table].columns
        self.connection.execute(f"DELETE FROM {table}")
        self._insert(table, [c.type for c in columns], [[row.get(c.name) for c in columns] for row in rows])

    def _new_parts(self) -> list[tuple[str, int]]:
        parts = {("part", name, str(part)): part for name, run in self.snapshot.runs.items() for part in run.parts}
        return sorted((key[1], part) for key, part in parts.items() if key not in self.stored)

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
        models = {_text(info.model.get("model")): info.model for info in reversed(infos)}
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
        wanted = [(c.name, c.type) for c in _TABLES["prompts"].columns] + list(columns.values())
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
        return {s: _label_fields(fields[path]) for s, path in paths.items()}

    def _insert_prompts(self, paths: Mapping[str, str], layout: Labels, columns: Mapping[str, tuple[str, str]]) -> None:
        """Insert prompt sets that have the same labels; a label is found by its place, since names may clash."""
        targets = ["prompt_set", "prompt_id", "text"]
        values = ["s.owner", "t.prompt_id", "t.text"]
        for place, (label, stored) in enumerate(layout, 1):
            column, kind = columns[label]
            targets.append(quote(column))
            value = f"struct_extract_at(t.labels, {place})"
            values.append("NULL" if stored == _NULL_TYPE else f"CAST({value} AS {kind})")
        query = f"INSERT INTO prompts ({', '.join(targets)}) SELECT {', '.join(values)} FROM {_FILES}"
        self._load(query, {path: s for s, path in paths.items()})

    def _fill_rows(self, commits: Mapping[tuple[str, int], Commit]) -> None:
        """Add the prompts, tokens and statistics of new parts, each table's files in one statement."""
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
        files: dict[str, dict[str, str]] = {}
        for (run, part), commit in commits.items():
            for table in _part_tables(self.snapshot.runs[run]):
                path = self._checked(table_name(run, part, table.name), commit.files)
                files.setdefault(table.name, {})[path] = run
        for name, owners in files.items():
            self._load(f"INSERT INTO {name} SELECT {_selected(name)} FROM {_FILES}", owners)
        self.connection.execute("DROP TABLE temp.fresh")

    def _load(self, query: str, owners: Mapping[str, str]) -> None:
        """Run an INSERT from Parquet files; `owners` names each path's run or prompt set."""
        if owners:
            self.connection.execute(query, {"files": list(owners), "owners": list(owners.values())})

    def _fill_user_tables(self) -> None:
        """Make added tables anew whose files or names changed."""
        files = _user_files(self.snapshot)
        old = _user_names({name for kind, name, _ in self.stored if kind == "table"})
        new = _user_names(files)
        for name, table in old.items():
            if new.get(name) != table:
                self.connection.execute(f"DROP TABLE {quote(table)}")
        for name, table in new.items():
            changed = any(("table", name, file) not in self.stored for file in files[name])
            if changed or old.get(name) != table:
                self._make_user_table(table, [f"{TABLES}/{name}/{file}" for file in files[name]])

    def _make_user_table(self, table: str, files: Sequence[str]) -> None:
        paths = [self._checked(file, _named_records(self.snapshot.folder, file)) for file in files]
        source = f"read_parquet([{', '.join(map(_literal, paths))}], union_by_name = true, hive_partitioning = false)"
        found = [name for (name,) in self._rows(f"SELECT column_name FROM (DESCRIBE SELECT * FROM {source})")]
        base = {_fold(c.name): c for c in (_TABLES[table].columns if table == "results" else ())}
        present = {_fold(name): name for name in found}
        columns = [
            quote(present[key]) if key in present else f"CAST(NULL AS {column.type}) AS {quote(column.name)}"
            for key, column in base.items()
        ]
        columns += [quote(name) for name in found if _fold(name) not in base]
        query = f"CREATE OR REPLACE TABLE {quote(table)} AS SELECT {', '.join(columns)} FROM {source}"
        self.connection.execute(query)


def _part_tables(run: RunSnapshot) -> list[Table]:
    """Return the tables that each part of a run has a file of."""
    statistics = run.info.plan.get("statistics")
    return [table for table in _PART_TABLES if isinstance(statistics, list | tuple) and table.statistic in statistics]


def _selected(table: str) -> str:
    """Return a table's columns as read from files that know nothing of their run."""
    return ", ".join(["s.owner", *(f"t.{c.name}" for c in _TABLES[table].columns[1:])])


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


def _label_fields(fields: Sequence[tuple[str, int, str]]) -> Labels:
    """Return the children of `labels` in a flattened Parquet schema: names and types, in order."""
    place = 1
    for _ in range(fields[0][1]):
        name, n_children, _ = fields[place]
        if name == "labels":
            children, child = [], place + 1
            for _ in range(n_children):
                children.append((fields[child][0], fields[child][2]))
                child = _after(fields, child)
            return children
        place = _after(fields, place)
    return []


def _after(fields: Sequence[tuple[str, int, str]], place: int) -> int:
    """Return the place behind a field and all that is nested in it."""
    pending = 1
    while pending:
        pending += fields[place][1] - 1
        place += 1
    return place


def label_columns(sets: Iterable[Labels]) -> dict[str, tuple[str, str]]:
    """Return the column and type of each label, given the labels of each prompt set in order.

    Numbers of different types become DOUBLE, anything else that differs VARCHAR, nested values too.
    """
    types: dict[str, str] = {}
    for labels in sets:
        for label, kind in labels:
            types[label] = _common_type(types.get(label, _NULL_TYPE), kind)
    names = distinct_names(types, taken=(c.name for c in _TABLES["prompts"].columns))
    return {label: (names[label], kind if _PLAIN_TYPE.fullmatch(kind) else "VARCHAR") for label, kind in types.items()}


def _common_type(first: str, second: str) -> str:
    if first == second or second == _NULL_TYPE:
        return first
    if first == _NULL_TYPE:
        return second
    return "DOUBLE" if _NUMERIC.fullmatch(first) and _NUMERIC.fullmatch(second) else "VARCHAR"


def distinct_names(names: Iterable[str], *, taken: Iterable[str]) -> dict[str, str]:
    """Return an SQL name for each name: itself, or with a suffix _2, _3, … where it is taken (DuckDB ignores case)."""
    used = {_fold(name) for name in taken}
    distinct: dict[str, str] = {}
    for name in names:
        candidate, number = name or "_", 2
        while _fold(candidate) in used:
            candidate, number = f"{name or '_'}_{number}", number + 1
        used.add(_fold(candidate))
        distinct[name] = candidate
    return distinct


def _user_names(names: Iterable[str]) -> dict[str, str]:
    """Return the SQL name of each added table: none shadows a built-in one, and `results` is one."""
    added = sorted(names)
    distinct = distinct_names((name for name in added if name != "results"), taken=_TABLES)
    return {name: distinct.get(name, name) for name in added}


def check_table_name(name: str) -> None:
    """Raise `SettingError` unless an added table may have this name: no built-in one, and usable as a folder's."""
    if _fold(name) in map(_fold, _TABLES):
        raise SettingError(f"{name!r} is a built-in table; choose another name than {', '.join(_TABLES)}")
    if not _USABLE_NAME.fullmatch(name):
        raise SettingError(
            f"table name {name!r} is not usable: up to 100 letters, digits and _ . -, not starting with . or -"
        )


def _named_records(folder: Folder, name: str) -> list[FileRecord]:
    """Return the record that an added table's file carries in its name, its size unknown."""
    match = _CHECKSUMMED.search(name)
    with contextlib.suppress(OSError):
        size = os.path.getsize(folder.inside(name))
        return [FileRecord(name, size, int(match[1], 16))] if match else []
    return []


def quote(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _fold(name: str) -> bytes:
    """Fold case as DuckDB does: ASCII letters only."""
    return name.encode("utf-8", "replace").lower()


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return _printable(value if isinstance(value, str) else json.dumps(value, default=str))


# Queries


@dataclass(frozen=True)
class QueryResult:
    """The rows of one query, held in memory by DuckDB; `fetchall`, `df` and `arrow` return all of them each time."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    _relation: "duckdb.DuckDBPyRelation" = field(repr=False)
    _remaining: list[Iterator[tuple[Any, ...]]] = field(default_factory=list, repr=False)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return all rows."""
        return list(self._relation.fetchall())

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, and None after the last."""
        if not self._remaining:
            self._remaining.append(iter(self.fetchall()))
        return next(self._remaining[0], None)

    def arrow(self) -> "pa.Table":
        """Return all rows as a pyarrow Table."""
        return self._relation.to_arrow_table()

    def df(self) -> "pd.DataFrame":
        """Return all rows as a pandas DataFrame."""
        return self._relation.df()


def check_select(query: str, connection: "duckdb.DuckDBPyConnection | None" = None) -> None:
    """Raise `SqlError` unless a text is one statement that only reads: SELECT, DESCRIBE, SHOW, EXPLAIN of one, ..."""
    import duckdb

    if connection is None:
        with duckdb.connect(":memory:") as parser:
            check_select(query, parser)
        return
    kinds = _statement_kinds(connection, query)
    if not kinds:
        raise SqlError("the query is empty")
    if len(kinds) > 1:
        raise SqlError(f"actdb sql runs one statement at a time: {len(kinds)} given")
    if kinds == ["EXPLAIN"]:
        kinds = _explained_kinds(connection, query)
    if kinds == ["MULTI"]:
        raise SqlError(
            "actdb sql only reads: PIVOT without IN refused, since it creates a type; list the values with IN"
        )
    if kinds != ["SELECT"]:
        raise SqlError(f"actdb sql only reads: {kinds[0]} refused")


def _statement_kinds(connection: "duckdb.DuckDBPyConnection", query: str) -> list[str]:
    import duckdb

    if _printable(query) != query:
        raise SqlError("the query is not valid Unicode text")
    try:
        return [str(statement.type.name) for statement in connection.extract_statements(query)]
    except duckdb.Error as exc:
        raise SqlError(one_line(exc)) from exc


def _explained_kinds(connection: "duckdb.DuckDBPyConnection", query: str) -> list[str]:
    """Return what an EXPLAIN explains, and with ANALYZE runs: the text behind the keyword and its options."""
    space = r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
    options = rf"{space}EXPLAIN\b{space}((?:ANALYZE|VERBOSE)\b|\([A-Z_,\s]*\))?"
    match = re.match(options, query, re.IGNORECASE | re.DOTALL)
    if match is None:
        return ["EXPLAIN"]
    with contextlib.suppress(SqlError):
        if kinds := _statement_kinds(connection, query[match.end() :]):
            return kinds
    return ["EXPLAIN"]


def run_query(
    connection: "duckdb.DuckDBPyConnection", query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None
) -> QueryResult:
    """Run one statement that only reads; raises `SqlError` on one line where it fails or is refused."""
    check_select(query, connection)
    with _reading(connection) as reader:
        relation = reader.sql(query, params=parameters).materialize()
    return QueryResult(tuple(relation.columns), tuple(map(str, relation.types)), relation)


@contextlib.contextmanager
def _reading(connection: "duckdb.DuckDBPyConnection") -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a cursor in a read-only transaction, since a SELECT may hide an INSERT; translates errors."""
    import duckdb

    try:
        reader = cursor(connection)
        reader.execute("BEGIN TRANSACTION READ ONLY")
        yield reader
        reader.execute("COMMIT")
    except duckdb.Error as exc:
        raise SqlError(one_line(exc)) from exc


def matching_prompts(connection: "duckdb.DuckDBPyConnection", run: str, where: str) -> list[int]:
    """Return the ids, ascending, of a run's committed prompts for which an SQL expression holds.

    The expression sees the columns of `prompts` (labels) and of `run_prompts`; a label hides a `run_prompts` column of
    its name. Raises `SqlError` where it is not one expression, or fails.
    """
    with _reading(connection) as reader:
        own = {_fold(name) for (name,) in reader.execute("SELECT column_name FROM (DESCRIBE prompts)").fetchall()}
        rest = [f"rp.{c.name}" for c in _TABLES["run_prompts"].columns if _fold(c.name) not in own]
        rows = ", ".join(["p.*", *rest])
        query = (
            f"WITH _rows AS (SELECT {rows} FROM run_prompts rp JOIN runs r USING (run)"
            " JOIN prompts p ON p.prompt_set = r.prompt_set AND p.prompt_id = rp.prompt_id WHERE run = $run)"
            " SELECT prompt_id FROM _rows WHERE "
        )
        # Between CASE WHEN and THEN no bracket is open that a text could close, between brackets no CASE that it
        # could end: what parses in both places is one expression.
        for frame in ("CASE WHEN\n{}\nTHEN true END", "(\n{}\n)"):
            _check_expression(reader, query + frame.format(where), where)
        found = reader.execute(f"{query}(\n{where}\n) ORDER BY prompt_id", {"run": run}).fetchall()
    return [int(prompt_id) for (prompt_id,) in found]


def _check_expression(connection: "duckdb.DuckDBPyConnection", query: str, where: str) -> None:
    try:
        kinds = _statement_kinds(connection, query)
    except SqlError as exc:
        raise SqlError(f"where={where!r} is not one SQL expression: {exc}") from exc
    if kinds != ["SELECT"]:
        raise SqlError(f"where={where!r} is not one SQL expression")


def words(connection: "duckdb.DuckDBPyConnection") -> list[str]:
    """Return the words that a shell may complete: keywords, tables, columns, functions."""
    found = cursor(connection).execute(
        "SELECT upper(keyword_name) FROM duckdb_keywords() WHERE keyword_category = 'reserved'"
        " UNION SELECT table_name FROM duckdb_tables() WHERE schema_name = 'main'"
        " UNION SELECT column_name FROM duckdb_columns() WHERE database_name = 'actdb' AND schema_name = 'main'"
        " UNION SELECT function_name FROM duckdb_functions() WHERE regexp_full_match(function_name, '[a-z]\\w*')"
        " ORDER BY ALL"
    )
    return [word for (word,) in found.fetchall()]


def one_line(exc: BaseException) -> str:
    """Return DuckDB's message with its suggestions on one line, without the excerpt of the query."""
    message = re.split(r"\n\s*LINE \d+:|\n\s*Stack Trace:", str(exc), maxsplit=1)[0]
    return " ".join(message.split())[:500]
