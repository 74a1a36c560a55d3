"""Selectivity: how much of the variance of every neuron lies between groups of rows, from one pass over stored rows.

Rows are sorted into cells (a token, or a token at a position), and sums and sums of squares are kept by cell: the
analysis of variance of all neurons follows from these, so that memory is cells × neurons and does not grow with rows.
Formulas: Fisher's one-way analysis of variance; η² = SS_between / SS_total; ω² as in Hays, "Statistics" (1963),
(SS_between − df_between · MS_within) / (SS_total + MS_within); for two factors the type II sums of squares, with the
additive model fitted by least squares because cells are not equally full.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

import actdb

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
CellOf = Callable[[Ints, Ints], Ints]
BLOCK_BYTES = 64 * 1024**2  # read at once, and
TILE_VALUES = 2**17  # values widened at once: half a mebibyte stays in a core's own cache
N_THREADS = 2


@dataclass(frozen=True)
class Variance:
    """One effect for every neuron [...]: F and its p, η², ω², and its degrees of freedom.

    A neuron that never varies has F and p NaN, and η² and ω² 0.
    """

    f: Floats
    p: Floats
    eta_squared: Floats
    omega_squared: Floats
    df_effect: int
    df_error: int


@dataclass(frozen=True)
class TwoWay:
    """Two factors: each alone, and their interaction (type II: an effect given the other factor)."""

    first: Variance
    second: Variance
    interaction: Variance


class CellSums:
    """Sums by cell of every neuron: `n_rows` [cell], `sums` [plane, cell, neuron], `squares` [plane, neuron].

    Values are shifted by the first block's mean, so that the variance of a neuron with a large mean is not lost in
    rounding; η² and F do not depend on the shift. Sums are float32 within a tile and float64 beyond.
    """

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self.n_rows = np.zeros(n_cells, np.int64)
        self.sums: Floats = np.zeros(0)
        self.squares: Floats = np.zeros(0)
        self.shift: npt.NDArray[np.float32] = np.zeros(0, np.float32)

    def add(self, values: npt.NDArray[Any], cells: Ints, pool: ThreadPoolExecutor | None = None) -> None:
        """Add rows: `values` [plane, row, neuron] of any float dtype, `cells` [row], −1 for a row to leave out."""
        if not len(cells):
            return
        if not self.sums.size:
            self._begin(values)
        kept = cells >= 0
        self.n_rows += np.bincount(cells[kept], minlength=self.n_cells)
        # Rows of a left-out cell go to one cell more, which is dropped: cheaper than copying the others together.
        places = torch.from_numpy(np.where(kept, cells, self.n_cells))
        weights = None if kept.all() else torch.from_numpy(kept.astype(np.float32))

        def add_plane(plane: int) -> None:
            self._add_plane(plane, values[plane], places, weights)

        list((pool.map if pool else map)(add_plane, range(len(values))))

    def _begin(self, values: npt.NDArray[Any]) -> None:
        n_planes, _, n_neurons = values.shape
        self.sums = np.zeros((n_planes, self.n_cells, n_neurons))
        self.squares = np.zeros((n_planes, n_neurons))
        self.shift = values[:, :256].mean(1, dtype=np.float32)

    def _add_plane(
        self, plane: int, values: npt.NDArray[Any], places: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        n_rows, n_neurons = values.shape
        shift = torch.from_numpy(self.shift[plane])
        sums = torch.zeros(self.n_cells + 1, n_neurons)
        squares = torch.zeros(n_neurons, dtype=torch.float64)
        step = max(1, TILE_VALUES // n_neurons)
        source = torch.from_numpy(values if values.flags.writeable else np.array(values))
        for begin in range(0, n_rows, step):
            rows = slice(begin, begin + step)
            tile = source[rows].float().sub_(shift)
            sums.index_add_(0, places[rows], tile)
            if weights is not None:
                tile.mul_(weights[rows, None])
            squares += tile.square_().sum(0)
        self.sums[plane] += sums[:-1].numpy()
        self.squares[plane] += squares.numpy()

    def marginal(self, shape: tuple[int, int], axis: int) -> "CellSums":
        """Return the sums by one of two crossed factors, the cells being [first, second] row by row."""
        merged = CellSums(shape[axis])
        other = 1 - axis
        merged.n_rows = self.n_rows.reshape(shape).sum(other)
        merged.sums = self.sums.reshape(len(self.sums), *shape, -1).sum(1 + other)
        merged.squares, merged.shift = self.squares, self.shift
        return merged

    def one_way(self) -> Variance:
        """Return the one-way analysis of variance by cell, for every neuron [plane, neuron]."""
        total = self._total()
        between = self._between(self.sums, self.n_rows)
        n_groups = int((self.n_rows > 0).sum())
        return _variance(between, total, total - between, n_groups - 1, int(self.n_rows.sum()) - n_groups)

    def two_way(self, shape: tuple[int, int]) -> TwoWay:
        """Return the two-way analysis of variance of cells [first, second], for every neuron [plane, neuron]."""
        total = self._total()
        cells = self._between(self.sums, self.n_rows)
        additive = self._additive(shape)
        first, second = (self.marginal(shape, axis) for axis in (0, 1))
        n, n_cells = int(self.n_rows.sum()), int((self.n_rows > 0).sum())
        by_first, by_second = (part._between(part.sums, part.n_rows) for part in (first, second))
        n_first, n_second = (int((part.n_rows > 0).sum()) for part in (first, second))
        error, df_error = total - cells, n - n_cells
        df_interaction = n_cells - n_first - n_second + 1
        return TwoWay(
            first=_variance(additive - by_second, total, error, n_first - 1, df_error),
            second=_variance(additive - by_first, total, error, n_second - 1, df_error),
            interaction=_variance(cells - additive, total, error, df_interaction, df_error),
        )

    def means(self) -> Floats:
        """Return the mean of every cell [plane, cell, neuron]; NaN where a cell is empty."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.sums / self.n_rows[:, None] + self.shift[:, None], np.float64)

    def _total(self) -> Floats:
        """SS_total [plane, neuron]."""
        grand = self.sums.sum(1)
        return _positive(self.squares - grand**2 / max(int(self.n_rows.sum()), 1))

    @staticmethod
    def _between(sums: Floats, n_rows: Ints) -> Floats:
        """SS_between [plane, neuron]: Σ_g S_g² / n_g − S² / n."""
        filled = n_rows > 0
        held = sums[:, filled]
        within = np.einsum("pcn,c->pn", held**2, 1 / n_rows[filled])
        return _positive(within - held.sum(1) ** 2 / n_rows.sum())

    def _additive(self, shape: tuple[int, int]) -> Floats:
        """Sum of squares of the model first + second, by the normal equations of its indicator columns."""
        first, second = np.divmod(np.arange(self.n_cells), shape[1])
        design = np.concatenate([first[:, None] == np.arange(shape[0]), second[:, None] == np.arange(shape[1])], axis=1)
        design = design.astype(np.float64)
        gram = design.T @ (design * self.n_rows[:, None])
        sides = np.einsum("cf,pcn->pfn", design, self.sums)
        fitted = np.einsum("fg,pgn->pfn", np.linalg.pinv(gram, hermitian=True), sides)
        explained = (fitted * sides).sum(1) - self.sums.sum(1) ** 2 / self.n_rows.sum()
        return _positive(explained)


