"""Sites that analyses add to a run: what comes back, stock readers, SQL, damage, killed calls, bad input."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actdb
from actdb.schema import unseal
from tests.hooked import PLAN, TinyModel, files_of, random_prompts, write_run

N_LAYERS, N_HEADS = 2, 2
DIMS = ("layer", "head", "prompt", "target")


def blocks_of(
    run: actdb.Run,
    values: npt.NDArray[Any],
    axis: int,
    sizes: Iterator[int] | None = None,
    *,
    of_rows: bool = False,
) -> Iterator[actdb.Block]:
    """Yield values [planes…, prompt or row in stored order, …] as blocks of the sizes given, then one of the rest."""
    rows = np.array(run.prompt_ids(order="stored"))
    pos = None
    if of_rows:
        index = run.prompt_index
        pos = np.concatenate(
            [np.arange(n) + (index.n_tokens[p] - n) for p, n in zip(rows, index.n_rows[rows], strict=True)]
        )
        rows = np.repeat(rows, index.n_rows[rows])
    begin = 0
    while begin < len(rows):
        end = begin + (next(sizes, len(rows)) if sizes else len(rows))
        piece = (slice(None),) * axis + (slice(begin, end),)
        yield actdb.Block(values[piece], rows[begin:end], None if pos is None else pos[begin:end])
        begin = end


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A harvested run of several parts."""
    actdb.harvest(TinyModel(), random_prompts(17), tmp_path / "x.actdb", run="made", **PLAN)
    return tmp_path / "x.actdb"


def interactions(run: actdb.Run, seed: int = 0) -> npt.NDArray[np.float32]:
    """Random values [layer, head, prompt in stored order, target]."""
    shape = (N_LAYERS, N_HEADS, run.n_prompts, N_LAYERS * N_HEADS)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def add_interactions(path: Path, *, seed: int = 0, **options: Any) -> npt.NDArray[np.float32]:
    """Add the site `interaction`; returns its values in the order of prompt ids."""
    with actdb.open(path, mode="a") as db:
        run = db.run()
        values = interactions(run, seed)
        run.add_site("interaction", dims=DIMS, blocks=blocks_of(run, values, 2, iter([5, 1, 4])), **options)
        return values[:, :, np.argsort(run.prompt_ids(order="stored"))]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_was_added_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("added") / "x.actdb"
    positions = data.draw(st.sampled_from(["all", "last"]))
    codec = data.draw(st.sampled_from(["lz4", "raw"]))
    write_run(root, seed=data.draw(st.integers(0, 99)), codec=codec, positions=positions)
    outer = data.draw(st.sampled_from([(), ("layer",), ("head",), ("layer", "head"), ("layer", "kv_head")]))
    axis = data.draw(st.sampled_from(["prompt", "row"]))
    features = data.draw(st.lists(st.integers(1, 4), max_size=1))
    dims = (*outer, axis, *("one",)[: len(features)])
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64", "int64", "uint16"]))
    with actdb.open(root, mode="a") as db:
        run = db.run()
        n = len(run.prompt_ids()) if axis == "prompt" else run.info.n_rows
        planes = [3 if dim == "layer" else data.draw(st.integers(1, 3)) for dim in outer]
        generator = np.random.default_rng(data.draw(st.integers(0, 99)))
        values = (generator.standard_normal((*planes, n, *features)) * 100).astype(dtype)
        sizes = iter(data.draw(st.lists(st.integers(1, 9), max_size=4)))
        run.add_site("mine", dims=dims, blocks=blocks_of(run, values, len(outer), sizes, of_rows=axis == "row"))
        assert db.verify() == []
    with actdb.open(root) as db:
        run = db.run()
        stored = run.prompt_ids(order="stored")
        counts = run.prompt_index.n_rows[stored] if axis == "row" else np.ones(len(stored), int)
        owner = np.repeat(stored, counts)
        expected = values[(slice(None),) * len(outer) + (np.argsort(owner, kind="stable"),)]
        selection = run["mine"]
        assert selection.dims == dims
        np.testing.assert_array_equal(selection.numpy(), expected)
        assert selection.dtype == np.dtype(dtype)
        prompt = data.draw(st.sampled_from(stored))
        mine = values[(slice(None),) * len(outer) + (owner == prompt,)]
        mine = mine if axis == "row" else mine[(slice(None),) * len(outer) + (0,)]
        np.testing.assert_array_equal(selection.sel(prompt=prompt).numpy(), mine)


