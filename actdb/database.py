"""Databases: what users open, query and write back to."""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from actdb import catalog
from actdb.errors import DamageError, RunError, SettingError, WriteError
from actdb.harvesting.settings import Settings, parse_sites
from actdb.run import Run
from actdb.storage import commits, verify
from actdb.storage.commits import RUNS, TABLES, Snapshot
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import duckdb
    import pyarrow

MODES = ("r", "a")
RESULT_COLUMNS = ("low", "high", "n", "seed", "null", "gold", "claimed", "verdict")


def open(path: str | os.PathLike[str], *, mode: str = "r") -> "Database":
    """Open a database: a snapshot of what is committed now, which stays the same until `refresh`.

    `mode="a"` lets analyses add tables and results; nothing else is ever written. Works while a harvest runs, and on a
    read-only disk. Costs one small file read a run. Raises `DatabaseError` where there is no database.
    """
    return Database(path, mode=mode)


def save_model(module: Any, folder: str | os.PathLike[str]) -> None:
    """Write a TransformerLens-native model as `config.json` and `model.safetensors`, for `actdb harvest FOLDER`.

    Raises `ModelError` for modules of another kind: those have a `save_pretrained` of their own.
    """
    from actdb.harvesting import native

    native.save_model(module, folder)


def harvest(
    model: Any,
    prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    out: str | os.PathLike[str] | None = None,
    *,
    run: str | None = None,
    step: int | None = None,
    sites: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: str = "all",
    dtype: str | None = None,
    store: str | None = None,
    codec: str = "lz4",
    precision: int | None = None,
    pattern: str = "full",
    stats: Sequence[str] | None = None,
    bos: bool = True,
    max_length: int | None = None,
    strict: bool = False,
    batch_tokens: int | None = None,
    part_tokens: int | None = None,
    buffer_mb: int = 128,
    worker: tuple[int, int] | None = None,
    device: str | None = None,
    tokenizer: Any = None,
    processing: str = "raw",
    random_init: int | None = None,
    hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    hooks_id: str | None = None,
    progress: Callable[[Any], None] | None = None,
) -> Run:
    """Run a model over prompts once and store its activations; returns the run.

    `model` is a name, a folder, or an `nn.Module` with TransformerLens HookPoints and a `cfg`; `prompts` is a .jsonl,
    .txt, .csv or .parquet file, or dicts with "text" or "tokens" and labels. `out` defaults to the model's short name
    with `.actdb`. Calling again with the same arguments resumes an interrupted run, checks a complete one against its
    checksums and recomputes damaged parts.

    `sites` are names of activations (default: those of resid_post, z, pattern, mlp_post that the model has; "none" for
    statistics only), `layers` the layers to store, `positions` "all" or "last". The model computes in `dtype` and
    values are kept as `store` (default float16, float32 for bfloat16 models), with `precision` mantissa bits where
    given. `hooks` are (hook_name, function) interventions, named by `hooks_id`. `worker=(i, n)` takes every n-th part.
    `progress` is called after each batch. Every other keyword is an option of `actdb harvest`, described there.

    Raises `ModelError`, `PromptError`, `SiteError`, `SettingError` before anything is written, `RunError` where the
    run's name is taken by another plan, `OverflowingError` where `store` cannot hold a value, `SpaceError` for a disk
    too small.
    """
    settings = Settings(
        run=run,
        step=step,
        sites=parse_sites(sites),
        layers=None if layers is None else tuple(layers),
        positions=positions,
        dtype=dtype,
        store=store,
        codec=codec,
        precision=precision,
        pattern=pattern,
        stats=None if stats is None else tuple(stats),
        bos=bos,
        max_length=max_length,
        strict=strict,
        batch_tokens=batch_tokens,
        part_tokens=part_tokens,
        buffer_mb=buffer_mb,
        worker=worker,
        device=device,
        tokenizer=tokenizer,
        processing=processing,
        random_init=random_init,
        hooks_id=hooks_id,
    )
    from actdb.harvesting.execution import run_harvest
    from actdb.harvesting.harvest import plan_harvest

    planned = plan_harvest(
        model, prompts if not isinstance(prompts, os.PathLike) else Path(prompts), settings, hooks=hooks
    )
    path = Path(out) if out is not None else Path(f"{planned.model.name}.actdb")
    run_harvest(planned, path, progress=progress)
    return Database(path).run(planned.info.name)