def block_rows(selection: actdb.Selection) -> int:
    """Return how many rows of a selection, over all its layers, make a block of 64 MiB."""
    return max(1, BLOCK_BYTES * selection.n_rows // max(selection.nbytes, 1))


def sum_cells(selection: actdb.Selection, cell_of: CellOf, *, n_cells: int, n_rows: int | None = None) -> CellSums:
    """Sum all rows of a selection [layer, row, neuron] (or [row, neuron]) by cell, in one pass and bounded memory.

    `cell_of(prompt, pos)` maps the prompt ids and positions of rows to cells, −1 for rows to leave out. Memory: one
    block of `n_rows` (64 MiB of rows by default), and layers × cells × neurons sums.
    """
    sums = CellSums(n_cells)
    with _one_thread_each(), ThreadPoolExecutor(N_THREADS) as pool:
        for block in selection.batches(n_rows or block_rows(selection)):
            if block.pos is None:
                raise actdb.SelectionError("selectivity needs rows with a position; this site has one row a prompt")
            values = block.values if block.values.ndim == 3 else block.values[None]
            sums.add(values, cell_of(block.prompt, block.pos), pool)
    return sums


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from spreading each operation over threads: layers are spread already, which is twice as fast."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _positive(squares: Floats) -> Floats:
    """A sum of squares without what rounding left below zero."""
    return np.asarray(np.maximum(squares, 0.0), np.float64)


def _variance(effect: Floats, total: Floats, error: Floats, df_effect: int, df_error: int) -> Variance:
    """Put F, p, η² and ω² together; a variance of rounding alone counts as none."""
    effect, error = _positive(effect), _positive(error)
    varies = total > 0
    mean_error = error / max(df_error, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        f = np.where(varies & (df_effect > 0) & (df_error > 0), effect / max(df_effect, 1) / mean_error, np.nan)
        eta = np.where(varies, effect / total, 0.0)
        omega = np.where(varies, (effect - df_effect * mean_error) / (total + mean_error), 0.0)
    p = stats.f.sf(f, max(df_effect, 1), max(df_error, 1))
    return Variance(f, np.asarray(p), eta, omega, df_effect, df_error)
