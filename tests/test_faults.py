"""Faults injected for real: killed processes, two harvests at once, a full disk, a read-only one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooked import TinyModel, files_of, random_prompts

import actdb
from actdb.storage.folder import temporary_path

HOOKED = Path(__file__).parent / "hooked.py"
PLAN = {"part_tokens": 30, "batch_tokens": 24}
N_KILLS = 60


@pytest.fixture(scope="module")
def server() -> Iterator["Server"]:
    """One process that has torch loaded and forks a harvest on demand."""
    process = subprocess.Popen([sys.executable, str(HOOKED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield Server(process)
    process.communicate(timeout=30)
    assert process.returncode == 0


class Server:
    """Harvests in forked children; see `hooked.serve`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, out: Path, **order: Any) -> int:
        """Start a harvest and return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"out": str(out), **PLAN, **order}) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Return the exit status of the harvest that was started last."""
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def check_partial(out: Path, *, sql: bool = True) -> int:
    """Check that a database opens, verifies and reads whatever state a harvest was killed in; returns its parts."""
    if not (out / "actdb.json").exists():
        return 0
    with actdb.open(out) as db:
        assert db.verify() == []
        parts = 0
        for run in db.runs():
            parts += len(db.snapshot.runs[run.name].parts)
            if (out / "runs" / run.name / "prompts.parquet").exists():
                n_rows = run["z"].sel(layer=1).numpy().shape[1]
                assert n_rows == int(run._prompts.n_rows[run._prompts.stored].sum())
                query = "SELECT count(DISTINCT prompt_id) FROM head_stats WHERE run = ?"
                if sql:
                    assert db.sql(query, [run.name]).fetchone() == (int(run._prompts.stored.sum()),)
    return parts


def test_killed_before_each_file_operation(tmp_path: Path, server: Server) -> None:
    """Kill −9 before the n-th operation that changes the disk, for many n: no state in between is ever broken."""
    whole = tmp_path / "whole.actdb"
    server.start(whole)
    assert server.wait() == 0
    wanted, seen, number = files_of(whole), set(), 0
    while True:
        out = tmp_path / f"{number}.actdb"
        server.start(out, kill_at=number)
        status = server.wait()
        seen.add(check_partial(out, sql=number % 5 == 0))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if number % 5 == 0:
            server.start(out)
            assert server.wait() == 0
            assert files_of(out) == wanted, number
        shutil.rmtree(out, ignore_errors=True)
        number += 7
    assert number >= 100
    assert {0, 1, 2} <= seen


def test_killed_at_random_moments_again_and_again(tmp_path: Path, server: Server) -> None:
    """One harvest, killed whenever, started again, until it is complete; then the tree is as if never interrupted."""
    whole, out = tmp_path / "whole.actdb", tmp_path / "x.actdb"
    began = time.monotonic()
    server.start(whole, n_prompts=200)
    assert server.wait() == 0
    duration = time.monotonic() - began
    generator, kills = random.Random(0), 0
    for _ in range(N_KILLS):
        pid = server.start(out, n_prompts=200)
        time.sleep(generator.uniform(0, duration / 3))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        kills += server.wait() == -signal.SIGKILL
        check_partial(out)
    assert kills >= 10
    server.start(out, n_prompts=200)
    assert server.wait() == 0
    assert files_of(out) == files_of(whole)
    with actdb.open(out) as db:
        assert db.verify() == []
        assert db.run().status == "complete"


def test_killed_through_the_command_line(tmp_path: Path) -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, d_vocab=16, n_ctx=32, attn_only=True, seed=0, act_fn="relu"
    )
    actdb.save_model(TransformerBridge.boot_native(cfg), tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in random_prompts(600)))

    def start(out: str) -> "subprocess.Popen[bytes]":
        options = ["-o", str(tmp_path / out), "--part-tokens", "20", "--batch-tokens", "20"]
        command = [sys.executable, "-c", "from actdb.cli import main; main()", "harvest", str(tmp_path / "model")]
        return subprocess.Popen([*command, str(prompts), *options], stderr=subprocess.DEVNULL)

    assert start("whole.actdb").wait(120) == 0
    for want in (1, 30):
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
    for out, worker in (("one", None), ("two", [0, 2]), ("two", [1, 2])):
        server.start(tmp_path / out, **({} if worker is None else {"worker": worker}))
        assert server.wait() == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_harvests_at_once_while_others_read(tmp_path: Path) -> None:
    """Two workers of one run and one other run at the same time, and a reader all the while."""
    orders = [{"run": "a", "worker": [0, 2]}, {"run": "a", "worker": [1, 2]}, {"run": "b", "n_prompts": 60}]
    out, alone = tmp_path / "x.actdb", tmp_path / "alone.actdb"
    servers = []
    for order in orders:
        process = subprocess.Popen(
            [sys.executable, str(HOOKED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        servers.append(Server(process))
        assert process.stdin is not None
        process.stdin.write(json.dumps({"out": str(out), "n_prompts": 120, **PLAN, **order}) + "\n")
        process.stdin.close()
    reads = 0
    while any(server._process.poll() is None for server in servers):
        check_partial(out)
        reads += 1
        time.sleep(0.02)
    assert reads > 3
    assert [server._process.returncode for server in servers] == [0, 0, 0]
    for server in servers:
        server._process.stdin = None
        assert server._process.communicate()[0].split()[1:] == ["0"]
    module = TinyModel()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    actdb.harvest(module, random_prompts(120), alone, run="a", **PLAN)
    actdb.harvest(module, random_prompts(60), alone, run="b", **PLAN)
    torch.set_num_threads(threads)
    ours, theirs = files_of(out), files_of(alone)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and not name.endswith("run.json")] == []


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
    dead = out / f".tmp-{host}-{child.stdout.strip()}-1-x"
    reused = out / f".tmp-{host}-{os.getpid()}-1-x"  # this process's number, but another start time
    elsewhere, old = out / ".tmp-elsewhere-1-1-x", out / ".tmp-elsewhere-1-1-old"
    for path in (mine, dead, reused, elsewhere, old):
        path.write_text("x")
    os.utime(old, (0, 0))
    actdb.harvest(TinyModel(), prompts, out)
    assert [path.exists() for path in (mine, dead, reused, elsewhere, old)] == [True, False, False, True, False]
