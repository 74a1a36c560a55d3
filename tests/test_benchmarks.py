"""Every benchmark runs in its tiny size: the equality that each asserts before timing holds."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.harness import Goal, Table, evict, machine
from tests.residency import need_eviction, resident_share


@pytest.mark.filterwarnings("default")  # peers warn of much
@pytest.mark.parametrize("claim", command.CLAIMS)
def test_tiny(claim: str, tmp_path: Path) -> None:
    table = importlib.import_module(f"benchmarks.{claim}").run("tiny", tmp_path)
    assert Table.from_json(table.to_json()).markdown() == table.markdown()
    assert len(table.rows) >= (1 if claim == "gpu" else 3)
    assert all(len(row) == len(table.header) for row in table.rows)
    assert all(value >= 0 for row in table.rows for value in row if isinstance(value, float))
    assert all(goal.measured > 0 for goal in table.goals)
    assert table.markdown().count("\n| ") == len(table.rows) + 2


def test_results_are_written(tmp_path: Path) -> None:
    goals = (Goal("speed", 2.0, 1.5), Goal("size", 2.0, 1.5, "MiB", at_least=False, why="it grows"))
    table = Table(
        "Made up", "A note.", ("way", "speed"), [("actdb", 2.0), ("other", 0.5), ("third", "")], goals, "speed"
    )
    (tmp_path / "tables").mkdir()
    for claim, made in (("harvest", "then"), ("write", "now")):
        (tmp_path / "tables" / f"{claim}.json").write_text(replace(table, made=made).to_json())
    command.write_results(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("| speed | 2 × | ≥ 1.5 × | yes |") == 2
    assert "| size | 2 MiB | ≤ 1.5 MiB | no: 1.33 × that; it grows |" in text
    assert text.index("then") < text.index("now")
    assert (tmp_path / "plots" / "harvest.png").stat().st_size > 1000


def test_a_claim_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LIMIT_S", 0.01)
    assert command.start_claim("startup", "tiny") is None


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
def test_files_that_are_mapped_leave_the_page_cache_too(tmp_path: Path) -> None:
    need_eviction(tmp_path)
    for name in ("mapped", "other"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.ones(2**20))
    held = [np.load(tmp_path / name / "x.npy", mmap_mode="r") for name in ("mapped", "other")]
    assert [array.sum() for array in held] == [2**20, 2**20]
    evict(tmp_path / "mapped")
    assert [resident_share(array) > 0.5 for array in held] == [False, True]
    assert held[0].sum() == 2**20


def test_the_machine_is_described() -> None:
    assert "cores; Python 3" in machine()
    assert "torch 2" in machine()
