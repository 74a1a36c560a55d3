"""The harvest benchmark on a CUDA device: bare forward pass, statistics only, four sites, and the ceilings beside.

GPT-2-small's shape with random weights, made here; bfloat16 and float32, 64 × 128 and 16 × 1024 tokens a batch. The
copy ceiling is what pinned memory takes of the bytes that are stored, the storage ceiling what a plain file takes.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actdb.harvesting.execution import run_harvest
from actdb.harvesting.harvest import plan_harvest
from actdb.harvesting.models import Model, load_model
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import forward
from benchmarks.harness import Goal, Table, note, take_turns

SITES = ("resid_post", "z", "pattern", "mlp_post")
BATCHES = {"full": 24, "quick": 6, "tiny": 1}
SHAPES = ((64, 128), (16, 1024))


def run(size: str, folder: Path) -> Table:
    """Return tokens/s of each way, dtype and shape, or one row that says that there is no device."""
    header = ("dtype", "batch", "way", "tokens/s", "÷ bare")
    if not torch.cuda.is_available():
        rows = [("", "", "not run: no CUDA device", "", "")]
        return Table("GPU", note(__doc__), header, rows)
    all_rows: list[tuple[Any, ...]] = []
    goals: list[Goal] = []
    for dtype in ("bfloat16", "float32"):
        model = load_model("gpt2-small", random_init=0, dtype=dtype, device="cuda")
        for shape in SHAPES:
            rows, reached = compare(model, dtype, shape, BATCHES[size], folder)
            all_rows += rows
            goals += reached
    text = f"{note(__doc__)} Device: {torch.cuda.get_device_name()}."
    return Table("GPU", text, header, all_rows, goals, "tokens/s")


def compare(
    model: Model, dtype: str, shape: tuple[int, int], n_batches: int, folder: Path
) -> tuple[list[tuple[Any, ...]], list[Goal]]:
    """Time the ways in turns on the same batches."""
    n_prompts, n_tokens = shape
    ids = np.random.default_rng(0).integers(0, 50_000, (n_batches, n_prompts, n_tokens))
    on_device = torch.from_numpy(ids).cuda()
    prompts = [{"tokens": prompt.tolist()} for batch in ids for prompt in batch]
    common: dict[str, Any] = {"batch_tokens": n_prompts * n_tokens}
    planned = {
        "actdb, statistics only": plan_harvest(model.module, prompts, Settings(sites=(), run="statistics", **common)),
        "actdb, four sites and statistics": plan_harvest(
            model.module, prompts, Settings(sites=SITES, run="full", **common)
        ),
    }
    out = folder / "x.actdb"

    def clear() -> None:
        for name in ("runs", "arrays.zarr"):
            shutil.rmtree(out / name, ignore_errors=True)

    def bare() -> None:
        for batch in on_device:
            forward(model, batch, torch.ones_like(batch), unembed=False)
        torch.cuda.synchronize()

    run_harvest(planned["actdb, four sites and statistics"], out)
    stored = sum(path.stat().st_size for path in (out / "arrays.zarr").rglob("*") if path.is_file())
    raw = sum(planned["actdb, four sites and statistics"].raw_bytes.values())
    ways = {"bare forward pass": bare, **{n: lambda p=p: run_harvest(p, out) for n, p in planned.items()}}
    speed = {name: ids.size / t for name, t in take_turns(ways, rounds=2, before=clear).items()}
    speed["copy ceiling"] = ids.size / (raw / copy_rate())
    speed["storage ceiling"] = ids.size / (stored / write_rate(folder / "plain"))
    base = speed["bare forward pass"]
    batch = f"{n_prompts} × {n_tokens}"
    ceiling = min(base, speed["copy ceiling"], speed["storage ceiling"])
    goals = [
        Goal(f"{dtype}, {batch}: statistics only ÷ bare", speed["actdb, statistics only"] / base, 0.8),
        Goal(f"{dtype}, {batch}: full ÷ ceiling", speed["actdb, four sites and statistics"] / ceiling, 0.9),
    ]
    return [(dtype, batch, name, v, v / base) for name, v in speed.items()], goals


def copy_rate(n_bytes: int = 1024**3) -> float:
    """Return bytes a second from the device to pinned memory."""
    source, target = torch.empty(n_bytes, dtype=torch.uint8, device="cuda"), torch.empty(n_bytes, dtype=torch.uint8)
    target = target.pin_memory()
    target.copy_(source)
    began = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    torch.cuda.synchronize()
    return 4 * n_bytes / (time.perf_counter() - began)


def write_rate(path: Path, n_bytes: int = 2 * 1024**3) -> float:
    """Return bytes a second of a plain file, synced."""
    from benchmarks.writer import plain_file

    began = time.perf_counter()
    plain_file(path, n_bytes)
    return n_bytes / (time.perf_counter() - began)
