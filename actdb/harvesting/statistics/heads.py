"""Head statistics: where each head looks, how widely, and how much it writes.

Masses are means over the queries that have a target. For a weight w[q, k] of a prompt of n tokens t:
first = w[q, 0], q ≥ 1; prev = w[q, q−1], q ≥ 1; self = w[q, q]; duplicate = Σ w[q, k] over k < q with t[k] = t[q];
induction = Σ w[q, k] over 1 ≤ k ≤ q with t[k−1] = t[q]; entropy = −Σ w ln w (nats); mean_distance = Σ w·(q − k).
Entropy, distance, max_weight and the norms are means over all queries, the first included.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformer_lens.hook_points import HookPoint

from actdb.errors import OverflowingError
from actdb.harvesting.capture import PaddedBatch
from actdb.harvesting.statistics import Hook

PATTERN_COLUMNS = (
    "entropy",
    "first_mass",
    "prev_mass",
    "self_mass",
    "duplicate_mass",
    "induction_mass",
    "mean_distance",
    "max_weight",
)
NORM_COLUMNS = ("z_norm", "result_norm")
Targets = torch.Tensor | tuple[torch.Tensor, ...]
SMALLEST = torch.finfo(torch.float32).tiny


class TokenTargets:
    """Which keys of each query are earlier copies, or follow one: [batch, query, key] masks."""

    def __init__(self, batch: PaddedBatch, *, sparse: bool | None = None) -> None:
        ids = batch.ids
        n = ids.shape[1]
        positions = torch.arange(n, device=ids.device)
        inside = positions < batch.counts[:, None]
        same = (ids[:, :, None] == ids[:, None, :]) & inside[:, :, None] & inside[:, None, :]  # [batch, query, key]
        duplicate = same & (positions[:, None] > positions)
        induction = torch.zeros_like(duplicate)
        induction[:, :, 1:] = duplicate[:, :, :-1]  # k follows k−1 < q, so k ≤ q
        self.n_duplicate = duplicate.any(-1).sum(-1).to(torch.float64)
        self.n_induction = induction.any(-1).sum(-1).to(torch.float64)
        self.inside = inside
        self.n_queries = batch.counts.to(torch.float64)
        # Few tokens repeat, so a processor gathers; an accelerator reads all, rather than wait for their number.
        gathers = ids.device.type == "cpu" if sparse is None else sparse
        self.duplicate: Targets = duplicate.nonzero(as_tuple=True) if gathers else duplicate
        self.induction: Targets = induction.nonzero(as_tuple=True) if gathers else induction

    def mass(self, pattern: torch.Tensor, where: "Targets") -> torch.Tensor:
        """Σ over the target keys and queries of each prompt: [batch, head, query, key] → [batch, head]."""
        if isinstance(where, torch.Tensor):
            return torch.where(where[:, None], pattern, 0).sum((-2, -1), dtype=torch.float64)
        prompt, query, key = where
        total = torch.zeros(pattern.shape[:2], dtype=torch.float64, device=pattern.device)
        return total.index_add_(0, prompt, pattern[prompt, :, query, key].to(torch.float64))


def pattern_statistics(pattern: torch.Tensor, targets: TokenTargets) -> torch.Tensor:
    """[batch, head, query, key] → [batch, head, column] in float64, columns as `PATTERN_COLUMNS`; NaN where null."""
    weights = pattern.to(torch.float32)
    n = weights.shape[-1]
    inside = targets.inside[:, None, :]  # [batch, 1, query]
    positions = torch.arange(n, device=weights.device, dtype=torch.float32)
    entropy = -weights.clamp_min(SMALLEST).log_().mul_(weights).sum(-1)  # 0 ln 0 is 0
    total = weights.sum(-1)
    distance = total * positions - weights @ positions
    largest = weights.amax(-1)
    diagonal = weights.diagonal(dim1=-2, dim2=-1)
    previous = weights.diagonal(offset=-1, dim1=-2, dim2=-1)

    def mean(values: torch.Tensor, count: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        summed = torch.where(valid, values, 0).sum(-1, dtype=torch.float64)
        return summed / count[:, None]

    every, later = targets.n_queries, targets.n_queries - 1
    columns = [
        mean(entropy, every, inside),
        mean(weights[..., 1:, 0], later, inside[..., 1:]),
        mean(previous, later, inside[..., 1:]),
        mean(diagonal, every, inside),
        targets.mass(weights, targets.duplicate) / targets.n_duplicate[:, None],
        targets.mass(weights, targets.induction) / targets.n_induction[:, None],
        mean(distance, every, inside),
        mean(largest, every, inside),
    ]
    return torch.stack(columns, dim=-1)


def z_statistics(z: torch.Tensor, targets: TokenTargets, gram: torch.Tensor | None) -> torch.Tensor:
    """[batch, pos, head, d_head] → [batch, head, 2] in float64: means of ‖z‖ and ‖z W_O‖.

    ‖z W_O‖² = z G zᵀ with the head's Gram matrix G = W_O W_Oᵀ [head, d_head, d_head]; NaN without one.
    """
    values = z.to(torch.float32)
    norms = [values.norm(dim=-1)]
    if gram is not None:
        by_head = values.permute(2, 0, 1, 3).flatten(1, 2)  # [head, batch·pos, d_head]
        squared = torch.linalg.vecdot(by_head @ gram, by_head).unflatten(1, values.shape[:2])  # [head, batch, pos]
        norms.append(squared.clamp_min(0).sqrt().permute(1, 2, 0))
    else:
        norms.append(torch.full_like(norms[0], torch.nan))
    inside = targets.inside[:, :, None]
    means = [torch.where(inside, n, 0).sum(1, dtype=torch.float64) / targets.n_queries[:, None] for n in norms]
    return torch.stack(means, dim=-1)


class HeadStatistics:
    """Collects the head statistics of one part, in (prompt, layer, head) order."""

    def __init__(
        self,
        patterns: Mapping[int, HookPoint],
        z_points: Mapping[int, HookPoint],
        grams: Mapping[int, torch.Tensor],
    ) -> None:
        self._patterns, self._z_points, self._grams = patterns, z_points, grams
        self._layers = sorted({*patterns, *z_points})
        self._seen: dict[tuple[int, str], torch.Tensor] = {}
        self._prompts: list[tuple[int, ...]] = []
        self._values: list[torch.Tensor] = []

    def hooks(self, batch: PaddedBatch) -> list[Hook]:
        """Return hooks on patterns and z."""
        targets, hooks = TokenTargets(batch), list[Hook]()
        self._prompts.append(batch.prompt_ids)
        for layer, point in self._patterns.items():

            def on_pattern(tensor: torch.Tensor, layer: int = layer) -> None:
                self._seen[layer, "pattern"] = pattern_statistics(tensor, targets)

            hooks.append((point, on_pattern))
        for layer, point in self._z_points.items():

            def on_z(tensor: torch.Tensor, layer: int = layer) -> None:
                self._seen[layer, "z"] = z_statistics(tensor, targets, self._grams.get(layer))

            hooks.append((point, on_z))
        return hooks

    def collect(self) -> None:
        """Stack what the hooks saw: [batch, layer, head, column], still on the device."""
        widths = {"pattern": len(PATTERN_COLUMNS), "z": len(NORM_COLUMNS)}
        layers = []
        for layer in self._layers:
            have = {kind: self._seen.pop((layer, kind), None) for kind in widths}
            like = next(value for value in have.values() if value is not None)
            filled = [
                like.new_full((*like.shape[:2], width), torch.nan) if have[kind] is None else have[kind]
                for kind, width in widths.items()
            ]
            layers.append(torch.cat(filled, dim=-1))  # type: ignore[arg-type]
        self._values.append(torch.stack(layers, dim=1))

    def tables(self) -> dict[str, Any]:
        """Return `head_stats`, sorted by prompt, layer, head; raises `OverflowingError` for attention not finite."""
        values = np.concatenate([batch.cpu().numpy() for batch in self._values])
        self._check(values)
        prompts = np.concatenate([np.asarray(ids, np.int32) for ids in self._prompts])
        return {"head_stats": self._table(prompts, values)}

    def _check(self, values: npt.NDArray[np.float64]) -> None:
        """Refuse statistics of activations that are not finite; a NaN elsewhere means that no query has a target."""
        for column, points in ((0, self._patterns), (len(PATTERN_COLUMNS), self._z_points)):
            for i, layer in enumerate(self._layers):
                if layer in points and not np.isfinite(values[:, i, :, column]).all():
                    raise OverflowingError(
                        f"attention of layer {layer} is not finite: the model itself overflows; try --dtype float32"
                    )

    def _table(self, prompts: npt.NDArray[np.int32], values: npt.NDArray[np.float64]) -> Any:
        import pyarrow as pa

        values = values[np.argsort(prompts, kind="stable")].astype(np.float32)
        n_prompts, n_layers, n_heads, _ = values.shape
        columns: dict[str, Any] = {
            "prompt_id": np.repeat(np.sort(prompts), n_layers * n_heads).astype(np.int32),
            "layer": np.tile(np.repeat(np.asarray(self._layers, np.int32), n_heads), n_prompts),
            "head": np.tile(np.arange(n_heads, dtype=np.int32), n_prompts * n_layers),
        }
        for i, name in enumerate((*PATTERN_COLUMNS, *NORM_COLUMNS)):
            flat = values[..., i].reshape(-1)
            columns[name] = pa.array(flat, mask=np.isnan(flat))
        return pa.table(columns)
