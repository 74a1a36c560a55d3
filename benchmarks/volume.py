"""Bytes a token of the four default sites, exact in float16, on a trained model, beside files without a database.

The model is the one that the demo ships, or the folder named by ACTDB_BENCH_MODEL with prompts in ACTDB_BENCH_PROMPTS.
The `.pt` of everything is what `run_with_cache` keeps, float32; the others hold the same four sites, patterns as dense
squares of the padded batch, as they come. Prompts of one batch are padded to the longest.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actdb
from actdb.demo import MODEL, PROMPTS
from actdb.harvesting.models import load_model
from actdb.harvesting.sites import LAYER_SITES
from benchmarks.harness import Goal, Table, note

N_PROMPTS = {"full": 600, "quick": 96, "tiny": 6}
BATCH = 16


def run(size: str, folder: Path) -> Table:
    """Return bytes a token of each way of storing."""
    model_path = os.environ.get("ACTDB_BENCH_MODEL", MODEL)
    prompts_path = Path(os.environ.get("ACTDB_BENCH_PROMPTS", PROMPTS))
    lines = prompts_path.read_text(encoding="utf-8").splitlines()[: N_PROMPTS[size]]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    variants = {"actdb, exact": {}, "actdb, --precision 7": {"precision": 7}, "actdb, --precision 5": {"precision": 5}}
    rows: list[tuple[Any, ...]] = []
    runs = {
        name: actdb.harvest(model_path, folder / "prompts.jsonl", folder / f"{i}.actdb", **options)  # type: ignore[arg-type]
        for i, (name, options) in enumerate(variants.items())
    }
    n_tokens = runs["actdb, exact"].info.n_rows
    names = runs["actdb, exact"].sites
    for name, run in runs.items():
        with actdb.open(folder / f"{list(runs).index(name)}.actdb") as db:
            sizes = dict(db.sql("SELECT site, stored_bytes FROM sites").fetchall())
            errors = dict(db.sql("SELECT site, max_abs_error FROM sites").fetchall())
        rows.append((name, *(sizes[site] / n_tokens for site in names), sum(sizes.values()) / n_tokens))
        rows.append((f"{name}: largest error", *(float(f"{errors[site]:.2g}") for site in names), ""))
        assert run.status == "complete"
    rows += peer_rows(model_path, runs["actdb, exact"], folder, names)
    exact = next(row for row in rows if row[0] == "actdb, exact")
    dense = next(row for row in rows if row[0] == "dense float16, no codec")
    goals = [
        Goal(
            "patterns ÷ dense float16", _of(exact, "pattern", names) / _of(dense, "pattern", names), 0.5, at_least=False
        )
    ]
    packed = _packed_bytes(runs["actdb, exact"]) / n_tokens
    for name, bound in (("actdb, --precision 7", 0.72), ("actdb, --precision 5", 0.6)):
        row = next(row for row in rows if row[0] == name)
        goals.append(Goal(f"{name} ÷ float16 without pads and squares", row[-1] / packed, bound, at_least=False))
    header = ("way", *names, "bytes a token")
    return Table("Bytes", note(__doc__), header, rows, goals)


def peer_rows(model_path: Any, run: actdb.Run, folder: Path, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Return bytes a token of files that hold padded batches as they come."""
    totals = {"dense float16, no codec": dict.fromkeys(names, 0), "npz, compressed, float16": dict.fromkeys(names, 0)}
    everything = same = 0
    for cache in batches(model_path, run):
        torch.save(dict(cache), folder / "all.pt")
        everything += (folder / "all.pt").stat().st_size
        kept = {n: v.half() for n, v in cache.items() if n.endswith(tuple(LAYER_SITES[site] for site in names))}
        torch.save(kept, folder / "same.pt")
        same += (folder / "same.pt").stat().st_size
        for site in names:
            arrays = {n: v.numpy() for n, v in kept.items() if n.endswith(LAYER_SITES[site])}
            np.savez_compressed(folder / "x.npz", **arrays)
            totals["npz, compressed, float16"][site] += (folder / "x.npz").stat().st_size
            totals["dense float16, no codec"][site] += sum(v.nbytes for v in arrays.values())
    n = run.info.n_rows
    rows: list[tuple[Any, ...]] = [
        (name, *(sizes[site] / n for site in names), sum(sizes.values()) / n) for name, sizes in totals.items()
    ]
    blank = ("",) * len(names)
    return [
        *rows,
        (".pt of the same sites, float16", *blank, same / n),
        (".pt of everything, float32", *blank, everything / n),
    ]


def batches(model_path: Any, run: actdb.Run) -> Iterator[Any]:
    """Yield what `run_with_cache` keeps of each padded batch of 16 prompts."""
    model = load_model(model_path)
    for begin in range(0, run.n_prompts, BATCH):
        tokens = [run.tokens(i) for i in range(begin, min(begin + BATCH, run.n_prompts))]
        ids = torch.zeros((len(tokens), max(map(len, tokens))), dtype=torch.long)
        for row, prompt in zip(ids, tokens, strict=True):
            row[: len(prompt)] = torch.from_numpy(prompt.copy())
        module: Any = model.module
        with torch.inference_mode():
            yield module.run_with_cache(ids)[1]


def _of(row: tuple[Any, ...], site: str, names: tuple[str, ...]) -> float:
    return float(row[1 + names.index(site)])


def _packed_bytes(run: actdb.Run) -> int:
    """Return the float16 bytes of what is stored: rows without pads, patterns as triangles."""
    return sum(
        int(np.prod(spec.planes))
        * (run.info.n_entries if spec.dims[-1] == "entry" else run.info.n_rows * spec.feature[0])
        * 2
        for spec in run.info.sites
    )
