"""Stored bytes: stock readers agree, every flipped byte is found, nothing leads outside the folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hooked import TinyModel, files_of, random_prompts, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import actdb
from actdb.harvesting.pipeline import cast_error
from actdb.schema import SiteSpec, seal
from actdb.storage import arrays, codecs, commits
from actdb.storage.shards import ShardReader, ShardWriter

PROMPTS = random_prompts(14)


def harvest(out: Path, **options: Any) -> actdb.Run:
    return actdb.harvest(TinyModel(), PROMPTS, out, part_tokens=30, batch_tokens=24, **options)


@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_stock_readers_read_the_same(tmp_path: Path, codec: str) -> None:
    written = write_run(tmp_path / "x.actdb", codec=codec, seed=6)
    run = actdb.open(tmp_path / "x.actdb").run()
    group = zarr.open_group(tmp_path / "x.actdb" / "arrays.zarr" / "made", mode="r")
    assert sorted(group.array_keys()) == sorted(run.sites)
    index = run._prompts
    for spec in run.info.sites:
        stock = np.asarray(group[spec.name][...])
        path = tmp_path / "x.actdb" / "arrays.zarr" / "made" / spec.name
        store = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
        assert np.array_equal(store.read().result(), stock)
        assert stock.shape == spec.shape
        assert group[spec.name].metadata.dimension_names == spec.dims
        starts = {"row": index.row_start, "entry": index.entry_start, "prompt": index.prompt_rows(spec)}[
            spec.dims[spec.axis]
        ]
        used = np.zeros(spec.shape[spec.axis], bool)
        for prompt, start in enumerate(starts.tolist()):
            want = written.values[spec.name][prompt]
            n = want.shape[spec.axis]
            used[start : start + n] = True
            assert np.array_equal(stock.take(range(start, start + n), axis=spec.axis), want)
        assert not stock.compress(~used, axis=spec.axis).any()  # absent rows read as the fill value


@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_shards_of_zarr_python_are_read(tmp_path: Path, codec: str) -> None:
    spec = SiteSpec("x", "x", ("layer", "row", "d"), (2, 10, 3), (2, 8, 3), (1, 4, 3), "float16", codec, None, (0, 1))
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "zarr.json").write_bytes(arrays.array_metadata(spec))
    values = np.random.default_rng(0).standard_normal((2, 10, 3)).astype(np.float16)
    zarr.open_array(folder, mode="r+")[...] = values
    reader = ShardReader(str(folder / "c" / "0" / "0" / "0"), spec)
    out = np.empty((4, 3), np.float16)
    for chunk in range(4):
        reader.read(chunk, out)
        assert np.array_equal(out, values[chunk // 2, 4 * (chunk % 2) :][:4])
        view = reader.view(chunk)
        assert (view is None) == (codec == "lz4")
        assert view is None or np.array_equal(view.reshape(4, 3), out)


@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.uint16]), (17, 3)), st.sampled_from(codecs.CODECS))
@settings(deadline=None)
def test_codecs_give_back_what_they_took(values: np.ndarray, codec: str) -> None:
    payload, crc = codecs.encode(values, codec)
    assert codecs.checksum_matches(payload + crc)
    out = np.empty_like(values)
    codecs.decode(payload + crc, codec, out)
    assert out.tobytes() == values.tobytes()
    with pytest.raises(ValueError, match="bytes instead of"):
        codecs.decode(payload + crc, codec, np.empty((18, 3), values.dtype))


@given(hnp.arrays(st.sampled_from([np.float16, np.float32]), 9, elements={"allow_nan": True, "allow_infinity": True}))
def test_largest_magnitude(values: np.ndarray) -> None:
    wide = np.abs(values.astype(np.float64))
    want = float(wide.max()) if np.isfinite(wide).all() else float("inf")
    assert codecs.largest_magnitude(values) == want


@given(
    hnp.arrays(np.float32, 9, elements=st.floats(allow_nan=False, allow_infinity=False, width=32)), st.integers(1, 22)
)
def test_rounding_is_bitround(values: np.ndarray, bits: int) -> None:
    from numcodecs.bitround import BitRound

    want = BitRound(bits).decode(BitRound(bits).encode(values.copy()))
    rounded = values.copy()
    error = codecs.round_mantissas(rounded, bits)
    finite = np.isfinite(want)
    assert np.array_equal(rounded[finite], want[finite])
    assert np.isfinite(rounded).all()
    assert error == np.abs(rounded.astype(np.float64) - values).max()


def test_the_cast_error_bounds_the_cast() -> None:
    spec = SiteSpec("x", "x", ("row",), (1,), (1,), (1,), "float16", "raw")
    values = np.random.default_rng(0).uniform(-300, 300, 10_000).astype(np.float32)
    error = float(np.abs(values.astype(np.float16).astype(np.float32) - values).max())
    assert error <= cast_error(float(np.abs(values).max()), spec, "float32") < 1.2 * error


def test_every_flipped_byte_of_a_shard_is_found(tmp_path: Path) -> None:
    written = write_run(tmp_path / "x.actdb", n_parts=1, n_prompts=3, longest=3, layers=(0,))
    spec = written.info.site("k")
    assert spec is not None
    path = tmp_path / "x.actdb" / arrays.shard_name("made", spec, 0)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        with actdb.open(tmp_path / "x.actdb") as db:
            damages = db.verify()
            assert [(d.run, d.part) for d in damages] == [("made", 0)], place
            assert str(path.resolve()) in damages[0].message
            with pytest.raises(actdb.DamageError, match="run the same harvest again"):
                db.run()["k"].numpy()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with actdb.open(tmp_path / "x.actdb") as db:
            assert len(db.verify()) == 1
            with pytest.raises(actdb.DamageError):
                db.run()["k"].numpy()
    path.unlink()
    with actdb.open(tmp_path / "x.actdb") as db, pytest.raises(actdb.DamageError, match="is missing"):
        db.run()["k"].numpy()


def test_stock_zarr_notices_flipped_payloads_too(tmp_path: Path) -> None:
    written = write_run(tmp_path / "x.actdb", n_parts=1)
    spec = written.info.site("k")
    assert spec is not None
    path = tmp_path / "x.actdb" / arrays.shard_name("made", spec, 0)
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)checksum"):
        np.asarray(zarr.open_array(tmp_path / "x.actdb" / "arrays.zarr" / "made" / "k", mode="r")[...])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def test_repair(tmp_path: Path) -> None:
    """Each file of a run, altered, truncated or deleted: verify names it, the same harvest restores its bytes."""
    out = tmp_path / "x.actdb"
    harvest(out)
    original = files_of(out)
    names = sorted(name for name in original if name != "actdb.json" and not name.endswith("run.json"))
    kinds = {name.rpartition("/")[0].rpartition("/")[2] + name[-12:]: name for name in names}
    assert len(kinds) >= 10
    for number, name in enumerate(kinds.values()):
        damage = (flip, lambda path: path.write_bytes(path.read_bytes()[:-3]), Path.unlink)[number % 3]
        damage(out / name)
        with actdb.open(out) as db:
            missing_commit = "/commits/" in name and not (out / name).exists()
            assert missing_commit or any(name in damage.path for damage in db.verify()), name
        harvest(out)
        assert files_of(out) == original, name
    for name in names:  # everything at once
        flip(out / name)
    harvest(out)
    assert files_of(out) == original


def test_what_cannot_be_repaired_is_named(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    name = harvest(out).name
    with actdb.open(out, mode="a") as db:
        db.add_results("study", name, values={"x": 1.0})
    run_json, table = out / "runs" / name / "run.json", next((out / "tables" / "results").iterdir())
    for path in (run_json, table):
        flip(path)
    with actdb.open(out) as db:
        messages = [damage.message for damage in db.verify()]
        assert len(messages) == 2
        assert any("run.json" in m and "cannot be recomputed" in m for m in messages)
        assert any(table.name in m and "cannot be recomputed" in m for m in messages)
        with pytest.raises(actdb.RunError, match="does not match its checksum|not the JSON"):
            db.run(name)
        assert db.runs() == []
    with pytest.raises(actdb.DamageError, match="run.json"):
        harvest(out)
    (out / "actdb.json").write_text("{")
    with pytest.raises(actdb.DatabaseError, match="is damaged"):
        actdb.open(out)


def test_other_formats_and_other_folders(tmp_path: Path) -> None:
    with pytest.raises(actdb.DatabaseError, match="not an actdb database"):
        actdb.open(tmp_path)
    with pytest.raises(actdb.DatabaseError, match="not an actdb database"):
        actdb.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for call in (lambda: actdb.open(tmp_path / "file"), lambda: harvest(tmp_path / "file")):
        with pytest.raises(actdb.DatabaseError):
            call()
    with pytest.raises(actdb.DatabaseError, match="holds other files"):
        harvest(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "actdb.json").write_text('{"format_version": 2}')
    for call in (lambda: actdb.open(tmp_path / "new"), lambda: harvest(tmp_path / "new")):
        with pytest.raises(actdb.DatabaseError, match="format version 2.*upgrade actdb"):
            call()


@pytest.mark.parametrize("kind", ["shard", "prompts", "commit", "run", "site"])
def test_links_that_lead_outside_are_refused(tmp_path: Path, kind: str) -> None:
    out, outside = tmp_path / "x.actdb", tmp_path / "outside"
    run = harvest(out)
    spec = run.info.site("z")
    assert spec is not None
    target = {
        "shard": arrays.shard_name(run.name, spec, 0),
        "prompts": f"runs/{run.name}/prompts.parquet",
        "commit": commits.commit_name(run.name, 0),
        "run": f"runs/{run.name}",
        "site": f"arrays.zarr/{run.name}/z",
    }[kind]
    shutil.move(out / target, outside)
    os.symlink(outside, out / target)
    with actdb.open(out) as db:
        assert any("leads outside" in damage.message for damage in db.verify())
        if kind in ("shard", "prompts", "site"):
            with pytest.raises(actdb.DamageError, match="leads outside"):
                db.run()["z"].numpy()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc"},
        {"sites": [{"name": "../x"}]},
        {"sites": "all"},
        {"n_parts": "many"},
        {"n_parts": None},
        {"files": [{"path": "/etc/passwd", "stored_bytes": 1, "crc32c": 0}]},
        {"files": [{"path": "a/../../b", "stored_bytes": 1, "crc32c": 0}]},
    ],
)
def test_hostile_run_files_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    out = tmp_path / "x.actdb"
    name = harvest(out).name
    path = out / "runs" / name / "run.json"
    value = json.loads(path.read_bytes())
    del value["crc32c"]
    path.write_bytes(seal({**value, **change}))
    with actdb.open(out) as db:
        assert list(db.snapshot.damaged) == [name]
        with pytest.raises(actdb.RunError, match="damaged"):
            db.run(name)


@pytest.mark.parametrize("size", ["shape", "shard_shape"])
def test_absurd_shapes_cost_no_memory(tmp_path: Path, size: str) -> None:
    out = tmp_path / "x.actdb"
    name = harvest(out, sites=["z"]).name
    path = out / "runs" / name / "run.json"
    value = json.loads(path.read_bytes())
    del value["crc32c"]
    site = value["sites"][0]
    site[size] = [2, 2, site["chunk_shape"][2] * 2**50, 4]
    path.write_bytes(seal(value))
    with actdb.open(out) as db:
        selection = db.run()["z"].sel(prompt=0)
        if size == "shard_shape":
            with pytest.raises(actdb.DamageError, match="does not fit the run|index is truncated"):
                selection.numpy()


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", 4)
    writer.write(2, b"abcd", b"efgh")
    record = writer.finish("s")
    assert record.stored_bytes == (tmp_path / "s").stat().st_size == 8 + 4 * 16 + 4
