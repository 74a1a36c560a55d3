"""The SQL catalog: tables made from fabricated runs, refreshed, damaged and attacked."""

import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actdb import catalog
from actdb.catalog import (
    SCHEMA,
    SIGNATURES,
    VIEWS,
    build,
    check_catalog,
    check_select,
    check_table_name,
    connect,
    distinct_names,
    label_columns,
    matching_prompts,
    run_query,
    schema_text,
)
from actdb.catalog import connection as connecting
from actdb.errors import DamageError, SettingError, SqlError
from actdb.schema import Commit, RunInfo, SiteSpec, SiteTally
from actdb.storage.commits import Snapshot, claim_run, read_run, table_name, take_snapshot, write_commit
from actdb.storage.folder import Folder

PROMPTS_PER_PART = 2
N_TOKENS = 3
N_HEADS = 2
HEAD_COLUMNS = [c.name for table in SCHEMA if table.name == "head_stats" for c in table.columns[4:]]

Labels = Mapping[str, pa.Array | Sequence[Any]]


def write_table(folder: Folder, name: str, table: pa.Table) -> None:
    path = folder.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def prompts_table(n_prompts: int, labels: Labels) -> pa.Table:
    ids = range(n_prompts)
    columns: dict[str, Any] = {
        "prompt_id": pa.array(ids, pa.int32()),
        "text": pa.array([f"text {i}" for i in ids]),
        "n_tokens": pa.array([N_TOKENS] * n_prompts, pa.int32()),
        "truncated": pa.array([0] * n_prompts, pa.int32()),
        "part": pa.array([i // PROMPTS_PER_PART for i in ids], pa.int32()),
        "row_start": pa.array([i * N_TOKENS for i in ids], pa.int64()),
        "n_rows": pa.array([N_TOKENS] * n_prompts, pa.int32()),
        "entry_start": pa.array([i * 6 for i in ids], pa.int64()),
        "n_entries": pa.array([6] * n_prompts, pa.int64()),
    }
    if labels:
        arrays = [pa.array(values) for values in labels.values()]
        columns["labels"] = pa.StructArray.from_arrays(arrays, names=list(labels))
    return pa.table(columns)


def tokens_table(n_prompts: int) -> pa.Table:
    pairs = [(prompt, pos) for prompt in range(n_prompts) for pos in range(N_TOKENS)]
    return pa.table(
        {
            "prompt_id": pa.array([prompt for prompt, _ in pairs], pa.int32()),
            "pos": pa.array([pos for _, pos in pairs], pa.int32()),
            "token_id": pa.array([10 * prompt + pos for prompt, pos in pairs], pa.int32()),
            "token": pa.array([f"t{pos}" for _, pos in pairs]),
        }
    )


def head_stats_table(part: int) -> pa.Table:
    prompts = [part * PROMPTS_PER_PART + i for i in range(PROMPTS_PER_PART)]
    rows = [(prompt, head) for prompt in prompts for head in range(N_HEADS)]
    stats = {
        name: pa.array([None if name == "result_norm" else prompt + head / 10 for prompt, head in rows], pa.float32())
        for name in HEAD_COLUMNS
    }
    keys = {"prompt_id": [p for p, _ in rows], "layer": [0] * len(rows), "head": [head for _, head in rows]}
    return pa.table({name: pa.array(values, pa.int32()) for name, values in keys.items()} | stats)


def run_info(folder: Folder, run: str, n_parts: int, plan: Mapping[str, Any]) -> RunInfo:
    site = SiteSpec("z", "blocks.{layer}.attn.hook_z", ("layer", "row"), (1, 12), (1, 6), (1, 6), "float16", "lz4")
    names = [f"runs/{run}/{name}.parquet" for name in ("prompts", "tokens")]
    return RunInfo(
        name=run,
        plan_hash=f"hash of {run} {json.dumps(plan, sort_keys=True, default=str)}",
        plan={"prompt_set": "set0", "statistics": ["heads"], "causal": True, "bos": True, **plan},
        model={"model": "tiny", "architecture": "Native", "n_layers": 1, "n_heads": N_HEADS},
        sites=(site,),
        n_parts=n_parts,
        n_prompts=n_parts * PROMPTS_PER_PART,
        n_rows=n_parts * PROMPTS_PER_PART * N_TOKENS,
        n_entries=0,
        files=tuple(folder.record(name) for name in names if folder.exists(name)),
        environment={"device": "cpu", "created_at": "2026-01-02T03:04:05+00:00", "actdb_version": "0.1.0"},
    )


def add_run(
    folder: Folder, run: str, *, n_parts: int = 2, parts: int = 2, labels: Labels | None = None, **plan: Any
) -> RunInfo:
    """Write a run of `n_parts` parts, of which the first `parts` are committed."""
    n_prompts = n_parts * PROMPTS_PER_PART
    write_table(folder, f"runs/{run}/prompts.parquet", prompts_table(n_prompts, labels or {}))
    write_table(folder, f"runs/{run}/tokens.parquet", tokens_table(n_prompts))
    info = run_info(folder, run, n_parts, plan)
    assert claim_run(folder, info)
    for part in range(parts):
        add_part(folder, info, part)
    return info


def add_part(folder: Folder, info: RunInfo, part: int) -> None:
    files = ()
    if info.plan["statistics"]:
        name = table_name(info.name, part, "head_stats")
        write_table(folder, name, head_stats_table(part))
        files = (folder.record(name),)
    tally = SiteTally(raw_bytes=100, stored_bytes=60 + part, max_abs=2.0, max_abs_error=0.5 * part)
    assert write_commit(folder, info.name, Commit(part, info.plan_hash, files, {"z": tally}))


def add_table(folder: Folder, name: str, table: pa.Table, stem: str = "a") -> None:
    path = folder.path(f"tables/{name}/x.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    path.rename(path.with_name(f"{stem}-{google_crc32c.value(path.read_bytes()):08x}.parquet"))


def rows(snapshot: Snapshot, query: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(connect(snapshot)) as connection:
        return run_query(connection, query).fetchall()


def content(snapshot: Snapshot) -> dict[str, list[tuple[Any, ...]]]:
    """Return all tables of a catalog, rows sorted."""
    with contextlib.closing(connect(snapshot)) as connection:
        names = [name for (name,) in run_query(connection, "SHOW TABLES").fetchall()]
        return {name: run_query(connection, f'SELECT * FROM "{name}" ORDER BY ALL').fetchall() for name in names}


def catalog_state(folder: Folder) -> tuple[int, int]:
    status = os.stat(folder.path("catalog.duckdb"))
    return status.st_ino, status.st_mtime_ns


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.create(tmp_path / "db.actdb")


def refuse_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the catalog was built again")

    monkeypatch.setattr(connecting, "_publish", fail)
    monkeypatch.setattr(connecting, "_in_memory", fail)


# Tables


def test_tables_hold_what_the_files_hold(folder: Folder) -> None:
    add_run(
        folder, "run", parts=1, labels={"category": ["a", "b", "a", "b"], "n": [1, 2, None, 4]}, step=5, fold_ln=False
    )
    snapshot = take_snapshot(folder)
    assert rows(snapshot, "FROM models") == [("tiny", "Native", 1, 2, *[None] * 6)]
    ((created, *others),) = rows(
        snapshot,
        "SELECT created_at, run, model, prompt_set, step, status, fold_ln, bos, n_parts, n_committed, device FROM runs",
    )
    assert created.isoformat() == "2026-01-02T03:04:05"
    assert others == ["run", "tiny", "set0", 5, "partial", False, True, 2, 1, "cpu"]
    assert rows(snapshot, "FROM sites") == [("run", "z", ["layer", "row"], [1, 12], "float16", "lz4", 100, 60, 0.0)]
    assert rows(snapshot, "FROM prompts ORDER BY prompt_id") == [
        ("set0", 0, "text 0", "a", 1),
        ("set0", 1, "text 1", "b", 2),
        ("set0", 2, "text 2", "a", None),
        ("set0", 3, "text 3", "b", 4),
    ]
    assert rows(snapshot, "FROM run_prompts ORDER BY prompt_id") == [
        ("run", 0, 3, 0, 0, 0, 3, 0, 6),
        ("run", 1, 3, 0, 0, 3, 3, 6, 6),
    ]
    assert rows(snapshot, "FROM tokens ORDER BY ALL") == [
        ("run", prompt, pos, 10 * prompt + pos, f"t{pos}") for prompt in range(2) for pos in range(3)
    ]
    stats = rows(
        snapshot, "SELECT run, prompt_id, layer, head, round(entropy, 3), result_norm FROM head_stats ORDER BY ALL"
    )
    assert stats == [("run", p, 0, h, pytest.approx(p + h / 10), None) for p in range(2) for h in range(2)]
    assert rows(snapshot, "FROM results") == []


def test_sites_sum_over_committed_parts(folder: Folder) -> None:
    info = add_run(folder, "run", n_parts=3, parts=2)
    query = "SELECT raw_bytes, stored_bytes, max_abs_error FROM sites"
    assert rows(take_snapshot(folder), query) == [(200, 121, 0.5)]
    add_part(folder, info, 2)
    assert rows(take_snapshot(folder), query) == [(300, 183, 1.0)]


def test_every_documented_column_exists(folder: Folder) -> None:
    add_run(folder, "run")
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        for table in SCHEMA:
            result = run_query(connection, f"FROM {table.name}")
            assert result.columns == tuple(c.name for c in table.columns), table.name
            assert result.types == tuple(c.type for c in table.columns), table.name
    for name in ("models", "runs", "sites", "prompts", "run_prompts", "tokens", "head_stats", "results"):
        assert f"{name}: " in schema_text()
    assert schema_text("sites").startswith("sites: ")
    with pytest.raises(SqlError, match="choose from models, runs"):
        schema_text("nope")


@pytest.mark.parametrize(
    "name", ["head_stats", "RUNS", "Head_Stats_Labelled", "", ".x", "-x", "a/b", "a b", 'x"', "..", "1" * 101]
)
def test_unusable_table_names(name: str) -> None:
    with pytest.raises(SettingError, match="built-in table" if name.isalpha() or "_" in name else "not usable"):
        check_table_name(name)


def test_labelled_view_follows_the_labels(folder: Folder) -> None:
    add_run(folder, "first", labels={"kind": ["a", "b", "a", "b"], 'x"y': [1, 2, 3, 4]}, step=7)
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        documented = tuple(column.name for column in VIEWS[0].columns)
        result = run_query(connection, "FROM head_stats_labelled ORDER BY ALL")
        assert result.columns == (*documented, "label_kind", 'label_x"y')
        joined = run_query(
            connection,
            'SELECT h.run, model, step, h.* EXCLUDE (run), kind, "x""y" FROM head_stats h JOIN runs USING (run)'
            " JOIN prompts USING (prompt_set, prompt_id) ORDER BY ALL",
        )
        assert result.fetchall() == joined.fetchall()
        assert len(result.fetchall()) == len(run_query(connection, "FROM head_stats").fetchall()) > 0
    add_run(folder, "second", labels={"later": [True, False, None, True]}, prompt_set="other")
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        found = run_query(connection, "SELECT DISTINCT run, step, label_kind, label_later FROM head_stats_labelled")
        assert {(run, step) for run, step, *_ in found.fetchall()} == {("first", 7), ("second", None)}
        assert ("second", None, None, True) in found.fetchall()


def test_everything_is_documented(folder: Folder) -> None:
    text = schema_text()
    for relation in (*SCHEMA, *VIEWS):
        assert f"{relation.name}: {relation.meaning}" in text
        assert all(f" {column.name} " in schema_text(relation.name) for column in relation.columns)
    for name, signature in SIGNATURES.items():
        assert f"{signature} -> " in text
        assert schema_text(name).startswith(signature)


def test_usable_table_names() -> None:
    for name in ("edges", "my_table.v2", "名前", "_x", "head-stats"):
        check_table_name(name)


def test_empty_database_has_empty_tables(folder: Folder) -> None:
    assert content(take_snapshot(folder)) == {relation.name: [] for relation in (*SCHEMA, *VIEWS)}


def test_run_json_alone_is_no_error(folder: Folder) -> None:
    claim_run(folder, run_info(folder, "killed", 2, {}))
    add_run(folder, "run")
    snapshot = take_snapshot(folder)
    assert rows(snapshot, "SELECT run, status, n_committed FROM runs ORDER BY run") == [
        ("killed", "partial", 0),
        ("run", "complete", 2),
    ]
    assert rows(snapshot, "SELECT run FROM sites ORDER BY run") == [("killed",), ("run",)]
    assert rows(snapshot, "SELECT DISTINCT run FROM run_prompts") == [("run",)]


def test_run_without_statistics_has_no_rows(folder: Folder) -> None:
    add_run(folder, "plain", statistics=[])
    assert rows(take_snapshot(folder), "FROM head_stats") == []
    assert len(rows(take_snapshot(folder), "FROM tokens")) == 12


def test_wrong_types_in_run_json_become_null(folder: Folder) -> None:
    add_run(folder, "run", step="many", bos="perhaps", random_seed=[1], dtype={"a": 1}, store="\ud800")
    ((step, bos, seed, dtype, store),) = rows(
        take_snapshot(folder), "SELECT step, bos, random_seed, dtype, store FROM runs"
    )
    assert (step, bos, seed, dtype, store) == (None, None, None, '{"a": 1}', "?")


def test_prompts_appear_once_a_set_and_labels_are_united(folder: Folder) -> None:
    add_run(folder, "a", labels={"x": [1, 2, 3, 4], "kind": ["u"] * 4})
    add_run(folder, "b", labels={"x": [1, 2, 3, 4], "kind": ["u"] * 4})
    add_run(folder, "c", prompt_set="set1", labels={"x": [0.5] * 4, "more": [True] * 4})
    snapshot = take_snapshot(folder)
    with contextlib.closing(connect(snapshot)) as connection:
        result = run_query(connection, "FROM prompts")
        assert result.columns[3:] == ("x", "kind", "more")
        assert result.types[3:] == ("DOUBLE", "VARCHAR", "BOOLEAN")
        assert len(result.fetchall()) == 8
        assert len(run_query(connection, "FROM run_prompts").fetchall()) == 12


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("BIGINT", "BIGINT", "BIGINT"),
        ("BIGINT", "INTEGER", "DOUBLE"),
        ("BIGINT", "DOUBLE", "DOUBLE"),
        ("BIGINT", "VARCHAR", "VARCHAR"),
        ("BOOLEAN", "BIGINT", "VARCHAR"),
        ('"NULL"', "BIGINT", "BIGINT"),
        ("BIGINT", '"NULL"', "BIGINT"),
        ('"NULL"', '"NULL"', "VARCHAR"),
        ("VARCHAR[]", "VARCHAR[]", "VARCHAR[]"),
        ("STRUCT(a BIGINT)", "STRUCT(a BIGINT)", "VARCHAR"),
    ],
)
def test_label_types(first: str, second: str, expected: str) -> None:
    assert label_columns([[("x", first)], [("x", second)]]) == {"x": ("x", expected)}


def test_distinct_names_ignore_case() -> None:
    assert distinct_names(["A", "a", "a_2", "", "É", "é", "Text"], taken=["text"]) == {
        "A": "A",
        "a": "a_2",
        "a_2": "a_2_2",
        "": "_",
        "É": "É",
        "é": "é",
        "Text": "Text_2",
    }


HOSTILE = [
    '"); DROP TABLE prompts; --',
    "it's",
    "A",
    "a",
    "ünïcödé 名",
    "select",
    "",
    "x\ny",
    "Text",
    "_file",
    "owner",
    "%s {}",
]


def test_hostile_label_names_are_only_names(folder: Folder) -> None:
    labels = {name: [i, i + 1, i + 2, i + 3] for i, name in enumerate(HOSTILE)}
    labels["list"], labels["nested"], labels["void"] = [[1], [2], [], None], [{"": 1}] * 4, [None] * 4
    labels["empty"], labels["half"] = [[]] * 4, [{"x": None, "y": 1}] * 4
    add_run(folder, "run", labels=labels)
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        result = run_query(connection, "FROM prompts WHERE prompt_id = 1")
        found = dict(zip(result.columns, result.fetchall()[0], strict=True))
        for i, name in enumerate(HOSTILE):
            assert found[{"a": "a_2", "": "_", "Text": "Text_2"}.get(name, name)] == i + 1
        assert (found["list"], found["void"], found["empty"]) == ([2], None, "[]")
        assert "1" in found["nested"]
        assert "1" in found["half"]
        assert matching_prompts(connection, "run", '"""); DROP TABLE prompts; --" = 2') == [2]
        assert matching_prompts(connection, "run", "a_2 = 4 AND A = 3") == [1]


@pytest.mark.parametrize("run", ["step=5", "a@b+c-d_e.f", "part=1"])
def test_run_names_are_not_read_as_partitions(folder: Folder, run: str) -> None:
    add_run(folder, run, labels={"step": [7] * 4})
    assert rows(take_snapshot(folder), "SELECT DISTINCT step FROM prompts") == [(7,)]
    assert rows(take_snapshot(folder), "SELECT DISTINCT run FROM head_stats") == [(run,)]


def test_folder_names_are_not_patterns_or_sql(tmp_path: Path) -> None:
    for name in ("[x]*.actdb", 'it\'s; "q" {a,b} ü.actdb'):
        folder = Folder.create(tmp_path / name)
        add_run(folder, "run")
        add_table(folder, "edges", pa.table({"x": [1]}))
        assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(8,)]
        add_run(folder, "run2")
        assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(16,)]
        assert folder.exists("catalog.duckdb")


