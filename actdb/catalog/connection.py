"""Connections to the catalog of a snapshot: the file where it is fresh, refreshed where it is stale, or in memory."""

import contextlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actdb.catalog.build import Builder, Items, catalog_version, read_items, snapshot_items, snapshot_stamp
from actdb.catalog.names import one_line, quote, sql_literal
from actdb.errors import DamageError
from actdb.storage.commits import Snapshot, take_snapshot
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import duckdb

CATALOG = "catalog.duckdb"
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "allow_community_extensions": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
_SEARCH_PATH = "SET search_path = 'actdb.main,memory.main'"
_WAL_SUFFIXES = (".wal", ".wal.checkpoint", ".wal.recovery")


def connect(snapshot: Snapshot) -> "duckdb.DuckDBPyConnection":
    """Return a locked connection to the catalog of a snapshot, refreshing the file where it is stale.

    A fresh catalog costs one DuckDB start and two small reads, and nothing is written. A catalog that is newer than the
    snapshot is left alone. The connection goes on to see this snapshot when the file is replaced later. Views, macros
    and Python functions may be added to it in the schema `memory.main`; use `cursor` for cursors that see the tables.
    Raises `DamageError` where a file that the catalog is made from is missing or altered.
    """
    import duckdb

    folder, stored = snapshot.folder, _open_stored(snapshot.folder)
    if stored is not None and stored.stamp == snapshot_stamp(snapshot):
        return _lock(stored.connection)
    items = frozenset() if stored is None else stored.close()
    ahead = not items <= snapshot_items(snapshot)
    if (ahead and items <= snapshot_items(take_snapshot(folder))) or not folder.writable():
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
            return read_items(self.connection) if self.stamp[0] == catalog_version() else frozenset()
        except duckdb.Error:
            return frozenset()
        finally:
            self.connection.close()


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
        connection.execute(f"ATTACH {sql_literal(path)} AS actdb (TYPE duckdb, READ_ONLY)")
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
        builder = Builder(connection, snapshot, predecessor)
        if predecessor:  # a copy may be hostile: its views shall reach nothing but the files that are read anyway
            names = [path, *(f"{path}{suffix}" for suffix in _WAL_SUFFIXES), *builder.sources()]
            connection.execute(f"SET allowed_paths = [{', '.join(map(sql_literal, names))}]")
            connection.execute("SET enable_external_access = false")
        connection.execute(f"ATTACH {sql_literal(path)} AS actdb (TYPE duckdb)")
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
        Builder(connection, snapshot, frozenset()).build()
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
