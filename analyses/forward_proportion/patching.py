"""Same state, other trajectory: one prompt's state put into another's run, and what of the divergence that explains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, hook_name
from analyses.common.metric import kl_divergence
from analyses.common.significance import Estimate, ratio_interval
from analyses.forward_proportion.batch import Batch, batches
from analyses.forward_proportion.state import SITE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ALL = 10**6
"""As many positions as both prompts have."""


@dataclass(frozen=True)
class Patched:
    """KL(A ‖ B) and KL(A ‖ patched B) in nats [pair] at the last token."""

    apart: Floats
    left: Floats

    def share(self, *, seed: int) -> Estimate:
        """Return the share of the divergence that the state explains, 1 − Σ left ÷ Σ apart, bootstrapped over pairs."""
        left = ratio_interval(self.left, self.apart, seed=seed)
        return Estimate(1 - left.value, 1 - left.high, 1 - left.low, left.n)


def convergent_pairs(db: actdb.Database, run: actdb.Run, prompts: Ints, *, layer: int, n: int) -> tuple[Ints, Ints]:
    """Return the `n` pairs of prompts whose last states at a layer lie nearest by cosine, nearest first."""
    graph = db.neighbors(SITE, layer=layer, k=1, metric="cosine", run=run.name)
    a, b = graph.prompt, graph.prompt[graph.numbers[:, 0]]
    low, high = np.minimum(a, b), np.maximum(a, b)
    kept = np.isin(low, prompts) & np.isin(high, prompts)
    order = np.flatnonzero(kept)[np.argsort(graph.distances[kept, 0], kind="stable")]
    _, first = np.unique(np.stack([low, high], 1)[order], axis=0, return_index=True)
    chosen = order[np.sort(first)][:n]
    return low[chosen], high[chosen]


@dataclass(frozen=True)
class CleanPairs:
    """Pairs of prompts `a` and `b` [pair], A's logits at the last position [pair, token], and KL(A ‖ B) [pair]."""

    a: Ints
    b: Ints
    target: torch.Tensor
    apart: Floats

    @classmethod
    def make(cls, run: actdb.Run, model: Any, a: Ints, b: Ints) -> "CleanPairs":
        """Run every prompt of the pairs once, without intervention."""
        logits = clean_logits(run, model, np.concatenate([a, b]))
        target = logits[: len(a)]
        return cls(a, b, target, kl_divergence(target, logits[len(a) :]).numpy())


def patch(run: actdb.Run, model: Any, pairs: CleanPairs, *, layer: int, n_last: int = 1) -> Patched:
    """Put A's states of the last positions into B's run at a layer; all before, and all other positions, stay B's.

    Step 8. Positions are counted from the end, at most as many as both have. Runs each B once.
    """
    left = np.empty(len(pairs.b))
    for places, batch in batches(run, pairs.b.tolist()):
        hook = put_states(run, batch, pairs.a[places].tolist(), layer=layer, n_last=n_last)
        left[places] = kl_divergence(pairs.target[places], batch.last_logits(model, [hook]))
    return Patched(pairs.apart, left)


def clean_logits(run: actdb.Run, model: Any, prompts: Ints) -> torch.Tensor:
    """Return the logits at the last position of each prompt [prompt, token], each prompt run once."""
    distinct, place = np.unique(prompts, return_inverse=True)
    found: list[torch.Tensor] = [torch.empty(0)] * len(distinct)
    for places, batch in batches(run, distinct.tolist()):
        for i, row in zip(places.tolist(), batch.last_logits(model), strict=True):
            found[i] = row
    return torch.stack(found)[torch.from_numpy(place)]


def put_states(run: actdb.Run, batch: Batch, sources: Sequence[int], *, layer: int, n_last: int) -> Hook:
    """Return the intervention that replaces the last positions' states by those stored of other prompts."""
    name = hook_name(run, "resid_post", layer=layer)
    width = run["resid_post"].shape[-1]
    values, chosen = torch.zeros(*batch.ids.shape, width), torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, (source, length) in enumerate(zip(sources, batch.lengths.tolist(), strict=True)):
        m = min(n_last, length, len(run.tokens(source)))
        states = run["resid_post"].sel(layer=layer, prompt=source, pos=slice(-m, None)).numpy()
        values[row, length - m : length] = torch.from_numpy(states.astype(np.float32))
        chosen[row, length - m : length] = True

    def function(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(chosen[..., None].to(activation.device), values.to(activation), activation)

    return name, function
