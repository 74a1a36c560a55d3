"""The scaled run: the same measurement on layers of gpt2-small's size, beside the raw read speed of the rows.

    python -m analyses.feature_persistence.scale [--rows 100000] [--model gpt2-small] [--db DB] [--codec lz4|raw]

Random weights, random sequences of ten tokens at eight positions: the original's probe. Prints, as JSON, seconds and
bytes a second of reading alone and of measuring, their ratio, and the peak of memory.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import actdb
from analyses.common.program import note
from analyses.common.selectivity import block_rows
from analyses.feature_persistence.model import N_POSITIONS
from analyses.feature_persistence.selection import LEVEL, Selectivity, measure
from analyses.feature_persistence.task import probe_prompts

N_ROUNDS = 3
MEBIBYTE = 1024**2


def main(argv: Sequence[str] | None = None) -> int:
    """Harvest where needed, then time; returns the exit status."""
    parser = argparse.ArgumentParser(description="Selectivity at the size of gpt2-small, and how fast.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="gpt2-small", help="name or folder; weights are random")
    parser.add_argument("--db", type=Path, default=Path("out/feature_persistence/scale.actdb"))
    parser.add_argument("--codec", default="lz4", choices=("lz4", "raw"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    try:
        run = harvest_rows(given.model, given.db, n_rows=given.rows, codec=given.codec, seed=given.seed)
        print(json.dumps(time_measurement(run), indent=1))
    except actdb.ActdbError as exc:
        print(f"scale: {exc}", file=sys.stderr)
        return 1
    return 0


def harvest_rows(model: str, db: Path, *, n_rows: int, codec: str, seed: int) -> actdb.Run:
    """Harvest `mlp_post` of a model with random weights on as many rows; a harvest that is there is used as it is."""
    name = f"{Path(model).name}-{n_rows}-{codec}"
    if (db / "actdb.json").is_file():
        found = [run for run in actdb.open(db).runs() if run.name == name and run.status == "complete"]
        if found:
            return found[0]
    note(f"harvesting {n_rows} rows of {model} into {db}")
    prompts = probe_prompts(n=-(-n_rows // N_POSITIONS), seed=seed)
    return actdb.harvest(
        model, prompts, out=db, run=name, sites=["mlp_post"], stats=(), codec=codec, random_init=seed, bos=False
    )


def time_measurement(run: actdb.Run) -> dict[str, object]:
    """Time reading all rows and measuring them, alternating, and return the best of each with what was found."""
    selection = run["mlp_post"]

    def read() -> None:
        for _ in selection.batches(block_rows(selection)):
            pass

    found: list[Selectivity] = []
    read_s, measure_s = [], []
    for _ in range(N_ROUNDS):
        read_s.append(_seconds(read))
        measure_s.append(_seconds(lambda: found.append(measure(run))))
    token, position = found[-1].token, found[-1].position
    return {
        "rows": selection.n_rows,
        "layers": len(selection.layers),
        "neurons": selection.shape[-1],
        "bytes": selection.nbytes,
        "read_s": min(read_s),
        "measure_s": min(measure_s),
        "read_mb_s": selection.nbytes / min(read_s) / MEBIBYTE,
        "measure_mb_s": selection.nbytes / min(measure_s) / MEBIBYTE,
        "ratio": min(read_s) / min(measure_s),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "selective_token": float(found[-1].selective("token").mean()),
        "selective_position": float(found[-1].selective("position").mean()),
        "eta_token_mean": float(token.eta_squared.mean()),
        "eta_position_mean": float(position.eta_squared.mean()),
        "level": LEVEL,
    }


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