def test_question_mark_in_the_path_costs_the_file_only(tmp_path: Path) -> None:
    folder = Folder.create(tmp_path / "what?.actdb")  # DuckDB takes what follows for options
    add_run(folder, "run")
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(8,)]
    assert sorted(os.listdir(folder.root)) == ["actdb.json", "runs"]
    assert not [name for name in os.listdir(tmp_path) if "wal" in name]


def test_added_tables(folder: Folder) -> None:
    add_table(folder, "results", pa.table({"analysis": ["p"], "run": ["r"], "key": ["k"], "value": [1.5], "n": [3]}))
    add_table(folder, "results", pa.table({"analysis": ["q"], "value": [2.5], "note": ["hi"]}), stem="b")
    for name in ("edges", "Edges", "head_stats", "head_stats_labelled", 'x"; DROP TABLE runs; --', "k=v"):
        add_table(folder, name, pa.table({"source": [1], "A": [2]}))
    snapshot = take_snapshot(folder)
    assert sorted(rows(snapshot, "SELECT analysis, run, key, value, n, note FROM results")) == [
        ("p", "r", "k", 1.5, 3, None),
        ("q", None, None, 2.5, None, "hi"),
    ]
    names = {name for (name,) in rows(snapshot, "SHOW TABLES")}
    own = {"Edges", "edges_2", "head_stats_2", "head_stats_labelled_2", 'x"; DROP TABLE runs; --', "k=v"}
    assert names == {relation.name for relation in (*SCHEMA, *VIEWS)} | own
    assert rows(snapshot, "FROM head_stats") == []
    assert rows(snapshot, 'FROM "x""; DROP TABLE runs; --"') == [(1, 2)]
    assert rows(snapshot, 'FROM "k=v"') == [(1, 2)]


