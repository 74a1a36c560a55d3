"""FAISS indexes of stored rows: held to exact search, killed and gone on with, refused where they do not fit."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import actdb
from actdb.cli import cli
from actdb.errors import DamageError, SettingError, SpaceError, StaleIndexError, WriteError
from actdb.neighbors import build, library
from actdb.neighbors.metric import METRICS
from tests.hooked import TinyModel, random_prompts

pytest.importorskip("faiss")

KINDS = ("flat", "ivf", "hnsw")
PLACE: dict[str, Any] = {"layer": 1}
VECTOR = [1, -2, 3, -4, 5, -6, 7, -8]


def make(path: Path, *, seed: int = 0, **options: Any) -> Path:
    """Harvest some 950 rows of 8 in 4 parts."""
    sites = ["resid_post", "k"]
    options = {"part_tokens": 256, "batch_tokens": 128, **options}
    actdb.harvest(TinyModel(seed=seed), random_prompts(150), path, sites=sites, stats=(), **options)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("indexes") / "x.actdb")


@pytest.fixture
def db(path: Path) -> Iterator[actdb.Database]:
    with actdb.open(path, mode="a") as opened:
        yield opened


def rows_of(result: Any) -> list[tuple[int, int]]:
    return [row[2:4] for row in result.fetchall()]


def share_equal(found: Any, truth: Any) -> float:
    return float(np.isclose(found, truth, rtol=1e-4, atol=1e-5).mean())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_finds_what_exact_search_finds(db: actdb.Database, kind: str, metric: str) -> None:
    record = db.index("resid_post", **PLACE, metric=metric, kind=kind, recall=1.0)
    assert record.recall >= 0.99
    assert record.design.kind == kind
    for prompt in range(0, 150, 13):
        for options in ({}, {"exclude_prompt": True}, {"exclude_within": 2}):
            asked: dict[str, Any] = {**PLACE, "prompt": prompt, "pos": 0, "metric": metric, "k": 7, **options}
            found, truth = db.nearest("resid_post", **asked).df(), db.nearest("resid_post", **asked, exact=True).df()
            assert share_equal(found["distance"], truth["distance"]) >= (1 if kind == "flat" else 0.9)
    asked = {**PLACE, "prompt": 3, "pos": 0, "metric": metric}
    assert db.nearest("resid_post", **asked).recall == record.recall
    assert db.nearest("resid_post", **asked, exact=True).recall is None
    assert db.nearest("resid_post", **asked, radius=0.1).recall is None
    graph = db.neighbors("resid_post", **PLACE, metric=metric, k=4)
    truth_graph = db.neighbors("resid_post", **PLACE, metric=metric, k=4, exact=True)
    assert graph.recall == record.recall
    assert truth_graph.recall is None
    assert share_equal(graph.distances, truth_graph.distances) >= (1 if kind == "flat" else 0.99)


def test_product_quantisation_orders_by_stored_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PQ_ROWS", 256)
    make(tmp_path / "x.actdb")
    with actdb.open(tmp_path / "x.actdb", mode="a") as db:
        record = db.index("resid_post", **PLACE, metric="l2", kind="ivfpq", recall=0.9)
        assert record.design.code_bytes >= 1
        assert record.recall >= 0.9
        found = db.nearest("resid_post", **PLACE, prompt=3, pos=0, metric="l2").df()
        place = zip(found["prompt_id"], found["pos"], strict=True)
        selected = db.run()["resid_post"].sel(layer=1)
        query = selected.sel(prompt=3, pos=0).numpy().astype(np.float64)
        truth = [np.linalg.norm(selected.sel(prompt=int(p), pos=int(q)).numpy() - query) for p, q in place]
        np.testing.assert_allclose(found["distance"], truth, rtol=1e-4)


def test_the_recall_is_that_of_rows_held_out(db: actdb.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured anew: the held-out rows' neighbours among the others, of a search as narrow as can be."""
    monkeypatch.setattr(build, "ASTRAY", 1.0)
    record = db.index("resid_post", **PLACE, metric="l2", kind="ivf", recall=0.01)
    assert record.breadth == 1
    held = np.array(record.held)
    from actdb.neighbors.index import number_order, open_index
    from actdb.neighbors.map import make_map
    from actdb.neighbors.row import Rows, make_plane

    plane = make_plane(db.run(), "resid_post", layer=1, head=None)
    rows = Rows(plane, make_map(db.run(), plane.width), "l2")
    values = rows.read(0, len(rows)).astype(np.float64)
    opened = open_index(db._folder, rows)
    assert opened is not None
    others = np.setdiff1d(np.arange(len(rows)), held)
    np.testing.assert_array_equal(number_order(len(rows), held), [*others, *held])
    distances = np.linalg.norm(values[held][:, None] - values, axis=-1)
    furthest = np.sort(distances[:, others], axis=1)[:, 9]
    scaled = (values[held] * record.scale).astype(np.float32)
    found = opened.order[library.search_index(opened.loaded, record.design, scaled, 60, 1)]
    hits = 0
    for mine, last, numbers in zip(distances, furthest, found.tolist(), strict=True):
        first = [number for number in numbers if number not in record.held][:10]
        hits += int((mine[first] <= last + 1e-5).sum())
    assert hits / len(held) / 10 == pytest.approx(record.recall, abs=0.01)
    assert record.recall < 0.9


