"""Faults injected for real: killed processes, two harvests at once, a full disk, a read-only one."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooked import PLAN, Server, TinyModel, files_of, random_prompts

import actdb
from actdb.harvesting import pipeline
from actdb.harvesting.pipeline import PartWriter, SiteShard, Writers
from actdb.schema import SiteSpec
from actdb.storage.folder import Folder, temporary_path
from actdb.storage.shards import ShardReader

N_KILLS = 50


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One process for all harvests that are killed."""
    server = Server()
    yield server
    assert server.close() == 0


def check_partial(out: Path, *, sql: bool = True) -> int:
    """Check that a database opens, verifies and reads whatever state a harvest is in; returns the parts it holds."""
    if not (out / "actdb.json").exists():
        return 0
    with actdb.open(out) as db:
        assert db.verify() == []
        for run in db.runs():
            n_rows = run["z"].sel(layer=1).numpy().shape[1]
            assert n_rows == int(run._prompts.n_rows[run._prompts.stored].sum())
            query = "SELECT count(DISTINCT prompt_id) FROM head_stats WHERE run = ?"
            if sql:
                assert db.sql(query, [run.name]).fetchone() == (int(run._prompts.stored.sum()),)
        return sum(len(held.parts) for held in db.snapshot.runs.values())


def test_killed_before_each_file_operation(tmp_path: Path, server: Server) -> None:
    """Kill −9 before every other operation that changes the disk: no state in between is ever broken."""
    whole = tmp_path / "whole.actdb"
    assert server.harvest(whole, n_prompts=8) == 0
    wanted, seen, number, status = files_of(whole), set(), 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        out = tmp_path / f"{number}.actdb"
        status = server.harvest(out, n_prompts=8, kill_at=number)
        seen.add(check_partial(out, sql=number % 10 == 0))
        if number % 6 == 0:
            assert server.harvest(out, n_prompts=8) == 0
            assert files_of(out) == wanted, number
        shutil.rmtree(out, ignore_errors=True)
        number += 2
    assert status == 0
    assert number >= 100
    assert {0, 1, 2} <= seen


def test_killed_at_random_moments_again_and_again(tmp_path: Path, server: Server) -> None:
    """A harvest, killed whenever, started again until it is complete: the tree is as if it was never interrupted."""
    whole = tmp_path / "whole.actdb"
    assert server.harvest(tmp_path / "first.actdb", n_prompts=8) == 0  # the server may still have been importing
    began = time.monotonic()
    assert server.harvest(whole, n_prompts=36) == 0
    duration = time.monotonic() - began
    wanted, generator, kills, completed, most = files_of(whole), random.Random(0), 0, 0, 0
    out = tmp_path / "x.actdb"
    while kills < N_KILLS or completed == 0:
        pid = server.start(out, n_prompts=36)
        time.sleep(generator.uniform(0, duration if kills < N_KILLS else 2 * duration))
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so still there
        status = server.wait(pid)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        most = max(most, check_partial(out, sql=kills % 4 == 0))
        if status == 0:
            assert files_of(out) == wanted
            shutil.rmtree(out)
            completed += 1
    assert most > 3
    assert server.harvest(out, n_prompts=36) == 0
    assert files_of(out) == wanted


def test_killed_through_the_command_line(tmp_path: Path) -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, d_vocab=16, n_ctx=32, attn_only=True, seed=0, act_fn="relu"
    )
    actdb.save_model(TransformerBridge.boot_native(cfg), tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in random_prompts(300)))

    def start(out: str) -> "subprocess.Popen[bytes]":
        options = ["-o", str(tmp_path / out), "--part-tokens", "20", "--batch-tokens", "20"]
        command = [sys.executable, "-c", "from actdb.cli import main; main()", "harvest", str(tmp_path / "model")]
        return subprocess.Popen([*command, str(prompts), *options], stderr=subprocess.DEVNULL)

    assert start("whole.actdb").wait(120) == 0
    for want in (1, 15):
        process = start("x.actdb")
        commits = tmp_path / "x.actdb" / "runs" / "model" / "commits"
        while process.poll() is None and (not commits.exists() or len(list(commits.glob("0*"))) < want):
            time.sleep(0.002)
        process.kill()
        process.wait()
        with actdb.open(tmp_path / "x.actdb") as db:
            assert db.verify() == []
            assert db.run().status == "partial"
    assert start("x.actdb").wait(120) == 0
    assert files_of(tmp_path / "x.actdb") == files_of(tmp_path / "whole.actdb")


