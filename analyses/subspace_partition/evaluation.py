"""How good a partition is: distances to nearest neighbours, information between subspaces, effects of patching one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, hook_name, logits_of
from analyses.common.metric import logit_difference
from analyses.subspace_partition.buffer import Buffer
from analyses.subspace_partition.information import mutual_information, normalised
from analyses.subspace_partition.partition import Partition
from analyses.subspace_partition.search import find_nearest

Floats = npt.NDArray[np.float64]
CLEAN, CORRUPTED = "clean", "corrupted"
BATCH = 64
ROW_BLOCK = 16_384


@dataclass(frozen=True)
class Geometry:
    """A partition measured on rows: by subspace the mean distance to the nearest key and the total variance.

    `information` is [subspace, subspace] in nats, NaN on the diagonal; `sizes` the dimensions.
    """

    sizes: tuple[int, ...]
    distance: Floats
    variance: Floats
    information: Floats

    @property
    def unweighted(self) -> float:
        """Mean distance over subspaces: the loss of the training."""
        return float(self.distance.mean())

    @property
    def weighted(self) -> float:
        """Mean distance over subspaces weighted by their dimensions."""
        return float(np.average(self.distance, weights=self.sizes))

    @property
    def relative(self) -> float:
        """Mean over subspaces of the distance in units of the subspace's spread, the root of its total variance."""
        spread = np.sqrt(np.where(self.variance > 0, self.variance, np.inf))
        return float((self.distance / spread).mean())

    @property
    def mean_information(self) -> float:
        """Mean information of a pair in nats; NaN of a single subspace."""
        values = self.information[np.isfinite(self.information)]
        return float(values.mean()) if len(values) else float("nan")

    @property
    def highest_normalised(self) -> float:
        """The highest information of a pair, divided by its dimensions; NaN of a single subspace."""
        values = normalised(self.information, self.sizes)
        return float(np.nanmax(values)) if len(self.sizes) > 1 else float("nan")


def measure_geometry(
    buffer: Buffer, partition: Partition, *, n_queries: int, n_keys: int, seed: int, pairs: bool = True
) -> Geometry:
    """Measure a partition on rows drawn from a buffer; queries are no keys. Without `pairs` no information is had."""
    queries, keys = buffer.sample(n_queries, n_keys, seed=seed)
    basis = torch.from_numpy(partition.rotation).to(keys.device)
    found = find_nearest(queries, keys, basis, partition.sizes)
    variance = (keys @ basis).double().var(0, correction=0).cpu().numpy()
    n = partition.n_subspaces
    information = np.full((n, n), np.nan)
    if pairs and n > 1:
        information = mutual_information(queries, keys, basis, partition.sizes, seed=seed)
    totals = np.array([variance[columns].sum() for columns in partition.columns()])
    return Geometry(partition.sizes, found.distance.double().mean(1).cpu().numpy(), totals, information)


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt of one length, the positions to patch, and the two tokens that are compared.

    `answer` is the token that the clean prompt has after the position `query`, `wrong` the corrupted one's.
    """

    clean: int
    corrupted: int
    pos: tuple[int, ...]
    answer: int
    wrong: int
    query: int = -1


def find_pairs(db: actdb.Database, run: actdb.Run) -> list[Pair]:
    """Read the pairs of a run from its prompts' labels: `pair` (a number), `role`, `patch_pos`, `answer`, `wrong`.

    `role` is clean or corrupted; the other three stand with the clean prompt, `answer` and `wrong` as token ids,
    `patch_pos` as a number or as several with spaces between. Raises `SettingError` for a run without such labels, or
    with pairs of different lengths.
    """
    labels = {
        name for (name,) in db.sql("SELECT column_name FROM duckdb_columns() WHERE table_name = 'prompts'").fetchall()
    }
    needed = {"pair", "role", "patch_pos", "answer", "wrong"}
    if not needed <= labels:
        missing = ", ".join(sorted(needed - labels))
        raise actdb.SettingError(f"run {run.name!r}: its prompts have no labels {missing}; see `find_pairs`")
    query = """SELECT a.prompt_id, b.prompt_id, a.patch_pos, a.answer, a.wrong
        FROM prompts a JOIN prompts b ON a.prompt_set = b.prompt_set AND a.pair = b.pair
        WHERE a.role = ? AND b.role = ? AND a.prompt_set = ? ORDER BY 1"""
    rows = db.sql(query, [CLEAN, CORRUPTED, run.info.plan["prompt_set"]]).fetchall()
    pairs = [Pair(a, b, _positions(pos), int(answer), int(wrong)) for a, b, pos, answer, wrong in rows]
    for pair in pairs:
        if len(run.tokens(pair.clean)) != len(run.tokens(pair.corrupted)):
            raise actdb.SettingError(f"prompts {pair.clean} and {pair.corrupted}, a pair, are of different lengths")
    return pairs


@dataclass(frozen=True)
class Effects:
    """What patching each subspace does to the logit difference of each pair: clean − patched, [pair, subspace].

    `whole` [pair] is the effect of patching all of the site, at the same positions; `clean` [pair] the difference
    before.
    """

    effect: Floats
    whole: Floats
    clean: Floats


def patch_subspaces(
    model: Any, run: actdb.Run, partition: Partition, pairs: Sequence[Pair], *, site: str, layer: int
) -> Effects:
    """Put the corrupted run's coordinates of one subspace after another into the clean run.

    The corrupted activations are the stored ones. Costs a forward pass of every pair for each subspace, and two more;
    pairs of one length go together.
    """
    hook = hook_name(run, site, layer=layer)
    n = partition.n_subspaces
    found = np.zeros((len(pairs), n)), np.zeros(len(pairs)), np.zeros(len(pairs))
    for chosen in _batches(run, pairs):
        batch = [pairs[i] for i in chosen]
        ids = torch.from_numpy(np.stack([run.tokens(pair.clean) for pair in batch])).long()
        other = _stored(run, batch, site=site, layer=layer)
        clean = _difference(model, ids, batch, [])
        whole = _difference(model, ids, batch, [_patch(hook, batch, other, None)])
        found[1][chosen], found[2][chosen] = clean - whole, clean
        for i in range(n):
            basis = torch.from_numpy(np.ascontiguousarray(partition.basis(i)))
            found[0][chosen, i] = clean - _difference(model, ids, batch, [_patch(hook, batch, other, basis)])
    return Effects(*found)


def gini(values: npt.ArrayLike) -> Floats:
    """Return the Gini coefficient over the last axis of values ≥ 0: 0 where all are equal, 1 − 1/n where one has all.

    G = Σ_i (2i − n − 1) x_i / (n Σ x), x ascending, i from 1; 0 where all are 0.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    n = ordered.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    total = ordered.sum(-1)
    return np.asarray((ordered @ weights) / np.where(total > 0, n * total, 1.0), np.float64)