def test_added_tables_are_refreshed(folder: Folder) -> None:
    add_table(folder, "edges", pa.table({"x": [1]}))
    assert rows(take_snapshot(folder), "FROM edges") == [(1,)]
    add_table(folder, "edges", pa.table({"x": [0.5], "y": ["new"]}), stem="b")
    assert sorted(rows(take_snapshot(folder), "FROM edges")) == [(0.5, "new"), (1.0, None)]
    add_table(folder, "EDGES", pa.table({"z": [9]}))  # sorts first, so that it takes the name
    assert rows(take_snapshot(folder), "FROM edges") == [(9,)]
    assert sorted(rows(take_snapshot(folder), "FROM edges_2")) == [(0.5, "new"), (1.0, None)]


# Refreshing


def test_fresh_catalog_is_not_written(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(folder, "run")
    connect(take_snapshot(folder)).close()
    before, listing = catalog_state(folder), sorted(os.listdir(folder.root))
    refuse_refresh(monkeypatch)
    monkeypatch.setattr(Folder, "temporary", refuse_refresh)
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(8,)]
    assert (catalog_state(folder), sorted(os.listdir(folder.root))) == (before, listing)


def test_refresh_equals_building_anew(folder: Folder) -> None:
    info = add_run(folder, "m", n_parts=3, parts=1, labels={"x": list(range(6))})
    steps: list[Callable[[], Any]] = [
        lambda: add_part(folder, info, 1),
        lambda: add_run(folder, "n", parts=1, labels={"x": list(range(4))}, prompt_set="same layout"),
        lambda: add_run(folder, "a", parts=1, labels={"y": ["v"] * 4, "x": ["s"] * 4}, prompt_set="other layout"),
        lambda: add_part(folder, info, 2),
        lambda: claim_run(folder, run_info(folder, "z", 1, {})),
        lambda: add_table(folder, "edges", pa.table({"x": [1]})),
    ]
    for step in steps:
        connect(take_snapshot(folder)).close()
        step()
        refreshed = content(take_snapshot(folder))
        catalog.discard(folder)
        assert content(take_snapshot(folder)) == refreshed


