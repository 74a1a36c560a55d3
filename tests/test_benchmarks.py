"""Every benchmark runs in its tiny size: the equality that each asserts before timing holds."""

import importlib
from pathlib import Path

import pytest

from benchmarks.__main__ import CLAIMS
from benchmarks.harness import machine


@pytest.mark.parametrize("claim", CLAIMS)
def test_tiny(claim: str, tmp_path: Path) -> None:
    table = importlib.import_module(f"benchmarks.{claim}").run("tiny", tmp_path)
    text = table.markdown()
    assert len(table.rows) >= 4
    assert all(len(row) == len(table.header) for row in table.rows)
    assert all(value > 0 for row in table.rows for value in row if isinstance(value, float))
    assert text.count("\n| ") == len(table.rows) + 2


def test_the_machine_is_described() -> None:
    assert "cores; Python 3" in machine()
    assert "torch 2" in machine()
