"""Many small runs in one database: seeds × steps, and what each costs.

    python -m analyses.feature_persistence.crowd [--seeds 50] [--db DB]

Trains each seed for ten epochs and harvests `mlp_post` and the head statistics at ten checkpoints. Prints, as JSON, the
seconds of a harvest, of the forward passes alone, of opening the database, and of the first query over all runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import actdb
from analyses.common.training import harvest_steps, train
from analyses.feature_persistence.model import PostNormTransformer
from analyses.feature_persistence.task import probe_prompts, training_sequences
from analyses.feature_persistence.training import STEPS_PER_EPOCH, batch_loss

N_CHECKPOINTS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs, then time; returns the exit status."""
    parser = argparse.ArgumentParser(description="Hundreds of tiny runs in one database, and what each costs.")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--db", type=Path, default=Path("out/feature_persistence/crowd.actdb"))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        print(json.dumps(time_runs(given.db, n_seeds=given.seeds), indent=1))
    except actdb.ActdbError as exc:
        print(f"crowd: {exc}", file=sys.stderr)
        return 1
    return 0


def time_runs(db: Path, *, n_seeds: int) -> dict[str, float]:
    """Train and harvest `n_seeds` × 10 runs, and time harvests, opening and the first query."""
    seconds: list[float] = []
    forward: list[float] = []
    prompts = probe_prompts()
    probe = torch.tensor([prompt["tokens"] for prompt in prompts])
    for seed in range(n_seeds):
        model = PostNormTransformer(seed=seed, name=f"seed{seed}")
        ids = torch.from_numpy(training_sequences(seed))
        harvest = harvest_steps(model, prompts, db, run=f"seed{seed}", sites=("mlp_post",), store="float32")

        def visit(step: int, model: PostNormTransformer = model, harvest: object = harvest) -> None:
            began = time.perf_counter()
            with torch.inference_mode():
                model(probe)
            middle = time.perf_counter()
            harvest(step)  # type: ignore[operator]
            forward.append(middle - began)
            seconds.append(time.perf_counter() - middle)

        n_steps = N_CHECKPOINTS * STEPS_PER_EPOCH
        train(
            model,
            partial(_loss, ids),
            optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
            n_steps=n_steps,
            checkpoints=range(STEPS_PER_EPOCH, n_steps + 1, STEPS_PER_EPOCH),
            visit=visit,
        )
    began = time.perf_counter()
    with actdb.open(db) as database:
        n_runs = len(database.runs())
        opened = time.perf_counter()
        n_rows = database.sql("SELECT count(*) FROM head_stats").fetchone()
        queried = time.perf_counter()
    return {
        "runs": n_runs,
        "harvest_s_median": float(np.median(seconds)),
        "harvest_s_max": max(seconds),
        "overhead_s_median": float(np.median(np.subtract(seconds, forward))),
        "overhead_s_mean": float(np.mean(np.subtract(seconds, forward))),
        "open_s": opened - began,
        "first_query_s": queried - opened,
        "head_stats_rows": n_rows[0] if n_rows else 0,
    }


def _loss(ids: torch.Tensor, model: PostNormTransformer, step: int) -> torch.Tensor:
    return batch_loss(model, ids, step)


if __name__ == "__main__":
    sys.exit(main())
