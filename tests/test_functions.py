"""SQL functions on stored activations: held to what was written, to `sel()`, and to the models' own logits."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actdb
from actdb.catalog import add_functions
from actdb.catalog.lookup import Address, Lookup
from actdb.errors import SqlError
from actdb.run import Run
from actdb.storage.commits import take_snapshot
from actdb.storage.folder import Folder
from tests.hooked import TinyModel, Written, random_prompts, write_run

LAYERS, N_HEADS = (0, 2, 5), 2
VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "both": {"causal": False, "codec": "raw", "n_parts": 1},
    "last": {"positions": "last", "n_parts": 2},
    "last-both": {"positions": "last", "causal": False},
}
Row = tuple[Any, ...]
Ask = Callable[[str, str, list[Row]], list[Any]]


def runs_of(root: Path) -> dict[str, Run]:
    """Return a database's runs as the functions have them, without a catalog."""
    folder = Folder.open(root)
    return {name: Run(folder, run, lambda *_: ()) for name, run in take_snapshot(folder).runs.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], dict[str, Written]]:
    root = tmp_path_factory.mktemp("functions") / "x.actdb"
    values = {
        name: write_run(root, seed=seed, name=name, layers=LAYERS, n_heads=N_HEADS, **options)
        for seed, (name, options) in enumerate(VARIANTS.items())
    }
    return runs_of(root), values


@pytest.fixture(scope="module")
def ask(written: tuple[dict[str, Run], Any]) -> Iterator[Ask]:
    with asking(written[0]) as made:
        yield made


@contextlib.contextmanager
def asking(runs: dict[str, Run]) -> Iterator[Ask]:
    """Yield a function that evaluates a call for each row of a table with these columns, over a bare connection."""
    connection = duckdb.connect()
    add_functions(connection, runs)

    def ask(call: str, names: str, rows: list[Row]) -> list[Any]:
        columns = zip(*rows, strict=True) if rows else [[] for _ in names.split()]
        kinds = [pa.string() if name in ("run", "site") else pa.int64() for name in names.split()]
        arrays = [pa.array(values, kind) for values, kind in zip(columns, kinds, strict=True)]
        cursor = connection.cursor()
        cursor.register("wanted", pa.table([*arrays, pa.array(range(len(rows)))], names=[*names.split(), "i"]))
        return [value for (value,) in cursor.execute(f"SELECT {call} FROM wanted ORDER BY i").fetchall()]

    with contextlib.closing(connection):
        yield ask


def pick(data: st.DataObject, held: Written, variant: str) -> tuple[int, int, int]:
    """Draw a prompt, a position or query, from either end, and the place of its row among the prompt's."""
    prompt = data.draw(st.integers(0, len(held.lengths) - 1))
    n = held.lengths[prompt]
    pos = n - 1 if variant.startswith("last") else data.draw(st.integers(0, n - 1))
    return prompt, pos - n * data.draw(st.integers(0, 1)), 0 if variant.startswith("last") else pos


def with_nulls(data: st.DataObject, row: Row) -> tuple[Row, bool]:
    """Make one argument null, now and then."""
    place = data.draw(st.integers(0, 6 * len(row)))
    return tuple(None if i == place else value for i, value in enumerate(row)), place < len(row)


def weights(held: Written, variant: str, prompt: int, plane: tuple[int, int], query: int) -> npt.NDArray[Any]:
    """Return a query's weights from the entries as they were written."""
    entries, n = held.values["pattern"][prompt][plane], held.lengths[prompt]
    if variant.startswith("last"):
        return entries
    if variant == "both":
        return entries.reshape(n, n)[query]
    square = np.zeros((n, n), entries.dtype)
    square[np.tril_indices(n)] = entries
    return square[query, : query + 1]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        assert (value is None) == (wanted is None)
        if wanted is not None:
            assert np.array_equal(np.array(value, np.float32), wanted.astype(np.float32))


# Values


@given(data=st.data(), n=st.integers(0, 30))
def test_activation(written: Any, ask: Ask, data: st.DataObject, n: int) -> None:
    rows, expected = [], []
    for _ in range(n):
        variant = data.draw(st.sampled_from([*VARIANTS, ""]))
        name = variant or list(VARIANTS)[-1]  # without a name: the newest
        held = written[1][name]
        prompt, pos, place = pick(data, held, name)
        site, layer = data.draw(st.sampled_from([("embed", 0), *(("resid_post", layer) for layer in LAYERS)]))
        row, missing = with_nulls(data, (variant, site, layer, prompt, pos))
        rows.append(row)
        values = held.values[site][prompt]
        value = values[place] if site == "embed" else values[LAYERS.index(layer), place]
        expected.append(None if missing else value)
    call = "activation(site, layer, p, pos, run := run)"
    assert_equal(ask(call, "run site layer p pos", rows), expected)


