"""Where a harvest's time goes: the same run with one thing after the other left out, taken in turns.

GPT-2-small's shape, 16 × 128 tokens a batch, four sites, float16, default codec. A row's cost is the difference to the
row above it, as a share of the bare forward pass without unembedding.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from actdb.harvesting.execution import run_harvest
from actdb.harvesting.harvest import Harvest, plan_harvest
from actdb.harvesting.settings import Settings
from actdb.harvesting.sites import forward
from benchmarks.harness import Table, note, take_turns
from benchmarks.harvest import SITES, make_inputs, make_model

SCALE = {"full": (3, 2), "quick": (2, 1), "tiny": (1, 1)}  # batches, rounds
PIPELINE = "actdb.harvesting.pipeline"


def run(size: str, folder: Path) -> Table:
    """Return seconds and shares of each stage."""
    n_batches, rounds = SCALE[size]
    model = make_model(size, folder)
    ids, prompts = make_inputs(model, n_batches)
    out = folder / "x.actdb"

    def planned(name: str, **options: Any) -> Harvest:
        return plan_harvest(model.module, prompts, Settings(run=name, **options))

    none = planned("none", sites=("resid_post",), layers=(model.n_layers - 1,), stats=())
    heads = planned("heads", sites=SITES, stats=("heads",))
    sites = planned("sites", sites=SITES, stats=())
    stages: dict[str, tuple[Harvest, AbstractContextManager[Any]]] = {
        "one site of one layer, nothing else": (none, nullcontext()),
        "+ all four sites cast and packed": (sites, patch(f"{PIPELINE}.PartWriter.append")),
        "+ encoded": (sites, patch(f"{PIPELINE}.SiteShard.write")),
        "+ written and synced": (sites, nullcontext()),
        "+ head statistics": (heads, nullcontext()),
    }

    def bare() -> None:
        for batch in ids:
            forward(model, batch, torch.ones_like(batch), unembed=False)

    def stage(harvest: Harvest, change: AbstractContextManager[Any]) -> None:
        with change:
            run_harvest(harvest, out)

    def clear() -> None:
        for name in ("runs", "arrays.zarr"):
            shutil.rmtree(out / name, ignore_errors=True)

    ways: dict[str, Callable[[], None]] = {"bare forward pass without unembedding": bare}
    ways |= {name: lambda s=s: stage(*s) for name, s in stages.items()}  # type: ignore[misc]
    run_harvest(heads, out)  # writes the weights, once a model
    medians = take_turns(ways, rounds=rounds, before=clear)
    first, rows, before = medians["bare forward pass without unembedding"], [], 0.0
    for name, seconds in medians.items():
        rows.append((name, seconds, seconds / first, (seconds - before) / first if before else 1.0))
        before = seconds
    rows = [(name, seconds, total, f"{share:+.3f}") for name, seconds, total, share in rows]
    return Table("Profile of a harvest", note(__doc__), ("stage", "s", "÷ bare", "cost ÷ bare"), rows)
