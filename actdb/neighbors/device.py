"""Where products are computed and the nearest kept: NumPy on the processor, torch on a GPU."""

import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actdb.errors import SettingError
from actdb.neighbors.best import Best
from actdb.scratch import Scratch

GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files of NVIDIA and AMD GPUs and of those that Windows lends: without one, torch need not be asked."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Kept(Protocol):
    """The nearest seen so far of each of many vectors; `Best` says what the methods do."""

    def offer(self, begin: int, products: Any, first: int, *, axis: int) -> None:
        """Take the products of a block."""

    def found(self) -> tuple[Ints, Floats]:
        """Return the numbers and products kept."""


class Processor:
    """Products by NumPy, which runs its BLAS on all cores. All products lie in the same memory, one at a time."""

    name = "cpu"

    def __init__(self) -> None:
        self._scratch = Scratch()

    def send(self, array: Floats) -> Any:
        """Return an array where products are computed."""
        return array

    def product(self, left: Any, right: Any) -> Any:
        """Return left · rightᵀ [row, row], valid until the next product."""
        out = self._scratch.array((len(left), len(right)), np.float32)
        return np.matmul(left, right.T, out=out)

    def hide(self, products: Any, rows: Ints, columns: Ints) -> None:
        """Make products −∞, which is never kept."""
        products[rows, columns] = -np.inf

    def best(self, n: int, k: int) -> Kept:
        """Return what keeps the `k` largest products of each of `n` vectors."""
        return Best(n, k)

    def above(self, products: Any, bound: float) -> tuple[Ints, Floats]:
        """Return the places [2, found] of the products that reach a bound, and these."""
        rows, columns = np.nonzero(products >= np.float32(bound))
        return np.stack([rows, columns]), products[rows, columns]


class TorchProcessor(Processor):
    """Products by torch on a GPU, in full float32."""

    def __init__(self, device: str) -> None:
        self.name = device

    def send(self, array: Floats) -> Any:
        """Return a tensor on the GPU."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.name)

    def product(self, left: Any, right: Any) -> Any:
        """Return left · rightᵀ [row, row]."""
        return left @ right.T

    def hide(self, products: Any, rows: Ints, columns: Ints) -> None:
        """Make products −∞, which is never kept."""
        import torch

        places = [torch.from_numpy(numbers).to(self.name) for numbers in (rows, columns)]
        products[places[0], places[1]] = -torch.inf

    def best(self, n: int, k: int) -> Kept:
        """Return what keeps the `k` largest products of each of `n` vectors, on the GPU."""
        return TorchBest(n, k, self.name)

    def above(self, products: Any, bound: float) -> tuple[Ints, Floats]:
        """Return the places [2, found] of the products that reach a bound, and these."""
        places = (products >= bound).nonzero(as_tuple=True)
        return np.stack([place.cpu().numpy() for place in places]), products[places].cpu().numpy()


class TorchBest:
    """`Best` in torch: each block's largest products joined to those kept."""

    def __init__(self, n: int, k: int, device: str) -> None:
        import torch

        self._products = torch.full((n, k), -torch.inf, device=device)
        self._numbers = torch.full((n, k), -1, dtype=torch.int64, device=device)

    def offer(self, begin: int, products: Any, first: int, *, axis: int) -> None:
        """Take the products of a block; see `Best.offer`."""
        import torch

        block = products if axis == 1 else products.T
        k = self._products.shape[1]
        values, places = block.topk(min(k, block.shape[1]), dim=1)
        rows = slice(begin, begin + len(block))
        joined = torch.cat([self._products[rows], values], dim=1)
        numbers = torch.cat([self._numbers[rows], places + first], dim=1)
        self._products[rows], order = joined.topk(k, dim=1)
        self._numbers[rows] = numbers.gather(1, order)

    def found(self) -> tuple[Ints, Floats]:
        """Return the numbers and products [vector, k], the largest first; −1 and −∞ where there were fewer."""
        products = self._products.cpu().numpy()
        return np.where(products == -np.inf, -1, self._numbers.cpu().numpy()), products


def choose_processor(device: str | None = None) -> Processor:
    """Return where to compute: the device named, or a GPU that torch sees, or the processor.

    Raises `SettingError` for a device that is not there.
    """
    if device == "cpu" or (device is None and not _may_have_gpu()):
        return Processor()
    import torch

    if device is None:
        return TorchProcessor("cuda") if torch.cuda.is_available() else Processor()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        raise SettingError(f"device {device!r}: not available here ({str(exc).splitlines()[0]})") from exc
    return TorchProcessor(device)


def _may_have_gpu() -> bool:
    """Whether a GPU may be there, asked without importing torch unless it is imported anyway."""
    return "torch" in sys.modules or any(True for name in GPU_FILES for _ in Path("/dev").glob(name))
