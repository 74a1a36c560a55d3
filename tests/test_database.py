"""Databases as users hold them: snapshots, tables written back, runs removed, names taken."""

import errno
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hooked import TinyModel, files_of, random_prompts

import actdb

PROMPTS = random_prompts(10)


def harvest(out: Path, *, seed: int = 0, **options: Any) -> actdb.Run:
    return actdb.harvest(TinyModel(seed=seed), PROMPTS, out, **options)


def test_the_same_command_does_nothing_more(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    harvest(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert harvest(out).status == "complete"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_name_taken_by_another_plan(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    harvest(out)
    before = files_of(out)
    for options, differs in (
        ({"seed": 1}, "weights_sha256"),
        ({"store": "float32"}, "store"),
        ({"sites": ["z"]}, "sites"),
    ):
        with pytest.raises(actdb.RunError, match=f"another plan .*{differs}.*--run"):
            harvest(out, **options)
    assert files_of(out) == before
    assert harvest(out, seed=1, run="other").name == "other"


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".hidden", "a\\b", "a b", "x" * 121])
def test_run_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(actdb.SettingError, match="is not usable"):
        harvest(tmp_path / "x.actdb", run=name)
    assert not (tmp_path / "x.actdb").exists()


def test_default_names(tmp_path: Path) -> None:
    assert harvest(tmp_path / "x.actdb").name == "tiny"
    assert harvest(tmp_path / "x.actdb", step=30).name == "tiny-step30"
    with actdb.open(tmp_path / "x.actdb") as db:
        assert [run.step for run in db.runs()] == [None, 30]
        assert db.sql("SELECT run, step FROM runs ORDER BY ALL").fetchall() == [("tiny", None), ("tiny-step30", 30)]
        with pytest.raises(actdb.RunError, match="no run 'z' in .*; it holds tiny, tiny-step30"):
            db.run("z")


def test_a_snapshot_stays_until_refreshed(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    harvest(out)
    with actdb.open(out) as db, actdb.open(out) as later:
        assert db.sql("SELECT count(*) FROM runs").fetchone() == (1,)
        harvest(out, run="second")
        assert [run.name for run in db.runs()] == ["tiny"]
        assert db.sql("SELECT count(*) FROM runs").fetchone() == (1,)
        later.refresh()
        assert later.sql("SELECT count(*) FROM runs").fetchone() == (2,)
        assert db.sql("SELECT count(*) FROM head_stats").fetchone() == (10 * 2 * 2,)
        db.refresh()
        assert db.run().name == "second"


def test_where_and_sql_agree(tmp_path: Path) -> None:
    run = harvest(tmp_path / "x.actdb")
    wanted = [i for i, prompt in enumerate(PROMPTS) if prompt["kind"] == "a" and len(prompt["tokens"]) > 3]
    selection = run["z"].sel(where="kind = 'a' AND n_tokens > 3", pos=-1)
    assert selection.prompt.tolist() == wanted
    for where in ("nothing = 1", "1); DROP TABLE prompts; --", "kind = 'a'; SELECT 1", ""):
        with pytest.raises(actdb.SqlError):
            run["z"].sel(where=where).numpy()


def test_writing_back(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    run = harvest(out)
    with actdb.open(out) as db:
        with pytest.raises(actdb.WriteError, match="mode='a'"):
            db.add_results("study", run, values={"x": 1})
        with pytest.raises(actdb.SettingError, match="choose 'r'"):
            actdb.open(out, mode="w")
    with actdb.open(out, mode="a") as db:
        db.add_results("study", run, values={"x": 1, "gone": 2})
        db.add_results("study", run, values={"x": {"value": 2.5, "low": 2, "high": 3, "n": 7, "verdict": "holds"}})
        db.add_results("other", run, values={"x": None})
        with pytest.raises(actdb.SettingError, match="unknown lowest"):
            db.add_results("study", run, values={"x": {"lowest": 2}})
        rows = db.sql("SELECT analysis, run, key, value, low, n, verdict FROM results ORDER BY ALL").fetchall()
        assert rows == [("other", "tiny", "x", None, None, None, None), ("study", "tiny", "x", 2.5, 2.0, 7, "holds")]
        db.add_table("pairs", pa.table({"a": [1, 2]}))
        db.add_table("pairs", pa.table({"a": [3], "b": ["x"]}))
        assert db.sql("SELECT a, b FROM pairs ORDER BY a").fetchall() == [(1, None), (2, None), (3, "x")]
        db.add_table("pairs", pa.table({"a": [9]}), replace=True)
        assert db.sql("SELECT * FROM pairs").fetchall() == [(9,)]
        for name in ("runs", "../x", "a/b", "", "RESULTS2; DROP TABLE runs"):
            with pytest.raises(actdb.ActdbError):
                db.add_table(name, pa.table({"a": [1]}))
        assert db.verify() == []


def test_removing_a_run_leaves_the_others(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    first = harvest(out, run="first")
    harvest(out, run="shared", store="float32")
    before = files_of(out)
    harvest(out, run="gone", seed=1)
    weights = len(list((out / "weights").iterdir()))
    with actdb.open(out) as db:
        assert db.remove("gone") > 1000
        assert files_of(out) == before
        assert len(list((out / "weights").iterdir())) == weights - 1
        assert [run.name for run in db.runs()] == ["first", "shared"]
        db.remove("shared")
        assert db.verify() == []
        assert db.run("first").weight("W_E").shape == first.weight("W_E").shape
        assert db.sql("SELECT DISTINCT run FROM head_stats").fetchall() == [("first",)]
        with pytest.raises(actdb.RunError, match="no run 'gone'"):
            db.remove("gone")


def test_an_interrupted_removal_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that ends after any number of deletions leaves a database that opens, verifies and answers."""
    made, out = tmp_path / "made.actdb", tmp_path / "x.actdb"
    harvest(made, run="kept", sites=["z"])
    harvest(made, run="gone", sites=["z", "k"], seed=1)
    unlink, n_deletions = os.unlink, 0

    def limited(*args: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "Input/output error")
        unlink(*args, **options)

    while not out.exists() or (out / "runs" / "gone").exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
        left = n_deletions
        with monkeypatch.context() as patch, actdb.open(out) as db:
            patch.setattr(os, "unlink", limited)
            with suppress(actdb.WriteError):
                db.remove("gone")
        with actdb.open(out) as db:
            assert db.verify() == []
            assert db.run("kept").status == "complete"
            for run in db.runs():
                run["z"].numpy()
            assert db.sql("SELECT DISTINCT run FROM head_stats ORDER BY ALL").fetchall()[-1] == ("kept",)
        n_deletions += 1
    assert n_deletions > 10
    with actdb.open(out) as db:
        assert [run.name for run in db.runs()] == ["kept"]


def test_the_folder_can_be_moved(tmp_path: Path) -> None:
    run = harvest(tmp_path / "x.actdb")
    wanted = run["z"].numpy()
    shutil.move(tmp_path / "x.actdb", tmp_path / "moved")
    with actdb.open(tmp_path / "moved") as db:
        assert (db.run()["z"].numpy() == wanted).all()
        assert db.sql("SELECT count(*) FROM prompts").fetchone() == (10,)
        assert db.verify() == []


def test_the_catalog_is_derived(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    harvest(out)
    query = "SELECT * FROM head_stats ORDER BY ALL"
    with actdb.open(out) as db:
        before = db.sql(query).fetchall()
    for damage in (Path.unlink, lambda path: path.write_bytes(b"nonsense" * 100)):
        damage(out / "catalog.duckdb")
        with actdb.open(out) as db:
            assert [found.path for found in db.verify()] == ["catalog.duckdb"] * (out / "catalog.duckdb").exists()
        with actdb.open(out) as db:
            assert db.sql(query).fetchall() == before
        assert (out / "catalog.duckdb").exists()


def test_many_tiny_runs(tmp_path: Path) -> None:
    out, module, prompts = tmp_path / "x.actdb", TinyModel(), random_prompts(4)
    began = time.perf_counter()
    for step in range(40):
        actdb.harvest(module, prompts, out, step=step)
    each_s = (time.perf_counter() - began) / 40
    began = time.perf_counter()
    with actdb.open(out) as db:
        opening_s = time.perf_counter() - began
        assert len(db.runs()) == 40
        assert db.sql("SELECT count(DISTINCT run) FROM head_stats").fetchone() == (40,)
    assert len(list((out / "weights").iterdir())) == 1
    assert each_s < 0.3  # about 0.05 s on two quiet cores
    assert opening_s < 0.2


def test_checkpoints_are_the_steps_of_one_model_over_one_prompt_set(tmp_path: Path) -> None:
    out, module, prompts = tmp_path / "x.actdb", TinyModel(), random_prompts(2)
    for step in (20, 3, 100):
        actdb.harvest(module, prompts, out, step=step)
    actdb.harvest(module, prompts, out, run="whole")
    actdb.harvest(module, random_prompts(3), out, run="others", step=5)
    with actdb.open(out) as db:
        assert [run.step for run in db.checkpoints("whole")] == [3, 20, 100]
        assert [run.name for run in db.checkpoints()] == ["others"]
        with pytest.raises(actdb.RunError, match="no run 'none'"):
            db.checkpoints("none")


def test_weights_are_written_once(tmp_path: Path) -> None:
    """A further run over the same weights leaves their files alone."""
    out = tmp_path / "x.actdb"
    harvest(out, run="first", sites=["z"])
    written = {path: path.stat().st_mtime_ns for path in (out / "weights").rglob("*")}
    harvest(out, run="second", sites=["k"])
    assert {path: path.stat().st_mtime_ns for path in (out / "weights").rglob("*")} == written
    assert len(written) > 3


def test_importing_is_quick() -> None:
    """Below 0.3 s of processor time; about 0.15 s, of which NumPy takes two thirds."""
    code = "import time; began = time.process_time(); import actdb; print(time.process_time() - began)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3


def test_imports_stay_light() -> None:
    heavy = ["torch", "zarr", "duckdb", "pyarrow", "transformer_lens", "transformers", "matplotlib", "pandas", "tqdm"]
    code = f"import sys, actdb, actdb.cli; sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reading_imports_neither_torch_nor_zarr(tmp_path: Path) -> None:
    harvest(tmp_path / "x.actdb")
    code = (
        "import sys, actdb; db = actdb.open(sys.argv[1]); run = db.run(); run['z'].sel(layer=0, prompt=2).numpy();"
        "run['pattern'].sel(prompt=2).numpy(); db.sql('SELECT 1').fetchall(); db.close();"
        "sys.exit(' '.join(m for m in ('torch', 'zarr', 'transformer_lens') if m in sys.modules) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.actdb")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
