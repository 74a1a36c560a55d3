"""Stored activations inside one SQL query, against arrays held in memory and a loop of slices.

Every way returns the mean cosine similarity of 100,000 residual vectors (d_model 768, float16, random, lz4) with one of
them; a table of prompts and positions names the vectors in storage order, in the order of prompts, or in random order.
SQL asks `avg(list_cosine_similarity(activation(...), activation(...)))`; pandas has the array rows in a data frame and
the vectors in memory as float16, and computes in float32 by blocks; the loop calls `sel(...).numpy()` for a sample of
the rows. Files are in the page cache; SQL opens the database anew each time, so that nothing is decoded yet.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

import actdb
from benchmarks.harness import Goal, Table, note, take_turns

SCALE = {"full": (100_000, 2_000, 5), "quick": (20_000, 500, 3), "tiny": (600, 20, 1)}  # vectors, looped, rounds
WIDTH, SHORTEST, LONGEST = 768, 20, 128
ORDERS = ("storage", "prompt", "random")
QUERY = """
    SELECT avg(list_cosine_similarity(activation('resid_post', 0, prompt_id, pos), activation('resid_post', 0, 0, 0)))
    FROM {order}_order
"""
Vectors = npt.NDArray[np.float16]


class Lookup(nn.Module):
    """A hooked module whose one activation is a random vector of each token."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name="lookup", n_layers=1, n_heads=1, d_model=WIDTH, d_vocab=n_tokens, n_ctx=LONGEST
        )
        self.W_E = nn.Parameter(torch.randn(n_tokens, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].hook_resid_post = HookPoint()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [batch, pos, d_model]."""
        found: torch.Tensor = self.blocks[0].hook_resid_post(self.W_E[ids])
        return found


def run(size: str, folder: Path) -> Table:
    """Return thousands of activations a second of each way, in each order."""
    n_vectors, n_looped, rounds = SCALE[size]
    path = folder / "lookup.actdb"
    vectors, places = harvest(path, n_vectors)
    samples = {order: rows.head(n_looped) for order, rows in places.items()}
    ways: dict[str, tuple[Callable[[str], float], int]] = {
        "actdb sql": (lambda order: in_sql(path, order), n_vectors),
        "pandas and an array in memory": (lambda order: in_memory(vectors, places[order]), n_vectors),
        "loop of sel()": (lambda order: in_loop(path, samples[order]), n_looped),
    }
    for order in ORDERS:
        assert np.isclose(in_sql(path, order), in_memory(vectors, places[order]), atol=1e-6), order
        assert np.isclose(in_loop(path, samples[order]), in_memory(vectors, samples[order]), atol=1e-6), order
    turns = {f"{name} {order}": partial(way, order) for order in ORDERS for name, (way, _) in ways.items()}
    seconds = take_turns(turns, rounds=rounds)
    rows = [(name, *(n / seconds[f"{name} {order}"] / 1e3 for order in ORDERS)) for name, (_, n) in ways.items()]
    header = ("way", *(f"{order} order, 1000 activations/s" for order in ORDERS))
    fast = rows[0][1]
    goals = (Goal("activations in SQL, storage order", float(fast), 100, "1000/s"),)
    return Table("Activations in SQL", note(__doc__), header, rows, goals)


def in_sql(path: Path, order: str) -> float:
    """Ask one query of a database opened for it."""
    with actdb.open(path) as db:
        return float(db.sql(QUERY.format(order=order)).fetchall()[0][0])


def in_memory(vectors: Vectors, places: pd.DataFrame) -> float:
    """Compute the same from an array [row, d_model]."""
    reference = vectors[places.attrs["first"]].astype(np.float32)
    cosines = np.empty(len(places), np.float32)
    for begin in range(0, len(places), 2048):
        rows = places["row"].to_numpy()[begin : begin + 2048]
        block = vectors[rows].astype(np.float32)
        norms = np.sqrt(np.einsum("rd,rd->r", block, block))
        cosines[begin : begin + 2048] = block @ reference / (norms * np.linalg.norm(reference))
    return float(pd.Series(cosines).mean())


def in_loop(path: Path, places: pd.DataFrame) -> float:
    """Compute the same from one slice a row."""
    with actdb.open(path) as db:
        site = db.run()["resid_post"].sel(layer=0)
        reference = site.sel(prompt=0, pos=0).numpy().astype(np.float32)
        total = 0.0
        for prompt, pos in zip(places["prompt_id"].tolist(), places["pos"].tolist(), strict=True):
            vector = site.sel(prompt=prompt, pos=pos).numpy().astype(np.float32)
            total += float(vector @ reference / (np.linalg.norm(vector) * np.linalg.norm(reference)))
    return total / len(places)


def harvest(path: Path, n_vectors: int) -> tuple[Vectors, dict[str, pd.DataFrame]]:
    """Harvest the vectors; returns them in storage order, and the places of each order, which SQL gets as a table."""
    generator = np.random.default_rng(0)
    ends = np.cumsum(generator.integers(SHORTEST, LONGEST + 1, n_vectors // SHORTEST))
    prompts = np.split(np.arange(n_vectors), ends[ends < n_vectors])
    module = Lookup(n_vectors)
    options = {"run": "lookup", "sites": ["resid_post"], "stats": (), "bos": False}
    actdb.harvest(module, [{"tokens": tokens.tolist()} for tokens in prompts], path, **options)
    with actdb.open(path, mode="a") as db:
        placed = db.sql("SELECT row_start FROM run_prompts ORDER BY prompt_id").df()["row_start"].to_numpy()
        lengths = np.array([len(tokens) for tokens in prompts])
        in_prompt = np.arange(n_vectors) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        stored = np.argsort(np.repeat(placed, lengths) + in_prompt)  # the prompt order of what is stored, row by row
        every = pd.DataFrame({"prompt_id": np.repeat(np.arange(len(prompts)), lengths), "pos": in_prompt})
        every["row"] = np.argsort(stored)
        every.attrs["first"] = int(every["row"][0])
        orders = {"storage": stored, "prompt": np.arange(n_vectors), "random": generator.permutation(n_vectors)}
        places = {order: every.iloc[rows].reset_index(drop=True) for order, rows in orders.items()}
        for order, rows in places.items():
            db.add_table(f"{order}_order", pa.table({name: rows[name].to_numpy() for name in ("prompt_id", "pos")}))
    return module.W_E.detach().numpy()[stored].astype(np.float16), places
