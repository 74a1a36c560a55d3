"""Peak memory of a harvest above the loaded model, at 1× and 10× prompts, beside `run_with_cache` that keeps all.

Each runs in a process of its own: the growth of its peak resident size after the model is loaded and has run once.
`run_with_cache` keeps the four sites of every batch in a list, float16, until the end.
"""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import Goal, Table, note

SCALE = {"full": (2, (1, 10)), "quick": (1, (1, 3)), "tiny": (1, (1, 2))}  # batches of 16 × 128 at 1×, factors
LIMIT_MB = 1024
HEAP = "the heap of the model's own activations goes on growing a little over the first batches"


def run(size: str, folder: Path) -> Table:
    """Return MiB above the model of each way and size."""
    n_batches, factors = SCALE[size]
    rows, peak = [], {}
    for way in ("actdb", "actdb, neuron statistics too", "run_with_cache"):
        for factor in factors if way == "actdb" or size != "full" else (1, 3):
            peak[way, factor] = start(way, size, n_batches * factor, folder / f"{len(rows)}")
            rows.append((way, f"{factor}×", peak[way, factor]))
    large = peak["actdb", factors[-1]]
    growth = large / max(peak["actdb", 1], 1e-9)
    goals = (
        Goal(f"peak memory above the model at {factors[-1]}×", large, LIMIT_MB, "MiB", at_least=False),
        Goal(
            f"peak memory at {factors[-1]}× ÷ at 1×",
            growth,
            1.15,
            at_least=False,
            why=HEAP,
        ),
    )
    return Table("Memory", note(__doc__), ("way", "prompts", "peak MiB above the model"), rows, goals)


def start(way: str, size: str, n_batches: int, out: Path) -> float:
    """Measure in a process of its own; in the tiny size, which tests that it runs, in this one."""
    if size == "tiny":
        return measure(way, size, n_batches, out)
    command = [sys.executable, "-m", "benchmarks.memory", way, size, str(n_batches), str(out)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure(way: str, size: str, n_batches: int, out: Path) -> float:
    """Return the growth of this process's peak resident size in MiB."""
    import torch

    from actdb.harvesting.execution import run_harvest
    from actdb.harvesting.harvest import plan_harvest
    from actdb.harvesting.settings import Settings
    from actdb.harvesting.sites import forward
    from benchmarks.harvest import BATCH, SITES, TOKENS, cached, make_model

    out.mkdir()
    model = make_model(size, out)
    ids = torch.from_numpy(
        np.random.default_rng(0).integers(0, int(model.config["d_vocab"]), (n_batches, BATCH, TOKENS))
    )
    forward(model, ids[0][:1, :8], torch.ones_like(ids[0][:1, :8]), unembed=True)
    before = resident_mb()
    if way.startswith("actdb"):
        prompts = [{"tokens": prompt.tolist()} for batch in ids for prompt in batch]
        stats = ("heads",) if way == "actdb" else ("heads", "neurons")
        run_harvest(plan_harvest(model.module, prompts, Settings(sites=SITES, stats=stats)), out / "x.actdb")
    else:
        kept = [cached(model, batch) for batch in ids]
        assert len(kept) == n_batches
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, 0.1)


def resident_mb() -> float:
    """Return the resident size now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024**2


if __name__ == "__main__":
    print(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
