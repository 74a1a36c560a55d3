"""The case whose answer is known: rows in which chosen neurons depend on token or position with a planted η²."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from scipy import stats

import actdb
from analyses.feature_persistence.model import N_POSITIONS, N_VOCABULARY
from analyses.feature_persistence.selection import KINDS
from analyses.feature_persistence.task import N_PROBE

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Planted:
    """A run whose neurons are known: `eta` maps (layer, neuron) of the planted ones to kind and η²; the rest noise."""

    run: actdb.Run
    eta: Mapping[tuple[int, int], tuple[str, float]]


def plant(
    db: Path,
    eta: Mapping[tuple[int, int], tuple[str, float]],
    *,
    n_layers: int = 2,
    n_neurons: int = 64,
    n_prompts: int = N_PROBE,
    seed: int = 0,
    run: str = "planted",
) -> Planted:
    """Make rows and import them into a database, as those of a model would be.

    A planted neuron is effect + noise, the effects having the variance η² / (1 − η²) in this sample (every position
    alike often, tokens as drawn) and the noise N(0, 1). With an empty `eta` it is the control.
    """
    generator = np.random.default_rng((seed, 11))
    ids = generator.integers(0, N_VOCABULARY, (n_prompts, N_POSITIONS))
    values = generator.standard_normal((n_layers, n_prompts, N_POSITIONS, n_neurons), np.float32)
    groups = {"token": ids, "position": np.broadcast_to(np.arange(N_POSITIONS), ids.shape)}
    for (layer, neuron), (kind, planted) in eta.items():
        effect = generator.permutation(np.linspace(-1, 1, groups[kind].max() + 1))[groups[kind]]
        effect = (effect - effect.mean()) / effect.std() * np.sqrt(planted / (1 - planted))
        values[layer, ..., neuron] += effect.astype(np.float32)
    db.parent.mkdir(parents=True, exist_ok=True)
    file = db.parent / f"{run}.safetensors"
    save_file({f"blocks.{i}.mlp.hook_post": torch.from_numpy(layer) for i, layer in enumerate(values)}, file)
    try:
        prompts = [{"tokens": row} for row in ids.tolist()]
        made = actdb.import_activations(file, prompts, out=db, run=run, sites=["mlp_post"], store="float32")
    finally:
        file.unlink(missing_ok=True)
    return Planted(made, eta)


def eta_interval(planted: float, kind: str, *, n_rows: int, confidence: float = 0.999) -> tuple[float, float]:
    """Return where the measured η² of a planted one lies with this confidence: from the noncentral F distribution.

    With groups fixed, F has the noncentrality n η² / (1 − η²), and η² = df_between F / (df_between F + df_within).
    """
    n_groups = dict(zip(KINDS, (N_VOCABULARY, N_POSITIONS), strict=True))[kind]
    df = (n_groups - 1, n_rows - n_groups)
    law = stats.ncf(*df, n_rows * planted / (1 - planted)) if planted > 0 else stats.f(*df)
    ends = [float(law.ppf(q)) for q in ((1 - confidence) / 2, (1 + confidence) / 2)]
    low, high = (df[0] * f / (df[0] * f + df[1]) for f in ends)
    return low, high