def test_refresh_reads_only_new_files(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(folder, "a")
    connect(take_snapshot(folder)).close()
    add_run(folder, "b")
    folder.path(table_name("a", 0, "head_stats")).unlink()
    folder.path("runs/a/tokens.parquet").unlink()
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(16,)]


def test_open_connection_keeps_its_content(folder: Folder) -> None:
    info = add_run(folder, "run", n_parts=3, parts=1)
    query = "SELECT count(*) FROM head_stats"
    counts, connections = [], []
    for part in (1, 2, None):
        connections.append(connect(take_snapshot(folder)))
        counts.append(run_query(connections[-1], query).fetchone())
        if part is not None:
            add_part(folder, info, part)
    assert counts == [(4,), (8,), (12,)]
    assert [run_query(c, query).fetchone() for c in connections] == counts
    for connection in connections:
        connection.close()


def test_catalog_newer_than_the_snapshot_is_left(folder: Folder) -> None:
    info = add_run(folder, "run", parts=1)
    old = take_snapshot(folder)
    add_part(folder, info, 1)
    connect(take_snapshot(folder)).close()
    before = catalog_state(folder)
    assert rows(old, "SELECT count(*) FROM head_stats") == [(4,)]
    assert catalog_state(folder) == before


def test_removed_run_leaves_the_catalog(folder: Folder) -> None:
    add_run(folder, "keep")
    add_run(folder, "gone", prompt_set="set1", labels={"x": [1] * 4})
    connect(take_snapshot(folder)).close()
    before = catalog_state(folder)
    subprocess.run(["rm", "-r", folder.path("runs/gone")], check=True)
    assert rows(take_snapshot(folder), "SELECT DISTINCT run FROM head_stats") == [("keep",)]
    assert rows(take_snapshot(folder), "SELECT DISTINCT prompt_set FROM prompts") == [("set0",)]
    assert catalog_state(folder) != before


