"""The semantic score of every head: one pass over stored patterns, a table, and a query."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import actdb
from analyses.semantic_head.category import TABLE as CATEGORY_TABLE
from analyses.semantic_head.category import Categories, shuffle_labels

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
TABLE = "semantic_scores"
LEAST_MASS = 1e-12
BLOCK_PROMPTS = 4
RANKING = f"""
    SELECT layer, head, avg(score) AS score, coalesce(stddev_samp(score) / sqrt(count(*)), 0) AS error,
           avg(shuffled) AS shuffled, count(*) AS n
    FROM {TABLE} WHERE run = $1 GROUP BY ALL ORDER BY score, layer, head
"""
"""The ranking of a run's heads by the stored table."""
DIRECT = """
    WITH word AS (
        SELECT t.prompt_id, t.pos, t.token_id, c.category
        FROM tokens t LEFT JOIN semantic_categories c USING (token_id) WHERE t.run = $1
    ), target AS (
        SELECT q.prompt_id, q.pos, list(k.pos + 1) FILTER (k.pos IS NOT NULL) AS keys
        FROM word q LEFT JOIN word k ON q.prompt_id = k.prompt_id AND k.pos < q.pos AND q.category = k.category
            AND q.token_id <> k.token_id GROUP BY ALL
    ), mass AS (
        SELECT list_sum(list_select(attention($2, $3, prompt_id, pos, run := $1), coalesce(keys, [1]))) AS mass
        FROM target
    )
    SELECT avg(-ln(greatest(mass, 1e-12))) FROM mass
"""
"""The score of one head straight from the stored patterns, in SQL alone: slower, and the same."""


@dataclass(frozen=True)
class Ranked:
    """A head's score: mean over prompts in nats, its standard error, and with categories shuffled over words."""

    layer: int
    head: int
    score: float
    error: float
    shuffled: float
    n: int

    @property
    def name(self) -> str:
        """The head as L1H5."""
        return f"L{self.layer}H{self.head}"


def targets(tokens: Ints, labels: Ints) -> npt.NDArray[np.bool_]:
    """Return T [query, key]: earlier keys of the query's category with another token; key 0 where there are none.

    `labels` [token id] are categories, −1 for none.
    """
    category = labels[tokens]
    same = (category[:, None] == category[None]) & (category[:, None] >= 0) & (tokens[:, None] != tokens[None])
    found = np.tril(same, -1)
    found[~found.any(1), 0] = True
    return np.asarray(found, np.bool_)


def semantic_score(patterns: npt.NDArray[Any], target: npt.NDArray[np.bool_]) -> Floats:
    """Return −ln max(Σ_k A[q, k] T[q, k], 1e-12), its mean over queries, of patterns [..., query, key] → [...]."""
    mass = np.einsum("...qk,qk->...q", patterns, target.astype(patterns.dtype), optimize=True)
    return np.asarray(-np.log(np.maximum(mass.astype(np.float64), LEAST_MASS)).mean(-1))


def score_heads(run: actdb.Run, labels: Ints, *, seed: int) -> pa.Table:
    """Score every head on every prompt in one pass over the stored patterns; returns the rows of `semantic_scores`.

    Columns run, prompt_id, layer, head, score, and `shuffled`, the score with categories permuted over the words: one
    permutation a prompt, the null. Memory is the patterns of `BLOCK_PROMPTS` prompts.
    """
    generator = np.random.default_rng((seed, 11))
    rows: list[dict[str, Any]] = []
    selection = run["pattern"]
    for block in selection.batches(BLOCK_PROMPTS):
        for prompt, patterns in zip(block.prompt.tolist(), block.values, strict=True):
            tokens = run.tokens(prompt).astype(np.int64)
            found = semantic_score(patterns, targets(tokens, labels))  # [layer, head]
            null = semantic_score(patterns, targets(tokens, shuffle_labels(labels, generator)))
            rows += [
                {"run": run.name, "prompt_id": prompt, "layer": layer, "head": head}
                | {"score": float(found[i, head]), "shuffled": float(null[i, head])}
                for i, layer in enumerate(selection.layers)
                for head in range(found.shape[1])
            ]
    return pa.Table.from_pylist(rows)


def store_scores(path: Path, run: actdb.Run, categories: Categories, labels: Ints, *, seed: int) -> None:
    """Keep the scores of a run's heads in `semantic_scores`, beside those of other runs, and the categories."""
    found = score_heads(run, labels, seed=seed)
    with actdb.open(path, mode="a") as db:
        if TABLE in db.snapshot.tables:
            others = db.sql(f"SELECT * FROM {TABLE} WHERE run <> $1", [run.name]).arrow()
            found = pa.concat_tables([pa.table(others).cast(found.schema), found])
        db.add_table(TABLE, found, replace=True)
        db.add_table(CATEGORY_TABLE, categories.table(), replace=True)


def rank_heads(db: actdb.Database, run: str) -> list[Ranked]:
    """Rank a run's heads by one query over the stored table, the most semantic first."""
    return [Ranked(*row) for row in db.sql(RANKING, [run]).fetchall()]


def score_in_sql(db: actdb.Database, run: str, *, layer: int, head: int) -> float:
    """Score one head by `DIRECT`; its mean over all queries, which is that over prompts where they are equally long."""
    return float(db.sql(DIRECT, [run, layer, head]).fetchone()[0])  # type: ignore[index]


@dataclass(frozen=True)
class PermutationNull:
    """A head's score, its scores with categories permuted [permutation], and how probable the score is among them."""

    score: float
    permuted: Floats
    p: float


def permute_categories(run: actdb.Run, labels: Ints, *, layer: int, head: int, n: int, seed: int) -> PermutationNull:
    """Score one head under `n` permutations of the categories over the words, the same one in all prompts.

    Words recur over prompts, so that prompts are not independent draws of a category's chance affinities; this null
    has that dependence.
    """
    generator = np.random.default_rng((seed, 12))
    selection = run["pattern"].sel(layer=layer, head=head)
    held = [
        (run.tokens(prompt).astype(np.int64), pattern)
        for block in selection.batches(BLOCK_PROMPTS)
        for prompt, pattern in zip(block.prompt.tolist(), block.values, strict=True)
    ]

    def score(by_token: Ints) -> float:
        return float(np.mean([semantic_score(pattern, targets(tokens, by_token)) for tokens, pattern in held]))

    observed = score(labels)
    permuted = np.array([score(shuffle_labels(labels, generator)) for _ in range(n)])
    return PermutationNull(observed, permuted, float((1 + (permuted <= observed).sum()) / (n + 1)))
