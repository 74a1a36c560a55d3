"""Queries on a connection: only SELECT-type statements, one at a time, errors in one line."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actdb.catalog.connection import cursor
from actdb.catalog.explanation import explain
from actdb.catalog.names import fold_case, one_line, printable
from actdb.catalog.tables import BUILT_IN
from actdb.errors import SqlError

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True)
class QueryResult:
    """The rows of one query, held in memory by DuckDB; `fetchall`, `df` and `arrow` return all of them each time.

    They raise `SqlError` once the database was closed or refreshed: DuckDB drops the rows with the connection.
    """

    columns: tuple[str, ...]
    types: tuple[str, ...]
    _relation: "duckdb.DuckDBPyRelation" = field(repr=False)
    _remaining: list[Iterator[tuple[Any, ...]]] = field(default_factory=list, repr=False)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return all rows."""
        with _still_open():
            return list(self._relation.fetchall())

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, and None after the last."""
        if not self._remaining:
            self._remaining.append(iter(self.fetchall()))
        return next(self._remaining[0], None)

    def arrow(self) -> "pa.Table":
        """Return all rows as a pyarrow Table."""
        with _still_open():
            return self._relation.to_arrow_table()

    def df(self) -> "pd.DataFrame":
        """Return all rows as a pandas DataFrame."""
        with _still_open():
            return self._relation.df()


@contextlib.contextmanager
def _still_open() -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.ConnectionException as exc:
        raise SqlError(
            "the database was closed or refreshed since this query: fetch its rows before, or ask again"
        ) from exc


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

    if printable(query) != query:
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
        raise SqlError(explain(exc, connection)) from exc


def matching_prompts(connection: "duckdb.DuckDBPyConnection", run: str, where: str) -> list[int]:
    """Return the ids, ascending, of a run's committed prompts for which an SQL expression holds.

    The expression sees the columns of `prompts` (labels) and of `run_prompts`; a label hides a `run_prompts` column of
    its name. Raises `SqlError` where it is not one expression, or fails.
    """
    with _reading(connection) as reader:
        own = {fold_case(name) for (name,) in reader.execute("SELECT column_name FROM (DESCRIBE prompts)").fetchall()}
        rest = [f"rp.{c.name}" for c in BUILT_IN["run_prompts"].columns if fold_case(c.name) not in own]
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
        " UNION SELECT view_name FROM duckdb_views() WHERE schema_name = 'main' AND NOT internal"
        " UNION SELECT column_name FROM duckdb_columns() WHERE database_name = 'actdb' AND schema_name = 'main'"
        " UNION SELECT function_name FROM duckdb_functions() WHERE regexp_full_match(function_name, '[a-z]\\w*')"
        " ORDER BY ALL"
    )
    return [word for (word,) in found.fetchall()]