@given(data=st.data(), n=st.integers(0, 30))
def test_head_activation(written: Any, ask: Ask, data: st.DataObject, n: int) -> None:
    rows, expected = [], []
    for _ in range(n):
        variant, site = data.draw(st.sampled_from(sorted(VARIANTS))), data.draw(st.sampled_from(["k", "pattern_index"]))
        prompt, pos, place = pick(data, written[1][variant], variant)
        layer, head = data.draw(st.sampled_from(LAYERS)), data.draw(st.integers(0, N_HEADS - 1))
        row, missing = with_nulls(data, (variant, site, layer, head, prompt, pos))
        rows.append(row)
        value = written[1][variant].values[site][prompt][LAYERS.index(layer), head, place]
        expected.append(None if missing else value)
    call = "head_activation(site, layer, head, p, pos, run := run)"
    assert_equal(ask(call, "run site layer head p pos", rows), expected)


@given(data=st.data(), n=st.integers(0, 30))
def test_attention(written: Any, ask: Ask, data: st.DataObject, n: int) -> None:
    rows, expected = [], []
    for _ in range(n):
        variant = data.draw(st.sampled_from(sorted(VARIANTS)))
        held = written[1][variant]
        prompt, query, _ = pick(data, held, variant)
        layer, head = data.draw(st.sampled_from(LAYERS)), data.draw(st.integers(0, N_HEADS - 1))
        row, missing = with_nulls(data, (variant, layer, head, prompt, query))
        rows.append(row)
        value = weights(held, variant, prompt, (LAYERS.index(layer), head), query % held.lengths[prompt])
        expected.append(None if missing else value)
        assert len(value) == (held.lengths[prompt] if "both" in variant else query % held.lengths[prompt] + 1)
    call = "attention(layer, head, p, query, run := run)"
    assert_equal(ask(call, "run layer head p query", rows), expected)


def test_values_are_those_of_selections(written: Any, ask: Ask) -> None:
    run = written[0]["causal"]
    for prompt in range(run.n_prompts):
        n = written[1]["causal"].lengths[prompt]
        rows = [(prompt, pos) for pos in range(n)]
        vectors = ask("activation('resid_post', 5, p, pos, run := 'causal')", "p pos", rows)
        assert np.array_equal(vectors, run["resid_post"].sel(layer=5, prompt=prompt).numpy().astype(np.float32))
        patterns = ask("attention(2, 1, p, pos, run := 'causal')", "p pos", rows)
        square = run["pattern"].sel(layer=2, head=1, prompt=prompt).numpy()
        assert_equal(patterns, [square[query, : query + 1] for query in range(n)])