def test_run_replaced_by_another_plan(folder: Folder) -> None:
    add_run(folder, "run", step=1)
    connect(take_snapshot(folder)).close()
    subprocess.run(["rm", "-r", folder.path("runs/run")], check=True)
    add_run(folder, "run", step=2, parts=1)
    assert rows(take_snapshot(folder), "SELECT step, n_committed FROM runs") == [(2, 1)]
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(4,)]


def test_unwritable_folder_is_served_from_memory(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(folder, "run", labels={"x": [1] * 4})
    monkeypatch.setattr(Folder, "writable", lambda self: False)
    snapshot = take_snapshot(folder)
    with contextlib.closing(connect(snapshot)) as connection:
        assert run_query(connection, "SELECT count(*) FROM head_stats").fetchall() == [(8,)]
        with pytest.raises(SqlError, match="read-only"):
            run_query(connection, "WITH x AS (INSERT INTO results VALUES (1, 2, 3, 4) RETURNING *) FROM x")
        with pytest.raises(SqlError, match="disabled by configuration"):
            run_query(connection, f"FROM read_text('{folder.path('actdb.json')}')")
    assert not folder.exists("catalog.duckdb")


def test_full_disk_is_served_from_memory(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(folder, "run")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(connecting, "_write", fail)
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(8,)]
    assert sorted(os.listdir(folder.root)) == ["actdb.json", "runs"]


def test_another_version_of_the_catalog_is_replaced(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(folder, "run")
    connect(take_snapshot(folder)).close()
    before = catalog_state(folder)
    monkeypatch.setattr(build, "CATALOG_VERSION", 0)
    connect(take_snapshot(folder)).close()
    assert catalog_state(folder) != before


def _refresh(root: str, start: Any, results: Any) -> None:
    start.wait()
    try:
        snapshot = take_snapshot(Folder.open(root))
        results.put(rows(snapshot, "SELECT count(*) FROM head_stats"))
    except BaseException as exc:
        results.put(repr(exc))


@pytest.mark.parametrize("stale", [False, True])
def test_processes_refresh_at_once(folder: Folder, stale: bool) -> None:
    if stale:
        add_run(folder, "first")
        connect(take_snapshot(folder)).close()
    add_run(folder, "run")
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_refresh, args=(str(folder.root), start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    results.close()
    results.join_thread()
    assert found == [[(16 if stale else 8,)]] * 3
    assert not [name for name in os.listdir(folder.root) if name.startswith(".tmp")]


def test_threads_refresh_at_once(folder: Folder) -> None:
    add_run(folder, "run")
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(rows(take_snapshot(folder), "SELECT count(*) FROM head_stats")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[(8,)]] * 4


# Damage


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_folder(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def damage_wal(path: Path) -> None:
    path.with_name("catalog.duckdb.wal").write_bytes(b"garbage")


@pytest.mark.parametrize(
    "damage", [damage_garbage, damage_truncated, damage_empty, damage_folder, damage_wal, Path.unlink]
)
def test_damaged_catalog_is_built_again(
    folder: Folder, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run(folder, "run")
    connect(take_snapshot(folder)).close()
    damage(folder.path("catalog.duckdb"))
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(8,)]
    assert sorted(os.listdir(folder.root)) == ["actdb.json", "catalog.duckdb", "runs"]
    refuse_refresh(monkeypatch)
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(8,)]
    check_catalog(folder)


def is_damaged(folder: Folder) -> bool:
    try:
        check_catalog(folder)
    except DamageError:
        return True
    return False


def test_flipped_bytes_in_the_catalog_never_pass(folder: Folder) -> None:
    add_run(folder, "run")
    snapshot = take_snapshot(folder)
    expected = content(snapshot)
    path = folder.path("catalog.duckdb")
    intact = path.read_bytes()
    for place in range(0, len(intact), len(intact) // 10):
        altered = bytearray(intact)
        altered[place] ^= 0x55
        path.write_bytes(altered)
        if is_damaged(folder):
            catalog.discard(folder)
        assert content(snapshot) == expected


@pytest.mark.parametrize(
    "name", ["runs/run/prompts.parquet", "runs/run/tokens.parquet", table_name("run", 1, "head_stats"), "tables/edges"]
)
@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped"])
def test_damaged_sources_are_named(folder: Folder, name: str, fault: str) -> None:
    add_run(folder, "run")
    add_table(folder, "edges", pa.table({"x": [1]}))
    snapshot = take_snapshot(folder)
    path = folder.path(name) if name.endswith(".parquet") else next(folder.path(name).iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if fault == "missing" else path.write_bytes(data[:99] if fault == "truncated" else data)
    with pytest.raises(DamageError, match=path.name):
        connect(snapshot)
    assert sorted(os.listdir(folder.root)) == ["actdb.json", "runs", "tables"]


def test_source_that_is_no_parquet_is_damage(folder: Folder) -> None:
    add_run(folder, "run")
    path = folder.path("tables/edges/a.parquet")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(DamageError, match=r"no catalog can be made of .*a\.parquet.*; run `actdb verify`"):
        connect(take_snapshot(folder))


# Hostile databases


def forge(folder: Folder, statements: Sequence[str]) -> None:
    """Put statements into the stored catalog, as someone who made the database could have."""
    with contextlib.closing(duckdb.connect(str(folder.path("catalog.duckdb")))) as connection:
        for statement in statements:
            connection.execute(statement)


def test_source_that_leads_outside_is_refused(folder: Folder, tmp_path: Path) -> None:
    info = add_run(folder, "run")
    outside = tmp_path / "secret.parquet"
    path = folder.path("runs/run/prompts.parquet")
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DamageError, match="outside"):
        connect(take_snapshot(folder))
    assert info.n_parts == 2


def make_secret(path: Path, reader: str) -> None:
    if reader == "read_parquet":
        pq.write_table(pa.table({"kind": ["s3cret"]}), path)
    else:
        path.write_text("kind\ns3cret\n")


@pytest.mark.parametrize("reader", ["read_text", "read_csv", "read_parquet", "glob"])
def test_views_of_a_hostile_catalog_read_nothing(folder: Folder, tmp_path: Path, reader: str) -> None:
    add_run(folder, "run")
    connect(take_snapshot(folder)).close()
    make_secret(tmp_path / "secret", reader)
    forge(folder, ["DROP TABLE results", f"CREATE VIEW results AS FROM {reader}('{tmp_path / 'secret'}')"])
    with pytest.raises(SqlError, match="disabled by configuration"):
        rows(take_snapshot(folder), "FROM results")


@pytest.mark.parametrize("stored", ["internal.items", "internal.prompt_sets", "internal.stamp", "prompts", "runs"])
def test_views_of_a_stale_hostile_catalog_read_nothing(folder: Folder, tmp_path: Path, stored: str) -> None:
    add_run(folder, "run", prompt_set="set1", labels={"x": [1] * 4})
    connect(take_snapshot(folder)).close()
    add_run(folder, "run2")
    secret = tmp_path / "secret"
    make_secret(secret, "read_csv")
    view = f"CREATE VIEW {stored} AS SELECT *, kind AS name, kind AS item, kind AS digest FROM read_csv('{secret}')"
    forge(folder, [f"DROP TABLE {stored}", view])
    secret.unlink()
    os.mkfifo(secret)  # opening it would hang for ever
    assert rows(take_snapshot(folder), "SELECT count(*) FROM head_stats") == [(16,)]
    assert rows(take_snapshot(folder), "SELECT count(*) FROM prompts") == [(8,)]


def test_macros_of_a_hostile_catalog_read_nothing(folder: Folder, tmp_path: Path) -> None:
    add_run(folder, "run")
    connect(take_snapshot(folder)).close()
    (tmp_path / "secret").write_text("s3cret")
    macro = f"CREATE MACRO lower(x) AS (SELECT content FROM read_text('{tmp_path / 'secret'}'))"
    forge(folder, [macro])
    with pytest.raises(SqlError, match="disabled by configuration"):
        rows(take_snapshot(folder), "SELECT lower(text) FROM prompts")


@pytest.mark.parametrize(
    "query",
    [
        "FROM read_text('{path}')",
        "FROM '{path}'",
        "FROM read_csv('{path}')",
        "FROM glob('{path}')",
        "FROM sniff_csv('{path}')",
        "FROM parquet_metadata('{path}')",
        "FROM query('FROM read_text(''{path}'')')",
        "SELECT (FROM (SELECT content FROM read_text('{path}')))",
    ],
)
def test_queries_read_no_files(folder: Folder, query: str) -> None:
    path = folder.path("secret.csv")
    path.write_text("s3cret\n")
    with pytest.raises(SqlError, match="disabled by configuration"):
        rows(take_snapshot(folder), query.format(path=path))


def test_queries_see_no_python_variables(folder: Folder) -> None:
    edges = pa.table({"x": [1]})
    with pytest.raises(SqlError, match='no table "edges"'):
        rows(take_snapshot(folder), "FROM edges")
    assert edges.num_rows == 1


def test_settings_are_locked(folder: Folder) -> None:
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        for setting in ("enable_external_access = true", "autoload_known_extensions = true", "threads = 1"):
            with pytest.raises(duckdb.Error, match="locked|Cannot"):
                connection.execute(f"SET {setting}")
        with pytest.raises(SqlError, match="locked"):
            run_query(connection, "FROM enable_logging('QueryLog', storage = 'file')")


# Queries


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        " select 1 ; ",
        "-- note\nWITH a AS (SELECT 1) FROM a",
        "VALUES (1)",
        "FROM runs",
        "TABLE runs",
        "DESCRIBE runs",
        "SHOW TABLES",
        "SUMMARIZE runs",
        "PIVOT runs ON status IN ('complete')",
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE SELECT 1",
        "explain /* ; */ (FORMAT json) -- x\n SELECT 1",
        "EXPLAIN (ANALYZE, FORMAT JSON) FROM runs",
        "EXPLAIN (SELECT 1)",
    ],
)
def test_reading_statements_pass(folder: Folder, query: str) -> None:
    check_select(query)
    rows(take_snapshot(folder), query)


@pytest.mark.parametrize(
    ("query", "refused"),
    [
        ("COPY runs TO 'x.csv'", "COPY"),
        ("CREATE TABLE x (a INT)", "CREATE"),
        ("CREATE MACRO f() AS 1", "CREATE"),
        ("INSERT INTO runs VALUES (1)", "INSERT"),
        ("UPDATE runs SET run = 'x'", "UPDATE"),
        ("DELETE FROM runs", "DELETE"),
        ("DROP TABLE runs", "DROP"),
        ("ATTACH 'x.db'", "ATTACH"),
        ("SET threads = 1", "SET"),
        ("USE memory", "SET"),
        ("PRAGMA database_size", "PRAGMA"),
        ("CALL enable_logging()", "CALL"),
        ("BEGIN", "TRANSACTION"),
        ("INSTALL httpfs", "LOAD"),
        ("EXPORT DATABASE 'x'", "EXPORT"),
        ("EXPLAIN DELETE FROM runs", "DELETE"),
        ("EXPLAIN ANALYZE INSERT INTO runs SELECT * FROM runs", "INSERT"),
        ("EXPLAIN (ANALYZE) COPY runs TO 'x.csv'", "COPY"),
        ("/* EXPLAIN */ EXPLAIN /* x */ ANALYZE CREATE TABLE x AS SELECT 1", "CREATE"),
        ("PIVOT runs ON status", "PIVOT without IN"),
    ],
)
def test_other_statements_are_refused(query: str, refused: str) -> None:
    with pytest.raises(SqlError, match=f"actdb sql only reads: {refused}.* refused"):
        check_select(query)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the query is empty"),
        ("-- nothing", "the query is empty"),
        ("SELECT 1; SELECT 2", "one statement at a time: 2 given"),
        ("SELECT 1; DROP TABLE runs", "one statement at a time: 2 given"),
        ("SELEC 1", 'Parser Error: syntax error at or near "SELEC"'),
        ("SELECT '\ud800'", "not valid Unicode"),
    ],
)
def test_unusable_queries(query: str, message: str) -> None:
    with pytest.raises(SqlError, match=message):
        check_select(query)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT entropie FROM head_stats", 'no column "entropie"; did you mean "entropy"\\?'),
        ("SELECT h.entropie FROM head_stats h", 'no column "entropie"; did you mean "entropy"\\?'),
        ("SELECT avg(first_mas) FROM head_stats GROUP BY layer", 'no column "first_mas"; did you mean "first_mass"\\?'),
        ("SELECT * EXCLUDE (layr) FROM head_stats", 'no column "layr"; did you mean "layer"\\?'),
        ("FROM head_stats JOIN runs USING (rn)", 'no column "rn"; did you mean "run"\\?'),
        ("SELECT ENTROPIE FROM head_stats", 'no column "ENTROPIE"; did you mean "entropy"\\?'),
        ('SELECT "a""b" FROM runs', 'no column "a"b" in the query.s tables; actdb sql --schema lists all, .*'),
        ('SELECT run FROM runs WHERE status = "xyz"', 'no column "xyz" .*texts stand in single quotes'),
        ("FROM head_stat", 'no table "head_stat"; did you mean "head_stats"\\?'),
        ("FROM head_stats_labeled", 'no table "head_stats_labeled"; did you mean "head_stats_labelled"\\?'),
        ("FROM zzzz", 'no table "zzzz"; there are head_attribution, head_changes, .*, tokens'),
        ("SELECT x.entropy FROM head_stats h", 'no alias "x"; the query.s tables are h'),
        ("SELECT medan(entropy) FROM head_stats", 'no function "medan"; did you mean "median"\\?'),
        ("FROM rnge(3)", 'no function "rnge"; did you mean "range"\\?'),
        ("SELECT list_cosine_simlarity([1], [2])", 'no function .*; did you mean "list_cosine_similarity"\\?'),
        ("SELECT 'x'::INTEGER", "Conversion Error: Could not convert string 'x' to INT32"),
        ("SELECT ?", ".*parameters: 1"),
    ],
)
def test_errors_are_one_line_with_suggestions(folder: Folder, query: str, message: str) -> None:
    with pytest.raises(SqlError) as caught:
        rows(take_snapshot(folder), query)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_can_be_fetched_again(folder: Folder) -> None:
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        result = run_query(connection, "SELECT i, i / 2 AS half, random() AS r FROM range($n) t(i)", {"n": 3})
        first = result.fetchall()
        assert [row[:2] for row in first] == [(0, 0.0), (1, 0.5), (2, 1.0)]
        assert result.fetchall() == first
        assert result.arrow().to_pylist() == [dict(zip(result.columns, row, strict=True)) for row in first]
        assert result.df()["r"].tolist() == [row[2] for row in first]
        assert [result.fetchone() for _ in range(4)] == [*first, None]
        assert result.columns == ("i", "half", "r")
        assert result.types == ("BIGINT", "DOUBLE", "DOUBLE")
        assert run_query(connection, "SELECT ?", [5]).fetchone() == (5,)
        assert run_query(connection, "SELECT 1 WHERE false").fetchone() is None


