"""All pairs (a, b) of a modulus: the model, the run that holds what it computed on them, and what it answers.

Every step that patches or ablates works on the whole grid at once, in (a, b) order: prompt a · p + b.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

import actdb
from analyses.common.intervention import Hook, Place, hook_name, logits_of, replace, stored

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
CORRUPTIONS = ("shifted", "shuffled", "random", "same answer")


@dataclass(frozen=True)
class Grid:
    """A model of (a + b) mod `modulus` and its run over all pairs; `training` [pair] says which it was trained on.

    Raises `SelectionError` for a run that does not hold the p² pairs in (a, b) order.
    """

    model: Any
    run: actdb.Run
    modulus: int
    training: Booleans | None = None

    def __post_init__(self) -> None:
        p, found = self.modulus, self.run.n_prompts
        if found != p * p:
            raise actdb.SelectionError(f"run {self.run.name!r} has {found} prompts; modulus {p} has {p * p} pairs")
        given = np.array([self.run.tokens(prompt)[:2] for prompt in (0, 1, p, p * p - 1)])
        if not np.array_equal(given, [[0, 0], [0, 1], [1, 0], [p - 1, p - 1]]):
            raise actdb.SelectionError(f"run {self.run.name!r} does not hold the pairs of modulus {p} in (a, b) order")

    @property
    def n_pairs(self) -> int:
        """p²."""
        return self.modulus**2

    @cached_property
    def a(self) -> Ints:
        """The first number of every pair [pair]."""
        return np.arange(self.n_pairs) // self.modulus

    @cached_property
    def b(self) -> Ints:
        """The second number of every pair [pair]."""
        return np.arange(self.n_pairs) % self.modulus

    @cached_property
    def answers(self) -> Ints:
        """(a + b) mod p of every pair [pair]."""
        return (self.a + self.b) % self.modulus

    @cached_property
    def ids(self) -> torch.Tensor:
        """Token ids [pair, pos], as the model saw them."""
        return torch.from_numpy(np.stack([self.run.tokens(prompt) for prompt in range(self.n_pairs)])).long()

    @cached_property
    def varying(self) -> tuple[int, ...]:
        """Positions whose token is not the same in all pairs: those of a and b, not that of "="."""
        return tuple(pos for pos in range(self.ids.shape[1]) if int(self.ids[:, pos].unique().numel()) > 1)

    @cached_property
    def clean(self) -> torch.Tensor:
        """Logits [pair, number] without intervention."""
        return self.logits()

    @cached_property
    def read_positions(self) -> tuple[int, ...]:
        """Positions whose last residual the answer is read from: the last one, or all where a model pools them.

        Found by giving each position's last residual another pair's.
        """
        turned = torch.arange(self.n_pairs).roll(1)
        values = self.stored("resid_post", layer=self.last_layer)[turned]
        name = hook_name(self.run, "resid_post", layer=self.last_layer)
        changed = (self.logits([replace(Place(name, pos=pos), values)]) for pos in range(self.ids.shape[1]))
        return tuple(pos for pos, logits in enumerate(changed) if not torch.allclose(logits, self.clean, atol=1e-5))

    @property
    def last_layer(self) -> int:
        """The model's last layer."""
        return max(self.run.layers)

    @cached_property
    def written(self) -> dict[str, torch.Tensor]:
        """What embeddings, heads (z) and MLPs wrote on all pairs [pair, pos, …], by hook name; read once, and kept."""
        found = {hook_name(self.run, "embed"): self.stored("embed")}
        for site in ("z", "mlp_out"):
            layers = self.run[site].layers
            found |= {hook_name(self.run, site, layer=layer): self.stored(site, layer=layer) for layer in layers}
        return found

    def stored(self, site: str, *, layer: int | None = None) -> torch.Tensor:
        """Read a site on all pairs from the run: [pair, pos, …], float32."""
        return stored(self.run, hook_name(self.run, site, layer=layer), range(self.n_pairs))

    def read(self, out: torch.Tensor) -> torch.Tensor:
        """Return the logits of the numbers [pair, number] in a model's output [pair, (pos,) token]."""
        return (out[:, -1] if out.ndim == 3 else out)[:, : self.modulus]

    def logits(self, hooks: Iterable[Hook] = ()) -> torch.Tensor:
        """Run the model on all pairs with interventions; returns logits [pair, number]."""
        return self.read(logits_of(self.model, self.ids, hooks))

    def right(self, logits: torch.Tensor) -> Booleans:
        """Return which pairs are answered rightly [pair] by logits [pair, number]."""
        return np.asarray(logits.argmax(-1).cpu().numpy() == self.answers)

    def losses(self, logits: torch.Tensor) -> Floats:
        """Return the cross-entropy of the right answer in nats [pair]; in float64, since a grokked model's is tiny."""
        return functional.cross_entropy(logits.double().cpu(), torch.from_numpy(self.answers), reduction="none").numpy()

    def accuracy(self, hooks: Iterable[Hook] = ()) -> float:
        """Return the share of all pairs that is answered rightly with interventions."""
        return float(self.right(self.logits(hooks)).mean())


def corruption(grid: Grid, kind: str, *, seed: int) -> Ints:
    """Return for every pair the pair whose activations are to be patched into it [pair].

    shifted: (a + 1, b), whose answer is one more; shuffled: a permutation of all pairs; random: any pair with another
    answer; same answer: (a + k, b − k) with k ≠ 0, which only what tells a from b should notice. Raises `SettingError`
    for another name.
    """
    p, generator = grid.modulus, np.random.default_rng((seed, 71))
    if kind == "shifted":
        return np.asarray((grid.a + 1) % p * p + grid.b, np.int64)
    if kind == "shuffled":
        return generator.permutation(grid.n_pairs)
    if kind in CORRUPTIONS:
        step = generator.integers(1, p, grid.n_pairs)  # never 0
        other = (grid.a + step) % p if kind == "same answer" else generator.integers(0, p, grid.n_pairs)
        answers = grid.answers + (0 if kind == "same answer" else step)
        return np.asarray(other * p + (answers - other) % p, np.int64)
    raise actdb.SettingError(f"corruption {kind!r}: choose one of {', '.join(CORRUPTIONS)}")