# Chunk reads


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return a run of several thousand rows, and its prompts and positions in storage order."""
    root = tmp_path_factory.mktemp("long") / "x.actdb"
    held = write_run(root, seed=3, n_prompts=1000, longest=8, n_parts=3)
    index = next(iter(runs_of(root).values())).source("resid_post").prompts()
    lengths = np.array(held.lengths)
    prompts = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(prompts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    order = np.argsort(index.row_start[prompts] + positions)
    return root, prompts[order], positions[order]


def chunks_with_rows(run: Run, site: str) -> int:
    """Count the chunks of one layer that hold rows, from where the prompts lie."""
    spec, index = run.source(site).spec, run.source(site).prompts()
    pairs = zip(index.row_start.tolist(), index.n_rows.tolist(), strict=True)
    return len({row // spec.chunk_shape[spec.axis] for start, n in pairs for row in range(start, start + n)})


@pytest.mark.parametrize("order", ["storage", "random"])
def test_each_chunk_is_read_once(long_run: Any, order: str) -> None:
    root, prompts, positions = long_run
    assert len(prompts) > 2 * 2048, "several calls"
    chosen = np.random.default_rng(0).permutation(len(prompts)) if order == "random" else np.arange(len(prompts))
    runs = runs_of(root)
    reader = runs["made"].source("resid_post").reader
    with asking(runs) as ask:
        rows = list(zip(prompts[chosen].tolist(), positions[chosen].tolist(), strict=True))
        found = ask("activation('resid_post', 2, p, pos)", "p pos", rows)
    assert reader.n_reads == chunks_with_rows(runs["made"], "resid_post")
    every = runs["made"]["resid_post"].sel(layer=2)
    places = {place: i for i, place in enumerate(zip(every.prompt.tolist(), every.pos.tolist(), strict=True))}
    assert np.array_equal(found, every.numpy()[[places[row] for row in rows]].astype(np.float32))


def test_storage_order_needs_no_cache(long_run: Any) -> None:
    root, prompts, positions = long_run
    runs = runs_of(root)
    reader = runs["made"].source("resid_post").reader
    lookup, n_calls = Lookup(runs, cache_bytes=0), 0
    for begin in range(0, len(prompts), 2048):
        block = slice(begin, begin + 2048)
        rows = np.arange(len(prompts[block]))
        lookup.vectors(
            len(rows), [(Address("activation", "", "resid_post", 5), rows, prompts[block], positions[block])]
        )
        n_calls += 1
    n_chunks = chunks_with_rows(runs["made"], "resid_post")
    assert n_chunks <= reader.n_reads <= n_chunks + n_calls


def test_a_vector_asked_for_many_times_is_held_once(long_run: Any) -> None:
    root, prompts, positions = long_run
    rows = np.arange(2048)
    address = Address("activation", "", "resid_post", 5)
    found = Lookup(runs_of(root)).vectors(2048, [(address, rows, prompts[rows % 2], positions[rows % 2])])
    assert found.values.size == 2 * 3
    assert set(found.offsets.tolist()) == {0, 3}


def test_the_cache_keeps_to_its_size(long_run: Any) -> None:
    root, prompts, positions = long_run
    lookup = Lookup(runs_of(root), cache_bytes=1000)
    rows = np.arange(len(prompts))
    lookup.vectors(len(rows), [(Address("activation", "", "resid_post", 5), rows, prompts, positions)])
    held = lookup._cache._chunks.values()
    assert 0 < sum(chunk.nbytes for chunk in held) == lookup._cache._bytes <= 1000


# In a database


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("database") / "x.actdb"
    sites = ["resid_post", "z", "k", "embed", "hook_pooled", "pattern", "mlp_post"]
    actdb.harvest(TinyModel(), random_prompts(20), root, run="best", pattern="topk:3")
    actdb.harvest(TinyModel(), random_prompts(20), root, run="first", sites=sites)
    actdb.harvest(TinyModel(seed=1), random_prompts(20), root, run="second", sites=sites)
    return root


def test_composes_with_joins_windows_and_list_functions(database: Path) -> None:
    with actdb.open(database) as db:
        first, second = db.run("first")["resid_post"].sel(layer=1), db.run("second")["resid_post"].sel(layer=1)
        found = db.sql(
            "SELECT t.prompt_id, t.pos, list_cosine_similarity("
            "activation('resid_post', 1, t.prompt_id, t.pos, run := t.run),"
            "activation('resid_post', 1, t.prompt_id, t.pos, run := u.run)) AS c,"
            "lag(list_sum(activation('mlp_post', 0, t.prompt_id, t.pos, run := t.run))) OVER w AS before "
            "FROM tokens t JOIN tokens u USING (prompt_id, pos) WHERE t.run = 'first' AND u.run = 'second'"
            "WINDOW w AS (PARTITION BY t.prompt_id ORDER BY t.pos) ORDER BY ALL"
        ).fetchall()
        x, y = (site.numpy().astype(np.float64) for site in (first, second))
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert [row[:2] for row in found] == list(zip(first.prompt.tolist(), first.pos.tolist(), strict=True))
        assert np.allclose([row[2] for row in found], cosines, atol=1e-5)
        sums = db.run("first")["mlp_post"].sel(layer=0).numpy().astype(np.float64).sum(1)
        assert [row[3] is None for row in found] == [row[1] == 0 for row in found]
        assert np.allclose([r[3] for r in found if r[1]], [sums[i - 1] for i, r in enumerate(found) if r[1]], rtol=1e-4)


def test_several_threads_at_once(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, vectors = set(), Lookup.vectors

    def recorded(self: Lookup, *arguments: Any) -> Any:
        threads.add(threading.get_ident())
        return vectors(self, *arguments)

    monkeypatch.setattr(Lookup, "vectors", recorded)
    with actdb.open(database) as db:
        sums = {}
        for run in ("first", "second"):
            values = db.run(run)["resid_post"].sel(layer=1)
            every = values.numpy().astype(np.float64).sum(1)
            sums |= {
                (run, *place): x for *place, x in zip(values.prompt.tolist(), values.pos.tolist(), every, strict=True)
            }
        n_copies = 500_000 // len(sums)
        table = [key for key in sums for _ in range(n_copies)]
        names = ("run", "prompt_id", "pos")
        _add(db, "many", pa.table(dict(zip(names, map(list, zip(*table, strict=True)), strict=True))))
        call = "list_sum(activation('resid_post', 1, prompt_id, pos, run := run)::DOUBLE[])"
        found = db.sql(f"SELECT run, prompt_id, pos, avg({call}), count(*) FROM many GROUP BY ALL").fetchall()
        assert len(threads) > 1 or (os.cpu_count() or 1) == 1
        assert len(found) == len(sums)
        for *key, mean, n in found:
            assert (mean, n) == (pytest.approx(sums[tuple(key)], rel=1e-4, abs=1e-4), n_copies)


def _add(db: actdb.Database, name: str, table: pa.Table) -> None:
    """Add a table in memory: nothing of it stays in the database."""
    connection = db._connect()
    connection.register("source", table)
    connection.execute(f"CREATE TABLE memory.main.{name} AS FROM source")
    connection.unregister("source")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("len(activation('resid_post', 0, 3, -1))", 8),
        ("len(head_activation('z', 0, 1, 3, 0))", 4),
        ("len(head_activation('k', 0, 0, 3, 0))", 4),
        ("len(attention(1, 0, 3, 0))", 1),
        ("round(list_sum(attention(1, 0, 3, -1)), 2)", 1.0),
        ("activation('resid_post', NULL, 3, 0)", None),
        ("activation('resid_post', 0, 3, 0, run := NULL)", None),
        ("activation('resid_post', 0, 3, 0) = activation('resid_post', 0, 3, 0, run := 'second')", True),
        ("activation('resid_post', 0, 3, 0) = activation('resid_post', 0, 3, 0, run := 'first')", False),
        ("activation('embed', 0::TINYINT, 3::INTEGER, 0::UINTEGER) = activation('embed', 0, 3, 0)", True),
        ("len(head_activation('pattern_index', 0, 1, 3, -1, run := 'best'))", 3),
    ],
)
def test_constants(database: Path, call: str, expected: Any) -> None:
    """Without a name the newest run answers, which is `second`."""
    with actdb.open(database) as db:
        assert db.run().name == "second"
        assert db.sql(f"SELECT {call}").fetchall() == [(expected,)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("activation('resid', 0, 3, 0)", "run 'second' has no site 'resid'; it holds resid_post, z, .*"),
        ("activation('../../x', 0, 3, 0)", "run 'second' has no site '../../x'; it holds .*"),
        ("activation('resid_post', 7, 3, 0)", "layer 7: there are layers 0 to 1"),
        ("activation('resid_post', -1, 3, 0)", "layer -1: there are layers 0 to 1"),
        ("activation('resid_post', 0, 20, 0)", "prompt 20: run 'second' has prompts 0 to 19"),
        ("activation('resid_post', 0, -1, 0)", "prompt -1: run 'second' has prompts 0 to 19"),
        ("activation('resid_post', 0, 3, 99)", r"pos 99: prompt 3 has positions 0 to \d+"),
        ("activation('resid_post', 0, 3, -99)", r"pos -99: prompt 3 has positions 0 to \d+"),
        ("activation('resid_post', 0, 3, 9223372036854775807)", "pos 9223372036854775807: prompt 3 has .*"),
        ("activation('resid_post', 9223372036854775807, 3, 0)", "layer 9223372036854775807: there are .*"),
        ("activation('embed', 1, 3, 0)", "layer 1: site 'embed' has no layers; give 0"),
        ("activation('z', 0, 3, 0)", r"site 'z' is read by head_activation\(site VARCHAR, .*, not by activation\(\)"),
        ("activation('pattern', 0, 3, 0)", r"site 'pattern' is read by attention\(.*"),
        (
            "activation('hook_pooled', 0, 3, 0)",
            r"site 'hook_pooled' has one vector a prompt .*run\['hook_pooled'\].sel\(prompt=...\)",
        ),
        ("head_activation('resid_post', 0, 0, 3, 0)", r"site 'resid_post' is read by activation\(.*"),
        ("head_activation('z', 0, 2, 3, 0)", "head 2: there are heads 0 to 1"),
        ("head_activation('k', 0, 1, 3, 0)", "head 1: there are heads 0 to 0"),
        ("attention(0, -1, 3, 0)", "head -1: there are heads 0 to 1"),
        ("attention(0, 0, 3, 99)", r"pos 99: prompt 3 has positions 0 to \d+"),
        ("attention(0, 0, 3, 0, run := 'best')", ".*pattern_index.* attention.. needs .* --pattern full"),
        ("activation('z', 0, 3, 0, run := '../second')", "no run '../second'; there are best, first, second"),
        ("logit_lens(0, 3, 0, 1)", "run 'second' has no weight 'W_U' there; it has .*"),
        (
            "activation('resid_post', 0, 3)",
            r"these arguments do not fit activation\(site VARCHAR, .* an example: SELECT .*",
        ),
        ("activation('resid_post', 0.5, 3, 0)", "these arguments do not fit activation.*"),
        ("activation('resid_post', 0, 3, 0, rnu := 'x')", "these arguments do not fit activation.*"),
        ("activatoin('resid_post', 0, 3, 0)", 'no function "activatoin"; did you mean "activation"\\?'),
    ],
)
@pytest.mark.parametrize("source", ["", " FROM tokens"])
def test_errors_name_the_choices(database: Path, call: str, message: str, source: str) -> None:
    with actdb.open(database) as db, pytest.raises(SqlError, match=f"^{message}$") as caught:
        db.sql(f"SELECT {call}{source}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["x", "../x", "/etc/passwd", "resid_post/../../../x"])
def test_no_function_reads_files(database: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    opened: list[str] = []
    with actdb.open(database) as db:
        db.sql("SELECT activation('resid_post', 0, 3, 0)")
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        for call in (f"activation('{path}', 0, 0, 0)", f"logit_lens(0, 0, 0, 1, run := '{path}')"):
            with pytest.raises(SqlError, match="no site|no run"):
                db.sql(f"SELECT {call}")
        with pytest.raises(SqlError, match="file system operations are disabled"):
            db.sql("SELECT activation('embed', 0, 0, 0), t.* FROM read_text('/etc/hostname') t")
    assert not [name for name in opened if path in name]


def test_functions_see_the_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "x.actdb"
    options = {"run": "one", "part_tokens": 40, "batch_tokens": 16, "sites": ["resid_post"]}
    actdb.harvest(TinyModel(), random_prompts(30), root, worker=(0, 2), **options)
    with actdb.open(root) as db:
        stored = {prompt for (prompt,) in db.sql("SELECT prompt_id FROM run_prompts").fetchall()}
        missing = min(set(range(30)) - stored)
        one = f"SELECT activation('resid_post', 1, {missing}, 0)"
        with pytest.raises(SqlError, match=f"prompt {missing} of run 'one' is not stored yet"):
            db.sql(one)
        actdb.harvest(TinyModel(), random_prompts(30), root, worker=(1, 2), **options)
        actdb.harvest(TinyModel(seed=1), random_prompts(30), root, run="two", sites=["resid_post"])
        with pytest.raises(SqlError, match="is not stored yet"):
            db.sql(one)
        with pytest.raises(SqlError, match="no run 'two'; there are one"):
            db.sql("SELECT activation('resid_post', 1, 0, 0, run := 'two')")
        db.refresh()
        for name in ("one", "two"):
            value = db.sql(f"SELECT activation('resid_post', 1, {missing}, 0, run := '{name}')").fetchall()[0][0]
            assert value == db.run(name)["resid_post"].sel(layer=1, prompt=missing, pos=0).numpy().tolist()


def test_catalogs_in_memory_have_the_functions(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "writable", lambda self: False)
    monkeypatch.setattr("actdb.catalog.connection._open_stored", lambda folder: None)
    with actdb.open(database) as db:
        assert db.sql("SELECT len(attention(0, 0, 3, -1)) = n_tokens FROM run_prompts WHERE prompt_id = 3").fetchall()
        assert "logit_lens" in db.sql_words()


def test_damage_is_named(tmp_path: Path) -> None:
    root = tmp_path / "x.actdb"
    run = actdb.harvest(TinyModel(), random_prompts(20), root, sites=["resid_post"])
    shard = next(path for path in (root / "arrays.zarr" / run.name / "resid_post").rglob("c/*/*/*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[3] ^= 255
    shard.write_bytes(content)
    with actdb.open(root) as db, pytest.raises(SqlError, match="is damaged: chunk 0 .* run the same harvest again"):
        db.sql("SELECT activation('resid_post', 0, prompt_id, pos) FROM tokens")


def test_command_line(database: Path) -> None:
    program = "from actdb.cli import main; main()"
    query = "SELECT attention(0, 0, 3, 1) AS a, activation('embed', 0, 3, 0)[1] AS x"
    done = subprocess.run(
        [sys.executable, "-c", program, "sql", str(database), query, "--format", "csv"], capture_output=True, text=True
    )
    run = actdb.open(database).run()
    weights = run["pattern"].sel(layer=0, head=0, prompt=3, pos=1).numpy()[:2].astype(np.float32)
    x = run["embed"].sel(prompt=3, pos=0).numpy()[0].astype(np.float32)
    assert done.stdout == f'a,x\n"[{weights[0]!s}, {weights[1]!s}]",{x!s}\n', done.stderr
    assert done.stderr == ""


# Lifetimes


@pytest.mark.parametrize(
    "ending", ["", "db.close()", "db.refresh()", "db.sql('SELECT 1')", "del db", "import sys; sys.kept = db, result"]
)
def test_nothing_is_said_at_exit(database: Path, ending: str) -> None:
    program = f"""
