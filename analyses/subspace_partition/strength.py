"""How strongly a component can carry one subspace into another: norms of its map's blocks, from weights alone.

Rows are h' = x R. A head moves x to x W_V W_O and scores a query against a key by x W_Q W_Kᵀ yᵀ; an MLP has its mean
Jacobian. What such a map M carries from subspace i to j is ‖R_iᵀ M R'_j‖_F. That depends on the subspaces' sizes and on
the singular values of M, so that it stands against the same norm between subspaces of these sizes turned at random.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import hook_name, stored
from analyses.subspace_partition.partition import Partition, column_ranges

Floats = npt.NDArray[np.float64]
N_NULL = 500
LEAST_SPREAD = 1e-9
"""Spreads of the null below this share of the strength are rounding: there is nothing to turn."""


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one head on the residual stream, row vectors, its norm's weights folded in: [d_model, d_model].

    `ov` is W_V W_O, `qk` is W_Q W_Kᵀ [query, key].
    """

    layer: int
    head: int
    ov: Floats
    qk: Floats

    @property
    def name(self) -> str:
        """The head as L1H0."""
        return f"L{self.layer}H{self.head}"


def read_heads(run: actdb.Run, layer: int) -> list[HeadMaps]:
    """Read the maps of a layer's heads from the weights stored with a run; a shared key serves its group of heads.

    Biases are left out: they carry nothing from a subspace. So is the division by a row's own length in the norm. With
    rotary positions `qk` is the form at distance 0.
    """
    q, k, v, o = (run.weight(name, layer=layer).astype(np.float64) for name in ("W_Q", "W_K", "W_V", "W_O"))
    norm = input_norm(run, layer)

    def maps(head: int) -> HeadMaps:
        shared = head * len(k) // len(q)
        return HeadMaps(layer, head, norm @ v[shared] @ o[head], norm @ q[head] @ k[shared].T @ norm.T)

    return [maps(head) for head in range(len(q))]


def input_norm(run: actdb.Run, layer: int) -> Floats:
    """Return what the norm before a layer's attention does to rows but for their length, [d_model, d_model].

    Layer norms centre, RMS norms do not; weights where there are any. Without a norm it is the identity.
    """
    width = int(run.info.model["d_model"])
    kind = str(run.info.model.get("normalization") or "").upper()
    name = f"blocks.{layer}.ln1.w"
    weights = run.weight("ln1.w", layer=layer) if name in run.weight_names(layer=layer) else np.ones(width)
    centre = np.eye(width) - (1 / width if kind.startswith("LN") else 0.0)
    return np.asarray(centre * weights.astype(np.float64))


def mean_jacobian(model: Any, run: actdb.Run, layer: int, *, prompts: Sequence[int]) -> Floats:
    """Return the mean over stored rows of ∂ mlp_out / ∂ resid_mid of a layer's MLP with its norm: [d_model, d_model].

    Row vectors: a small change dx of the MLP's input changes its output by dx J. The rows are those of the run's site
    `resid_mid`; the model runs them through its MLP once, and back d_model times. Of a mean, what one row carries with
    one sign and the next with the other is nothing: the strength is that of what the MLP does everywhere.
    """
    before, after = hook_name(run, "resid_mid", layer=layer), f"blocks.{layer}.hook_mlp_out"
    total, n_rows = torch.zeros(0), 0
    for group in _by_length(run, prompts):
        rows = stored(run, before, group).requires_grad_()  # [prompt, pos, d_model]
        seen: list[torch.Tensor] = []
        ids = torch.from_numpy(np.stack([run.tokens(prompt) for prompt in group]).astype(np.int64))
        hooks = [
            (before, lambda tensor, hook, rows=rows: rows),
            (after, lambda tensor, hook, seen=seen: seen.append(tensor)),
        ]
        with torch.enable_grad(), actdb.hooked(model, hooks):
            model(ids)
        columns = [
            torch.autograd.grad(seen[0][..., j].sum(), rows, retain_graph=True)[0].sum((0, 1))
            for j in range(rows.shape[-1])
        ]
        jacobian = torch.stack(columns, 1).double()
        total = jacobian if not n_rows else total + jacobian
        n_rows += rows.shape[0] * rows.shape[1]
    return np.asarray((total / n_rows).numpy(), np.float64)