class Database:
    """A snapshot of a database; safe to use from several threads.

    Use it as a context manager, or `close` it: the SQL connection holds files open.
    """

    def __init__(self, path: str | os.PathLike[str], *, mode: str = "r") -> None:
        if mode not in MODES:
            raise SettingError(f"mode {mode!r}: choose 'r' to read or 'a' to add tables and results")
        self._folder = Folder.open(path)
        self._mode = mode
        self._lock = threading.RLock()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._runs: dict[str, Run] = {}
        self._snapshot = commits.take_snapshot(self._folder)

    @property
    def path(self) -> Path:
        """The database folder."""
        return self._folder.root

    @property
    def snapshot(self) -> Snapshot:
        """What is committed, as seen when the database was opened or refreshed."""
        return self._snapshot

    def refresh(self) -> None:
        """Take a new snapshot; runs and selections made before keep the old one."""
        with self._lock:
            self.close()
            self._runs = {}
            self._snapshot = commits.take_snapshot(self._folder)

    def close(self) -> None:
        """Close the SQL connection; it opens again when needed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def runs(self) -> list[Run]:
        """Return all runs, oldest first; runs whose `run.json` is damaged are left out (`verify` names them)."""
        return [self._run(name) for name in sorted(self._snapshot.runs, key=self._age)]

    def run(self, name: str | None = None) -> Run:
        """Return a run by name, or the only or newest one; raises `RunError` with the names that there are."""
        names = sorted(self._snapshot.runs, key=self._age)
        if name is None:
            if not names:
                raise RunError(f"{self.path} holds no runs yet")
            return self._run(names[-1])
        if name not in self._snapshot.runs:
            damaged = self._snapshot.damaged.get(name)
            raise RunError(damaged or f"no run {name!r} in {self.path}; it holds {', '.join(names) or 'none'}")
        return self._run(name)

    def sql(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> "catalog.QueryResult":
        """Run one SELECT-type query over the tables; the result has `.df()`, `.arrow()`, `.fetchall()`, `.fetchone()`.

        Raises `SqlError` for anything that is not a query, or that DuckDB rejects. The first query brings the catalog
        up to date.
        """
        with self._lock:
            return catalog.run_query(self._connect(), query, parameters)

    def sql_words(self) -> list[str]:
        """Return the words that an SQL shell may complete: keywords, tables, columns, functions."""
        with self._lock:
            return catalog.words(self._connect())

    def verify(self) -> list[verify.Damage]:
        """Check every stored byte against its checksum; returns what is damaged, [] where all is well.

        The catalog, which is derived, is read whole too. Costs one pass over all files.
        """
        damages = list(verify.check_database(self._snapshot))
        try:
            catalog.check_catalog(self._folder)
        except DamageError as exc:
            damages.append(verify.Damage("catalog.duckdb", str(exc)))
        return damages

    def remove(self, run: str) -> int:
        """Delete a run: its arrays, statistics and weights that no other run uses; returns the bytes freed.

        The commits go first, so that an interrupted removal leaves a partial run and never a damaged one. Works without
        `mode="a"`. Raises `RunError` where there is no such run.
        """
        if run not in self._snapshot.runs and run not in self._snapshot.damaged:
            raise RunError(f"no run {run!r} in {self.path}; it holds {', '.join(self._snapshot.runs) or 'none'}")
        weights = self._own_weights(run)
        folders = [f"{RUNS}/{run}/commits", f"arrays.zarr/{run}", *weights, f"{RUNS}/{run}/parts", f"{RUNS}/{run}"]
        freed = 0
        try:
            for name in folders:
                freed += _remove_tree(self._folder, name)
        except OSError as exc:
            raise WriteError(f"cannot remove {exc.filename or self.path}: {exc.strerror}") from exc
        self.refresh()
        return freed

    def add_table(self, name: str, table: "pyarrow.Table", *, replace: bool = False) -> None:
        """Add rows to a table of your own, readable by SQL under `name`; `replace` drops what it held before.

        The rows become a Parquet file with its checksum in its name. Needs `mode="a"`.
        """
        catalog.check_table_name(name)
        existing = self._snapshot.tables.get(name, ())
        written = self._write_table(name, f"rows-{len(existing):06d}", table)
        self._drop_files(name, [file for file in existing if replace and file != written])
        self.refresh()

    def add_results(self, analysis: str, run: Run | str, *, values: Mapping[str, Any]) -> None:
        """Store an analysis's figures of a run in the table `results`; what it stored of that run before is replaced.

        `values` maps keys to numbers, or to dicts with `value` and any of low, high, n, seed, null, gold, claimed,
        verdict. Needs `mode="a"`.
        """
        name = run.name if isinstance(run, Run) else run
        table = _results_table(analysis, name, values)
        stem = f"{_slug(analysis)}--{_slug(name)}"
        existing = [file for file in self._snapshot.tables.get("results", ()) if file.rpartition("-")[0] == stem]
        written = self._write_table("results", stem, table)
        self._drop_files("results", [file for file in existing if file != written])
        self.refresh()

    def __repr__(self) -> str:
        return f"<Database {str(self.path)!r}, {len(self._snapshot.runs)} runs>"

    def _run(self, name: str) -> Run:
        with self._lock:
            if name not in self._runs:
                self._runs[name] = Run(self._folder, self._snapshot.runs[name], self._matching)
            return self._runs[name]

    def _age(self, name: str) -> tuple[str, str]:
        return str(self._snapshot.runs[name].info.environment.get("created_at", "")), name

    def _matching(self, run: str, where: str) -> Sequence[int]:
        with self._lock:
            return catalog.matching_prompts(self._connect(), run, where)

    def _connect(self) -> "duckdb.DuckDBPyConnection":
        if self._connection is None:
            connection = catalog.connect(self._snapshot)
            # Runs of their own: those of users lead back here, and what DuckDB holds is no cycle that Python could free
            names = sorted(self._snapshot.runs, key=self._age)
            runs = {name: Run(self._folder, self._snapshot.runs[name], _no_conditions) for name in names}
            catalog.add_functions(connection, runs)
            self._connection = connection
        return self._connection

    def _own_weights(self, run: str) -> list[str]:
        """Return the weight folders that only this run uses."""
        held = {
            name: {
                record.path.rpartition("/")[0] for record in snapshot.info.files if record.path.startswith("weights/")
            }
            for name, snapshot in self._snapshot.runs.items()
        }
        if self._snapshot.damaged:
            return []  # a damaged run.json may name any of them
        others = {path for name, paths in held.items() if name != run for path in paths}
        return sorted(held.get(run, set()) - others)

    def _write_table(self, name: str, stem: str, table: "pyarrow.Table") -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._mode != "a":
            raise WriteError(f"{self.path} is open for reading; open it with mode='a' to add tables")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        file = verify.table_file_name(stem, content)
        self._folder.publish(f"{TABLES}/{name}/{file}", content)
        return file

    def _drop_files(self, name: str, files: Sequence[str]) -> None:
        for file in files:
            self._folder.path(f"{TABLES}/{name}/{file}").unlink(missing_ok=True)


def _no_conditions(run: str, where: str) -> Sequence[int]:
    raise AssertionError(f"SQL functions select by numbers alone, not by {where!r}")


def _results_table(analysis: str, run: str, values: Mapping[str, Any]) -> "pyarrow.Table":
    import pyarrow as pa

    rows = []
    for key, given in values.items():
        entry = dict(given) if isinstance(given, Mapping) else {"value": given}
        unknown = set(entry) - {"value", *RESULT_COLUMNS}
        if unknown:
            raise SettingError(
                f"result {key!r}: unknown {', '.join(sorted(unknown))}; use value, {', '.join(RESULT_COLUMNS)}"
            )
        rows.append({"analysis": analysis, "run": run, "key": key, **entry})
    kinds = {"n": pa.int64(), "seed": pa.int64(), **dict.fromkeys(("analysis", "run", "key", "verdict"), pa.string())}
    names = ("analysis", "run", "key", "value", *RESULT_COLUMNS)
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, TypeError) as exc:
        raise SettingError(f"results of {analysis!r}: {str(exc).splitlines()[0]}") from exc


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._=+@" else "_" for c in text)[:80]


def _remove_tree(folder: Folder, name: str) -> int:
    """Delete a folder and return its bytes; symbolic links are removed, not followed."""
    path = folder.path(name)
    if path.is_symlink():
        path.unlink()
        return 0
    if not path.exists():
        return 0
    freed = sum(os.lstat(os.path.join(parent, file)).st_size for parent, _, files in os.walk(path) for file in files)
    shutil.rmtree(path)
    return freed
