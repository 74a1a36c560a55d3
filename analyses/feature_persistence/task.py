"""Token sequences: the four patterns that the tiny model is trained on, the random probe, the structured inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import actdb
from analyses.feature_persistence.model import N_POSITIONS, N_VOCABULARY

Ints = npt.NDArray[np.int64]
PATTERNS = ("ascending", "repeating", "alternating", "random")
PERIODS = (2, 3, 4)
N_TRAINING, N_PROBE = 1000, 500
STRUCTURES = ("ascending", "descending", "repeated", "alternating", "random")


def training_sequences(seed: int, *, patterns: Sequence[str] = PATTERNS, n: int = N_TRAINING) -> Ints:
    """Draw sequences [n, pos], each of one of the patterns with equal chance."""
    generator = np.random.default_rng((seed, 1))
    makers = {name: _MAKERS[name] for name in patterns}
    names = list(makers)
    return np.stack([makers[names[i]](generator) for i in generator.integers(0, len(names), n)])


def probe_prompts(*, n: int = N_PROBE, n_positions: int = N_POSITIONS, seed: int = 0) -> list[dict[str, Any]]:
    """Draw the random sequences on which selectivity is measured: the same for every model, so that runs compare."""
    ids = np.random.default_rng((seed, 2)).integers(0, N_VOCABULARY, (n, n_positions))
    return [{"tokens": row} for row in ids.tolist()]


def structured_prompts(*, n_each: int = 40, n_positions: int = N_POSITIONS, seed: int = 0) -> list[dict[str, Any]]:
    """Draw sequences of each structure, labelled by `kind`."""
    generator = np.random.default_rng((seed, 3))
    places = np.arange(n_positions)
    prompts = []
    for kind in STRUCTURES:
        for _ in range(n_each):
            first, second = generator.choice(N_VOCABULARY, 2, replace=False)
            ids = {
                "ascending": (first + places) % N_VOCABULARY,
                "descending": (first - places) % N_VOCABULARY,
                "repeated": np.full(n_positions, first),
                "alternating": np.where(places % 2, second, first),
                "random": generator.integers(0, N_VOCABULARY, n_positions),
            }[kind]
            prompts.append({"tokens": ids.tolist(), "kind": kind})
    return prompts


def read_kinds(db: actdb.Database, run: str) -> list[str]:
    """Return the label `kind` of every prompt of a run."""
    query = "SELECT kind FROM prompts JOIN runs USING (prompt_set) WHERE run = $1 ORDER BY prompt_id"
    return [kind for (kind,) in db.sql(query, [run]).fetchall()]


def _ascending(generator: np.random.Generator) -> Ints:
    return (generator.integers(N_VOCABULARY) + np.arange(N_POSITIONS)) % N_VOCABULARY


def _repeating(generator: np.random.Generator) -> Ints:
    block = generator.integers(0, N_VOCABULARY, generator.choice(PERIODS))
    return np.resize(block, N_POSITIONS)


def _alternating(generator: np.random.Generator) -> Ints:
    return np.resize(generator.choice(N_VOCABULARY, 2, replace=False), N_POSITIONS)


def _random(generator: np.random.Generator) -> Ints:
    return generator.integers(0, N_VOCABULARY, N_POSITIONS)


_MAKERS: dict[str, Callable[[np.random.Generator], Ints]] = {
    "ascending": _ascending,
    "repeating": _repeating,
    "alternating": _alternating,
    "random": _random,
}
