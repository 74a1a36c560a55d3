"""What a pathway carries: two heads ablated together, against A's contribution taken out of B's input alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, Place, Route, path_patch, place, zero_ablation
from analyses.common.metric import kl_divergence
from analyses.common.significance import Estimate, ratio_interval
from analyses.forward_proportion.batch import Batch, batches

Floats = npt.NDArray[np.float64]
Head = tuple[int, int]
Pair = tuple[Head, Head]


@dataclass(frozen=True)
class Perturbed:
    """KL(clean ‖ intervened) at the last token in nats [pair, prompt]: both heads ablated, and the path cut."""

    pairs: tuple[Pair, ...]
    ablation: Floats
    disruption: Floats

    def ratio(self, *, seed: int) -> Estimate:
        """Return disruption ÷ ablation, sums over pairs and prompts, with its bootstrap interval over pairs."""
        return ratio_interval(self.disruption.mean(1), self.ablation.mean(1), seed=seed)


def strongest_pairs(mean: npt.NDArray[Any], heads: Sequence[Head], *, n: int) -> list[Pair]:
    """Return the pairs A → B with the greatest mean interaction [source, target], strongest first."""
    order = np.argsort(-mean, axis=None, kind="stable")[:n]
    return [(heads[a], heads[b]) for a, b in zip(*np.unravel_index(order, mean.shape), strict=True) if mean[a, b] > 0]


def random_pairs(heads: Sequence[Head], *, n: int, without: Sequence[Pair], seed: int) -> list[Pair]:
    """Draw pairs A → B with A in a lower layer, none of those given."""
    every = [(a, b) for a in heads for b in heads if a[0] < b[0] and (a, b) not in set(without)]
    chosen = np.random.default_rng((seed, 6)).permutation(len(every))[:n]
    return [every[i] for i in chosen]


def perturb(run: actdb.Run, model: Any, pairs: Sequence[Pair], prompts: Sequence[int]) -> Perturbed:
    """Measure both interventions for each pair on each prompt. Three runs of the model a pair and batch.

    Step 6. z and W_O come from the database; the model runs only for the interventions.
    """
    ablation, disruption = np.empty((2, len(pairs), len(prompts)))
    for places, batch in batches(run, prompts):
        clean = batch.last_logits(model)
        for i, pair in enumerate(pairs):
            ablated = batch.last_logits(
                model, [zero_ablation(place(run, "z", layer=layer, head=head)) for layer, head in pair]
            )
            ablation[i, places] = kl_divergence(clean, ablated)
            cut = batch.at_last(path_patch(model, batch.ids, severed(run, batch, pair)))
            disruption[i, places] = kl_divergence(clean, cut)
    return Perturbed(tuple(pairs), ablation, disruption)


def severed(run: actdb.Run, batch: Batch, pair: Pair) -> Route:
    """Return the route that takes A's contribution z_A W_O^A out of B's query, key and value input alone.

    Where key and value heads are shared, those that B reads from change for the heads that share them too.
    """
    (layer_a, head_a), (layer_b, head_b) = pair
    written = batch.stored("z", layer=layer_a, head=head_a) @ torch.from_numpy(
        np.array(run.weight("W_O", layer=layer_a, head=head_a), np.float32)
    )
    n_kv = int(run.info.model.get("n_kv_heads") or run["z"].shape[1])
    shared = head_b * n_kv // run["z"].shape[1]
    receivers = [Place(f"blocks.{layer_b}.attn.hook_q", head=head_b)]
    receivers += [Place(f"blocks.{layer_b}.attn.hook_{name}", head=shared) for name in "kv"]
    sender: Hook = (f"blocks.{layer_b}.hook_resid_pre", partial(_without, written=written))
    return Route(sender=sender, receivers=receivers)


def _without(activation: torch.Tensor, hook: Any, written: torch.Tensor) -> torch.Tensor:
    return activation - written.to(activation)