import actdb
db = actdb.open({str(database)!r})
result = db.sql("SELECT activation('resid_post', 0, 3, 0) AS a FROM range(3)")
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_results_end_with_their_connection(database: Path) -> None:
    with actdb.open(database) as db:
        result = db.sql("SELECT 1")
        assert result.fetchall() == [(1,)]
    for fetch in (result.fetchall, result.fetchone, result.arrow, result.df):
        with pytest.raises(SqlError, match="closed or refreshed since this query"):
            fetch()


def test_databases_that_nobody_holds_are_freed(database: Path) -> None:
    db = actdb.open(database)
    result = db.sql("SELECT len(activation('resid_post', 0, 3, 0)) FROM range(3)")
    held, inner = weakref.ref(db), weakref.ref(db._connection)
    del db
    gc.collect()
    assert held() is None
    assert inner() is None
    assert result.fetchall() == [(8,)] * 3


# Logit lens


@pytest.fixture(scope="module")
def lenses(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Callable[[str, str], tuple[Path, list[dict[str, Any]]]]:
    """Return a function from a kind of model to a database of its residuals in float32, and its prompts."""
    root, made = tmp_path_factory.mktemp("lens"), {}

    def harvested(kind: str, processing: str = "raw") -> tuple[Path, list[dict[str, Any]]]:
        prompts = random_prompts(6, longest=10, d_vocab=48)
        out = root / f"{kind}-{processing}.actdb"
        if out not in made:
            options = {"sites": ["resid_post"], "store": "float32", "processing": processing}
            made[out] = actdb.harvest(model_folder(kind), prompts, out, **options)
        return out, prompts

    return harvested


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "mixtral", "native-mlp", "native-attn"])
@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_lens_of_the_last_layer_is_the_model(
    lenses: Callable[..., Any], bridge: Callable[..., Any], kind: str, processing: str
) -> None:
    import torch

    database, prompts = lenses(kind, processing)
    model = bridge(kind, folded=processing == "folded")
    with actdb.open(database) as db:
        query = "SELECT prompt_id, pos, logit_lens(1, prompt_id, pos, 1 + pos) AS l FROM tokens"
        for prompt, pos, found in db.sql(query).fetchall():
            with torch.no_grad():
                logits = model(torch.tensor([prompts[prompt]["tokens"]]))[0, pos].double()
            best = logits.sort(descending=True)
            assert [entry["token_id"] for entry in found] == best.indices[: pos + 1].tolist()
            assert np.allclose([entry["logit"] for entry in found], best.values[: pos + 1], atol=1e-4)
            chances = logits.softmax(0)[best.indices[: pos + 1]]
            assert np.allclose([entry["probability"] for entry in found], chances, atol=1e-5)