@pytest.mark.parametrize("name", ["where", "map", "head"])
def test_an_index_answers_for_its_own_comparison_alone(db: actdb.Database, name: str, tmp_path: Path) -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    options: dict[str, Any] = {
        "where": {**PLACE, "where": "n_tokens > 4"},
        "map": {**PLACE, "partition": rotation, "subspace": (2, 6)},
        "head": {"layer": 1, "head": 0},
    }[name]
    site = "k" if name == "head" else "resid_post"
    record = db.index(site, **options, kind="flat", metric="l2")
    assert db.neighbors(site, **options, k=2, metric="l2").recall == record.recall
    for changed in ({"metric": "ip"}, {"where": "n_tokens > 5"}, {"layer": 0}):
        assert db.neighbors(site, **{"metric": "l2", **options, **changed}, k=2).recall is None
    found = db.neighbors(site, **options, k=2, metric="l2")
    truth = db.neighbors(site, **options, k=2, metric="l2", exact=True)
    np.testing.assert_allclose(found.distances, truth.distances, atol=1e-5)


def test_what_fits_is_left_and_a_wider_search_made_anew(db: actdb.Database) -> None:
    first = db.index("resid_post", layer=0, kind="ivf", recall=0.3)
    assert db.index("resid_post", layer=0, recall=0.3) == first
    better = db.index("resid_post", layer=0, kind="ivf", recall=1.0)
    assert better.breadth > first.breadth
    assert better.recall > first.recall
    assert db.index("resid_post", layer=0, kind="flat").design.kind == "flat"