def test_functions_added_in_memory_are_seen(folder: Folder) -> None:
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        connection.create_function("_double", lambda x: 2 * x, ["BIGINT"], "BIGINT")
        connection.execute("CREATE MACRO memory.main.twice(x, more := 0) AS _double(x) + more")
        connection.execute("CREATE VIEW memory.main.own AS SELECT count(*) AS n FROM actdb.main.runs")
        assert run_query(connection, "SELECT twice(4, more := 1), n FROM own").fetchall() == [(9, 0)]
        assert "twice" in catalog.words(connection)


def test_words_for_completion(folder: Folder) -> None:
    with contextlib.closing(connect(take_snapshot(folder))) as connection:
        assert {"SELECT", "GROUP", "head_stats", "entropy", "avg", "list_cosine_similarity"} <= set(
            catalog.words(connection)
        )


# Matching prompts


@pytest.fixture
def labelled(folder: Folder) -> Folder:
    labels = {"category": ["a", "b", "a", "it's"], "n_tokens": [100, 200, 300, 400]}
    add_run(folder, "run", labels=labels)
    add_run(folder, "part", parts=1, labels=labels)
    return folder


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("category = 'a'", [0, 2]),
        ("category = 'it''s'", [3]),
        ("n_tokens > 150", [1, 2, 3]),  # the label, not the tokens of the run
        ("row_start >= 6 -- later", [2, 3]),
        ("part = 1 AND truncated = 0", [2, 3]),
        ("text LIKE '%1'", [1]),
        ("true", [0, 1, 2, 3]),
        ("NULL", []),
        ("category IN (SELECT category FROM prompts GROUP BY ALL HAVING count(*) > 1)", [0, 2]),
        ("prompt_id IN (SELECT prompt_id FROM head_stats WHERE entropy > 2.05)", [2, 3]),
        ("(category = 'a') OR (category = 'b')", [0, 1, 2]),
        ("CASE WHEN category = 'b' THEN true ELSE false END", [1]),
        ("category = ';)'", []),
    ],
)
def test_matching_prompts(labelled: Folder, where: str, expected: list[int]) -> None:
    with contextlib.closing(connect(take_snapshot(labelled))) as connection:
        assert matching_prompts(connection, "run", where) == expected
        assert matching_prompts(connection, "part", where) == [i for i in expected if i < 2]
        assert matching_prompts(connection, "nope", where) == []