def test_two_workers_make_what_one_makes(tmp_path: Path, server: Server) -> None:
    assert server.harvest(tmp_path / "one") == 0
    assert server.harvest(tmp_path / "two", worker=[1, 2]) == 0
    with actdb.open(tmp_path / "two") as db:
        assert db.run().status == "partial"
    assert server.harvest(tmp_path / "two", worker=[0, 2]) == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_harvests_at_once_while_others_read(tmp_path: Path, server: Server) -> None:
    """Two workers of one run, the same run once more as a whole, and another run, all at once, and a reader."""
    orders: list[dict[str, Any]] = [
        {"run": "a", "worker": [0, 2], "n_prompts": 90},
        {"run": "a", "worker": [1, 2], "n_prompts": 90},
        {"run": "a", "n_prompts": 90},
        {"run": "b", "n_prompts": 60},
    ]
    out, alone, seen = tmp_path / "x.actdb", tmp_path / "alone.actdb", set()
    started = [server.start(out, **order) for order in orders]
    while any(is_running(pid) for pid in started):
        seen.add(check_partial(out))
    assert [server.wait(pid) for pid in started] == [0, 0, 0, 0]
    assert seen  # how many states a reader meets depends on the machine; each was checked
    for order in orders[2:]:
        assert server.harvest(alone, **order) == 0
    assert files_of(out) == files_of(alone)


