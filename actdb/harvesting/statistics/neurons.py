"""Neuron statistics: moments, maximum and active share of each neuron, and the places where it is highest.

Moments are kept as count, mean and central sums, M2 = Σ (x − mean)² and M3 = Σ (x − mean)³, which merge exactly over
batches and parts (Chan, Golub, LeVeque 1979; Pébay 2008). The highest places of each part are enough for the highest
of all parts; ties go to the lower prompt, then the lower position.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformer_lens.hook_points import HookPoint

from actdb.errors import OverflowingError
from actdb.harvesting.capture import KEY_STEP, PaddedBatch
from actdb.harvesting.statistics import Hook
from actdb.schema import N_TOP

N_GROUPS = 64
BLOCK_ROWS = 128


class Moments:
    """Running count, mean, central sums, maximum and active count of [neuron] columns, in float64 on the device."""

    def __init__(self, values: torch.Tensor) -> None:
        self.count = 0
        zeros = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        self.mean, self.m2, self.m3, self.active = zeros, zeros.clone(), zeros.clone(), zeros.clone()
        self.max = torch.full_like(zeros, -torch.inf)

    def add(self, values: torch.Tensor) -> None:
        """Take [row, neuron] values, in blocks that stay in a processor's cache."""
        size = BLOCK_ROWS if values.device.type == "cpu" else len(values)
        for block in values.split(size):
            mean = block.mean(0)
            from_mean = block - mean
            squared = from_mean * from_mean
            m2, m3 = squared.sum(0), squared.mul_(from_mean).sum(0)
            self._merge(len(block), mean.double(), m2.double(), m3.double())
            self.max = torch.maximum(self.max, block.amax(0).double())
            self.active += (block > 0).sum(0)

    def _merge(self, count: int, mean: torch.Tensor, m2: torch.Tensor, m3: torch.Tensor) -> None:
        total = self.count + count
        delta, share = mean - self.mean, self.count * count / total
        self.m3 += m3 + delta**3 * share * (self.count - count) / total
        self.m3 += 3 * delta * (self.count * m2 - count * self.m2) / total
        self.m2 += m2 + delta**2 * share
        self.mean += delta * count / total
        self.count = total


class Highest:
    """The `N_TOP` highest values of each neuron so far and the key of the row of each, [rank, neuron]."""

    def __init__(self) -> None:
        self.values = self.keys = torch.empty(0)

    def add(self, values: torch.Tensor, keys: torch.Tensor) -> None:
        """Take [row, neuron] values and the rows' keys [row]."""
        found, places = highest(values, keys, N_TOP)
        if len(self.values) == 0:
            self.values, self.keys = found, places
            return
        found, places = torch.cat([self.values, found]), torch.cat([self.keys, places])
        by_key = places.argsort(dim=0, stable=True)
        found, places = found.gather(0, by_key), places.gather(0, by_key)
        order = found.argsort(dim=0, descending=True, stable=True)[:N_TOP]
        self.values, self.keys = found.gather(0, order), places.gather(0, order)


def highest(values: torch.Tensor, keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` highest values of each column [rank, neuron] and their rows' keys, equal ones by the lower key."""
    k = min(k, len(values))
    if values.device.type != "cpu" or len(values) < 4 * N_GROUPS:
        by_key = keys.argsort()
        ordered = values[by_key].sort(dim=0, descending=True, stable=True)
        return ordered.values[:k].contiguous(), keys[by_key][ordered.indices[:k]]
    # The k-th highest of group maxima bounds the k-th highest value from below: few values pass it.
    whole = len(values) // N_GROUPS * N_GROUPS
    maxima = values[:whole].unflatten(0, (N_GROUPS, -1)).amax(1)  # [group, neuron]
    bound = maxima.topk(k, dim=0).values[-1]
    row, neuron = divmod(np.flatnonzero((values >= bound).numpy()), values.shape[1])
    candidates, key = values.numpy()[row, neuron], keys.numpy()[row]
    order = np.lexsort((key, -candidates, neuron))
    starts = np.searchsorted(neuron[order], np.arange(values.shape[1]))
    places = order[starts + np.arange(k)[:, None]]  # [rank, neuron]
    return torch.from_numpy(candidates[places]), torch.from_numpy(key[places])


class NeuronStatistics:
    """Collects the neuron statistics of one part."""

    def __init__(self, points: Mapping[int, HookPoint]) -> None:
        self._points = points
        self._moments: dict[int, Moments] = {}
        self._highest = {layer: Highest() for layer in points}

    def hooks(self, batch: PaddedBatch) -> list[Hook]:
        """Return hooks on the neurons [batch, pos, neuron]."""
        hooks: list[Hook] = []
        for layer, point in self._points.items():

            def on_neurons(tensor: torch.Tensor, layer: int = layer) -> None:
                rows = batch.rows(tensor).to(torch.float32)
                self._moments.setdefault(layer, Moments(rows)).add(rows)
                self._highest[layer].add(rows, batch.keys)

            hooks.append((point, on_neurons))
        return hooks

    def collect(self) -> None:
        """Nothing is left to do: the hooks keep running sums."""

    def tables(self) -> dict[str, Any]:
        """Return `neuron_moments` and `neuron_top`; raises `OverflowingError` for activations not finite."""
        import pyarrow as pa

        layers = sorted(self._points)
        return {
            "neuron_moments": pa.concat_tables([pa.table(self._moment_columns(layer)) for layer in layers]),
            "neuron_top": pa.concat_tables([pa.table(self._top_columns(layer)) for layer in layers]),
        }

    def _moment_columns(self, layer: int) -> dict[str, Any]:
        held = self._moments[layer]
        columns = {name: getattr(held, name).cpu().numpy() for name in ("mean", "m2", "m3", "max")}
        if not np.isfinite(columns["m3"]).all():
            raise OverflowingError(f"mlp_post of layer {layer} is not finite: the model itself overflows")
        n = len(columns["mean"])
        return {
            "layer": np.full(n, layer, np.int32),
            "neuron": np.arange(n, dtype=np.int32),
            "n": np.full(n, held.count, np.int64),
            **columns,
            "max": columns["max"].astype(np.float32),
            "n_active": held.active.cpu().numpy().astype(np.int64),
        }

    def _top_columns(self, layer: int) -> dict[str, Any]:
        held = self._highest[layer]
        values, keys = held.values.T.cpu().numpy(), held.keys.T.cpu().numpy()  # [neuron, rank]
        n, k = values.shape
        prompt, pos = divmod(keys.reshape(-1), KEY_STEP)
        return {
            "layer": np.full(n * k, layer, np.int32),
            "neuron": np.repeat(np.arange(n, dtype=np.int32), k),
            "rank": np.tile(np.arange(k, dtype=np.int32), n),
            "value": values.reshape(-1),
            "prompt_id": prompt.astype(np.int32),
            "pos": pos.astype(np.int32),
        }