@pytest.mark.parametrize(
    "where",
    [
        "",
        "1) --",
        "true); DROP TABLE prompts; --",
        "true; SELECT 1",
        "true) UNION (SELECT 42 WHERE true",
        "true) UNION (SELECT 42 WHERE (true)",
        "true THEN true END UNION SELECT 42 WHERE CASE WHEN true",
        "true /*",
        "SELECT true",
        "true, true",
        "true ORDER BY 1",
        "category = 'a",
        "nope = 1",
        "$1 = 1",
        "count(*) > 1",
        "text = (SELECT content FROM read_text('/etc/hostname'))",
    ],
)
def test_where_is_one_expression(labelled: Folder, where: str) -> None:
    with contextlib.closing(connect(take_snapshot(labelled))) as connection:
        with pytest.raises(SqlError) as caught:
            matching_prompts(connection, "run", where)
        assert "\n" not in str(caught.value)


# Speed and imports


def test_many_runs(folder: Folder) -> None:
    info = add_run(folder, "run-000", labels={"category": ["a"] * 4})
    copy_run(folder, info, range(1, 500))
    started = time.perf_counter()
    connection = connect(take_snapshot(folder))
    built_s = time.perf_counter() - started
    assert run_query(connection, "SELECT count(*), count(DISTINCT run) FROM head_stats").fetchall() == [(4000, 500)]
    connection.close()
    copy_run(folder, info, [500])
    snapshot = take_snapshot(folder)
    started = time.perf_counter()
    connect(snapshot).close()
    refreshed_s = time.perf_counter() - started
    started = time.perf_counter()
    connect(snapshot).close()
    fresh_s = time.perf_counter() - started
    print(f"built {built_s:.2f} s, one more run {refreshed_s:.3f} s, fresh {fresh_s:.4f} s")
    assert built_s < 20
    assert refreshed_s < 5
    assert fresh_s < 1


def copy_run(folder: Folder, info: RunInfo, numbers: Sequence[int]) -> None:
    """Write further runs like one, their files the same."""
    source = folder.path(f"runs/{info.name}")
    for number in numbers:
        run = f"run-{number:03d}"
        target = folder.path(f"runs/{run}")
        (target / "parts").mkdir(parents=True)
        for name in ("prompts.parquet", "tokens.parquet", *(f"parts/{p:06d}.head_stats.parquet" for p in range(2))):
            os.link(source / name, target / name)
        files = tuple(replace(f, path=f.path.replace(info.name, run)) for f in info.files)
        copied = replace(info, name=run, plan_hash=run, files=files, plan={**info.plan, "step": number})
        claim_run(folder, copied)
        for part in range(2):
            record = (folder.record(table_name(run, part, "head_stats")),)
            write_commit(folder, run, Commit(part, run, record, {"z": SiteTally(1, 1, 1.0, 0.0)}))
    assert read_run(folder, info.name) == info


def test_import_is_light() -> None:
    modules = ("duckdb", "pyarrow", "pandas", "torch", "zarr")
    code = f"import sys, actdb.catalog; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
