"""Stored bytes: stock readers agree, every flipped byte is found, nothing leads outside the folder."""

import copy
import errno
import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from hooked import TinyModel, files_of, random_prompts, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import actdb
from actdb.harvesting.pipeline import SiteShard, Writers, cast_error
from actdb.schema import FileRecord, SiteSpec, seal
from actdb.storage import arrays, codecs, commits, verify
from actdb.storage.folder import Folder
from actdb.storage.shards import ShardReader, ShardWriter, index_bytes
from benchmarks import data
from benchmarks.harness import evict
from tests.residency import need_eviction, resident_share

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
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            assert np.array_equal(np.asarray(zarr.open_array(path, mode="r")[...]), stock)
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


def test_precision_is_bitround_of_what_would_be_stored(tmp_path: Path) -> None:
    from numcodecs.bitround import BitRound

    out = tmp_path / "x.actdb"
    exact = harvest(out, run="exact", sites=["z", "pattern"])
    rounded = harvest(out, run="rounded", sites=["z", "pattern"], precision=4)
    for site in ("z", "pattern"):
        array = zarr.open_array(out / "arrays.zarr" / "exact" / site, mode="r")[...]
        want = BitRound(4).decode(BitRound(4).encode(np.array(array)))
        found = zarr.open_array(out / "arrays.zarr" / "rounded" / site, mode="r")[...]
        assert np.array_equal(found, want)
        assert not np.array_equal(found, array)
        spec = rounded.info.site(site)
        assert spec is not None
        held = [commits.read_commit(Folder(out), "rounded", part).sites[site] for part in range(rounded.info.n_parts)]
        worst = float(np.abs(want.astype(np.float64) - array).max())
        limits = [tally.max_abs_error - cast_error(tally.max_abs, spec, "float32") for tally in held]
        assert max(limits) == pytest.approx(worst)
        assert sum(tally.stored_bytes for tally in held) < sum(
            commits.read_commit(Folder(out), "exact", part).sites[site].stored_bytes
            for part in range(exact.info.n_parts)
        )


