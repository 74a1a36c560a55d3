"""Neuron statistics: moments, maximum and active share of each neuron, and the places where it is highest.

Moments are kept as count, mean and central sums, M2 = Σ (x − mean)² and M3 = Σ (x − mean)³, which merge exactly over
batches and parts (Chan, Golub, LeVeque 1979; Pébay 2008). The highest places of each part are enough for the highest
of all parts; ties go to the lower prompt, then the lower position.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
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
        """Take [row, neuron] values; the sums about their mean in blocks that stay in a processor's cache."""
        mean = values.mean(0)
        m2, m3 = torch.zeros_like(self.m2), torch.zeros_like(self.m3)
        for block in values.split(BLOCK_ROWS if values.device.type == "cpu" else len(values)):
            from_mean = block - mean
            squared = from_mean * from_mean
            m2 += squared.sum(0)
            m3 += squared.mul_(from_mean).sum(0)
            self.active += torch.gt(block, 0, out=from_mean).sum(0)  # ones and zeros: summing booleans is slower
            self.max = torch.maximum(self.max, block.amax(0))
        self._merge(len(values), mean.double(), m2, m3)

    def _merge(self, count: int, mean: torch.Tensor, m2: torch.Tensor, m3: torch.Tensor) -> None:
        total = self.count + count
        delta, share = mean - self.mean, self.count * count / total
        self.m3 += m3 + delta**3 * share * (self.count - count) / total
        self.m3 += 3 * delta * (self.count * m2 - count * self.m2) / total
        self.m2 += m2 + delta**2 * share
        self.mean += delta * count / total
        self.count = total


class Highest:
    """Candidates for the `N_TOP` highest values of each neuron: all that reach a bound which rises with the batches.

    The N_TOP-th highest of the maxima of groups of rows is a lower bound of the N_TOP-th highest value, and few values
    reach it: 20 a neuron of 2048 rows.
    """

    def __init__(self) -> None:
        self._bound: torch.Tensor | None = None
        self._found: list[tuple[torch.Tensor, ...]] = []
        self._n_rows = self._width = 0

    def add(self, values: torch.Tensor, keys: torch.Tensor) -> None:
        """Take [row, neuron] values and the rows' keys [row]."""
        bound, n_groups = self._bound, min(N_GROUPS, len(values))
        self._n_rows, self._width = self._n_rows + len(values), values.shape[1]
        if n_groups >= N_TOP:
            whole = len(values) // n_groups * n_groups
            maxima = values[:whole].unflatten(0, (n_groups, -1)).amax(1)  # [group, neuron]
            own = maxima.topk(N_TOP, dim=0).values[-1]
            bound = self._bound = own if bound is None else torch.maximum(own, bound)
        reaching = torch.ones_like(values, dtype=torch.bool) if bound is None else values >= bound
        flat = reaching.flatten().nonzero()[:, 0]
        row, neuron = flat // self._width, flat % self._width
        self._found.append((neuron, values.flatten()[flat], keys[row]))

    def sorted(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return the highest values [neuron, rank], falling, and their keys; equal ones by the lower key."""
        neuron, value, key = (torch.cat(columns).cpu().numpy() for columns in zip(*self._found, strict=True))
        order = np.lexsort((key, -value, neuron))
        starts = np.searchsorted(neuron[order], np.arange(self._width))
        places = order[starts[:, None] + np.arange(min(N_TOP, self._n_rows))]
        return value[places], key[places]


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
        values, keys = self._highest[layer].sorted()
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
