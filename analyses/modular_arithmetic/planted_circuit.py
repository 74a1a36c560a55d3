"""A model built by hand that adds modulo p with one of its two heads: the other writes where nothing reads.

The residual stream has four parts of p directions: numbers, answers, a part that nothing reads, and a spare one. A
number is embedded as its own direction. Both heads look at all positions alike; the working one sums the numbers of a
and b into the position of "=", the idle one writes a random image of them into the unread part. One neuron for each
pair of numbers fires on that pair, and writes its sum mod p. So the circuit is known: a and b → the working head → the
MLP → the output, four edges, and nothing else does anything.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import actdb
from analyses.modular_arithmetic.component import Edge
from analyses.modular_arithmetic.grid import Grid
from analyses.modular_arithmetic.model import ModularTransformer, Shape, pair_ids

RUN = "planted-circuit"
SITES = ("embed", "resid_mid", "resid_post", "z", "mlp_post", "mlp_out")
MARGIN = 20.0
"""Logit of the right answer; that of others is 0."""
LENGTH = 4.0
"""Of an answer in the residual stream; numbers have length 1, so that the answer is what most of it is about."""
IDLE_SCALE = 0.1
N_POSITIONS = 3


def planted_model(modulus: int, *, working: int = 0, seed: int = 0) -> ModularTransformer:
    """Return the model; `working` is the head that does the work, 0 or 1. It is right on all pairs."""
    p, n_neurons = modulus, modulus * (modulus + 1) // 2
    shape = Shape("one-layer", n_layers=1, d_model=4 * p, n_heads=2, d_mlp=n_neurons, biases=True)
    model = ModularTransformer(shape, p, seed=seed, name=RUN)
    noise = IDLE_SCALE * torch.randn(p, p, generator=torch.Generator().manual_seed(seed))
    numbers, answers, unread = (slice(i * p, (i + 1) * p) for i in range(3))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            parameter.zero_()
        weights["embed.W_E"][:p, numbers] = torch.eye(p)
        for head in range(2):
            weights["blocks.0.attn.W_V"][head, numbers, :p] = torch.eye(p) * N_POSITIONS  # each gets a third
        weights["blocks.0.attn.W_O"][working, :p, numbers] = torch.eye(p)
        weights["blocks.0.attn.W_O"][1 - working, :p, unread] = noise
        _fill_neurons(weights, p, numbers=numbers, answers=answers)
        weights["unembed.W_U"][answers] = torch.eye(p) * (MARGIN / LENGTH)
    return model.eval()


def planted_edges(*, working: int = 0) -> frozenset[Edge]:
    """Return the edges of the circuit that was planted."""
    head = f"L0H{working}"
    return frozenset({("embed a", head), ("embed b", head), (head, "MLP0"), ("MLP0", "output")})


def planted_grid(db: Path, modulus: int = 7, *, working: int = 0) -> Grid:
    """Harvest the model's grid as a run of a database (what is there is only checked) and return it."""
    model = planted_model(modulus, working=working)
    prompts = [{"tokens": row} for row in pair_ids(modulus, equals=True).tolist()]
    name = f"{RUN}-{modulus}-{working}"
    run = actdb.harvest(model, prompts, out=db, run=name, sites=SITES, store="float32")
    return Grid(model, run, modulus, np.ones(modulus**2, np.bool_))


def _fill_neurons(weights: Mapping[str, torch.Tensor], p: int, *, numbers: slice, answers: slice) -> None:
    """A neuron for each pair i ≤ j. That of i < j also fires for (i, i) and (j, j): those of i = j take that back."""
    into, bias, out = (weights[f"blocks.0.mlp.{name}"] for name in ("W_in", "b_in", "W_out"))
    i, j = (torch.from_numpy(side) for side in np.triu_indices(p))
    neuron = torch.arange(len(i))
    reads, writes = into[numbers], out[:, answers]  # [number, neuron], [neuron, answer]
    reads[i, neuron] = 1
    reads[j, neuron] = 1
    bias.fill_(-1)
    writes[neuron, (i + j) % p] = LENGTH
    for same in neuron[i == j].tolist():
        n = int(i[same])
        for other in range(p):
            if other != n:
                writes[same, (n + other) % p] -= LENGTH
