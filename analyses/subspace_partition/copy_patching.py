"""Subspace patching on a copy transformer: which subspace of the stream carries what copying rests on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import actdb
from analyses.common.report import Claim
from analyses.subspace_partition import picture
from analyses.subspace_partition.baseline import TRAINED, baselines
from analyses.subspace_partition.buffer import Buffer, fill_buffer
from analyses.subspace_partition.claims import patching_claims
from analyses.subspace_partition.copy_study import LAYER, PARTITION, SITE, Found
from analyses.subspace_partition.evaluation import Pair, measure_geometry, patch_subspaces
from analyses.subspace_partition.partition import Partition

N_ROWS = 16_384


def copy_pairs(db: actdb.Database, run: actdb.Run) -> list[Pair]:
    """Return the pairs of a run of `sequence.paired_prompts`, each patched at one token of the pattern's first turn.

    The pattern of pair i is asked for its token j = 1 + i mod (length − 1): the clean prompt should go on with it at
    the repeat of the token before. Patched is the place where the token stood first, whose row says which token it is
    and which came before it: with either from the corrupted prompt, copying fails, by another token or by none.
    """
    query = """SELECT a.prompt_id, b.prompt_id, a.pair, a.pattern_length
        FROM prompts a JOIN prompts b ON a.prompt_set = b.prompt_set AND a.pair = b.pair
            JOIN runs r ON r.prompt_set = a.prompt_set
        WHERE a.role = 'clean' AND b.role = 'corrupted' AND r.run = $1 ORDER BY 1"""
    found = []
    for clean, corrupted, number, length in db.sql(query, [run.name]).fetchall():
        j = 1 + int(number) % (int(length) - 1)
        place = 1 + j  # after the start token
        answer, wrong = (int(run.tokens(prompt)[place]) for prompt in (clean, corrupted))
        found.append(Pair(int(clean), int(corrupted), (place,), answer, wrong, query=int(length) + j))
    return found


def study_patching(model: Any, name: str, db: Path, *, figures: Path, unit: int, seed: int) -> Found:
    """Patch the subspaces of a copy transformer's stored partition, and of the baselines, between its stored pairs."""
    with actdb.open(db) as held:
        rows, run = held.run(f"{name}-rows"), held.run(f"{name}-pairs")
        partition, pairs = Partition.read(held, rows, PARTITION), copy_pairs(held, run)
        buffer = fill_buffer(rows[SITE].sel(layer=LAYER), seed=seed, n_rows=N_ROWS)
        partitions = _partitions(buffer, partition, unit=unit, seed=seed)
        effects = {
            key: patch_subspaces(model, run, each, pairs, site=SITE, layer=LAYER) for key, each in partitions.items()
        }
    counts: dict[str, Any] = {"n_queries": 512, "n_keys": N_ROWS, "seed": seed}
    geometry = {key: measure_geometry(buffer, each, **counts, pairs=False) for key, each in partitions.items()}
    claims = [replace(entry, key=f"{name}.{entry.key}") for entry in patching_claims(effects, geometry, seed=seed)]
    file = f"{name}-patching.png"
    caption = picture.draw_effects(figures / file, effects, geometry)
    return Found(run.name, _judged(claims), {}, {f"figures/{file}": f"{name}: {caption}"})


def _partitions(buffer: Buffer, partition: Partition, *, unit: int, seed: int) -> Mapping[str, Partition]:
    others = baselines(buffer.rows.float().numpy(), partition.sizes, unit=unit, seed=seed)
    return {TRAINED: partition, **others}


def _judged(claims: list[Claim]) -> list[Claim]:
    return [entry.judged() for entry in claims]
