"""Formats of the command line: what is written, where, and that it reads back."""

import csv
import datetime
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from actdb.errors import SettingError, WriteError
from actdb.output import FORMATS, emit, output_options

TABLE = pa.table(
    {
        "name": ["plain", 'comma, "quote"\nline', None],
        "small": pa.array([0.1, None, 16777216.0], pa.float32()),
        "wide": [0.1, 1 / 3, 1e300],
        "count": [1, -2, 3],
        "flag": [True, False, None],
        "vector": pa.array([[0.1, 0.2], None, []], pa.list_(pa.float32())),
        "sum": pa.array([Decimal(3), Decimal(4), Decimal(5)], pa.decimal128(38, 0)),
    }
)
CSV = (
    "name,small,wide,count,flag,vector,sum\n"
    'plain,0.1,0.1,1,true,"[0.1, 0.2]",3\n'
    '"comma, ""quote""\nline",,0.3333333333333333,-2,false,,4\n'
    ",16777216.0,1e+300,3,,[],5\n"
)

Written = Callable[..., tuple[str, str]]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Written:
    def write(data: Any, format: str | None = None, columns: list[str] | None = None) -> tuple[str, str]:
        emit(columns or data.column_names, data, format)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return write


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def pretend(width: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))

    return pretend


def test_csv_is_the_default_when_piped(written: Written) -> None:
    assert written(TABLE) == (CSV, "")


def test_csv_reads_back(written: Written) -> None:
    lines = list(csv.reader(io.StringIO(written(TABLE, "csv")[0], newline="")))
    assert lines[2][0] == 'comma, "quote"\nline'
    assert json.loads(lines[1][5]) == [0.1, 0.2]


@given(st.lists(st.floats(width=32), min_size=1), st.lists(st.floats(), min_size=1))
def test_floats_read_back_exactly(singles: list[float], doubles: list[float]) -> None:
    for values, kind, dtype in ((singles, pa.float32(), np.float32), (doubles, pa.float64(), np.float64)):
        out = io.StringIO()
        real, sys.stdout = sys.stdout, out
        try:
            emit(["x"], pa.table({"x": pa.array(values, kind)}), "csv")
        finally:
            sys.stdout = real
        texts = out.getvalue().splitlines()[1:]
        np.testing.assert_array_equal(np.array(texts, dtype), np.array(values, dtype))
        assert [t for t in texts if t != "nan"] == [
            repr(float(str(dtype(v)))) for v in values if not math.isnan(v)
        ]  # and no digit more than needed


def test_rows_of_python_values(written: Written) -> None:
    row = [1, None, np.float32(0.1), np.int64(7), np.array([0.5, 0.1], np.float32), b"\x01\xff", {"a": (1, 2)}]
    columns = list("abcdefg")
    assert written([row], "csv", columns)[0] == 'a,b,c,d,e,f,g\n1,,0.1,7,"[0.5, 0.1]",01ff,"{""a"": [1, 2]}"\n'
    assert json.loads(written([row], "ndjson", columns)[0]) == dict(
        zip(columns, [1, None, 0.1, 7, [0.5, 0.1], "01ff", {"a": [1, 2]}], strict=True)
    )


def test_json(written: Written) -> None:
    expected = [
        {"name": "plain", "small": 0.1, "wide": 0.1, "count": 1, "flag": True, "vector": [0.1, 0.2], "sum": 3},
        {
            "name": 'comma, "quote"\nline',
            "small": None,
            "wide": 1 / 3,
            "count": -2,
            "flag": False,
            "vector": None,
            "sum": 4,
        },
        {"name": None, "small": 16777216.0, "wide": 1e300, "count": 3, "flag": None, "vector": [], "sum": 5},
    ]
    assert json.loads(written(TABLE, "json")[0]) == expected
    lines = written(TABLE, "ndjson")[0]
    assert [json.loads(line) for line in lines.splitlines()] == expected
    assert lines.endswith("}\n")


def test_json_has_no_nan_and_iso_times(written: Written) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    table = pa.table({"x": [math.nan, math.inf], "y": [[-math.inf, 1.0], []], "t": [when, None]})
    text = written(table, "json")[0]
    assert json.loads(text, parse_constant=pytest.fail) == [
        {"x": None, "y": [None, 1.0], "t": "2026-01-02T03:04:05"},
        {"x": None, "y": [], "t": None},
    ]


@pytest.mark.parametrize(("format", "expected"), [("json", "[]\n"), ("ndjson", ""), ("csv", "a,b\n")])
def test_no_rows(written: Written, format: str, expected: str) -> None:
    assert written([], format, ["a", "b"])[0] == expected


def test_equal_column_names_are_kept(written: Written) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert written(table, "csv")[0] == "a,a\n1,2\n"
    assert written(table, "ndjson")[0] == '{"a": 1, "a": 2}\n'


def test_table_is_aligned_and_counted(written: Written) -> None:
    table = pa.table({"head": [1, 10], "token": ["a", None], "mass": pa.array([0.123456789, None], pa.float32())})
    out, err = written(table, "table")
    assert out == "head  token      mass\n----  -----  --------\n   1  a      0.123457\n  10\n"
    assert err == "(2 rows)\n"
    assert written([], "table", ["a"]) == ("a\n-\n", "(0 rows)\n")
    assert written([[1]], "table", ["a"])[1] == "(1 row)\n"