def test_hardly_a_query_is_led_astray(db: actdb.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean alone would allow a search so narrow that some queries find nothing."""
    monkeypatch.setattr(build, "ASTRAY", 1.0)
    narrow = db.index("resid_post", layer=0, metric="l2", kind="ivf", recall=0.6)
    monkeypatch.setattr(build, "ASTRAY", 0.0)
    (db.path / narrow.file.path).unlink()
    assert db.index("resid_post", layer=0, metric="l2", kind="ivf", recall=0.6).breadth > narrow.breadth


def test_the_kind_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.make_design(None, 50_000, 768).kind == "flat"
    assert library.make_design(None, 500_000, 64).kind == "hnsw"
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)  # a megabyte of memory
    assert library.make_design(None, 500_000, 64).kind == "ivfpq"
    for width in (1, 3, 64, 768, 1000, 1001):
        assert width % library.make_design("ivfpq", 10**6, width).code_bytes == 0


# Killed.

CHILD = """
import os, signal, sys
from actdb.neighbors import build, library
import actdb
build.BLOCK_ROWS, build.CHECKPOINT_S, build.SAVING_SHARE = 64, 0.0, 1e9
left = int(sys.argv[2])
write = library.write_index
def counted(index, path):
    global left
    write(index, path)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
library.write_index = counted
with actdb.open(sys.argv[1], mode="a") as db:
    added = []
    db.index("resid_post", layer=1, metric="l2", kind="ivf", progress=lambda done, total: added.append(done))
    print(added[0], db.nearest("resid_post", layer=1, metric="l2", prompt=3, pos=0).fetchall())
"""


def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    path = make(tmp_path / "x.actdb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(path)]
    firsts, truth = [], None
    for attempt in range(12):
        # killed after writing, before the file has its name, and then with one more file each time
        done = subprocess.run([*command, str(attempt // 2 + 1)], env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            firsts.append(int(done.stdout.split()[0]))
            truth = done.stdout.partition(" ")[2]
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        with actdb.open(path) as db:
            assert len(db.nearest("resid_post", **PLACE, metric="l2", prompt=3, pos=0).fetchall()) == 10
            assert db.verify() == []
    assert truth is not None
    assert firsts[0] > 64  # it did not begin anew
    with actdb.open(path) as db:
        found = db.nearest("resid_post", **PLACE, metric="l2", prompt=3, pos=0)
        assert str(found.fetchall()) == truth.strip()
    (folder,) = (path / "indexes" / "tiny" / "neighbors").iterdir()
    assert sorted(file.name.partition("-")[0] for file in folder.iterdir()) == ["index", "index.json"]


# Refused.


def test_an_index_of_fewer_parts_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x.actdb", worker=(0, 2))
    with actdb.open(path, mode="a") as db:
        assert db.run().status == "partial"
        db.index("resid_post", **PLACE)
        assert len(rows_of(db.nearest("resid_post", **PLACE, vector=VECTOR, k=3))) == 3
    make(path, worker=(1, 2))
    command = f"actdb index {path} resid_post --run tiny --metric cosine --layer 1"
    with actdb.open(path, mode="a") as db:
        with pytest.raises(StaleIndexError, match=f"there are other ones now .*; make it anew: {command}"):
            db.nearest("resid_post", **PLACE, vector=VECTOR, k=3)
        with pytest.raises(StaleIndexError, match="make it anew"):
            db.neighbors("resid_post", **PLACE, k=3)
        exact = rows_of(db.nearest("resid_post", **PLACE, vector=VECTOR, k=3, exact=True))
        result = CliRunner().invoke(cli, [*command.split()[1:]])
        assert result.exit_code == 0, result.output
    with actdb.open(path) as db:
        assert rows_of(db.nearest("resid_post", **PLACE, vector=VECTOR, k=3)) == exact


def test_an_index_of_another_harvest_is_refused(tmp_path: Path) -> None:
    for name, seed in (("x", 0), ("y", 1)):
        make(tmp_path / name, seed=seed)
    with actdb.open(tmp_path / "x", mode="a") as db:
        db.index("resid_post", **PLACE)
    (tmp_path / "x" / "indexes").rename(tmp_path / "y" / "indexes")
    with actdb.open(tmp_path / "y") as db:
        with pytest.raises(StaleIndexError, match="made of another harvest; make it anew: actdb index"):
            db.nearest("resid_post", **PLACE, vector=VECTOR)
        assert len(db.nearest("resid_post", **PLACE, vector=VECTOR, exact=True).fetchall()) == 10


def test_an_index_of_a_partition_that_was_replaced_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x.actdb")
    generator = np.random.default_rng(7)
    with actdb.open(path, mode="a") as db:
        width = db.run()["resid_post"].shape[-1]
        first, second = (np.linalg.qr(generator.normal(size=(width, width)))[0] for _ in range(2))
        options = {**PLACE, "partition": "parts", "subspace": 1}
        db.add_partition(db.run(), "parts", first, [2, width - 2])
        record = db.index("resid_post", **options)
        assert f"of parts 2:{width}" in str(record)
        assert len(db.nearest("resid_post", **options, prompt=3, pos=0).fetchall()) == 10
        db.add_partition(db.run(), "parts", second, [2, width - 2])
        command = (
            f"actdb index {path} resid_post --run tiny --metric cosine --layer 1 --partition parts --subspace 2:{width}"
        )
        with pytest.raises(StaleIndexError, match=f"made of another partition; make it anew: {command}"):
            db.nearest("resid_post", **options, prompt=3, pos=0)
        exact = rows_of(db.nearest("resid_post", **options, prompt=3, pos=0, exact=True))
    result = CliRunner().invoke(cli, command.split()[1:])
    assert result.exit_code == 0, result.output
    with actdb.open(path) as db:
        assert rows_of(db.nearest("resid_post", **options, prompt=3, pos=0)) == exact


@pytest.mark.parametrize("what", ["flip", "cut", "gone", "record"])
def test_damage_is_refused_and_repaired(tmp_path: Path, what: str) -> None:
    path = make(tmp_path / "x.actdb")
    with actdb.open(path, mode="a") as db:
        made = db.index("resid_post", **PLACE)
        truth = rows_of(db.nearest("resid_post", **PLACE, vector=VECTOR))
    file = path / made.file.path
    if what == "record":
        file = next(file.parent.glob("index.json"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-5] if what == "cut" else content)
    message = "does not match its checksum" if what == "record" else "make it anew: actdb index .* --layer 1"
    with actdb.open(path, mode="a") as db:
        with pytest.raises(DamageError, match=message):
            db.nearest("resid_post", **PLACE, vector=VECTOR)
        damages = db.verify()
        assert len(damages) == 1
        assert damages[0].run == "tiny"
        db.index("resid_post", **PLACE)
        assert db.verify() == []
        assert rows_of(db.nearest("resid_post", **PLACE, vector=VECTOR)) == truth


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    """A graph keeps rows as float16, scaled: neither huge nor tiny activations are lost."""
    for name, factor in (("huge", 1e6), ("tiny", 1e-9)):
        hooks = [("blocks.1.hook_resid_post", lambda tensor, hook, factor=factor: tensor * factor)]
        path = make(tmp_path / name, hooks=hooks, hooks_id=name, run=name, store="float32")
        with actdb.open(path, mode="a") as db:
            for metric in METRICS:
                record = db.index("resid_post", **PLACE, metric=metric, kind="hnsw")
                assert record.recall >= 0.95
                asked = {**PLACE, "prompt": 3, "pos": 0, "metric": metric}
                found, truth = (
                    db.nearest("resid_post", **asked).df(),
                    db.nearest("resid_post", **asked, exact=True).df(),
                )
                np.testing.assert_allclose(found["distance"], truth["distance"], rtol=1e-3, atol=1e-6 * factor)


def test_a_full_disk(tmp_path: Path) -> None:
    path = make(tmp_path / "x.actdb")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with actdb.open(path, mode="a") as db:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            with pytest.raises(SpaceError, match="no space left while writing .*x.actdb/indexes/tiny/neighbors"):
                db.index("resid_post", **PLACE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (folder,) = (path / "indexes" / "tiny" / "neighbors").iterdir()
        assert list(folder.iterdir()) == []
        assert db.index("resid_post", **PLACE).recall == 1


def test_a_database_open_for_reading_gets_no_index(path: Path) -> None:
    with actdb.open(path) as db, pytest.raises(WriteError, match="open it with mode='a' to make an index"):
        db.index("resid_post", **PLACE)


def test_without_faiss_exact_search_goes_on(db: actdb.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.index("resid_post", layer=1, metric="ip", kind="flat")
    monkeypatch.setitem(sys.modules, "faiss", None)
    from actdb.neighbors.index import _loaded

    _loaded.cache_clear()
    for call in (db.index, db.nearest):
        options = {"kind": "hnsw"} if call == db.index else {"vector": VECTOR}
        with pytest.raises(SettingError, match="an index needs FAISS: pip install 'actdb.cpu.'"):
            call("resid_post", layer=1, metric="ip", **options)
    assert len(db.nearest("resid_post", layer=1, metric="ip", vector=VECTOR, exact=True).fetchall()) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lsh"}, "index kind 'lsh': choose one of flat, ivf, hnsw, ivfpq"),
        ({"kind": "ivfpq"}, "index kind 'ivfpq' needs 9984 rows to train on"),
        ({"recall": 0}, "recall 0: choose a share above 0, up to 1"),
        ({"recall": 1.5}, "recall 1.5: choose a share above 0, up to 1"),
        ({"where": "prompt_id = 0 AND n_tokens = 1 OR prompt_id = 1 AND n_tokens = 1"}, "needs 2 rows"),
    ],
)
def test_what_cannot_be_indexed(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(), [{"tokens": [1]}, {"tokens": [2, 3, 4]}], path, sites=["resid_post"], stats=())
    with actdb.open(path, mode="a") as db, pytest.raises(SettingError, match=message):
        db.index("resid_post", layer=0, **options)


def test_the_smallest_index(tmp_path: Path) -> None:
    path = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(), [{"tokens": [1, 2]}], path, sites=["resid_post"], stats=())
    with actdb.open(path, mode="a") as db:
        for kind in KINDS:
            assert db.index("resid_post", layer=0, kind=kind).n_rows == 2
            assert db.neighbors("resid_post", layer=0, k=1).numbers.tolist() == [[1], [0]]


# The command line.


def test_index_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(), random_prompts(30), path)
    command = ["index", str(path), "z", "--layer", "1", "--head", "0", "--kind", "hnsw", "--where", "kind = 'a'"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    with actdb.open(path) as db:
        n_rows = db.run()["z"].sel(where="kind = 'a'").n_rows
    shown = "z layer 1 head 0 cosine where kind = 'a': hnsw, recall@10 1.000"
    assert f"index of {shown}, {n_rows} rows" in result.stderr
    listed = CliRunner().invoke(cli, ["info", str(path), "--format", "csv"])
    assert shown in listed.stdout
    asked = ["nearest", str(path), "z", "--layer", "1", "--head", "0", "--prompt", "2", "--pos", "0"]
    by_index, exact = (CliRunner().invoke(cli, [*asked, "--where", "kind = 'a'", *more]) for more in ([], ["--exact"]))
    assert by_index.stdout == exact.stdout
    assert by_index.stdout.count("\n") == 11
    assert "by an index of recall@10 1.000; --exact compares every row" in by_index.stderr
    assert exact.stderr == ""
    removed = CliRunner().invoke(cli, ["rm", str(path), "--run", "tiny"])
    assert removed.exit_code == 0, removed.output
    assert list((path / "indexes").iterdir()) == []
