"""DuckDB's errors in one line each, with the nearest name where one is unknown."""

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from actdb import errors
from actdb.catalog.documentation import FUNCTIONS
from actdb.catalog.names import one_line

if TYPE_CHECKING:
    import duckdb

NEAR = 0.6
"""Least similarity (twice the matching letters over all letters) of a name that is suggested."""
_RAISED = re.compile(r"Invalid Input Error: Python exception occurred while executing the UDF: (\w+): (.*)")
_CANDIDATES = re.compile(r"Candidate (?:bindings|tables): (.*)")
_UNKNOWN = {
    "column": re.compile(
        r'(?:Referenced column |column named |Column )"(.+?)"'
        r"(?: not found in FROM clause| in EXCLUDE list not found| does not exist on|$| Candidate)"
    ),
    "table": re.compile(r"Table with name (.+?) does not exist!"),
    "alias": re.compile(r'Referenced table "(.+?)" not found!'),
    "function": re.compile(r"Function with name (.+?) does not exist!"),
}
_NAMES = {
    "column": "SELECT DISTINCT column_name FROM duckdb_columns() WHERE database_name = 'actdb' AND schema_name = 'main'"
    " ORDER BY ALL",
    "table": "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'main' UNION ALL"
    " SELECT view_name FROM duckdb_views() WHERE schema_name = 'main' AND NOT internal ORDER BY ALL",
    "function": "SELECT DISTINCT function_name FROM duckdb_functions()"
    " WHERE regexp_full_match(function_name, '[a-z]\\w*') ORDER BY ALL",
}
_ELSE = {
    "column": " in the query's tables; actdb sql --schema lists all, and texts stand in single quotes",
    "table": "; there are {names}",
    "alias": "; the query's tables are {names}",
    "function": "; there are DuckDB's, and {own}",
}


def explain(exc: BaseException, connection: "duckdb.DuckDBPyConnection") -> str:
    """Return DuckDB's message in one line: an unknown name with the nearest, an error of actdb's own as it was raised.

    `connection` is asked for the names that there are, through a cursor of its own.
    """
    text = one_line(exc)
    raised = _RAISED.fullmatch(text)
    if raised and issubclass(getattr(errors, raised[1], Exception), errors.ActdbError):
        return raised[2]
    for function in FUNCTIONS:
        if re.search(rf"\bMacro {function.name}\(\) does not support the supplied arguments", text):
            return f"these arguments do not fit {function.signature}; an example: {function.example}"
    for kind, pattern in _UNKNOWN.items():
        if found := pattern.search(text):
            return _unknown(kind, found[1], text, connection)
    return text


def _unknown(kind: str, name: str, text: str, connection: "duckdb.DuckDBPyConnection") -> str:
    """Return the line on an unknown name: DuckDB's own candidates, which the query can see, come before all others."""
    offered = _CANDIDATES.search(text)
    names = re.findall(r'"(.+?)"', offered[1]) if offered else []
    best = nearest(name, names)
    if best is None and kind in _NAMES:
        names = [found for (found,) in connection.cursor().execute(_NAMES[kind]).fetchall()]
        best = nearest(name, names)
    if best is not None:
        return f'no {kind} "{name}"; did you mean "{best}"?'
    own = ", ".join(function.name for function in FUNCTIONS)
    return f'no {kind} "{name}"' + _ELSE[kind].format(names=", ".join(names), own=own)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name most like another, letter case and qualifiers aside; None where none is like it."""
    plain = {candidate.rpartition(".")[2].lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.rpartition(".")[2].lower(), plain, n=1, cutoff=NEAR)
    return plain[found[0]] if found else None