def gini_measures(effects: Floats, sizes: Sequence[int], variance: Floats) -> dict[str, Floats]:
    """Return the Gini coefficients [pair] of |effect|, of |effect| a dimension, and of |effect| by variance."""
    absolute = np.abs(effects)
    return {
        "effect": gini(absolute),
        "effect_by_dim": gini(absolute / np.asarray(sizes, np.float64)),
        "effect_by_variance": gini(absolute / np.where(variance > 0, variance, np.inf)),
    }


def patched_rows(rows: torch.Tensor, other: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """Return rows [row, width] with their part in the span of `basis` [width, n] replaced by that of `other`."""
    return other if basis is None else rows + (other - rows) @ basis @ basis.T


def _patch(hook: str, pairs: Sequence[Pair], other: torch.Tensor, basis: torch.Tensor | None) -> Hook:
    """The intervention that patches each pair of a batch at its positions; `other` is [row, width], pair by pair."""
    rows = torch.tensor([i for i, pair in enumerate(pairs) for _ in pair.pos])
    places = torch.tensor([pos for pair in pairs for pos in pair.pos])

    def function(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        given = other.to(activation)
        turned = None if basis is None else basis.to(activation)
        out = activation.clone()
        out[rows, places] = patched_rows(activation[rows, places], given, turned)
        return out

    return hook, function


def _stored(run: actdb.Run, pairs: Sequence[Pair], *, site: str, layer: int) -> torch.Tensor:
    values = [run[site].sel(layer=layer, prompt=pair.corrupted).numpy()[list(pair.pos)] for pair in pairs]
    return torch.from_numpy(np.concatenate(values).astype(np.float32))


def _difference(model: Any, ids: torch.Tensor, pairs: Sequence[Pair], hooks: list[Hook]) -> Floats:
    every = logits_of(model, ids, hooks)
    logits = every[range(len(pairs)), [pair.query for pair in pairs]]
    answers, wrong = (torch.tensor([getattr(pair, name) for pair in pairs]) for name in ("answer", "wrong"))
    return logit_difference(logits.float(), answers.to(logits.device), wrong.to(logits.device)).double().cpu().numpy()


def _batches(run: actdb.Run, pairs: Sequence[Pair]) -> list[list[int]]:
    """Group pairs by their prompts' length."""
    by_length: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_length.setdefault(len(run.tokens(pair.clean)), []).append(i)
    return [group[i : i + BATCH] for group in by_length.values() for i in range(0, len(group), BATCH)]


def _positions(text: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text).split())