def test_lens_of_an_earlier_layer(lenses: Callable[..., Any], bridge: Callable[..., Any]) -> None:
    import torch

    database, prompts = lenses("llama")
    model = bridge("llama")
    with actdb.open(database) as db, torch.no_grad():
        for prompt, found in db.sql("SELECT prompt_id, logit_lens(0, prompt_id, -1, 48) FROM run_prompts").fetchall():
            _, cache = model.run_with_cache(torch.tensor([prompts[prompt]["tokens"]]))
            logits = model.unembed(model.ln_final(cache["blocks.0.hook_resid_post"]))[0, -1]
            assert sorted(entry["token_id"] for entry in found) == list(range(48))
            assert np.allclose([e["logit"] for e in found], [logits[e["token_id"]] for e in found], atol=1e-4)
            assert sum(entry["probability"] for entry in found) == pytest.approx(1, abs=1e-5)


def test_lens_of_mixed_rows(lenses: Callable[..., Any]) -> None:
    """Rows of several layers, k, duplicates and nulls in one call are what each is alone."""
    rows = [(0, 1, 0, 3), (1, 1, -1, 5), (0, None, 0, 3), (0, 1, 0, 1), (1, 2, 0, 2), (0, 1, 0, 3), (None, 1, 0, 3)]
    with actdb.open(lenses("gpt2")[0]) as db:
        table = ", ".join(str((i, *row)).replace("None", "NULL") for i, row in enumerate(rows))
        together = db.sql(f"SELECT logit_lens(l, p, q, k) FROM (VALUES {table}) t(i, l, p, q, k) ORDER BY i").fetchall()
        alone = [db.sql("SELECT logit_lens($1, $2, $3, $4)", list(row)).fetchall()[0] for row in rows]
    assert [len(value) if value else None for (value,) in together] == [3, 5, None, 1, 2, 3, None]
    for (value,), (wanted,) in zip(together, alone, strict=True):
        assert [e["token_id"] for e in value or []] == [e["token_id"] for e in wanted or []]