def test_table_is_the_default_on_a_terminal(written: Written, terminal: Callable[[int], None]) -> None:
    terminal(80)
    assert written(pa.table({"a": [1]}))[0] == "a\n-\n1\n"


@pytest.mark.parametrize("width", [10, 17, 40, 80])
def test_table_fits_the_terminal(written: Written, terminal: Callable[[int], None], width: int) -> None:
    terminal(width)
    table = pa.table({f"column_{i}": ["x" * 10 * i] for i in range(8)} | {"n": [123]})
    out, err = written(table, "table")
    assert max(map(len, out.splitlines())) <= width
    assert "…" in out
    assert ("of 9 columns shown" in err) == (width < 80)


def test_long_cells_are_cut_and_short_columns_stay(written: Written, terminal: Callable[[int], None]) -> None:
    terminal(30)
    out, _ = written(pa.table({"id": [12345], "text": ["word " * 20]}), "table")
    assert out.splitlines()[2] == "12345  word word word word wo…"


def test_wide_characters_count_double(written: Written, terminal: Callable[[int], None]) -> None:
    terminal(12)
    out, _ = written(pa.table({"a": ["名前名前名前", "abc"], "b": [1, 2]}), "table")
    assert out.splitlines()[2:] == ["名前名前…  1", "abc        2"]


def test_table_escapes_control_characters(written: Written) -> None:
    out, _ = written(pa.table({"a\x1b]0;t": ["\x1b[2J\n\t\u202e"]}), "table")
    assert out.splitlines()[2] == "\\x1b[2J\\n\\t\\u202e"
    assert "\x1b" not in out


def test_parquet_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="add -o FILE.parquet"):
        emit(TABLE.column_names, TABLE, "parquet")
    emit(TABLE.column_names, TABLE, None, tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").equals(TABLE)
    emit(["a", "b"], [(1, "x"), (None, "y")], "parquet", tmp_path / "y")
    assert pq.read_table(tmp_path / "y").to_pylist() == [{"a": 1, "b": "x"}, {"a": None, "b": "y"}]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("x.csv", "name,"),
        ("x.json", "[\n{"),
        ("x.ndjson", "{"),
        ("x.jsonl", "{"),
        ("x.CSV", "name,"),
        ("x.txt", "name,"),
    ],
)
def test_suffix_decides(tmp_path: Path, name: str, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    emit(TABLE.column_names, TABLE, None, tmp_path / name)
    assert (tmp_path / name).read_text().startswith(start)
    assert capsys.readouterr().out == ""
    assert os.listdir(tmp_path) == [name]


def test_option_beats_suffix(tmp_path: Path) -> None:
    emit(TABLE.column_names, TABLE, "csv", tmp_path / "x.json")
    assert (tmp_path / "x.json").read_bytes().decode() == CSV


def test_unknown_format() -> None:
    with pytest.raises(SettingError, match="unknown format 'xml'; choose from table, json"):
        emit(["a"], [[1]], "xml")


def test_unwritable_places(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is a folder"):
        emit(["a"], [[1]], "csv", tmp_path)
    with pytest.raises(WriteError, match="cannot write .*x.csv: No such file or directory"):
        emit(["a"], [[1]], "csv", tmp_path / "no" / "x.csv")
    if os.getuid():
        tmp_path.chmod(0o500)
        with pytest.raises(WriteError, match="cannot write"):
            emit(["a"], [[1]], "csv", tmp_path / "x.csv")


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("old")

    def rows() -> Any:
        yield [1]
        raise KeyError("late")

    with pytest.raises(KeyError):
        emit(["a"], rows(), "csv", path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.csv"]


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    emit(["a"], [[1]], None, tmp_path / "link.csv")
    assert (tmp_path / "real.csv").read_text() == "a\n1\n"
    assert (tmp_path / "link.csv").is_symlink()


def test_devices_are_written_directly() -> None:
    emit(["a"], [[1]], "csv", "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_broken_pipe_is_left_to_the_caller() -> None:
    code = (
        "import sys\nfrom actdb.output import emit\n"
        "try:\n    emit(['a'], ([i] for i in range(10**7)), 'csv')\n"
        "except BrokenPipeError:\n    sys.stderr.write('broken'); sys.stderr.flush()\n"
        "    import os; os._exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "a\n"
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(30)) == ("broken", 7)
    process.stderr.close()


def test_options_of_a_command(tmp_path: Path) -> None:
    @click.command()
    @output_options
    def show(format: str | None, output: Path | None) -> None:
        emit(["a"], [[1]], format, output)

    runner = CliRunner()
    assert runner.invoke(show, []).output == "a\n1\n"
    assert json.loads(runner.invoke(show, ["--format", "json"]).output) == [{"a": 1}]
    assert runner.invoke(show, ["-o", str(tmp_path / "x.csv")]).output == ""
    assert (tmp_path / "x.csv").read_text() == "a\n1\n"
    assert runner.invoke(show, ["--format", "xml"]).exit_code == 2
    assert all(format in runner.invoke(show, ["--help"]).output for format in FORMATS)


def test_import_is_light() -> None:
    code = "import sys, actdb.output; print([m for m in ('duckdb', 'pyarrow', 'pandas', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
