"""Which copy transformers are studied, and how much of everything."""

from dataclasses import dataclass, replace

from analyses.subspace_partition.copying import Copier
from analyses.subspace_partition.sequence import Task
from analyses.subspace_partition.training import Recipe


@dataclass(frozen=True)
class Extent:
    """One copy transformer to study, and how much of everything."""

    copier: Copier
    checkpoints: tuple[int, ...]
    recipe: Recipe
    block_rows: int
    n_row_prompts: int
    n_prompts: int = 256
    n_pairs: int = 64
    pair_length: int = 16
    n_queries: int = 64
    n_few_keys: int = 1024
    n_keys: int = 16_384
    n_null: int = 500
    n_starts: int = 3


UNIQUE = Extent(
    copier=Copier("copy", Task(62, (2, 15)), positions="rotary", n_steps=3000, batch=32, learning_rate=0.01),
    checkpoints=(0, 50, 100, 150, 200, 300, 500, 1000, 2000),
    recipe=Recipe(
        unit=4,
        n_key_blocks=1,
        learning_rate=0.01,
        first_merge=1500,
        merge_every=500,
        n_steps=3000,
        stop_at_n_subspaces=2,
        information_keys=8192,
        information_queries=1000,
    ),
    block_rows=1024,
    n_row_prompts=12_000,
    pair_length=10,
)
"""Patterns of unique tokens: 62 of them give 3 782 pairs, so that of 1024 keys few are a query's twin in everything.

With rotary positions no place is written into the stream, and the only way to copy is by what stood before.
"""

BIGRAM = replace(
    UNIQUE,
    copier=replace(
        UNIQUE.copier,
        name="bigram",
        task=Task(40, (4, 12), "bigram", n_distinct=6),
        d_model=24,
        n_heads=2,
        n_steps=4000,
    ),
    checkpoints=(0, 250, 500, 1000, 2000, 3000),
    recipe=replace(UNIQUE.recipe, stop_at_n_subspaces=3, n_steps=3500),
    block_rows=512,
    n_few_keys=512,
)
"""Patterns of unique pairs: what to copy follows from two tokens, which takes two heads before the induction heads."""
