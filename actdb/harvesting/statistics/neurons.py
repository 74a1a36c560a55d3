"""Neuron statistics: moments, maximum and active share of each neuron, and the places where it is highest.

Moments are kept as count, mean and central sums, M2 = Σ (x − mean)² and M3 = Σ (x − mean)³, which merge exactly over
batches and parts (Chan, Golub, LeVeque 1979; Pébay 2008). The highest places of each part are enough for the highest
of all parts; ties go to the lower prompt, then the lower position.
"""

import mmap
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
ROOM = 4


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
            torch.maximum(self.max, block.amax(0).double(), out=self.max)
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
    reach it: 20 a neuron of 2048 rows. They lie in arrays that are made once, and sorted out when these are full: small
    arrays that live from batch to batch would split the heap between those of the model, which then grows.
    """

    def __init__(self) -> None:
        self._bound: torch.Tensor | None = None
        self._held: list[torch.Tensor] = []  # neuron, value, key
        self._count = self._width = 0

    @torch.inference_mode()
    def add(self, values: torch.Tensor, keys: torch.Tensor) -> None:
        """Take [row, neuron] values and the rows' keys [row]."""
        bound, n_groups = self._bound, min(N_GROUPS, len(values))
        self._width = values.shape[1]
        if n_groups >= N_TOP:
            whole = len(values) // n_groups * n_groups
            maxima = values[:whole].unflatten(0, (n_groups, -1)).amax(1)  # [group, neuron]
            own = maxima.topk(N_TOP, dim=0).values[-1]
            bound = self._bound = own.clone() if bound is None else torch.maximum(own, bound, out=bound)
        reaching = torch.ones_like(values, dtype=torch.bool) if bound is None else values >= bound
        flat = reaching.flatten().nonzero()[:, 0]
        row, neuron = flat // self._width, flat % self._width
        self._append(neuron, values.flatten()[flat], keys[row])

    @torch.inference_mode()
    def sorted(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return the highest values [neuron, rank], falling, and their keys; equal ones by the lower key."""
        self._compact()
        _, value, key = (column[: self._count].unflatten(0, (self._width, -1)).cpu().numpy() for column in self._held)
        return value, key

    def _append(self, *found: torch.Tensor) -> None:
        n = len(found[0])
        if self._held and self._count + n > len(self._held[0]):
            self._compact()
        if not self._held or self._count + n > len(self._held[0]):
            capacity = max(ROOM * N_TOP * self._width, 2 * (self._count + n))
            grown = [apart(capacity, column) for column in found]
            for new, old in zip(grown, self._held, strict=False):
                new[: self._count] = old[: self._count]
            self._held = grown
        for held, column in zip(self._held, found, strict=True):
            held[self._count : self._count + n] = column
        self._count += n

    def _compact(self) -> None:
        """Sort by neuron, falling value and key, and keep the highest of each neuron."""
        columns = [column[: self._count] for column in self._held]
        for place, descending in ((2, False), (1, True), (0, False)):
            order = columns[place].argsort(dim=0, descending=descending, stable=True)
            columns = [column[order] for column in columns]
        neuron = columns[0]
        starts = torch.searchsorted(neuron, torch.arange(self._width, device=neuron.device))
        kept = torch.arange(len(neuron), device=neuron.device) - starts[neuron] < N_TOP
        self._count = int(kept.sum())
        for held, column in zip(self._held, columns, strict=True):
            held[: self._count] = column[kept]


def apart(size: int, like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised array [size]; on a CPU in memory of its own, outside the heap."""
    if like.device.type != "cpu":
        return torch.empty(size, dtype=like.dtype, device=like.device)
    memory = mmap.mmap(-1, size * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype)


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
                if layer not in self._moments:
                    self._moments[layer] = Moments(rows)
                self._moments[layer].add(rows)
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
