"""Names and types that come from files: labels, tables and columns, made safe and distinct for SQL."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from actdb.catalog.tables import BUILT_IN
from actdb.catalog.views import RELATION_NAMES
from actdb.errors import SettingError

_USABLE_NAME = re.compile(r"\w[\w.-]{0,99}")
CHECKSUMMED = re.compile(r"-([0-9a-f]{8})\.parquet")
_NUMERIC = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\)")
_PLAIN_TYPE = re.compile(r"[A-Z][A-Z0-9_ ]*(\(\d+, ?\d+\))?(\[\])*")
NULL_TYPE = '"NULL"'
Labels = Sequence[Sequence[str]]
"""The labels of a prompt set: name and DuckDB type of each, in order."""


def label_fields(fields: Sequence[tuple[str, int, str]]) -> Labels:
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
            types[label] = _common_type(types.get(label, NULL_TYPE), kind)
    names = distinct_names(types, taken=(c.name for c in BUILT_IN["prompts"].columns))
    return {label: (names[label], kind if _PLAIN_TYPE.fullmatch(kind) else "VARCHAR") for label, kind in types.items()}


def _common_type(first: str, second: str) -> str:
    if first == second or second == NULL_TYPE:
        return first
    if first == NULL_TYPE:
        return second
    return "DOUBLE" if _NUMERIC.fullmatch(first) and _NUMERIC.fullmatch(second) else "VARCHAR"


def distinct_names(names: Iterable[str], *, taken: Iterable[str]) -> dict[str, str]:
    """Return an SQL name for each name: itself, or with a suffix _2, _3, … where it is taken (DuckDB ignores case)."""
    used = {fold_case(name) for name in taken}
    distinct: dict[str, str] = {}
    for name in names:
        candidate, number = name or "_", 2
        while fold_case(candidate) in used:
            candidate, number = f"{name or '_'}_{number}", number + 1
        used.add(fold_case(candidate))
        distinct[name] = candidate
    return distinct


def user_names(names: Iterable[str]) -> dict[str, str]:
    """Return the SQL name of each added table: none shadows a built-in one, and `results` is one."""
    added = sorted(names)
    distinct = distinct_names((name for name in added if name != "results"), taken=RELATION_NAMES)
    return {name: distinct.get(name, name) for name in added}


def check_table_name(name: str) -> None:
    """Raise `SettingError` unless an added table may have this name: no built-in one, and usable as a folder's."""
    if fold_case(name) in map(fold_case, RELATION_NAMES):
        raise SettingError(f"{name!r} is a built-in table; choose another name than {', '.join(RELATION_NAMES)}")
    if not _USABLE_NAME.fullmatch(name):
        raise SettingError(
            f"table name {name!r} is not usable: up to 100 letters, digits and _ . -, not starting with . or -"
        )


def quote(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def sql_literal(text: str) -> str:
    """Return a text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def fold_case(name: str) -> bytes:
    """Fold case as DuckDB does: ASCII letters only."""
    return name.encode("utf-8", "replace").lower()


def printable(text: str) -> str:
    """Return a text in one line, control characters shown."""
    return text.encode("utf-8", "replace").decode()


def nullable_text(value: Any) -> str | None:
    """Return a value as text, None kept."""
    if value is None:
        return None
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))


def one_line(exc: BaseException) -> str:
    """Return DuckDB's message with its suggestions on one line, without the excerpt of the query."""
    message = re.split(r"\n\s*LINE \d+:|\n\s*Stack Trace:", str(exc), maxsplit=1)[0]
    return " ".join(message.split())[:500]