@dataclass(frozen=True)
class Strengths:
    """Frobenius norms [source subspace, target subspace] of a map between two partitions, and their null.

    `null` and `spread` are mean and standard deviation under random rotations, `p` the share of these that reach the
    value. Where neither side is cut nothing can be turned: spread 0, p NaN.
    """

    values: Floats
    null: Floats
    spread: Floats
    p: Floats


def measure_map(
    matrix: Floats, source: Partition, target: Partition, *, seed: int, n_null: int = N_NULL, joint: bool = False
) -> Strengths:
    """Measure ‖R_iᵀ M R'_j‖_F for all subspaces i of the source and j of the target, beside its null.

    The null turns each rotation by a random one (Haar), `joint` both by the same: for a form on one plane. Costs
    `n_null` times two products of [d, d] matrices.
    """
    own = source.rotation.astype(np.float64), target.rotation.astype(np.float64)
    values = block_norms(own[0].T @ matrix @ own[1], source.sizes, target.sizes)
    generator = np.random.default_rng((seed, 34))
    drawn = np.empty((n_null, *values.shape))
    for i in range(n_null):
        first, second = _turned(generator, source, target, joint=joint)
        drawn[i] = block_norms(first.T @ matrix @ second, source.sizes, target.sizes)
    spread = drawn.std(0)
    spread[spread <= LEAST_SPREAD * values] = 0.0
    p = np.where(spread > 0, (1 + (drawn >= values).sum(0)) / (1 + n_null), np.nan)
    return Strengths(values, drawn.mean(0), spread, p)


def block_norms(matrix: npt.NDArray[Any], sizes: Sequence[int], other: Sequence[int]) -> Floats:
    """Return the Frobenius norms [block, other block] of the blocks of a matrix."""
    rows = np.add.reduceat(np.square(matrix), [part.start for part in column_ranges(sizes)], axis=0)
    return np.asarray(np.sqrt(np.add.reduceat(rows, [part.start for part in column_ranges(other)], axis=1)))


def random_rotation(generator: np.random.Generator, width: int) -> Floats:
    """Return an orthogonal matrix [width, width] from the uniform (Haar) measure, by QR of normal numbers."""
    basis, triangle = np.linalg.qr(generator.standard_normal((width, width)))
    return np.asarray(basis * np.sign(np.diagonal(triangle)))


def _turned(
    generator: np.random.Generator, source: Partition, target: Partition, *, joint: bool
) -> tuple[Floats, Floats]:
    """Random rotations in place of a partition's own; one that is not cut needs none."""
    first = random_rotation(generator, len(source.rotation)) if source.n_subspaces > 1 else np.eye(len(source.rotation))
    if joint:
        return first, first
    return first, random_rotation(generator, len(first)) if target.n_subspaces > 1 else np.eye(len(first))


def _by_length(run: actdb.Run, prompts: Sequence[int]) -> Iterator[list[int]]:
    """Groups of prompts of one length."""
    groups: dict[int, list[int]] = {}
    for prompt in prompts:
        groups.setdefault(len(run.tokens(prompt)), []).append(int(prompt))
    yield from groups.values()


def read_jacobians(model: Any, run: actdb.Run, *, prompts: Sequence[int]) -> Mapping[int, Floats]:
    """Return the mean Jacobians of all layers of which the run holds `resid_mid`; none for attention-only models."""
    layers = run["resid_mid"].layers if "resid_mid" in run else ()
    return {layer: mean_jacobian(model, run, layer, prompts=prompts) for layer in layers}
