"""The nearest key of each query in every subspace, in one pass over the keys.

For each subspace s the nearest key minimises ‖k_s‖² − 2 q_s·k_s, with k_s = k R_s. What a plain search does in several
passes over memory (rotate all keys, a matrix of distances a subspace, its root, its minimum) is done here tile by tile
while a tile is in the cache: half-precision keys are widened, rotated into all subspaces at once, each subspace's norms
written beside its columns so that one product gives the score, and the scores reduced to the minimum of each small
group of keys. Afterwards only the best group of each query is looked at again, by exact differences in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from analyses.subspace_partition.partition import column_ranges

GROUP = 32
"""Keys whose scores are reduced to one minimum; the best group is compared exactly."""
MIDDLE_ROWS = 1024
TILE_BYTES = {"cpu": 4 * 1024**2, "cuda": 256 * 1024**2}
"""What a tile of rotated keys may take: about a core's share of the cache."""


@dataclass(frozen=True)
class Nearest:
    """The nearest key of each query by subspace: its row among the keys and its distance, [subspace, query]."""

    index: torch.Tensor
    distance: torch.Tensor


def find_nearest(
    queries: torch.Tensor,
    keys: torch.Tensor | Sequence[torch.Tensor],
    basis: torch.Tensor | None,
    sizes: Sequence[int],
) -> Nearest:
    """Find the key nearest to each query [query, width] in every subspace of `basis` [width, width], cut by `sizes`.

    `keys` is [key, width] in any floating dtype, or blocks of such; rows are counted through the blocks. Without a
    `basis` both are rotated already. Euclidean distances in float32, without gradient. Equal to `torch.cdist` of each
    subspace to rounding: where two keys lie within some 1e-6 ‖k‖² of one another in squared distance, either may be
    found. Costs width² + n_queries · width multiplications a key, and memory for a tile.
    """
    blocks = [keys] if isinstance(keys, torch.Tensor) else list(keys)
    with torch.no_grad():
        queries = queries.to(torch.float32)
        turn = None if basis is None else basis.detach().to(torch.float32)
        # The keys' middle is moved to the origin: less is lost in ‖k‖² − 2 q·k, and no distance changes.
        middle = blocks[0][:: max(1, len(blocks[0]) // MIDDLE_ROWS)].to(torch.float32).mean(0)
        search = _Search(queries - middle, middle, turn, tuple(sizes))
        best = torch.full((len(sizes), len(queries)), torch.inf, device=queries.device)
        group = torch.zeros_like(best, dtype=torch.long)
        begin = 0
        for block in blocks:
            for tile in block.split(search.tile_rows(block)):
                _keep_best(best, group, *search.group_minima(tile), begin)
                begin += len(tile)
        rows = (group.unsqueeze(-1) + torch.arange(GROUP, device=group.device)).clamp_max(begin - 1)
        return _refine(queries, blocks, turn, sizes, rows)


@dataclass(frozen=True)
class _Stretch:
    """Subspaces of one size that follow one another: searched by one batched product.

    `own` are their columns of a rotated row, `padded` their columns with one more a subspace, for its norm; `queries`
    [subspace, size + 1, query] holds −2 q_s and, against the norm, 1.
    """

    size: int
    own: slice
    padded: slice
    queries: torch.Tensor

    def view(self, rotated: torch.Tensor) -> torch.Tensor:
        """Padded rows [key, column] → [key, subspace, size + 1]."""
        padded: torch.Tensor = rotated[:, self.padded].unflatten(1, (-1, self.size + 1))
        return padded

    def scores(self, rotated: torch.Tensor) -> torch.Tensor:
        """Padded rows [key, column] → ‖k_s‖² − 2 q_s·k_s [subspace, key, query]; the norms are written beside."""
        keys = self.view(rotated)
        keys[..., -1] = keys[..., :-1].square().sum(-1)
        return torch.bmm(keys.transpose(0, 1), self.queries)


class _Search:
    """One search's queries, made ready, and R with a free column a subspace."""

    def __init__(
        self, queries: torch.Tensor, middle: torch.Tensor, basis: torch.Tensor | None, sizes: tuple[int, ...]
    ) -> None:
        self.middle, self.n_columns = middle, sum(sizes) + len(sizes)
        self.stretches = list(_stretches(queries if basis is None else queries @ basis, sizes))
        self.rotation, self.offset = None, torch.zeros_like(queries[:1])
        if basis is not None:
            self.rotation = self._pad(basis)
            self.offset = self._pad((-middle @ basis)[None])

    def tile_rows(self, block: torch.Tensor) -> int:
        """Keys of a tile, whole groups."""
        n_scores = sum(len(stretch.queries) * stretch.queries.shape[2] for stretch in self.stretches)
        fitting = TILE_BYTES[block.device.type] // (4 * (self.n_columns + n_scores))
        return max(GROUP, fitting // GROUP * GROUP)

    def group_minima(self, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [key, width] → each query's least score, and the first key of its group, [subspace, query]."""
        wide = tile.to(torch.float32)
        if self.rotation is None:
            rotated = self._pad(wide - self.middle)
        else:
            rotated = torch.addmm(self.offset, wide, self.rotation)  # [key, width + n_subspaces]
        least = torch.cat([_by_group(stretch.scores(rotated)) for stretch in self.stretches])
        value, at = least.min(1)
        return value, at * GROUP

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [row, width] → [row, width + n_subspaces], a column of zeros after each subspace's."""
        out = rows.new_zeros(len(rows), self.n_columns)
        for stretch in self.stretches:
            stretch.view(out)[..., :-1] = rows[:, stretch.own].unflatten(1, (-1, stretch.size))
        return out


def _stretches(rotated: torch.Tensor, sizes: Sequence[int]) -> Iterator[_Stretch]:
    """Cut rotated queries [query, width] into stretches."""
    begin = first = 0
    for size, group in groupby(sizes):
        n = len(list(group))
        own, padded = slice(begin, begin + n * size), slice(first, first + n * (size + 1))
        begin, first = own.stop, padded.stop
        queries = -2 * rotated[:, own].unflatten(1, (n, size)).permute(1, 2, 0)  # [subspace, size, query]
        yield _Stretch(size, own, padded, torch.cat([queries, torch.ones_like(queries[:, :1])], 1))


def _by_group(scores: torch.Tensor) -> torch.Tensor:
    """Scores [subspace, key, query] → the minimum of each group of keys [subspace, group, query]."""
    n = scores.shape[1]
    whole = n // GROUP * GROUP
    parts = [scores[:, :whole].unflatten(1, (-1, GROUP)).amin(2)] if whole else []
    if whole < n:
        parts.append(scores[:, whole:].amin(1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _keep_best(best: torch.Tensor, group: torch.Tensor, value: torch.Tensor, at: torch.Tensor, begin: int) -> None:
    better = value < best
    best[better] = value[better]
    group[better] = at[better] + begin


def _refine(
    queries: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    basis: torch.Tensor | None,
    sizes: Sequence[int],
    rows: torch.Tensor,
) -> Nearest:
    """Choose among the keys `rows` [subspace, query, candidate] of each query by exact differences."""
    index, distance = [], []
    for columns, candidates in zip(column_ranges(sizes), rows, strict=True):
        own = slice(None) if basis is not None else columns  # of rotated keys only the subspace's columns are read
        found = take_rows([block[:, own] for block in blocks], candidates.reshape(-1))
        apart = found.view(*candidates.shape, -1) - queries[:, None, own]
        lengths = torch.linalg.vector_norm(apart if basis is None else apart @ basis[:, columns], dim=-1)
        least, at = lengths.min(1)
        index.append(candidates.gather(1, at[:, None])[:, 0])
        distance.append(least)
    return Nearest(torch.stack(index), torch.stack(distance))


def take_rows(blocks: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Return rows [row] counted through blocks of keys, in float32 [row, width]."""
    if len(blocks) == 1:
        return blocks[0][rows].to(torch.float32)
    ends = torch.tensor([len(block) for block in blocks], device=rows.device).cumsum(0)
    within = torch.bucketize(rows, ends, right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    out = torch.empty(len(rows), blocks[0].shape[1], device=rows.device)
    for number in within.unique().tolist():
        chosen = torch.nonzero(within == number).squeeze(1)
        out[chosen] = blocks[number][rows[chosen] - starts[number]].to(torch.float32)
    return out
