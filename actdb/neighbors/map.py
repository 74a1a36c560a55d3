"""What is done to rows before they are compared: the final norm, a subspace, the metric of the unembedding."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from actdb.errors import SelectionError, SettingError
from actdb.unembedding import FinalNorm

if TYPE_CHECKING:
    from actdb.run import Run

MAPS = ("final_norm", "unembed")
GRAM_COLUMNS = 8192
ORTHOGONAL_TOLERANCE = 1e-3
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Range = tuple[int, int]
_grams: "WeakKeyDictionary[Run, Doubles]" = WeakKeyDictionary()
"""W_U W_Uᵀ of the runs in use: of gpt2-small it takes a second."""


@dataclass(frozen=True)
class RowMap:
    """A map of rows [row, d] to [row, width]: a norm, then a matrix [d, width], each where asked for.

    `key` tells maps apart: the names, and digests of weights and rotation.
    """

    width: int
    norm: FinalNorm | None
    matrix: Floats | None
    key: Mapping[str, Any]

    def apply(self, rows: Floats) -> Floats:
        """Return mapped rows, float32."""
        if self.norm is not None:
            rows = self.norm.normalised(rows)
        return np.asarray(rows if self.matrix is None else rows @ self.matrix, np.float32)


def make_map(
    run: "Run",
    width: int,
    *,
    names: Sequence[str] = (),
    rotation: npt.ArrayLike | None = None,
    columns: Range | None = None,
    partition: str | None = None,
) -> RowMap:
    """Return the map of rows of a site of this width, from weights kept with the run; the model is not loaded.

    final_norm is the run's final norm. `rotation` [width, n ≤ width] has orthonormal columns, of which the range
    `columns` spans a subspace: rows become their coordinates there; `partition` is its name, where it has one. unembed
    makes lengths those of the logits: with W_U [d_model, d_vocab] and G = W_U W_Uᵀ = F Fᵀ, ‖Δ F‖ = ‖Δ W_U‖, where F is
    d_model wide; in a subspace, G is restricted to it. Costs one pass over W_U the first time.

    Raises `SettingError` for an unknown map or a matrix that is no rotation, `SelectionError` where the run lacks the
    weights.
    """
    unknown = [name for name in names if name not in MAPS]
    if unknown:
        raise SettingError(f"map {unknown[0]!r}: choose from {', '.join(MAPS)}")
    basis = None if rotation is None else _basis(rotation, width, columns)
    if rotation is None and columns is not None:
        raise SettingError("subspace: give the partition that it belongs to")
    norm = _final_norm(run, width) if "final_norm" in names else None
    matrix = basis
    if "unembed" in names:
        factor = _unembedding_factor(run, width, basis)
        matrix = np.asarray(factor if basis is None else basis.astype(np.float64) @ factor, np.float32)
    range_text = "" if columns is None else f"{columns[0]}:{columns[1]}"
    key = {
        **({} if partition is None else {"partition": partition, "columns": range_text}),
        "maps": sorted(names),
        "weights": run.info.plan.get("weights_sha256") if names else None,
        "subspace": None if basis is None else hashlib.sha256(basis.tobytes()).hexdigest(),
    }
    return RowMap(width if matrix is None else matrix.shape[1], norm, matrix, key)


def map_label(key: Mapping[str, Any]) -> str:
    """Return a short text for the key of a map, empty for none: final_norm, ndm 0:32; subspace 1a2b3c4d of no name."""
    if "partition" in key:
        subspace = [f"{key['partition']} {key['columns']}".rstrip()]
    else:
        subspace = [f"subspace {key['subspace'][:8]}"] if key["subspace"] else []
    return ", ".join([*key["maps"], *subspace])


def subspace_options(key: Mapping[str, Any]) -> list[str]:
    """Return the options of `actdb index` that choose the subspace of a map's key; NAME where it has no name."""
    if not key["subspace"]:
        return []
    partition, columns = key.get("partition", "NAME"), key.get("columns")
    return [f"--partition {partition}", *([f"--subspace {columns}"] if columns else [])]


def check_rotation(rotation: npt.ArrayLike) -> Floats:
    """Return a matrix [width, n ≤ width] as float32; raises `SettingError` unless its columns are orthonormal."""
    try:
        matrix = np.asarray(rotation, np.float32)
    except (TypeError, ValueError) as exc:
        raise SettingError("partition: give a matrix of numbers, or the name of a stored partition") from exc
    if matrix.ndim != 2 or not 1 <= matrix.shape[1] <= len(matrix):
        raise SettingError(f"partition: a matrix {list(matrix.shape)} is no rotation: give [width, width]")
    wide = matrix.astype(np.float64)
    error = np.abs(wide.T @ wide - np.eye(matrix.shape[1])).max()
    if not error <= ORTHOGONAL_TOLERANCE:
        raise SettingError(f"partition is no rotation: its columns are not orthonormal, off by {error:.2g}")
    return matrix


def _basis(rotation: npt.ArrayLike, width: int, columns: Range | None) -> Floats:
    """Return the chosen columns of a rotation."""
    matrix = check_rotation(rotation)
    if len(matrix) != width:
        raise SettingError(f"partition: a rotation of {len(matrix)} does not fit vectors of {width}")
    if columns is None:
        return matrix
    begin, end = columns
    if not 0 <= begin < end <= matrix.shape[1]:
        raise SettingError(f"subspace {begin}:{end}: the rotation has columns 0 to {matrix.shape[1] - 1}")
    return np.ascontiguousarray(matrix[:, begin:end])


def _final_norm(run: "Run", width: int) -> FinalNorm:
    norm = FinalNorm.of_run(run)
    if norm.scale is None:
        raise SelectionError(f"map 'final_norm': run {run.name!r} keeps no final norm; leave the map out")
    _check_width("final_norm", len(norm.scale), width)
    return norm


def _unembedding_factor(run: "Run", width: int, basis: Floats | None) -> Doubles:
    """Return F with F Fᵀ = Bᵀ W_U W_Uᵀ B; B is the basis, or nothing."""
    gram = _grams.get(run)
    if gram is None:
        gram = _grams.setdefault(run, _unembedding_gram(run))
    _check_width("unembed", len(gram), width)
    if basis is not None:
        gram = basis.T.astype(np.float64) @ gram @ basis
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def _unembedding_gram(run: "Run") -> Doubles:
    """Return W_U W_Uᵀ [d_model, d_model], by blocks of tokens."""
    unembedding = run.weight("W_U")
    gram = np.zeros((len(unembedding), len(unembedding)))
    for begin in range(0, unembedding.shape[1], GRAM_COLUMNS):
        block = np.asarray(unembedding[:, begin : begin + GRAM_COLUMNS], np.float64)
        gram += block @ block.T
    return gram


def _check_width(name: str, expected: int, width: int) -> None:
    if width != expected:
        raise SettingError(f"map {name!r} takes vectors of the residual stream, {expected} wide; the site has {width}")