@given(
    cuts=st.lists(st.integers(0, 40), max_size=6),
    length=st.integers(1, 9),
    heads=st.sampled_from([None, 1, 3]),
    codec=st.sampled_from(codecs.CODECS),
    lockstep=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_may_end_anywhere(
    tmp_path: Path, cuts: list[int], length: int, heads: int | None, codec: str, lockstep: bool
) -> None:
    """Chunks taken as they lie in a block, and those put together from several, hold the same rows in every plane."""
    n_rows, planes = 41, (2,) if heads is None else (2, heads)
    dims = ("layer", "row", "d") if heads is None else ("layer", "head", "row", "d")
    capacity = -(-n_rows // length) * length
    shapes = [(*planes, n_rows, 3), (*planes, capacity, 3), (*(1 for _ in planes), length, 3)]
    spec = SiteSpec("x", "x", dims, *shapes, "float16", codec, None, (0, 1))
    values = np.random.default_rng(0).standard_normal(shapes[0]).astype(np.float16)
    writers = Writers(lockstep=lockstep)
    shard = SiteShard(spec, tmp_path / "s", writers)
    borders = [0, *sorted(cuts), n_rows]
    for begin, end in itertools.pairwise(borders):
        for layer in range(2):
            shard.append(layer, np.ascontiguousarray(values[layer, ..., begin:end, :]))
        writers.settle(least_bytes=100)
    shard.flush()
    writers.close()
    shard.writer.finish("s")
    reader, n_chunks = ShardReader(str(tmp_path / "s"), spec), capacity // length
    for plane, rows in enumerate(values.reshape(-1, n_rows, 3)):
        padded = np.concatenate([rows, np.zeros((capacity - n_rows, 3), np.float16)])
        for chunk in range(n_chunks):
            out = np.ones((length, 3), np.float16)
            reader.read(plane * n_chunks + chunk, out)
            assert np.array_equal(out, padded[chunk * length :][:length])


def test_a_slice_that_is_not_in_memory_reads_little_more_than_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, the first touch of a mapped page may read megabytes around it."""
    need_eviction(tmp_path)
    monkeypatch.setattr("actdb.storage.shards.ADVISED_S", 0.0)
    values = np.random.default_rng(0).standard_normal((1, 16_000, 1024), np.float32).astype(np.float16)
    data.write_run(tmp_path / "x.actdb", {"resid_post": values}, np.full(160, 100), "raw")
    with actdb.open(tmp_path / "x.actdb") as db:
        site = db.run()["resid_post"]
        view = site.sel(layer=0, prompt=80).numpy()  # its chunks are verified and mapped from now on
        evict(tmp_path / "x.actdb")
        assert np.array_equal(site.sel(layer=0, prompt=80).numpy(), values[0, 8000:8100])
        shard = next(iter(site._source.reader._shards.values()))
        assert 0 < resident_share(shard._mapped) < 0.1
        assert np.array_equal(view, values[0, 8000:8100])


@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_unused_chunks_are_absent(tmp_path: Path, codec: str) -> None:
    written = write_run(tmp_path / "x.actdb", codec=codec, seed=6)
    absent = 0
    for spec in written.info.sites:
        for part in range(written.info.n_parts):
            reader = ShardReader(str(tmp_path / "x.actdb" / arrays.shard_name("made", spec, part)), spec)
            there = set(reader.chunk_numbers().tolist())
            for chunk in set(range(spec.n_chunks)) - there:
                out = np.ones(spec.chunk_shape, spec.dtype)
                reader.read(chunk, out)
                assert not out.any()
                assert reader.view(chunk) is None
                absent += 1
    assert absent > 10


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
    stored = bytes(payload) + crc
    assert codecs.checksum_matches(stored)
    if codec == "raw":
        assert stored[:-4] == values.tobytes()
        return
    out = np.empty_like(values)
    codecs.decode(stored, out)
    assert out.tobytes() == values.tobytes()
    with pytest.raises(ValueError, match="bytes instead of"):
        codecs.decode(stored, np.empty((18, 3), values.dtype))


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
    rounded, error = codecs.round_mantissas(values, bits)
    finite = np.isfinite(want)
    assert np.array_equal(rounded[finite], want[finite])
    assert np.isfinite(rounded).all()
    assert error == np.abs(rounded.astype(np.float64) - values).max()


def test_the_cast_error_bounds_the_cast() -> None:
    spec = SiteSpec("x", "x", ("row",), (1,), (1,), (1,), "float16", "raw")
    values = np.random.default_rng(0).uniform(-300, 300, 10_000).astype(np.float32)
    error = float(np.abs(values.astype(np.float16).astype(np.float32) - values).max())
    assert error <= cast_error(float(np.abs(values).max()), spec, "float32") < 1.2 * error


def test_encoding_does_not_depend_on_threads(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    blocks = [generator.standard_normal(40_000).astype(np.float16).round(1) for _ in range(24)]
    once = [codecs.encode(block, "lz4") for block in blocks]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(lambda block: codecs.encode(block, "lz4"), blocks)) == once
    spec = SiteSpec("x", "x", ("row",), (48_000,), (48_000,), (2_000,), "float16", "lz4")
    shards = set()
    for n_threads in (1, 2, 8):
        writers = Writers(n_threads)
        shard = SiteShard(spec, tmp_path / str(n_threads), writers)
        for block in blocks:
            shard.append(0, block[:2_000])
        writers.close()
        shard.writer.finish("x")
        shards.add((tmp_path / str(n_threads)).read_bytes())
    assert len(shards) == 1


@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_a_flipped_byte_spoils_its_own_chunk_only(tmp_path: Path, codec: str) -> None:
    """Every byte of a shard: the chunk that holds it refuses to be read, by stock zarr too; the others are intact."""
    spec = SiteSpec("x", "x", ("layer", "row", "d"), (2, 5, 3), (2, 8, 3), (1, 4, 3), "float16", codec, None, (0, 1))
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "zarr.json").write_bytes(arrays.array_metadata(spec))
    values = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float16)
    zarr.open_array(folder, mode="r+")[...] = values
    path = folder / "c" / "0" / "0" / "0"
    content, out = path.read_bytes(), np.empty((4, 3), np.float16)
    intact = ShardReader(str(path), spec)
    chunks = intact.chunk_numbers().tolist()
    n_payload = len(content) - index_bytes(spec.n_chunks)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        if place >= n_payload:
            with pytest.raises(actdb.DamageError, match="index is truncated or altered"):
                ShardReader(str(path), spec)
            continue
        reader, bad = ShardReader(str(path), spec), []
        for chunk in chunks:
            for read in (lambda c, r=reader: r.read(c, out), reader.check, reader.view):
                try:
                    read(chunk)
                except actdb.DamageError as exc:
                    bad.append((chunk, str(exc)))
        chunk, message = bad[0]
        assert bad == [(chunk, message)] * (3 if codec == "raw" else 2)
        assert f"{path} is damaged: chunk {chunk} does not match its checksum" in message
        if place % 7 == 0:
            layer, row = chunk // 2, 4 * (chunk % 2)
            with pytest.raises(ValueError, match="(?i)checksum"):
                np.asarray(zarr.open_array(folder, mode="r")[layer, row])


def forge(index: Any, payload: bytes = b"") -> bytes:
    """A shard with a valid checksum over any index."""
    packed = np.asarray(index, "<u8").tobytes()
    return payload + packed + google_crc32c.value(packed).to_bytes(4, "little")


ABSENT = 2**64 - 1
CHUNK = b"".join(codecs.encode(np.zeros((4, 3), np.float16), "raw"))


@pytest.mark.parametrize(
    "content",
    [
        forge([[0, 2**63], [ABSENT, ABSENT]], CHUNK),
        forge([[2**64 - 3, 10], [ABSENT, ABSENT]], CHUNK),  # the sum wraps round
        forge([[ABSENT, 10], [ABSENT, ABSENT]], CHUNK),
        forge([[0, ABSENT], [ABSENT, ABSENT]], CHUNK),
        forge([[0, 0], [ABSENT, ABSENT]], CHUNK),
        forge([[0, 3], [ABSENT, ABSENT]], CHUNK),
        forge([[10_000, 8], [ABSENT, ABSENT]], CHUNK),
        forge([[ABSENT, ABSENT]] * 1, CHUNK),
        b"",
    ],
)
def test_forged_indexes(tmp_path: Path, content: bytes) -> None:
    spec = SiteSpec("x", "x", ("row", "d"), (8, 3), (8, 3), (4, 3), "float16", "raw")
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(actdb.DamageError, match="s is damaged: its chunk index"):
        ShardReader(str(tmp_path / "s"), spec)


@pytest.mark.parametrize("codec", ["lz4", "raw"])
@pytest.mark.parametrize("wrong", ["shorter", "longer", "empty", "header", "noise"])
def test_forged_chunks(tmp_path: Path, codec: str, wrong: str) -> None:
    """Chunks with valid checksums that do not hold what they should."""
    spec = SiteSpec("x", "x", ("row", "d"), (8, 3), (8, 3), (4, 3), "float16", codec)
    shape = {"shorter": (3, 3), "longer": (5, 3)}.get(wrong, (4, 3))
    payload = bytearray(codecs.encode(np.random.default_rng(0).standard_normal(shape).astype(np.float16), codec)[0])
    if wrong == "empty":
        payload = bytearray()
    elif wrong == "header":
        payload[12:16] = (2**31 - 1).to_bytes(4, "little")  # Blosc's encoded size: must not be believed
        payload += b"" if codec == "lz4" else b"xx"
    elif wrong == "noise":
        payload = bytearray(b"\xff" * 37)
    payload += google_crc32c.value(bytes(payload)).to_bytes(4, "little")
    (tmp_path / "s").write_bytes(forge([[0, len(payload)], [ABSENT, ABSENT]], bytes(payload)))
    reader, out = ShardReader(str(tmp_path / "s"), spec), np.empty((4, 3), np.float16)
    wanted = "chunk 0 has .* bytes instead of 24" if codec == "raw" else "chunk 0 does not decode"
    for _ in range(2):
        with pytest.raises(actdb.DamageError, match=wanted):
            reader.read(0, out)


def write_shard(writer: ShardWriter, payload: bytes = b"abcd") -> FileRecord:
    writer.write(2, payload, b"efgh")
    return writer.finish("s")


def write_chunks(path: Path, payloads: list[bytes]) -> bytes:
    writer = ShardWriter(path, len(payloads))
    for chunk, payload in enumerate(payloads):
        writer.write(chunk, payload, b"1234")
    writer.finish("s")
    return path.read_bytes()


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_direct_and_buffered_writes_make_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    """Past the page cache, through it, and where the file system refuses one or the other at the last moment."""
    payloads = [random.Random(size).randbytes(size) for size in sizes]
    with monkeypatch.context() as patch:
        patch.setattr("actdb.storage.shards.BLOCK_BYTES", 4096)
        direct = write_chunks(tmp_path / "s", payloads)
        patch.delattr(os, "O_DIRECT")
        assert write_chunks(tmp_path / "s", payloads) == direct
    with monkeypatch.context() as patch:
        patch.setattr("actdb.storage.shards.BLOCK_BYTES", 1024)  # no sector: such a write is refused
        assert write_chunks(tmp_path / "s", payloads) == direct
    with monkeypatch.context() as patch:
        patch.setattr("actdb.storage.shards.BLOCK_BYTES", 4096)
        patch.setattr(fcntl, "fcntl", Mock(side_effect=[0, OSError(errno.EINVAL, "Invalid argument")] * 100))
        assert write_chunks(tmp_path / "s", payloads) == direct
    body = b"".join(payload + b"1234" for payload in payloads)
    assert direct[: len(body)] == body
    assert len(direct) == len(body) + index_bytes(len(payloads))


def test_whole_blocks_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that can: here the one that holds temporary files, unless it says no."""
    monkeypatch.setattr("actdb.storage.shards.BLOCK_BYTES", 4096)
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct writes on this file system")
    writer = ShardWriter(tmp_path / "s", 1)
    writer.write(0, bytes(5000), b"1234")
    assert fcntl.fcntl(writer._file, fcntl.F_GETFL) & os.O_DIRECT
    writer.finish("s")


def test_a_short_write_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes a part of a write, here by a file size limit, makes an error and never a truncated shard."""
    monkeypatch.setattr("actdb.storage.shards.BLOCK_BYTES", 4096)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit, size in ((5, 4), (8 + 20, 4), (4096 + 100, 9000), (8192, 9000)):
            writer = ShardWriter(tmp_path / "s", 4)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                write_shard(writer, bytes(size))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            writer.abandon()
            assert not (tmp_path / "s").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_flipped_bytes_of_a_shard_are_found(tmp_path: Path) -> None:
    written = write_run(tmp_path / "x.actdb", n_parts=1, n_prompts=3, longest=3, layers=(0,))
    spec = written.info.site("k")
    assert spec is not None
    path = tmp_path / "x.actdb" / arrays.shard_name("made", spec, 0)
    content = path.read_bytes()
    for place in range(0, len(content), 5):
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


@pytest.mark.parametrize("name", ["actdb.json", "run.json", "000000.json", "zarr.json", "prompts.parquet"])
def test_every_flipped_byte_of_a_small_file_is_found(tmp_path: Path, name: str) -> None:
    """Also flips that keep the meaning: a letter's case (1e-7, 1E-7; \\u00e9, \\u00E9), a blank for a tab."""
    out = tmp_path / "x.actdb"
    actdb.harvest(TinyModel(), random_prompts(2), out, sites=["z"], stats=[], run="é".encode().hex())
    path = max(out.rglob(name), key=lambda path: len(path.parts))
    content = path.read_bytes()
    places = range(0, len(content), 1 + len(content) // 300)
    for place in [*places, *(i for i in range(len(content)) if content[i : i + 2] == b"e-")]:
        for mask in (0x20, 0x29):
            path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
            try:
                found = [damage.path for damage in verify.check_database(commits.take_snapshot(Folder.open(out)))]
            except actdb.DatabaseError as exc:
                found = [name for text in ("actdb.json is damaged", "upgrade actdb") if text in str(exc)]
            assert found == [str(path.relative_to(out))], (place, mask)


def test_a_reader_is_told_of_altered_prompts(tmp_path: Path) -> None:
    write_run(tmp_path / "x.actdb")
    path = tmp_path / "x.actdb" / "runs" / "made" / "prompts.parquet"
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with actdb.open(tmp_path / "x.actdb") as db, pytest.raises(actdb.DamageError, match="run the same harvest"):
            db.run()["k"].numpy()


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
    for text in ("", "{", "[]", "[" * 100_000, "1", '{"format_version": 0}', '{"format_version": true}'):
        (tmp_path / "new" / "actdb.json").write_text(text)
        with pytest.raises(actdb.DatabaseError, match="actdb.json is damaged"):
            actdb.open(tmp_path / "new")
    (tmp_path / "new" / "actdb.json").write_text('{"format_version": 2}')
    for call in (lambda: actdb.open(tmp_path / "new"), lambda: harvest(tmp_path / "new")):
        with pytest.raises(actdb.DatabaseError, match="format version 2.*upgrade actdb"):
            call()


@pytest.mark.parametrize("kind", ["shard", "prompts", "commit", "commits", "run", "site"])
def test_links_that_lead_outside_are_refused(tmp_path: Path, kind: str) -> None:
    out, outside = tmp_path / "x.actdb", tmp_path / "outside"
    run = harvest(out)
    spec = run.info.site("z")
    assert spec is not None
    target = {
        "shard": arrays.shard_name(run.name, spec, 0),
        "prompts": f"runs/{run.name}/prompts.parquet",
        "commit": commits.commit_name(run.name, 0),
        "commits": f"runs/{run.name}/commits",
        "run": f"runs/{run.name}",
        "site": f"arrays.zarr/{run.name}/z",
    }[kind]
    shutil.move(out / target, outside)
    os.symlink(outside, out / target)
    before = times_below(outside)
    with actdb.open(out) as db:
        assert any("leads outside" in damage.message for damage in db.verify())
        if kind in ("shard", "prompts", "site"):
            with pytest.raises(actdb.DamageError, match="leads outside"):
                db.run()["z"].numpy()
    with suppress(actdb.ActdbError):  # it repairs what it can, and writes nothing through the link
        harvest(out)
    assert times_below(outside) == before


def times_below(path: Path) -> dict[Path, int]:
    """When a file, or each file and folder below a folder, was last written."""
    return {found: found.stat().st_mtime_ns for found in [path, *path.rglob("*")]}


@pytest.mark.parametrize("name", ["arrays.zarr", "weights", "tables"])
def test_linked_folders_are_refused(tmp_path: Path, name: str) -> None:
    out, outside = tmp_path / "x.actdb", tmp_path / "outside"
    run = harvest(out)
    with actdb.open(out, mode="a") as db:
        db.add_results("study", run, values={"x": 1.0})
    shutil.move(out / name, outside)
    os.symlink(outside, out / name)
    before = times_below(outside)
    if name == "tables":
        with pytest.raises(actdb.DamageError, match="leads outside"):
            actdb.open(out)
    else:
        with actdb.open(out) as db:
            assert any("leads outside" in damage.message for damage in db.verify())
    if name == "tables":
        harvest(out, run="another")  # it has nothing to do there
    else:
        with pytest.raises(actdb.DamageError, match="leads outside"):
            harvest(out, run="another")
    assert times_below(outside) == before


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """A named pipe in the place of any file is damage: nobody waits for a writer that never comes."""
    out = tmp_path / "x.actdb"
    written = write_run(out)
    shard = arrays.shard_name("made", written.info.sites[0], written.info.n_parts - 1)
    for name in (shard, commits.commit_name("made", 0), "runs/made/prompts.parquet", "runs/made/run.json"):
        content = (out / name).read_bytes()
        (out / name).unlink()
        os.mkfifo(out / name)
        with actdb.open(out) as db:
            assert [damage.path for damage in db.verify()] == [name]
            if name != commits.commit_name("made", 0):
                with pytest.raises(actdb.ActdbError, match="regular file"):
                    db.run("made")["resid_post"].numpy()
        (out / name).unlink()
        (out / name).write_bytes(content)


def test_strange_names_of_commits_are_passed_over(tmp_path: Path) -> None:
    out = tmp_path / "x.actdb"
    write_run(out, committed=[0, 2])
    for name in ("²²²²²².json", "9" * 60 + ".json", "1.json", "000099.json", "x.json", "000001.json.bak"):
        (out / "runs" / "made" / "commits" / name).write_text("{}")
    with actdb.open(out) as db:
        assert db.snapshot.runs["made"].parts == (0, 2)
        assert db.run().status == "partial"
        assert db.verify() == []


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
        if size == "shape":  # rows that no part holds
            assert selection.numpy().shape == selection.shape
            return
        with pytest.raises(actdb.DamageError, match="does not fit the run|index is truncated"):
            selection.numpy()


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    record = write_shard(ShardWriter(tmp_path / "s", 4))
    assert record.stored_bytes == (tmp_path / "s").stat().st_size == 8 + 4 * 16 + 4


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63, 2**70, -(2**70), 0.5, 1e300]),
    st.sampled_from(["", "x", "..", "../../x", "/etc/passwd", "a\x00b", "\ud800", "row", "entry", "float16", "9" * 30]),
    st.sampled_from([[], {}, [1, 2, 3], [[]], {"a": {}}]),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, held in inner for place in places(held, (*at, key)))]


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    node = changed
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = new
    return changed


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forged") / "x.actdb"
    write_run(out, seed=1, codec="raw")
    return out