def test_stock_zarr_reads_the_same_bytes(database: Path) -> None:
    values = add_interactions(database)
    run = actdb.open(database).run()
    array: Any = zarr.open_array(database / "arrays.zarr/made/interaction", mode="r")
    assert array.metadata.dimension_names == DIMS
    rows = run.prompt_index.prompt_rows(run.info.site("interaction"))
    np.testing.assert_array_equal(array[:][:, :, rows], values)


def test_the_run_and_sql_know_it_at_once(database: Path) -> None:
    with actdb.open(database, mode="a") as db:
        run = db.run()
        assert "interaction" not in run
        values = interactions(run)
        run.add_site("interaction", dims=DIMS, blocks=blocks_of(run, values, 2))
        assert run.sites[-1] == "interaction" == db.run().sites[-1]
        np.testing.assert_array_equal(run["interaction"].sel(layer=1, head=0, prompt=3).shape, (4,))
        columns = "dims, shape, dtype, raw_bytes"
        found = db.sql(f"SELECT {columns} FROM sites WHERE site = 'interaction'").fetchone()
    spec = run.info.site("interaction")
    assert spec is not None
    assert found == (list(DIMS), list(spec.shape), "float32", values.nbytes)


def test_sql_reads_interactions(database: Path) -> None:
    values = add_interactions(database)
    with actdb.open(database) as db:
        query = (
            "SELECT a.l, a.h, b.l, b.h, prompt_id, interaction(a.l, a.h, b.l, b.h, prompt_id) FROM run_prompts,"
            " (SELECT l, h FROM range(2) t(l), range(2) s(h)) a, (SELECT l, h FROM range(2) t(l), range(2) s(h)) b"
        )
        rows = db.sql(query).fetchall()
        assert len(rows) == 16 * 17
        for layer_a, head_a, layer_b, head_b, prompt, found in rows:
            assert found == values[layer_a, head_a, prompt, 2 * layer_b + head_b]
        assert db.sql("SELECT interaction(0, 1, 1, NULL, 3)").fetchone() == (None,)
        assert db.sql("SELECT interaction(0, 1, 1, 1, 3, run := 'made')").fetchone() == (values[0, 1, 3, 3],)
        for call, message in {
            "interaction(0, 1, 2, 0, 3)": "layer_b 2: choose one of 0, 1",
            "interaction(0, 1, 1, -1, 3)": "head_b -1: choose one of 0, 1",
            "interaction(0, 2, 1, 1, 3)": "head 2: there are heads 0 to 1",
            "interaction(5, 1, 1, 1, 3)": "layer 5: there are layers 0 to 1",
            "interaction(0, 1, 1, 1, 17)": "prompt 17: run 'made' has prompts 0 to 16",
        }.items():
            with pytest.raises(actdb.SqlError, match=message):
                db.sql(f"SELECT {call}").fetchall()


def test_sql_says_what_is_missing(database: Path) -> None:
    with actdb.open(database, mode="a") as db:
        with pytest.raises(actdb.SqlError, match="no site 'interaction'; python -m analyses.forward_proportion"):
            db.sql("SELECT interaction(0, 0, 1, 0, 0)").fetchall()
        run = db.run()
        blocks = blocks_of(run, np.zeros((17, 4), np.float32), 0)
        run.add_site("interaction", dims=("prompt", "target"), blocks=blocks)
        with pytest.raises(actdb.SqlError, match=r"has axes prompt, target .* instead of layer, head, prompt, target"):
            db.sql("SELECT interaction(0, 0, 1, 0, 0)").fetchall()


