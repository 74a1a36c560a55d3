"""States at the last position: stored as a site of their own, and paired by the nearest-neighbour search."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.metric import js_divergence, kl_divergence

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SITE = "last_state"
DIMS = ("layer", "prompt", "d_model")
DISTANCES: dict[str, dict[str, Any]] = {
    "cosine": {"metric": "cosine"},
    "final_norm": {"metric": "cosine", "map": "final_norm"},
    "unembed": {"metric": "l2", "map": ["final_norm", "unembed"]},
}
"""What `db.neighbors` is asked for: 1 − cos x, 1 − cos ln_final(x), ‖W_Uᵀ Δ ln_final(x)‖₂."""
WITHOUT_NORM: dict[str, dict[str, Any]] = {
    "cosine": {"metric": "cosine"},
    "final_norm": {"metric": "cosine"},
    "unembed": {"metric": "l2", "map": "unembed"},
}
"""The same for a model that has no final norm."""
BLOCK_VALUES = 2**23
PROMPTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Pairs:
    """Pairs of prompts: ids `a` and `b` [pair], their three distances, and how far their outputs lie apart."""

    a: Ints
    b: Ints
    distances: dict[str, Floats]
    kl: Floats
    js: Floats

    def __len__(self) -> int:
        return len(self.a)


def store_states(run: actdb.Run) -> None:
    """Add the site `last_state`, the residual stream of each layer at the last position. Needs `mode="a"`."""
    if SITE in run:
        return

    def blocks() -> Iterator[actdb.Block]:
        stored = np.array(run.prompt_ids(order="stored"))
        for begin in range(0, len(stored), PROMPTS_AT_ONCE):
            some = stored[begin : begin + PROMPTS_AT_ONCE]
            yield actdb.Block(run["resid_post"].sel(prompt=some, pos=-1).numpy(), some)

    run.add_site(SITE, dims=DIMS, blocks=blocks())


def searches(run: actdb.Run) -> dict[str, dict[str, Any]]:
    """Return what `db.neighbors` is asked for, by distance."""
    return DISTANCES if run.readout().norm.divides else WITHOUT_NORM


def neighbour_pairs(db: actdb.Database, run: actdb.Run, *, layer: int, k: int, n: int, seed: int) -> tuple[Ints, Ints]:
    """Return the pairs of prompts that are among each other's `k` nearest by any of the three distances.

    Each pair stands once; more than `n` are thinned at random. Costs three searches; no matrix of all pairs is made.
    """
    found = []
    for options in searches(run).values():
        graph = db.neighbors(SITE, layer=layer, k=k, run=run.name, **options)
        a, b = np.repeat(graph.prompt, graph.numbers.shape[1]), graph.prompt[graph.numbers.reshape(-1)]
        found.append(np.stack([np.minimum(a, b), np.maximum(a, b)], 1))
    pairs = np.unique(np.concatenate(found), axis=0)
    if len(pairs) > n:
        pairs = pairs[np.sort(np.random.default_rng((seed, 7)).permutation(len(pairs))[:n])]
    return pairs[:, 0], pairs[:, 1]


def other_pairs(prompts: Ints, *, n: int, seed: int) -> tuple[Ints, Ints]:
    """Draw pairs of two different prompts at random."""
    generator = np.random.default_rng((seed, 8))
    a = generator.integers(0, len(prompts), n)
    b = (a + generator.integers(1, len(prompts), n)) % len(prompts)
    return prompts[a], prompts[b]


def measure_pairs(run: actdb.Run, readout: Any, a: Ints, b: Ints, *, layer: int) -> Pairs:
    """Return the distances of pairs at a layer, and KL(a ‖ b) and Jensen–Shannon of what the last layer predicts.

    Logits are those of the last layer's stored states; a block of pairs is held at once.
    """
    distances: dict[str, list[Floats]] = {name: [] for name in DISTANCES}
    divergences: list[Floats] = []
    last = run[SITE].layers[-1]
    step = max(1, BLOCK_VALUES // readout.n_tokens)
    for begin in range(0, len(a), step):
        some = slice(begin, begin + step)
        pair = [ids[some].tolist() for ids in (a, b)]
        x, y = (_rows(run, layer, ids) for ids in pair)
        for name, values in state_distances(readout, x, y).items():
            distances[name].append(values)
        p, q = (torch.from_numpy(readout.logits(_rows(run, last, ids))) for ids in pair)
        divergences.append(np.stack([kl_divergence(p, q).numpy(), js_divergence(p, q).numpy()]))
    kl, js = np.concatenate(divergences, 1)
    return Pairs(a, b, {name: np.concatenate(values) for name, values in distances.items()}, kl, js)


def state_distances(readout: Any, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> dict[str, Floats]:
    """Return the three distances of rows [row, d_model], as `db.neighbors` measures them."""
    norm_x, norm_y = readout.norm.normalised(x), readout.norm.normalised(y)
    through = (norm_x - norm_y) @ readout.matrix
    return {
        "cosine": 1 - _cosine(x, y),
        "final_norm": 1 - _cosine(norm_x, norm_y),
        "unembed": np.sqrt((through.astype(np.float64) ** 2).sum(1)),
    }


def normed_differences(run: actdb.Run, readout: Any, a: Ints, b: Ints, *, layer: int) -> Floats:
    """Return Δ = ln_final(x_a) − ln_final(x_b) [pair, d_model] at a layer."""
    x, y = (readout.norm.normalised(_rows(run, layer, ids.tolist())) for ids in (a, b))
    return np.asarray(x - y, np.float64)


def _rows(run: actdb.Run, layer: int, prompts: list[int]) -> npt.NDArray[np.float32]:
    return np.asarray(run[SITE].sel(layer=layer, prompt=prompts).numpy(), np.float32)


def _cosine(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    sizes = np.sqrt((wide_x**2).sum(1) * (wide_y**2).sum(1))
    return np.asarray((wide_x * wide_y).sum(1) / np.maximum(sizes, 1e-300))
