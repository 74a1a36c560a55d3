"""Selectivity of every neuron of a run for token and position, from one pass over its stored rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import actdb
from analyses.common.selectivity import CellSums, TwoWay, Variance, sum_cells
from analyses.common.significance import significant

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
KINDS = ("token", "position")
LEVEL = 0.01
MAX_CELLS = 4096
N_COMMON_TOKENS = 64


@dataclass(frozen=True)
class Cells:
    """Where rows belong: cells [token, position], row by row; `tokens` are the token ids of the first axis."""

    tokens: Ints
    n_positions: int
    _places: Ints
    _starts: Ints

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens × positions."""
        return len(self.tokens), self.n_positions

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.tokens) * self.n_positions

    def __call__(self, prompt: Ints, pos: Ints) -> Ints:
        """Return the cell of each row by its prompt and position, −1 for tokens and positions that are left out."""
        place = self._places[self._starts[prompt] + pos]
        return np.where((place >= 0) & (pos < self.n_positions), place * self.n_positions + pos, -1)


@dataclass(frozen=True)
class Selectivity:
    """One site of one run: the effects of token and position alone, and of both with their interaction.

    Each effect's arrays are [layer, neuron]. `n_rows` counts the rows in any cell.
    """

    token: Variance
    position: Variance
    crossed: TwoWay
    n_rows: int

    def by_kind(self, kind: str) -> Variance:
        """Return the one-way effect of `token` or `position`."""
        return self.token if kind == "token" else self.position

    def selective(self, kind: str, *, method: str = "bonferroni") -> npt.NDArray[np.bool_]:
        """Return which neurons [layer, neuron] are selective at p < 0.01, corrected over the neurons of a layer."""
        return np.stack([significant(p, level=LEVEL, method=method) for p in self.by_kind(kind).p])


def token_cells(run: actdb.Run) -> Cells:
    """Return the cells of a run: all tokens and positions, or the most frequent and the first of them where many.

    At most `MAX_CELLS` cells: 64 tokens at up to 64 positions of a language model.
    """
    ids = [run.tokens(prompt) for prompt in range(run.n_prompts)]
    flat = np.concatenate(ids).astype(np.int64)
    found, counts = np.unique(flat, return_counts=True)
    n_positions = max(map(len, ids))
    if len(found) * n_positions > MAX_CELLS:
        found = np.sort(found[np.argsort(-counts, kind="stable")[:N_COMMON_TOKENS]])
        n_positions = min(n_positions, MAX_CELLS // len(found))
    places = np.searchsorted(found, flat)
    places = np.where(found[np.minimum(places, len(found) - 1)] == flat, places, -1)
    return Cells(found, n_positions, places, np.cumsum([0, *map(len, ids)]))


def measure(run: actdb.Run, site: str = "mlp_post") -> Selectivity:
    """Measure one site of a run in one pass over its rows."""
    cells = token_cells(run)
    sums = sum_cells(run[site], cells, n_cells=cells.n_cells)
    return from_sums(sums, cells.shape)


def from_sums(sums: CellSums, shape: tuple[int, int]) -> Selectivity:
    """Return the selectivity for two crossed factors from sums by cell."""
    token, position = (sums.marginal(shape, axis).one_way() for axis in (0, 1))
    return Selectivity(token, position, sums.two_way(shape), int(sums.n_rows.sum()))
