"""The nearest key of each query in every subspace: one step of training a partition of activation space.

The search of `analyses.subspace_partition`, which rotates half-precision keys tile by tile and keeps but the minimum of
each group of keys, against plain `torch.cdist` of each subspace and its minimum. `search` is handed keys that are
rotated already, in float32; `rotation and search` the keys as they are buffered, in half precision, which a training
step must rotate anew. A step of training has the loss, the gradient through the rotation and Adam besides. The peers'
distances agree to 1e-4, and so do the neighbours but for ties. `arithmetic` is what the products alone take, as matrix
products of these shapes in float32: no search that makes them can be faster.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analyses.subspace_partition.partition import Rotation, column_ranges
from analyses.subspace_partition.search import Nearest, find_nearest
from analyses.subspace_partition.training import Recipe, partition_loss
from benchmarks.harness import Goal, Table, note, take_turns

SHAPES = {"full": (768, 32, 128, 25, 16_384), "quick": (768, 32, 128, 4, 16_384), "tiny": (24, 4, 16, 3, 256)}
"""Width, subspace, queries, blocks of keys, rows of a block."""
ROUNDS = {"full": 2, "quick": 2, "tiny": 1}
TOLERANCE = 1e-4
HOUR_S = 3600


def run(size: str, folder: Path) -> Table:
    """Return the seconds of each way on the CPU, and on a CUDA device where there is one."""
    rows: list[tuple[Any, ...]] = []
    goals: list[Goal] = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        found, reached = compare(device, size)
        rows += found
        goals += reached
    header = ("device", "what", "way", "s", "× as fast")
    return Table("Subspace search", note(__doc__), header, rows, goals, "× as fast")


def compare(device: str, size: str) -> tuple[list[tuple[Any, ...]], list[Goal]]:
    """Time all ways in turns on one device, after all gave the same."""
    width, unit, n_queries, n_blocks, block_rows = SHAPES[size]
    sizes = (unit,) * (width // unit)
    generator = torch.Generator().manual_seed(0)
    queries = made_rows(n_queries, width, generator).to(device)
    blocks = [made_rows(block_rows, width, generator).half().to(device) for _ in range(n_blocks)]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.to(device)
    rotated, turned = rotate(blocks, basis), queries @ basis
    searching: dict[str, Callable[[], Any]] = {
        "actdb": partial(find_nearest, turned, rotated, None, sizes),
        "torch.cdist": partial(plain_search, turned, rotated, sizes),
        "arithmetic": partial(products, turned, rotated, sizes),
    }
    whole: dict[str, Callable[[], Any]] = {
        "actdb": partial(find_nearest, queries, blocks, basis, sizes),
        "torch.cdist": lambda: plain_search(turned, rotate(blocks, basis), sizes),
        "arithmetic": lambda: products(turned, rotate(blocks, basis), sizes),
    }
    check(searching["actdb"](), searching["torch.cdist"](), turned, rotated, sizes)
    check(whole["actdb"](), searching["torch.cdist"](), turned, rotated, sizes)
    rows, goals = [], []
    for what, ways in (("search", searching), ("rotation and search", whole)):
        seconds = take_turns({name: _waiting(way, device) for name, way in ways.items()}, rounds=ROUNDS[size])
        rows += [(device, what, way, s, seconds["torch.cdist"] / s) for way, s in seconds.items()]
        if what == "search" and size != "tiny":
            name = f"search of {n_blocks * block_rows:,} keys, {device}: torch.cdist ÷ actdb"
            goals.append(Goal(name, seconds["torch.cdist"] / seconds["actdb"], 3.0))
    step = time_step(queries, blocks, sizes, device)
    hours = step * Recipe().n_steps / HOUR_S
    rows.append((device, "step of training", "actdb", step, ""))
    rows.append(
        (device, f"training of {Recipe().n_steps:,} steps", f"actdb, projected: {hours:.3g} h", hours * HOUR_S, "")
    )
    return rows, goals


def made_rows(n: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Rows near a plane of a quarter of the dimensions, in float32: neighbours are at all distances."""
    plane = torch.randn(max(1, width // 4), width, generator=torch.Generator().manual_seed(1)) / 4
    points = torch.randn(n, len(plane), generator=generator) @ plane
    return points + 0.1 * torch.randn(n, width, generator=generator)


def rotate(blocks: list[torch.Tensor], basis: torch.Tensor) -> torch.Tensor:
    """All keys rotated [key, width], in float32."""
    return torch.cat([block.to(torch.float32) @ basis for block in blocks])


def plain_search(queries: torch.Tensor, keys: torch.Tensor, sizes: tuple[int, ...]) -> Nearest:
    """What one writes without this module: the distances of each subspace, and their minimum."""
    found = [torch.cdist(queries[:, columns], keys[:, columns]).min(1) for columns in column_ranges(sizes)]
    return Nearest(torch.stack([each.indices for each in found]), torch.stack([each.values for each in found]))


def products(queries: torch.Tensor, keys: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """The products of a search alone, each result dropped."""
    for columns in column_ranges(sizes):
        own = queries[:, columns].T.contiguous()
        for tile in keys[:, columns].split(2048):
            tile @ own


def check(found: Nearest, truth: Nearest, queries: torch.Tensor, keys: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """Hold a search to the plain one: its neighbours are as near, by exact differences, in every subspace."""
    for i, columns in enumerate(column_ranges(sizes)):
        ours, theirs = (keys[each.index[i]][:, columns] for each in (found, truth))
        mine = torch.linalg.vector_norm(queries[:, columns] - ours, dim=1)
        other = torch.linalg.vector_norm(queries[:, columns] - theirs, dim=1)
        assert torch.allclose(found.distance[i], mine, atol=TOLERANCE)
        assert float((mine - other).max()) <= TOLERANCE, (i, float((mine - other).max()))


def time_step(
    queries: torch.Tensor, blocks: list[torch.Tensor], sizes: tuple[int, ...], device: str, n: int = 3
) -> float:
    """Return the seconds of a training step: search, loss, gradient, Adam; the median of `n`, one untimed before."""
    recipe = Recipe()
    rotation = Rotation(queries.shape[1], sizes).to(device)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=recipe.learning_rate)

    def step() -> None:
        loss = partition_loss(rotation.basis, sizes, queries, blocks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rotation.parameters(), recipe.clip)
        optimizer.step()

    times = []
    for _ in range(n + 1):
        began = time.perf_counter()
        _waiting(step, device)()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[n // 2]


def _waiting(way: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same, ending when the device is done."""

    def call() -> None:
        way()
        if device == "cuda":
            torch.cuda.synchronize()

    return call
