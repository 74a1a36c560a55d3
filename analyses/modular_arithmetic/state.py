"""What a model holds of every pair at one site: a row a pair, read from the database, and put back for patches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, hook_name
from analyses.modular_arithmetic.grid import Booleans, Grid

Rows = npt.NDArray[np.float32]
SITES = ("embed", "resid_mid", "mlp_post", "resid_post")
"""Sites that states are read from, in the order in which they are computed."""


@dataclass(frozen=True)
class State:
    """A site on all pairs: `rows` [pair, feature] hold its positions side by side."""

    site: str
    layer: int | None
    positions: tuple[int, ...]
    hook: str
    rows: Rows

    @property
    def name(self) -> str:
        """The site, and of which layer."""
        return self.site if self.layer is None else f"{self.site} {self.layer}"

    def put(self, rows: npt.NDArray[Any]) -> Hook:
        """Return the intervention that puts other rows [pair, feature] in the place of these."""
        n = len(self.positions)
        parts = torch.from_numpy(np.asarray(rows, np.float32)).reshape(len(rows), n, -1)  # [pair, position, feature]
        width = parts.shape[-1]

        def function(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            out = activation.clone()
            out[:, list(self.positions)] = parts.to(activation).reshape(len(activation), n, width)
            return out

        return self.hook, function


def read_state(grid: Grid, site: str, *, layer: int | None = None) -> State:
    """Read a site at the positions that count there: those the answer is read from in the last layer, else all.

    The embedding is that of a and b. Raises `SiteError` for a site that the run does not hold.
    """
    name = hook_name(grid.run, site, layer=layer)
    if site == "embed":
        positions = grid.varying
    elif layer == grid.last_layer:
        positions = grid.read_positions
    else:
        positions = tuple(range(grid.ids.shape[1]))
    values = grid.stored(site, layer=layer)[:, list(positions)]  # [pair, position, feature]
    return State(site, layer, positions, name, values.reshape(len(values), -1).numpy())


def read_states(grid: Grid, sites: tuple[str, ...] = SITES) -> list[State]:
    """Read all sites of all layers that the run holds, in the order in which they are computed."""
    held = [site for site in sites if site in grid.run.sites]
    if not held:
        raise actdb.SiteError(f"run {grid.run.name!r} holds none of {', '.join(sites)}; harvest it with --sites")
    states = [read_state(grid, "embed")] if "embed" in held else []
    return states + [
        read_state(grid, site, layer=layer) for layer in grid.run.layers for site in held if site != "embed"
    ]


def split_pairs(modulus: int, *, seed: int, held_out: float = 0.5) -> Booleans:
    """Return which pairs [pair] concepts are fitted on; the others, a share of all, are held out.

    (a, b) and (b, a) go together: many a model holds them alike, so that one would give the other away.
    """
    a, b = np.divmod(np.arange(modulus**2), modulus)
    unordered = np.minimum(a, b) * modulus + np.maximum(a, b)
    order = np.random.default_rng((seed, 31)).permutation(np.unique(unordered))
    return np.asarray(np.isin(unordered, order[round(held_out * len(order)) :]), np.bool_)