def read_everything(out: Path) -> None:
    """Open, verify and read a database that may be forged: errors of actdb are fine, any other is not."""
    with actdb.open(out) as db:
        verify.check_database(db.snapshot)
        list(verify.check_database(db.snapshot))
        for run in db.runs():
            assert repr(run)
            for site in run:
                for options in ({}, {"prompt": 0}, {"prompt": [1, 2], "layer": run.layers[0]}):
                    try:
                        selection = run[site].sel(**options)
                        assert repr(selection)
                        selection.numpy()
                        next(iter(selection.batches(3)), None)
                    except actdb.ActdbError:
                        continue


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_forged_json_only_makes_errors_of_actdb(forged: Path, data: st.DataObject) -> None:
    """Any node of `run.json` or of a commit replaced by junk, checksum renewed: no crash, no hang, no other error."""
    path = forged / data.draw(st.sampled_from(["runs/made/run.json", commits.commit_name("made", 1)]))
    original = path.read_bytes()
    value = json.loads(original)
    del value["crc32c"]
    at = data.draw(st.sampled_from(places(value)[1:]))
    path.write_bytes(seal(replaced(value, at, data.draw(JUNK))))
    try:
        read_everything(forged)
    finally:
        path.write_bytes(original)


@given(
    column=st.sampled_from(["n_tokens", "part", "row_start", "n_rows", "entry_start", "n_entries"]),
    row=st.integers(0, 8),
    value=st.sampled_from([-(2**63), -5, -1, 0, 1, 3, 50, 2**20, 2**31, 2**40, 2**62, 2**63 - 1]),
)
@settings(max_examples=100, deadline=None)
def test_forged_prompt_tables_only_make_errors_of_actdb(forged: Path, column: str, row: int, value: int) -> None:
    path, run_json = forged / "runs" / "made" / "prompts.parquet", forged / "runs" / "made" / "run.json"
    original, original_json = path.read_bytes(), run_json.read_bytes()
    table = pq.read_table(path)
    numbers = table.column(column).to_numpy().astype(np.int64)
    numbers[row] = value
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(numbers)), path)
    content = json.loads(original_json)
    del content["crc32c"]
    content["files"][0] |= {"stored_bytes": path.stat().st_size, "crc32c": google_crc32c.value(path.read_bytes())}
    run_json.write_bytes(seal(content))
    try:
        read_everything(forged)
    finally:
        path.write_bytes(original)
        run_json.write_bytes(original_json)
