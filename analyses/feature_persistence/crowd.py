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
    timed = np.array([times for seed in range(n_seeds) for times in harvest_seed(db, seed)])
    overhead = timed[:, 0] - timed[:, 1]
    began = time.perf_counter()
    with actdb.open(db) as database:
        n_runs = len(database.runs())
        opened = time.perf_counter()
        n_rows = database.sql("SELECT count(*) FROM head_stats").fetchone()
        queried = time.perf_counter()
    return {
        "runs": n_runs,
        "harvest_s_median": float(np.median(timed[:, 0])),
        "overhead_s_median": float(np.median(overhead)),
        "overhead_s_mean": float(overhead.mean()),
        "overhead_s_of_last_tenth": float(np.median(overhead[-max(1, len(overhead) // 10) :])),
        "harvest_cpu_s_median": float(np.median(timed[:, 2])),
        "open_s": opened - began,
        "first_query_s": queried - opened,
        "head_stats_rows": n_rows[0] if n_rows else 0,
    }


def harvest_seed(db: Path, seed: int) -> list[tuple[float, float, float]]:
    """Train one seed and harvest ten checkpoints.

    Returns of each the seconds of the harvest, of the forward pass alone, and the processor's seconds of the harvest:
    on a busy machine the last alone tells.
    """
    model = PostNormTransformer(seed=seed, name=f"seed{seed}")
    prompts, ids = probe_prompts(), torch.from_numpy(training_sequences(seed))
    probe = torch.tensor([prompt["tokens"] for prompt in prompts])
    harvest = harvest_steps(model, prompts, db, run=f"seed{seed}", sites=("mlp_post",), store="float32")
    timed: list[tuple[float, float, float]] = []

    def visit(step: int) -> None:
        began = time.perf_counter()
        with torch.inference_mode():
            model(probe)
        middle, busy = time.perf_counter(), time.process_time()
        harvest(step)
        timed.append((time.perf_counter() - middle, middle - began, time.process_time() - busy))

    n_steps = N_CHECKPOINTS * STEPS_PER_EPOCH
    train(
        model,
        partial(_loss, ids),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
        n_steps=n_steps,
        checkpoints=range(STEPS_PER_EPOCH, n_steps + 1, STEPS_PER_EPOCH),
        visit=visit,
    )
    return timed


def _loss(ids: torch.Tensor, model: PostNormTransformer, step: int) -> torch.Tensor:
    return batch_loss(model, ids, step)


if __name__ == "__main__":
    sys.exit(main())