def test_other_readers_take_it(database: Path) -> None:
    values = add_interactions(database)
    with actdb.open(database) as db:
        run = db.run()
        dataset = run.dataset()
        np.testing.assert_array_equal(dataset["interaction"].transpose("layer", "head", "prompt_id", "target"), values)
        assert not [name for name in run.activation_cache(0) if "interaction" in name]
        batches = list(run["interaction"].sel(layer=0, head=1).batches(4))
        prompts = np.concatenate([block.prompt for block in batches])
        np.testing.assert_array_equal(np.concatenate([block.values for block in batches]), values[0, 1, prompts])
        assert prompts.tolist() == run.prompt_ids(order="stored")


def test_the_run_itself_is_not_rewritten(database: Path) -> None:
    before = files_of(database)
    add_interactions(database)
    after = files_of(database)
    assert {name: after[name] for name in before} == before
    new = {name for name in after if name not in before}
    assert {name.rpartition("interaction")[0] for name in new} == {"runs/made/sites/", "arrays.zarr/made/"}
    actdb.harvest(TinyModel(), random_prompts(17), database, run="made", **PLAN)
    assert files_of(database) == after


def test_added_twice_makes_the_same_bytes(database: Path) -> None:
    add_interactions(database)
    first = files_of(database)
    with pytest.raises(actdb.SettingError, match="has an added site 'interaction'; replace it with replace=True"):
        add_interactions(database)
    assert files_of(database) == first
    add_interactions(database, seed=1, replace=True)
    assert files_of(database) != first
    add_interactions(database, replace=True)
    assert files_of(database) == first


def test_replacing_is_seen_by_the_same_run_and_by_sql(database: Path) -> None:
    add_interactions(database)
    with actdb.open(database, mode="a") as db:
        run = db.run()
        one = "SELECT interaction(0, 1, 1, 1, 3)"
        before = run["interaction"].sel(prompt=3).numpy(), db.sql(one).fetchone()
        run.add_site("interaction", dims=DIMS, blocks=blocks_of(run, interactions(run, 5), 2), replace=True)
        after = run["interaction"].sel(prompt=3).numpy(), db.sql(one).fetchone()
        assert (before[0] != after[0]).all()
        assert before[1] != after[1] == (after[0][0, 1, 3],)


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_verify_names_damage(database: Path) -> None:
    add_interactions(database)
    shard = sorted((database / "arrays.zarr/made/interaction/c").rglob("*"))[-1]
    metadata = database / "arrays.zarr/made/interaction/zarr.json"
    commit = database / "runs/made/sites/interaction.json"
    for path, offset in ((shard, 5), (shard, -9), (metadata, 30), (commit, 60)):
        intact = path.read_bytes()
        damage(path, offset)
        with actdb.open(database) as db:
            assert [found.path for found in db.verify()] == [str(path.relative_to(database))], (path, offset)
        path.write_bytes(intact)
    shard.unlink()
    with actdb.open(database) as db:
        (found,) = db.verify()
        assert str(shard.relative_to(database)) in found.message
        prompt = next(iter(np.flatnonzero(db.run().prompt_index.part == int(shard.parent.name))))
        with pytest.raises(actdb.DamageError, match="missing|damaged"):
            db.run()["interaction"].sel(prompt=int(prompt)).numpy()


def test_a_damaged_chunk_is_not_returned(database: Path) -> None:
    add_interactions(database)
    for shard in (database / "arrays.zarr/made/interaction/c").rglob("*"):
        if shard.is_file():
            damage(shard, 5)
    with actdb.open(database) as db, pytest.raises(actdb.DamageError, match="add the site again to repair it"):
        db.run()["interaction"].numpy()
    add_interactions(database, replace=True)
    assert actdb.open(database).verify() == []


