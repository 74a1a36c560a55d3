"""The causal check of a circuit: clean prompts, in which one edge alone carries what their corrupted partners have.

Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023) within a subspace: the difference between the corrupted and
the clean stream, projected on the subspace, reaches one input (queries, keys or values) of one head and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import actdb
from analyses.common.intervention import Hook, Place, Route, components, hook_name, logits_of, path_patch, stored
from analyses.common.metric import logit_difference
from analyses.common.significance import Estimate, mean_interval
from analyses.subspace_partition.circuit import Plane
from analyses.subspace_partition.strength import random_rotation

HOOKS = {"query": "hook_q", "key": "hook_k", "value": "hook_v"}
STREAM = "stream"
N_RANDOM = 8
PAIRS = """
    SELECT p.prompt_id, p.role, p.known_from, p.known_to FROM prompts p JOIN runs r USING (prompt_set)
    WHERE r.run = $1 ORDER BY p.pair, p.prompt_id
"""


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts, all of one length, aligned by the label `pair`; [pair] ids of prompts of a run.

    `known` are the positions whose next tokens are judged.
    """

    run: actdb.Run
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    known: slice

    @classmethod
    def read(cls, db: actdb.Database, run: actdb.Run) -> "Pairs":
        """Read the pairs of a run from its labels `pair`, `role` (clean, corrupted), `known_from` and `known_to`.

        Raises `SelectionError` where they do not pair up.
        """
        rows = db.sql(PAIRS, [run.name]).fetchall()
        by_role = {role: tuple(int(row[0]) for row in rows if row[1] == role) for role in ("clean", "corrupted")}
        ranges = {(int(begin), int(end)) for *_, begin, end in rows}
        if not rows or len(by_role["clean"]) != len(by_role["corrupted"]) or len(ranges) != 1:
            raise actdb.SelectionError(f"run {run.name!r}: its prompts are no clean and corrupted pairs of one length")
        return cls(run, by_role["clean"], by_role["corrupted"], slice(*ranges.pop()))

    @cached_property
    def ids(self) -> torch.Tensor:
        """Token ids of the clean prompts [pair, pos]."""
        return self._tokens(self.clean)

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logit(clean answer) − logit(corrupted answer), mean over the known positions, [pair]."""
        after = slice(self.known.start + 1, self.known.stop + 1)
        answers = (self._tokens(prompts)[:, after] for prompts in (self.clean, self.corrupted))
        return logit_difference(logits[:, self.known], *answers).mean(1)

    def difference(self, site: str, layer: int) -> torch.Tensor:
        """Return what the corrupted prompts have more than the clean ones at a site, [pair, pos, …]."""
        hook = hook_name(self.run, site, layer=layer)
        return stored(self.run, hook, self.corrupted) - stored(self.run, hook, self.clean)

    def _tokens(self, prompts: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.run.tokens(prompt) for prompt in prompts]).astype(np.int64))


@dataclass(frozen=True)
class EdgeEffect:
    """How much the metric falls when one edge carries the corrupted partner's, mean over pairs.

    From `source` (a head's direct output, or the whole stream) through a subspace to one side of a reader (None: to all
    that follows). `whole` is the fall where all subspaces do, of the whole stream; `null` that of random subspaces of
    this size.
    """

    source: str
    subspace: str
    reader: str | None
    side: str
    fall: Estimate
    whole: float
    null: float

    @property
    def share(self) -> float:
        """The fall as a share of the whole stream's."""
        return self.fall.value / self.whole if self.whole else float("nan")

    @property
    def null_share(self) -> float:
        """The same of random subspaces."""
        return self.null / self.whole if self.whole else float("nan")


class EdgeCheck:
    """Measures edges through one plane of a model on pairs of prompts."""

    def __init__(self, model: Any, pairs: Pairs, plane: Plane, *, seed: int) -> None:
        self.model, self.pairs, self.plane = model, pairs, plane
        self.hook = hook_name(pairs.run, plane.site, layer=plane.layer)
        self.clean = pairs.metric(logits_of(model, pairs.ids))
        generator = np.random.default_rng((seed, 35))
        width = len(plane.partition.rotation)
        self.random = [random_rotation(generator, width).astype(np.float32) for _ in range(N_RANDOM)]

    def change(self, source: str) -> torch.Tensor:
        """Return what a source has more in the corrupted prompts [pair, pos, d_model]: `stream` or a head."""
        if source == STREAM:
            return self.pairs.difference(self.plane.site, self.plane.layer)
        layer, head = parse_head(source)
        z = self.pairs.difference("z", layer)[:, :, head]  # [pair, pos, d_head]
        return z @ self.pairs.run.torch_weight("W_O", layer=layer, head=head).float()

    def measure(self, source: str, reader: str | None = None, side: str = "key") -> list[EdgeEffect]:
        """Measure the edges from a source through each subspace to one side of a reader, or to all that follows."""
        change, partition = self.change(source), self.plane.partition
        whole = float(self._fall(self.change(STREAM), reader, side).mean())
        found = []
        for subspace, columns in enumerate(partition.columns()):
            falls = self._fall(_within(change, partition.basis(subspace)), reader, side)
            null = [self._fall(_within(change, other[:, columns]), reader, side).mean() for other in self.random]
            label = self.plane.label(subspace)
            estimate = mean_interval(falls.tolist())
            found.append(EdgeEffect(source, label, reader, side, estimate, whole, float(np.mean(null))))
        return found

    def _fall(self, change: torch.Tensor, reader: str | None, side: str) -> torch.Tensor:
        """The fall of the metric [pair] when a change of the plane reaches a side of a reader alone."""
        sender: Hook = (self.hook, lambda activation, hook: activation + change)
        if reader is None:
            return self.clean - self.pairs.metric(logits_of(self.model, self.pairs.ids, [sender]))
        layer, head = parse_head(reader)
        hook = f"blocks.{layer}.attn.{HOOKS[side]}"
        receiver = Place(hook, head=head if side == "query" else self._shared(head))
        logits = path_patch(self.model, self.pairs.ids, Route(sender, [receiver], self._between(layer)))
        return self.clean - self.pairs.metric(logits)

    def _between(self, layer: int) -> Mapping[str, torch.Tensor]:
        """What the components between the plane and a layer wrote in the clean prompts: held fixed."""
        layers = range(self.plane.depth, layer)
        if not len(layers):
            return {}
        sites = [site for site in ("z", "mlp_out") if site in self.pairs.run]
        every = components(self.pairs.run, self.pairs.clean, sites=sites)
        return {name: values for name, values in every.items() if int(name.split(".")[1]) in layers}

    def _shared(self, head: int) -> int:
        """The key and value head of a head."""
        shape = self.pairs.run.info.model
        return head * int(shape["n_kv_heads"]) // int(shape["n_heads"])


def parse_head(name: str) -> tuple[int, int]:
    """Return layer and head of a name as L1H0; raises `SettingError` for any other."""
    layer, dash, head = name.removeprefix("L").partition("H")
    if not (name.startswith("L") and dash and layer.isdecimal() and head.isdecimal()):
        raise actdb.SettingError(f"head {name!r}: name it by layer and head, as L1H0")
    return int(layer), int(head)


def _within(change: torch.Tensor, basis: npt.NDArray[np.float32]) -> torch.Tensor:
    """The part of a change [pair, pos, d_model] that lies in the span of orthonormal columns."""
    columns = torch.from_numpy(np.ascontiguousarray(basis))
    return change @ columns @ columns.T
