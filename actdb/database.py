"""Databases: what users open, query and write back to."""

import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from actdb import catalog
from actdb.errors import DamageError, RunError, SettingError, WriteError
from actdb.run import Run
from actdb.storage import commits, verify
from actdb.storage.commits import INDEXES, RUNS, TABLES, RunSnapshot, Snapshot, added_folder
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import duckdb
    import pyarrow

    from actdb.neighbors.index import IndexRecord
    from actdb.neighbors.result import Nearest, Neighbors

MODES = ("r", "a")
RESULT_COLUMNS = ("low", "high", "n", "seed", "null", "gold", "claimed", "verdict")


def open(path: str | os.PathLike[str], *, mode: str = "r") -> "Database":
    """Open a database: a snapshot of what is committed now, which stays the same until `refresh`.

    `mode="a"` lets analyses add tables, results and sites; nothing else is ever written. Works while a harvest runs,
    and on a read-only disk. Costs one small file read a run. Raises `DatabaseError` where there is no database.
    """
    return Database(path, mode=mode)


def open_run(path: str | os.PathLike[str], name: str) -> Run:
    """Open one run without looking at the others, which would take longer with each further one.

    Raises `DamageError` where its `run.json` is missing or damaged, `RunError` while it has nothing to show.
    """
    folder = Folder.open(path)
    snapshot = commits.take_run_snapshot(folder, name)
    if snapshot is None:
        raise RunError(f"run {name!r} in {path} holds nothing yet")
    database = cache(partial(Database, path))  # opened where a condition needs its tables
    return Run(folder, snapshot, lambda run, where: database()._matching(run, where))


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

    def checkpoints(self, name: str | None = None) -> list[Run]:
        """Return the runs with a training step that share a run's model and prompts, by step (None: the newest run's).

        Raises `RunError` for an unknown run. Reads the record of every run once.
        """
        chosen = self.run(name)
        alike = [run for run in self.runs() if run.step is not None and _series(run) == _series(chosen)]
        return sorted(alike, key=lambda run: run.step or 0)

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

    def compare(
        self, run_a: str, run_b: str, *, of: str = "heads", measure: str | None = None, k: int | None = None
    ) -> "catalog.QueryResult":
        """Return the `k` (default: all) heads or neurons that changed most from one run to another, most first.

        Both runs are over one prompt set, such as training steps, or a random initialisation and the trained model.
        Heads: the `measure` of head_stats whose effect is greatest (norms left out), or the one given, with its means,
        its change over shared prompts, effect sizes (Cohen's d_av and d_z) and the head's roles. Neurons: mean, std,
        skew and active fraction, ranked by the standardised change of the mean, or of `measure`. Formulas stand with
        the views `head_changes` and `neuron_changes`. Raises `RunError` for a run that is not there, `SettingError` for
        runs that cannot be compared.
        """
        before, after = self.run(run_a).info, self.run(run_b).info
        with self._lock:
            return catalog.compare_runs(self._connect(), before, after, of=of, measure=measure, k=k)

    def nearest(
        self,
        site: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        prompt: int | None = None,
        pos: int | None = None,
        vector: Any = None,
        text: str | None = None,
        k: int | None = None,
        radius: float | None = None,
        metric: str = "cosine",
        where: str | None = None,
        exclude_prompt: bool = False,
        exclude_within: int = 0,
        map: str | Sequence[str] | None = None,
        partition: Any = None,
        subspace: Any = None,
        run: str | None = None,
        exact: bool = False,
        model: Any = None,
        tokenizer: Any = None,
        device: str | None = None,
    ) -> "Nearest":
        """Return the stored rows nearest to a query: run, rank, prompt_id, pos, distance, token, context, labels.

        The query is a stored row (`prompt` and `pos`), a `vector` [width] or a .npy file of one, or a `text`, run
        through the run's model (`model`, `tokenizer`: where they are, if not under the recorded name) and taken at
        `pos`, by default its last.
        `k` rows are returned (default 10), or with `radius` all within that distance, `k` of them at most. Distances
        ascend: `metric` cosine is 1 − cos, l2 the Euclidean distance, ip −⟨x, y⟩. Among the rows are those of prompts
        that satisfy `where`; the query's own row never is, nor with `exclude_prompt` its prompt's, nor positions up to
        `exclude_within` from it.

        Before the metric come `map`: final_norm, unembed (‖W_Uᵀ Δ‖), or both; and a subspace: the columns `subspace`
        (begin, end) of the rotation `partition` [width, width]; of one kept by `add_partition`, a subspace's number.
        An index made for the same comparison answers, and the result has its `recall`, unless `exact` or a radius is
        asked for; without one, every row is read and compared, on a GPU where there is one.

        Raises `SettingError` for what does not fit, `SelectionError` for rows that are not there, `StaleIndexError`
        for an index that no longer fits the run.
        """
        from actdb.neighbors.nearest import Comparison, find_nearest

        query = {"prompt": prompt, "pos": pos, "vector": vector, "text": text, "model": model, "tokenizer": tokenizer}
        return find_nearest(
            self._folder,
            self.sql,
            self.run(run),
            site,
            Comparison(metric, map, partition, subspace, where),
            layer=layer,
            head=head,
            query=query,
            k=k,
            radius=radius,
            exclude_prompt=exclude_prompt,
            exclude_within=exclude_within,
            use_index=not exact,
            device=device,
        )

    def neighbors(
        self,
        site: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        k: int = 10,
        metric: str = "cosine",
        where: str | None = None,
        exclude_prompt: bool = False,
        exclude_within: int = 0,
        map: str | Sequence[str] | None = None,
        partition: Any = None,
        subspace: Any = None,
        run: str | None = None,
        exact: bool = False,
        save: bool = False,
        device: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Neighbors":
        """Return the `k` nearest rows of every row: a k-NN graph as arrays; see `nearest` for the arguments.

        `save` keeps its edges in the table `neighbor_edges`, in place of those of the same run, site, layer, head,
        metric and map; that needs `mode="a"`. An exact graph of 10⁵ rows of 768 takes about a minute on two
        cores, each pair computed once; of millions, make an index first. `progress` is called with what is done and
        what there is.
        """
        from actdb.neighbors.nearest import Comparison, find_neighbors

        if save:
            self._check_writable("save neighbor edges")
        graph = find_neighbors(
            self._folder,
            self.sql,
            self.run(run),
            site,
            Comparison(metric, map, partition, subspace, where),
            layer=layer,
            head=head,
            k=k,
            exclude_prompt=exclude_prompt,
            exclude_within=exclude_within,
            use_index=not exact,
            device=device,
            progress=progress,
        )
        if save:
            self._replace_rows("neighbor_edges", graph.stem, graph.edges())
        return graph

    def index(
        self,
        site: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        metric: str = "cosine",
        where: str | None = None,
        map: str | Sequence[str] | None = None,
        partition: Any = None,
        subspace: Any = None,
        run: str | None = None,
        kind: str | None = None,
        recall: float = 0.95,
        progress: Callable[[int, int], None] | None = None,
    ) -> "IndexRecord":
        """Make the FAISS index that `nearest` and `neighbors` use for this comparison of rows; see `nearest`.

        `kind` is flat, ivf, hnsw or ivfpq (default: by the number of rows); it searches as widely as `recall` at 10
        needs, measured on rows held out. Rows are streamed; an interrupted call is gone on with, an index that fits is
        left, one that does not is made anew. `progress` gets (rows added, rows). Needs `mode="a"` and FAISS.
        """
        from actdb.neighbors.build import build_index
        from actdb.neighbors.nearest import Comparison
        from actdb.neighbors.row import make_plane

        self._check_writable("make an index")
        plane = make_plane(self.run(run), site, layer=layer, head=head)
        rows = Comparison(metric, map, partition, subspace, where).rows(plane, self.sql)
        return build_index(self._folder, rows, kind=kind, recall=recall, progress=progress)

    def add_partition(self, run: Run | str, name: str, rotation: Any, sizes: Sequence[int] | None = None) -> None:
        """Keep a rotation [width, n] with orthonormal columns under a name, cut into subspaces of `sizes` columns.

        `nearest`, `neighbors` and `index` take the name as `partition`, and a subspace by its number. It stands in the
        table `partitions`, in place of one of that name. Needs `mode="a"`.
        """
        from actdb.neighbors.partition import PARTITIONS, partition_stem, partition_table

        held = self.run(run.name if isinstance(run, Run) else run).name
        self._replace_rows(PARTITIONS, partition_stem(held, name), partition_table(held, name, rotation, sizes))

    def top(
        self,
        site: str,
        *,
        layer: int | None = None,
        neuron: int | None = None,
        neurons: Sequence[int] | None = None,
        k: int = 10,
        run: str | None = None,
    ) -> "catalog.QueryResult":
        """Return the `k` rows where a neuron, or the sum of a group, is highest: exactly those of a full scan.

        Columns run, rank (from 0), prompt_id, pos, value, for a group `activations` (one a neuron), token, context (the
        tokens around, its own in brackets), then labels. `neuron` is a place on the last axis of a site of rows without
        heads. Values are those stored. Costs some chunks where the highest activations kept with a run are enough (up
        to 15 rows of one neuron of mlp_post), else the neurons' columns of a copy made by `transpose`, else one scan of
        the layer. Raises `SelectionError` for what is not stored, `SettingError` for a `k` beyond the rows.
        """
        from actdb.neurons.query import Group, find_top

        if (neuron is None) == (neurons is None):
            raise SettingError("top needs neuron= or neurons=, and not both")
        chosen = list(neurons) if neurons is not None else [int(neuron)] if neuron is not None else []
        return find_top(Group.make(self._folder, self.run(run), site, layer, chosen), k, self.sql)

    def most_similar(
        self,
        site: str,
        *,
        layer: int | None = None,
        neurons: Sequence[int],
        prompt: int,
        pos: int,
        k: int = 10,
        metric: str = "l2",
        run: str | None = None,
    ) -> "catalog.QueryResult":
        """Return the `k` rows most like the row at (prompt, pos) within a group of neurons, nearest first.

        Columns run, rank, prompt_id, pos, distance, token, context, then labels. `metric` is l2, l1 or cosine (1 − cos,
        rows where the group is silent left out); the row itself is never returned, equal ones come by prompt and
        position. Costs the group's columns of a copy made by `transpose`, else one scan of the layer. For whole vectors
        and indexes see `nearest`. Raises as `top` does.
        """
        from actdb.neurons.query import Group, find_similar

        group = Group.make(self._folder, self.run(run), site, layer, neurons)
        return find_similar(group, prompt, pos, k, metric, self.sql)

    def transpose(
        self,
        site: str,
        *,
        layer: int | None = None,
        run: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Keep a neuron-major copy of one layer, from which `top` and `most_similar` read a group's columns alone.

        Returns its bytes: those of the layer before encoding. A copy of fewer parts is not used; the same call makes it
        anew. Needs `mode="a"`. Costs one scan, some 128 MiB of memory. `progress` gets (rows done, rows).
        """
        self._check_writable("add a copy")
        from actdb.neurons.columns import build_columns

        return build_columns(self._folder, self.run(run), site, layer, progress=progress)

    def verify(self) -> list[verify.Damage]:
        """Check every stored byte against its checksum; returns what is damaged, [] where all is well.

        The catalog, which is derived, is read whole too. Costs one pass over all files.
        """
        from actdb.neighbors.index import check_indexes
        from actdb.neurons.columns import check_columns

        damages = list(verify.check_database(self._snapshot))
        for name, held in self._snapshot.runs.items():
            damages += [verify.Damage(path, why, name) for path, why in check_columns(self._folder, held.info)]
            damages += [verify.Damage(path, why, name) for path, why in check_indexes(self._folder, name)]
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
        folders = [
            added_folder(run),
            f"{RUNS}/{run}/commits",
            f"{INDEXES}/{run}",
            f"arrays.zarr/{run}",
            *weights,
            f"{RUNS}/{run}/parts",
            f"{RUNS}/{run}",
        ]
        freed = 0
        try:
            for name in folders:
                freed += _remove_tree(self._folder, name)
        except OSError as exc:
            raise WriteError(f"cannot remove {exc.filename or self.path}: {exc.strerror}") from exc
        self.refresh()
        return freed

    def compute_statistics(
        self, stats: Sequence[str], *, run: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """Compute statistics (heads, neurons, tokens, lens) of a stored run from its arrays, without the model.

        Returns the kinds computed; those that the harvest computed already, or an earlier call, are left. They agree
        with a harvest's to the stored precision; the table `statistics` tells which is which. An interrupted call is
        gone on with, damaged parts are computed anew. `progress` gets (parts done, parts). Needs `mode="a"`. Costs one
        read of the sites needed, and for tokens and lens an unembedding a row (and layer).

        Raises `SettingError` where the sites or weights needed are not stored.
        """
        self._check_writable("compute statistics")
        from actdb.harvesting.replay import compute_statistics

        computed = compute_statistics(self._folder, self.run(run), stats, progress=progress)
        self.refresh()
        return computed

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
        self._replace_rows("results", f"{_slug(analysis)}--{_slug(name)}", table)

    def __repr__(self) -> str:
        return f"<Database {str(self.path)!r}, {len(self._snapshot.runs)} runs>"

    def _run(self, name: str) -> Run:
        with self._lock:
            if name not in self._runs:
                renew = partial(self._renew, name) if self._mode == "a" else None
                self._runs[name] = Run(self._folder, self._snapshot.runs[name], self._matching, renew)
            return self._runs[name]

    def _renew(self, name: str) -> RunSnapshot:
        """Take a new snapshot for a run that adds to itself; raises `RunError` where it is gone."""
        with self._lock:
            self.refresh()
            return self.run(name).snapshot

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

        self._check_writable("add tables")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        file = verify.table_file_name(stem, content)
        self._folder.publish(f"{TABLES}/{name}/{file}", content)
        return file

    def _replace_rows(self, name: str, stem: str, table: "pyarrow.Table") -> None:
        """Write rows of a table under a stem, in place of those that it held under that stem."""
        existing = [file for file in self._snapshot.tables.get(name, ()) if file.rpartition("-")[0] == stem]
        written = self._write_table(name, stem, table)
        self._drop_files(name, [file for file in existing if file != written])
        self.refresh()

    def _check_writable(self, purpose: str) -> None:
        if self._mode != "a":
            raise WriteError(f"{self.path} is open for reading; open it with mode='a' to {purpose}")

    def _drop_files(self, name: str, files: Sequence[str]) -> None:
        for file in files:
            self._folder.path(f"{TABLES}/{name}/{file}").unlink(missing_ok=True)


def _series(run: Run) -> tuple[Any, Any]:
    """Return what checkpoints of one training have in common: model and prompts."""
    return run.info.model.get("model"), run.info.plan.get("prompt_set")


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