def test_a_damaged_commit_hides_the_site_and_is_replaced(database: Path) -> None:
    values = add_interactions(database)
    damage(database / "runs/made/sites/interaction.json", 60)
    with actdb.open(database) as db:
        assert "interaction" not in db.run()
        assert db.sql("SELECT count(*) FROM sites WHERE site = 'interaction'").fetchone() == (0,)
    add_interactions(database)
    with actdb.open(database) as db:
        np.testing.assert_array_equal(db.run()["interaction"].numpy(), values)


KILLED = """
import os, signal, sys
import numpy as np
import actdb
from tests.test_add_site import DIMS, blocks_of, interactions

with actdb.open(sys.argv[1], mode="a") as db:
    run = db.run()

    def blocks():
        for i, block in enumerate(blocks_of(run, interactions(run), 2, iter([6, 6]))):
            if i == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield block
    run.add_site("interaction", dims=DIMS, blocks=blocks())
"""


@pytest.mark.parametrize("block", [1, 2])
def test_a_killed_call_leaves_no_site(database: Path, block: int) -> None:
    before = files_of(database)
    command = [sys.executable, "-c", KILLED, str(database), str(block)]
    died = subprocess.run(command, cwd=Path(__file__).parents[1], check=False)
    assert died.returncode == -9
    with actdb.open(database) as db:
        assert "interaction" not in db.run()
        assert db.verify() == []
    values = add_interactions(database)
    with actdb.open(database) as db:
        np.testing.assert_array_equal(db.run()["interaction"].numpy(), values)
    assert not [name for name in files_of(database) if ".tmp-" in name]
    assert db.remove("made") > 0
    assert set(files_of(database)) == {
        name for name in before if "/made/" not in name and not name.startswith("weights/")
    }


def test_a_call_that_fails_leaves_nothing(database: Path) -> None:
    before = files_of(database)
    with actdb.open(database, mode="a") as db:
        run = db.run()

        def blocks() -> Iterator[actdb.Block]:
            yield next(blocks_of(run, interactions(run), 2, iter([9])))
            raise RuntimeError("the analysis failed")

        with pytest.raises(RuntimeError, match="the analysis failed"):
            run.add_site("interaction", dims=DIMS, blocks=blocks())
        infinite = interactions(run)
        infinite[1, 1, -1, 0] = np.inf
        with pytest.raises(actdb.OverflowingError, match="interaction of layer 1"):
            run.add_site("interaction", dims=DIMS, blocks=blocks_of(run, infinite, 2))
    assert files_of(database) == before


