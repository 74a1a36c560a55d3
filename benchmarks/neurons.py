"""Highest rows of a neuron and of a group, and most similar rows, against full scans.

One layer of 1,000,000 rows × 3072 neurons (float16, lz4; a random vector a token plus one a position). The scan streams
the layer from the database, each chunk once, and keeps the best; the array in memory is float16, read by column.
Neurons and rows differ from turn to turn, so that nothing is decoded yet. A single neuron is answered from the highest
activations kept while harvesting; a group of 10 and the 10 rows nearest within it (l2) from the neuron-major copy, or
without one by a scan.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

import actdb
from actdb.neurons.query import Best, distances
from benchmarks.harness import Goal, Table, note, take_turns

SCALE = {"full": (1_000_000, 3072, 2), "quick": (60_000, 3072, 2), "tiny": (900, 48, 1)}  # rows, neurons, rounds
LENGTH, N_TOKENS, GROUP, K = 128, 20_000, 10, 10
Values = npt.NDArray[np.float16]


class Neurons(nn.Module):
    """A hooked module whose one activation is mlp_post: a random vector a token plus one a position."""

    def __init__(self, n_neurons: int) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name="neurons", n_layers=1, n_heads=1, d_model=4, d_mlp=n_neurons, d_vocab=N_TOKENS, n_ctx=LENGTH
        )
        generator = torch.Generator().manual_seed(0)
        self.W_E = nn.Parameter(torch.randn(N_TOKENS, n_neurons, generator=generator))
        self.W_pos = nn.Parameter(torch.randn(LENGTH, n_neurons, generator=generator))
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].mlp = nn.Module()
        self.blocks[0].mlp.hook_post = HookPoint()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [batch, pos, neuron]."""
        found: torch.Tensor = self.blocks[0].mlp.hook_post(self.W_E[ids] + self.W_pos[: ids.shape[1]])
        return found


def run(size: str, folder: Path) -> Table:
    """Return the milliseconds of each question, and how many times faster than the scan."""
    n_rows, n_neurons, rounds = SCALE[size]
    path = folder / "neurons.actdb"
    generator = np.random.default_rng(0)
    prompts = ({"tokens": generator.integers(0, N_TOKENS, LENGTH).tolist()} for _ in range(n_rows // LENGTH))
    actdb.harvest(Neurons(n_neurons), prompts, path, sites=["mlp_post"], stats=["neurons"])
    with actdb.open(path, mode="a") as db:
        array = np.concatenate([block.values for block in db.run()["mlp_post"].sel(layer=0).batches(65_536)])
        questions = Questions(db, array)
        turns = questions.without_copy()
        seconds = take_turns(turns, rounds=rounds)
        db.transpose("mlp_post", layer=0)
        seconds |= take_turns(questions.with_copy(), rounds=max(rounds, 5))
        questions.check()
    return _table(seconds)


class Questions:
    """The three questions, asked of other neurons each time, with each way of answering them."""

    def __init__(self, db: actdb.Database, array: Values) -> None:
        self._db, self._array = db, array
        self._numbers = count(1)
        rows = db.run()["mlp_post"].sel(layer=0)
        assert rows.n_rows == len(array)

    def without_copy(self) -> dict[str, Callable[[], Any]]:
        """Return what needs no copy: actdb, the scan, and the array in memory."""
        return {
            "top of a neuron: actdb": lambda: self.top(1),
            "top of a neuron: scan": lambda: self.scan_top(1),
            "top of a neuron: array in memory": lambda: self.memory_top(1),
            "top of a group: actdb without a copy": lambda: self.top(GROUP),
            "top of a group: scan": lambda: self.scan_top(GROUP),
            "top of a group: array in memory": lambda: self.memory_top(GROUP),
            "most similar: actdb without a copy": self.similar,
            "most similar: scan": self.scan_similar,
            "most similar: array in memory": self.memory_similar,
        }

    def with_copy(self) -> dict[str, Callable[[], Any]]:
        """Return what the neuron-major copy answers."""
        return {
            "top of a group: actdb, copy": lambda: self.top(GROUP),
            "most similar: actdb, copy": self.similar,
        }

    def check(self) -> None:
        """Assert that the ways agree."""
        for n in (1, GROUP):
            neurons = self._neurons(n, 0)
            result = self._db.top("mlp_post", layer=0, neurons=neurons, k=K).fetchall()
            scores = self._array[:, neurons].astype(np.float64).sum(1)
            assert np.allclose([row[4] for row in result], np.sort(scores)[::-1][:K]), n
            assert np.allclose(self.scan_top(n, 0).scores, np.sort(scores)[::-1][:K]), n

    def top(self, n: int) -> Any:
        """Ask actdb."""
        return self._db.top("mlp_post", layer=0, neurons=self._neurons(n, next(self._numbers)), k=K).fetchall()

    def similar(self) -> Any:
        """Ask actdb."""
        number = next(self._numbers)
        ask = {"neurons": self._neurons(GROUP, number), "prompt": number % (len(self._array) // LENGTH), "pos": 3}
        return self._db.most_similar("mlp_post", layer=0, k=K, **ask).fetchall()

    def scan_top(self, n: int, number: int | None = None) -> Best:
        """Stream the layer and keep the best."""
        neurons = self._neurons(n, next(self._numbers) if number is None else number)
        return self._scan(neurons, lambda values: values.sum(1))

    def scan_similar(self) -> Best:
        """Stream the layer and keep the nearest."""
        neurons = self._neurons(GROUP, next(self._numbers))
        wanted = self._array[17, neurons].astype(np.float64)
        return self._scan(neurons, lambda values: -distances(values, wanted, "l2"))

    def memory_top(self, n: int) -> Any:
        """Sum the columns of the array and sort out the best."""
        scores = self._array[:, self._neurons(n, next(self._numbers))].astype(np.float32).sum(1)
        return np.argpartition(-scores, K)[:K]

    def memory_similar(self) -> Any:
        """Compare the columns of the array and sort out the nearest."""
        values = self._array[:, self._neurons(GROUP, next(self._numbers))].astype(np.float32)
        return np.argpartition(((values - values[17]) ** 2).sum(1), K)[:K]

    def _neurons(self, n: int, number: int) -> list[int]:
        width = self._array.shape[1]
        return np.random.default_rng(number).choice(width, n, replace=False).tolist()  # type: ignore[no-any-return]

    def _scan(self, neurons: list[int], score: Callable[[Any], Any]) -> Best:
        best = Best(K)
        for block in self._db.run()["mlp_post"].sel(layer=0, neuron=neurons).batches(65_536):
            assert block.pos is not None
            best.offer(score(np.asarray(block.values, np.float64)), block.prompt, block.pos)
        return best


def _table(seconds: dict[str, float]) -> Table:
    rows, goals = [], []
    for name, s in seconds.items():
        question, way = name.split(": ")
        speed = seconds[f"{question}: scan"] / s
        rows.append((question, way, s * 1e3, speed))
        if way in ("actdb", "actdb, copy"):
            goals.append(Goal(f"{question}, {way.removeprefix('actdb, ')} ÷ full scan", speed, 20))
    rows.sort(key=lambda row: row[0])
    header = ("question", "way", "ms", "times as fast as the scan")
    return Table("Neurons", note(__doc__), header, rows, goals)