def is_running(pid: int) -> bool:
    """Whether a process that has not been waited for still runs."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(path)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, module, prompts = tmp_path / "small", TinyModel(d_model=64), random_prompts(300, longest=30)
    with mounted(small, "-t", "tmpfs", "-o", "size=1500k", "none"):
        out = small / "x.actdb"
        with pytest.raises(actdb.SpaceError, match="needs up to .* MB free; choose fewer --sites"):
            actdb.harvest(module, prompts, out, part_tokens=500)
        monkeypatch.setattr("actdb.harvesting.execution._check_space", lambda *_: None)
        with pytest.raises(actdb.SpaceError, match="no space left .* run the same command again"):
            actdb.harvest(module, prompts, out, part_tokens=500)
        with actdb.open(out) as db:
            assert db.run().status == "partial"
            assert db.verify() == []
            assert db.sql("SELECT count(*) > 0 FROM head_stats").fetchone() == (
                len(db.snapshot.runs["tiny"].parts) > 0,
            )
        assert not list(out.rglob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        run = actdb.harvest(module, prompts, out, part_tokens=500)
        assert run.status == "complete"
        monkeypatch.undo()
        assert np.array_equal(
            run["z"].numpy(), actdb.harvest(module, prompts, tmp_path / "y", part_tokens=500)["z"].numpy()
        )


def test_a_read_only_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=64m", "none"):
        wanted = actdb.harvest(TinyModel(), random_prompts(5), disk / "x.actdb")["z"].numpy()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with actdb.open(disk / "x.actdb") as db:
            assert np.array_equal(db.run()["z"].numpy(), wanted)
            assert db.sql("SELECT count(*) FROM prompts").fetchone() == (5,)
            assert db.verify() == []
            assert list(db.run()["z"].sel(where="kind = 'a'", pos=-1).prompt) == [0, 2, 4]
            with pytest.raises(actdb.WriteError, match="Read-only"):
                db.remove("tiny")
        for out in ("x.actdb", "new.actdb"):
            with pytest.raises(actdb.WriteError, match="cannot write"):
                actdb.harvest(TinyModel(), random_prompts(5), disk / out, run="other")
        assert actdb.open(disk / "x.actdb").run().status == "complete"


def test_temporary_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    out, prompts = tmp_path / "x.actdb", random_prompts(3)
    actdb.harvest(TinyModel(), prompts, out)
    mine = temporary_path(out / "runs" / "mine")
    host = mine.name.split("-")[1]
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    zombie = subprocess.Popen(["true"])  # killed and not waited for: many containers have nobody who waits
    while is_running(zombie.pid):
        time.sleep(0.01)
    started = Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[19]
    gone = [
        out / f".tmp-{host}-{child.stdout.strip()}-1-x",
        out / f".tmp-{host}-{os.getpid()}-1-x",  # this process's number, but another start time
        out / f".tmp-{host}-{zombie.pid}-{started}-x",
        out / ".tmp-elsewhere-1-1-old",
        out / "arrays.zarr" / "tiny" / "z" / f".tmp-{host}-{child.stdout.strip()}-1-x",
    ]
    kept = [
        mine,
        out / ".tmp-elsewhere-1-1-x",
        out / f".tmp-{host.rpartition('.')[0]}-{child.stdout.strip()}-1-x",  # the same host name, other process numbers
        out / f".tmp-{host}-{'9' * 40}-1-x",
    ]
    for path in (*gone, *kept):
        path.write_text("x")
    os.utime(gone[3], (0, 0))
    Folder(out).sweep("arrays.zarr/tiny/k")
    assert [path.exists() for path in gone] == [False, False, False, False, True]
    actdb.harvest(TinyModel(), prompts, out)
    assert [path.exists() for path in gone] == [False] * len(gone)
    assert [path.exists() for path in kept] == [True] * len(kept)
    zombie.wait()


def test_a_process_that_tells_nothing_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc hides other users' processes, the file of a live one stays."""
    path = temporary_path(tmp_path / "x")
    path.write_text("x")
    monkeypatch.setattr("actdb.storage.folder._start_time", lambda pid: 0)
    Folder(tmp_path).sweep()
    assert path.exists()


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is faster than the disk waits: chunks under way never hold more than the limit and one chunk."""
    spec = SiteSpec("x", "x", ("row",), (3200,), (3200,), (100,), "float32", "lz4")
    disk, most, writers = threading.Event(), 0, Writers(pending_bytes=1000)
    shard = SiteShard(spec, tmp_path / "s", writers)
    write = shard.write
    monkeypatch.setattr(shard, "write", lambda *args: (disk.wait(10), write(*args)))
    values = np.arange(3200, dtype=np.float32)
    feeder = threading.Thread(target=lambda: [shard.append(0, values[i : i + 50]) for i in range(0, 3200, 50)])
    feeder.start()
    for _ in range(50):
        time.sleep(0.002)
        most = max(most, writers._backlog.reserved("bytes"))
    assert feeder.is_alive()  # it waits
    assert 800 <= most < 1000 + 400
    disk.set()
    feeder.join()
    writers.close()
    assert writers._backlog.reserved("bytes") == 0
    shard.writer.finish("s")
    reader, out = ShardReader(str(tmp_path / "s"), spec), np.empty(100, np.float32)
    for chunk in range(32):
        reader.read(chunk, out)
        assert np.array_equal(out, values[100 * chunk :][:100])


def test_few_parts_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where syncing is slow, finished parts do not pile up with their files open."""
    commit, most = PartWriter.commit, 0

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return commit(*args, **options)

    def count(progress: Any) -> None:
        nonlocal most
        most = max(most, len(list(tmp_path.rglob(".tmp-*"))))

    monkeypatch.setattr(PartWriter, "commit", slow)
    run = actdb.harvest(
        TinyModel(), random_prompts(30), tmp_path / "x", part_tokens=8, batch_tokens=8, sites=["z", "k"], progress=count
    )
    assert run.info.n_parts > 15
    assert 4 <= most <= 2 * (pipeline.PENDING_PARTS + 2)


def test_errors_reach_the_caller_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while encoding, writing, or at a part's end or beginning: raised, cleaned up after, resumable."""
    prompts, wanted, out = random_prompts(12), tmp_path / "wanted", tmp_path / "x"
    actdb.harvest(TinyModel(), prompts, wanted, **PLAN)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for target in ("encode_chunks", "ShardWriter.write", "ShardWriter.finish", "commits.write_commit", "SiteShard"):
        with monkeypatch.context() as patch:
            patch.setattr(f"actdb.harvesting.pipeline.{target}", broken)
            with pytest.raises(OSError, match="Input/output error"):
                actdb.harvest(TinyModel(), prompts, out, **PLAN)
        assert not list(out.rglob(".tmp-*")), target
        assert check_partial(out, sql=False) == 0
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("actdb-write")]
    actdb.harvest(TinyModel(), prompts, out, **PLAN)
    assert files_of(out) == files_of(wanted)