def test_bad_input_is_refused(database: Path) -> None:
    before = files_of(database)
    with actdb.open(database, mode="a") as db:
        run = db.run()
        stored = np.array(run.prompt_ids(order="stored"))
        block = actdb.Block(np.zeros((17, 3), np.float32), stored)
        rows = next(run["resid_post"].batches(9))
        for name, dims, blocks, message in [
            ("z", ("prompt", "x"), [block], "has harvested site 'z'; choose another name"),
            ("../z", ("prompt", "x"), [block], "not usable as a name"),
            ("mine", ("x", "y"), [block], "give one of prompt and row"),
            ("mine", ("prompt", "row"), [block], "give one of prompt and row"),
            ("mine", ("entry",), [block], "give one of prompt and row"),
            ("mine", ("prompt", "x", "x"), [block], "give one of prompt and row"),
            ("mine", ("prompt", "x", "y"), [block], "after it none or one of your own"),
            ("mine", ("head", "layer", "prompt"), [block], "before it none, layer, head or both"),
            ("mine", ("prompt",), [block], r"a block of shape \[17, 3\] does not have the axes prompt"),
            ("mine", ("prompt", "x"), [], "there are no blocks"),
            ("mine", ("prompt", "x"), [actdb.Block(block.values.astype(bool), stored)], "dtype bool cannot be stored"),
            ("mine", ("prompt", "x"), [actdb.Block(block.values[:, :0], stored)], "an axis without places"),
            ("mine", ("layer", "prompt"), [actdb.Block(block.values.T, stored)], "3 layers instead of the run's 2"),
            ("mine", ("prompt", "x"), [actdb.Block(block.values, stored[::-1])], "next comes prompt"),
            ("mine", ("prompt", "x"), [actdb.Block(block.values[:5], stored[:5])], "hold 5 rows, the run 17"),
            ("mine", ("prompt", "x"), [block, block], "more than the run's 17 rows"),
            (
                "mine",
                ("prompt", "x"),
                [actdb.Block(block.values, stored[:5])],
                r"a block of float32 \[17, 3\] for 5 rows",
            ),
            ("mine", ("layer", "row", "x"), [actdb.Block(rows.values, rows.prompt)], "must tell each row's pos"),
            ("mine", ("layer", "row", "x"), [actdb.Block(rows.values, rows.prompt, rows.pos + 1)], "next comes prompt"),
        ]:
            with pytest.raises(actdb.SettingError, match=message):
                run.add_site(name, dims=dims, blocks=blocks)
        later = actdb.Block(block.values[7:].astype(np.float64), stored[7:])
        with pytest.raises(actdb.SettingError, match=r"the first block asks for float32 \[10, 3\]"):
            run.add_site("mine", dims=("prompt", "x"), blocks=[actdb.Block(block.values[:7], stored[:7]), later])
    assert files_of(database) == before
    with actdb.open(database) as db, pytest.raises(actdb.WriteError, match="mode='a' to add sites"):
        db.run().add_site("mine", dims=("prompt", "x"), blocks=[block])


def test_a_partial_run_takes_none(tmp_path: Path) -> None:
    write_run(tmp_path / "x.actdb", committed=[0, 1])
    with actdb.open(tmp_path / "x.actdb", mode="a") as db, pytest.raises(actdb.RunError, match="is partial: finish"):
        db.run().add_site("mine", dims=("prompt",), blocks=[actdb.Block(np.zeros(2), np.arange(2))])


def test_prompt_ids_refuses_another_order(database: Path) -> None:
    with actdb.open(database) as db, pytest.raises(actdb.SettingError, match="choose one of id, stored"):
        db.run().prompt_ids(order="random")


@pytest.mark.parametrize("change", ["plan_hash", "name", "hook", "capacity", "axes"])
def test_a_commit_that_does_not_fit_is_refused(database: Path, change: str) -> None:
    from actdb.schema import seal

    add_interactions(database)
    path = database / "runs/made/sites/interaction.json"
    value = unseal(path.read_bytes(), str(path))
    if change == "plan_hash":
        value["plan_hash"] = "0" * 64
    elif change == "capacity":
        value["spec"]["shard_shape"][2] = 0
    elif change == "axes":
        for shape in ("shape", "shard_shape", "chunk_shape"):
            value["spec"][shape][3:] = [2, 2]
        value["spec"]["dims"].append("more")
    else:
        value["spec"][change] = "z"
    path.write_bytes(seal(value))
    with actdb.open(database) as db:
        assert "interaction" not in db.run()
        assert [found.path for found in db.verify()] == ["runs/made/sites/interaction.json"]


def test_reading_imports_neither_torch_nor_zarr(database: Path) -> None:
    add_interactions(database)
    code = (
        "import sys, actdb\n"
        f"with actdb.open({str(database)!r}) as db:\n"
        "    db.run()['interaction'].numpy(); db.sql('SELECT interaction(0, 0, 1, 0, 0)').fetchall()\n"
        "assert not {'torch', 'zarr'} & {*sys.modules}, sys.modules.keys() & {'torch', 'zarr'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