class Numbers:
    """A tokenizer whose tokens are their own numbers."""

    all_special_ids, bos_token_id = (), None

    def __len__(self) -> int:
        return 48

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"t{token}"

    def decode(self, ids: list[int], **_: Any) -> str:
        return f"t{ids[0]}"


def test_lens_shows_the_tokens_that_prompts_hold(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    options = {"sites": ["resid_post"], "tokenizer": Numbers(), "bos": False}
    actdb.harvest(model_folder("gpt2"), [{"tokens": [7, 3]}, {"tokens": [40]}], tmp_path / "x.actdb", **options)
    with actdb.open(tmp_path / "x.actdb") as db:
        found = db.sql("SELECT unnest(logit_lens(0, 0, 0, 48), recursive := true)").fetchall()
    assert {token_id: token for token_id, token, *_ in found if token} == {3: "t3", 7: "t7", 40: "t40"}
    assert len(found) == 48


@pytest.mark.parametrize(
    ("k", "kind", "message"),
    [
        (0, "gpt2", "k 0: choose 1 to 48, the tokens of the vocabulary"),
        (49, "gpt2", "k 49: choose 1 to 48, the tokens of the vocabulary"),
        (1, "bert", "its model looks both ways; the logit lens is for causal models"),
    ],
)
def test_lens_refuses(lenses: Callable[..., Any], k: int, kind: str, message: str) -> None:
    with actdb.open(lenses(kind)[0]) as db, pytest.raises(SqlError, match=message):
        db.sql(f"SELECT logit_lens(0, 0, 0, {k})")


def test_examples_in_the_documentation_run(lenses: Callable[..., Any], database: Path, tmp_path: Path) -> None:
    from actdb.catalog.documentation import FUNCTIONS

    copy = shutil.copytree(database, tmp_path / "x.actdb")
    with actdb.open(copy, mode="a") as db:
        block = actdb.Block(np.ones((2, 2, 20, 4), np.float32), np.array(db.run().prompt_ids(order="stored")))
        db.run().add_site("interaction", dims=("layer", "head", "prompt", "target"), blocks=[block])
    for function in FUNCTIONS:
        with actdb.open(lenses("gpt2")[0] if function.name == "logit_lens" else copy) as db:
            example = function.example.replace("range(4)", "range(2)")
            assert db.sql(example).fetchall(), function.name
