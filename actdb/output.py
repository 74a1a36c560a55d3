"""How rows leave the command line: one decorator for the options, one function for table, json, ndjson, csv, parquet.

Data goes to standard output or a file, notes to standard error.
"""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from actdb.errors import SettingError, WriteError
from actdb.storage.folder import temporary_path, write_error

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("table", "json", "ndjson", "csv", "parquet")
SUFFIXES = {".json": "json", ".ndjson": "ndjson", ".jsonl": "ndjson", ".csv": "csv", ".parquet": "parquet"}
LONGEST_CELL = 60
SHORTEST_CELL = 5
GAP = "  "

Command = TypeVar("Command", bound=Callable[..., Any])
Row = Sequence[Any]


def output_options(command: Command) -> Command:
    """Add `--format` and `-o/--output` to a command, which gets them as `format` and `output`."""
    command = click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output."
    )(command)
    return click.option(
        "--format",
        type=click.Choice(FORMATS),
        help="How rows are written [default: by the suffix of -o; else table on a terminal, csv when piped]",
    )(command)


def emit(
    columns: Sequence[str],
    data: "pa.Table | Iterable[Row]",
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> None:
    """Write rows in one of `FORMATS` to a file, or to standard output.

    `data` is an Arrow table, or rows in the order of `columns`. From Arrow, float32 columns are written as the shortest
    text that reads back the same float32. Raises `SettingError` for parquet without a file, `WriteError` or
    `SpaceError` where the file cannot be written; a file appears whole or not at all.
    """
    chosen = format or _default_format(output)
    if chosen not in FORMATS:
        raise SettingError(f"unknown format {chosen!r}; choose from {', '.join(FORMATS)}")
    if chosen == "parquet":
        if output is None:
            raise SettingError("parquet is written to a file: add -o FILE.parquet")
        table = _arrow(columns, data)
        with _file(output) as path:
            _write_parquet(table, path)
        return
    rows = _rows(data)
    if output is None:
        _write(columns, rows, chosen, sys.stdout, width=_terminal_width())
        return
    with _file(output) as path, open(path, "w", encoding="utf-8", newline="") as file:
        _write(columns, rows, chosen, file, width=None)


def _default_format(output: str | os.PathLike[str] | None) -> str:
    if output is not None:
        return SUFFIXES.get(Path(output).suffix.lower(), "csv")
    return "table" if sys.stdout.isatty() else "csv"


def _terminal_width() -> int | None:
    """Return the columns of the terminal on standard output; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@contextlib.contextmanager
def _file(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes the file at the end; pipes and devices are written directly."""
    final = Path(output)
    if final.exists() and not final.is_file():
        if final.is_dir():
            raise SettingError(f"{output} is a folder; -o names a file")
        yield final
        return
    path = temporary_path(final.resolve())
    try:
        yield path
        os.replace(path, final.resolve())
    except BrokenPipeError:
        raise
    except OSError as exc:
        translated = write_error(exc, str(output))
        if translated is exc:
            translated = WriteError(f"cannot write {output}: {os.strerror(exc.errno or 0)}")
        raise translated from exc
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _write(columns: Sequence[str], rows: Iterable[Row], format: str, file: IO[str], *, width: int | None) -> None:
    if format == "table":
        _write_table(columns, list(rows), file, width=width)
    elif format == "csv":
        _write_csv(columns, rows, file)
    else:
        _write_json(columns, rows, file, lines=format == "ndjson")
    file.flush()


# Values


def _rows(data: "pa.Table | Iterable[Row]") -> Iterator[Row]:
    """Yield rows of plain Python values, an Arrow table's batch by batch."""
    if not hasattr(data, "to_batches"):
        yield from data
        return
    for batch in data.to_batches(max_chunksize=65_536):
        yield from zip(*map(_values, batch.columns), strict=True)


def _values(column: "pa.Array") -> list[Any]:
    """Return a column's values; a float32 becomes the float with the same shortest text."""
    import pyarrow as pa

    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        texts = column.to_numpy(zero_copy_only=False).astype(str).tolist()
        return [
            float(text) if valid else None for text, valid in zip(texts, column.is_valid().to_pylist(), strict=True)
        ]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return _list_values(column)
    return list(column.to_pylist())


def _list_values(column: "pa.Array") -> list[Any]:
    lists = []
    items = iter(_values(column.flatten()))  # what nulls hide is left out
    for length in column.value_lengths().to_pylist() if hasattr(column, "value_lengths") else _lengths(column):
        lists.append(None if length is None else [next(items) for _ in range(length)])
    return lists


def _lengths(column: "pa.Array") -> list[int | None]:
    return [column.type.list_size if valid else None for valid in column.is_valid().to_pylist()]


def _arrow(columns: Sequence[str], data: "pa.Table | Iterable[Row]") -> "pa.Table":
    import pyarrow as pa

    if hasattr(data, "to_batches"):
        return data
    rows = list(data)
    return pa.table([pa.array([row[i] for row in rows]) for i in range(len(columns))], names=list(columns))


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities become null, times ISO 8601, bytes hexadecimal."""
    if hasattr(value, "dtype"):
        value = _from_numpy(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, str | int) else str(value)


def _from_numpy(value: Any) -> Any:
    """Return a NumPy scalar or array as plain values, floats by their shortest text."""
    if value.ndim:
        return [_from_numpy(item) for item in value]
    return float(str(value)) if value.dtype.kind == "f" else value.item()


def _cell(value: Any) -> Any:
    """Return what a csv cell holds; floats stay floats, which are written shortest."""
    if hasattr(value, "dtype"):
        value = _from_numpy(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | dict):
        return json.dumps(_plain(value), ensure_ascii=False)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    return value if isinstance(value, float) else str(value)


# Formats


def _write_csv(columns: Sequence[str], rows: Iterable[Row], file: IO[str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(map(_cell, row) for row in rows)


def _write_json(columns: Sequence[str], rows: Iterable[Row], file: IO[str], *, lines: bool) -> None:
    names = [json.dumps(name, ensure_ascii=False) for name in columns]  # kept apart, since two may be equal
    start, between, end = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    empty = True
    for row in rows:
        values = [json.dumps(_plain(value), ensure_ascii=False) for value in row]
        pairs = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        file.write(f"{start if empty else between}{{{pairs}}}")
        empty = False
    file.write(("" if lines else "[]\n") if empty else end)


def _write_parquet(table: "pa.Table", path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(table, path)
    except pa.ArrowException as exc:
        raise SettingError(f"these rows cannot be written as parquet: {exc}") from exc


def _write_table(columns: Sequence[str], rows: Sequence[Row], file: IO[str], *, width: int | None) -> None:
    """Write aligned columns, numbers to the right, cut to the terminal; the note of the row count goes to stderr."""
    texts = [[_shown(value) for value in row] for row in rows]
    right = [
        any(map(_is_number, values)) and all(map(_is_number_or_null, values)) for values in zip(*rows, strict=True)
    ]
    right = right or [False] * len(columns)
    names = [_escaped(name) for name in columns]
    widths = [
        min(LONGEST_CELL if width is None else width, max(map(text_width, cells), default=0))
        for cells in zip(names, *texts, strict=True)
    ]
    widths = widths if width is None else _fitted(widths, width)
    lines = [names, ["-" * w for w in widths], *texts]
    for i, line in enumerate(lines):
        cells = [_aligned(text, w, right=r and i != 1) for text, w, r in zip(line, widths, right, strict=False)]
        cells += ["…"] * (len(widths) < len(columns))
        file.write(GAP.join(cells).rstrip() + "\n")
    hidden = f", {len(widths)} of {len(columns)} columns shown" if len(widths) < len(columns) else ""
    file.flush()
    click.echo(f"({len(rows)} row{'s' * (len(rows) != 1)}{hidden})", err=True)


def _fitted(widths: Sequence[int], width: int) -> list[int]:
    """Cut the widest columns until all fit; where even short ones do not, leave the last ones out."""
    fitted = list(widths)
    while _line_width(fitted) > width and max(fitted) > SHORTEST_CELL:
        fitted[fitted.index(max(fitted))] -= 1
    if _line_width(fitted) <= width:
        return fitted
    while len(fitted) > 1 and _line_width([*fitted, 1]) > width:
        fitted.pop()
    return fitted


def _line_width(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float | Decimal) and not isinstance(value, bool)) or hasattr(value, "dtype")


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def _shown(value: Any) -> str:
    """Return a table cell's text: floats with six digits, control characters escaped."""
    if isinstance(value, float) or (hasattr(value, "dtype") and value.dtype.kind == "f" and not value.ndim):
        return f"{value:.6g}"
    return _escaped(str(_cell(value)))


def _escaped(text: str) -> str:
    """Escape what would move the cursor or change the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _aligned(text: str, width: int, *, right: bool) -> str:
    text = _cut(text, width)
    padding = " " * (width - text_width(text))
    return padding + text if right else text + padding


def _cut(text: str, width: int) -> str:
    if text_width(text) <= width:
        return text
    kept, used = io.StringIO(), 1
    for character in text:
        used += text_width(character)
        if used > width:
            break
        kept.write(character)
    return kept.getvalue() + "…"


def text_width(text: str) -> int:
    """Return the terminal columns that a text takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
