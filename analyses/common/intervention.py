"""Interventions on any hooked model, with sources read from the database.

An intervention is a pair (hook name, function), the same that `actdb.harvest(hooks=…)` takes: what is measured here can
be harvested too. A hooked model is an `nn.Module` with TransformerLens HookPoints, or a `TransformerBridge`, called on
ids [batch, pos]; activations are [batch, pos, feature], [batch, pos, head, d_head] or, for patterns, [batch, head,
query, key]. On a bridge, transformer-lens' own sweeps (`transformer_lens.patching`) take `run.activation_cache(...)` as
their source; what is here works on plain modules as well, and the tests hold the two to each other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

import actdb

Hook = tuple[str, Callable[..., Any]]
Metric = Callable[[torch.Tensor], torch.Tensor]
Index = int | Sequence[int] | slice | None
ROW_BLOCK = 16_384


@dataclass(frozen=True)
class Place:
    """A part of an activation: a hook, and the head, neuron or position of it (None: all).

    Of a pattern `pos` is the query and `neuron` the key.
    """

    hook: str
    head: Index = None
    neuron: Index = None
    pos: Index = None

    def mask(self, activation: torch.Tensor) -> torch.Tensor:
        """Return where the place lies in an activation, as a mask that broadcasts over it."""
        shape = activation.shape
        is_pattern = self.hook.endswith("hook_pattern")
        head_axis, pos_axis = (1, 2) if is_pattern else (2, 1)
        chosen = [(pos_axis, self.pos), (len(shape) - 1, self.neuron)]
        if self.head is not None:
            if len(shape) != 4:
                raise actdb.SelectionError(f"{self.hook} has no heads: its activation is {list(shape)}")
            chosen.append((head_axis, self.head))
        mask = torch.ones([1] * len(shape), dtype=torch.bool, device=activation.device)
        for axis, index in chosen:
            if index is None:
                continue
            along = torch.zeros(shape[axis], dtype=torch.bool, device=activation.device)
            along[index if isinstance(index, int | slice) else list(index)] = True
            mask = mask & along.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return mask


def place(run: actdb.Run, site: str, *, layer: int | None = None, **parts: Index) -> Place:
    """Return the place of a site of a run, by TransformerLens' hook name; `parts` are head, neuron, pos."""
    return Place(hook_name(run, site, layer=layer), **parts)


def hook_name(run: actdb.Run, site: str, *, layer: int | None = None) -> str:
    """Return the hook that a stored site was taken from; raises `SiteError` where the run has no such site."""
    spec = run.info.site(site)
    if spec is None:
        raise actdb.SiteError(f"run {run.name!r} has no site {site!r}; it holds {', '.join(run.sites)}")
    return spec.hook if layer is None else f"blocks.{layer}.{spec.hook}"


def replace(at: Place, values: torch.Tensor | float) -> Hook:
    """Return the intervention that puts `values`, which broadcast over the whole activation, at one place of it."""

    def function(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        given = torch.as_tensor(values, dtype=activation.dtype, device=activation.device)
        return torch.where(at.mask(activation), given, activation)

    return at.hook, function


def stored(run: actdb.Run, hook: str, prompts: Sequence[int]) -> torch.Tensor:
    """Read a hook's activation of prompts of one length from the database: [batch, pos, …], as a model gives it."""
    return torch.as_tensor(run.activation_cache(list(prompts))[hook]).float()


def stored_mean(run: actdb.Run, site: str, *, layer: int | None = None, by_pos: bool = False) -> torch.Tensor:
    """Return a site's mean over all stored rows, [feature] or [head, d_head]; `by_pos` puts positions first.

    One pass over the stored rows in bounded memory. A position is averaged over the prompts that have it.
    """
    selection = run[site].sel(layer=layer)
    total = torch.zeros(0, dtype=torch.float64)  # [pos, …] summed over prompts, as long as the longest so far
    counts = np.zeros(0, np.int64)
    for block in selection.batches(ROW_BLOCK):
        values = torch.from_numpy(np.moveaxis(block.values, -2, 0).astype(np.float32))  # [row, (head,) feature]
        places = torch.from_numpy(block.pos if by_pos else np.zeros(len(block), np.int64))
        n_places = max(int(places.max()) + 1, len(counts))
        grown = torch.zeros(n_places, *values.shape[1:], dtype=torch.float64)
        if len(total):
            grown[: len(total)] = total
        total = grown.index_add_(0, places, values.double())
        found = np.bincount(places.numpy(), minlength=n_places)
        counts = found + np.pad(counts, (0, n_places - len(counts)))
    means = total / torch.from_numpy(counts).reshape(-1, *[1] * (total.ndim - 1))
    return (means if by_pos else means[0]).float()


def zero_ablation(at: Place) -> Hook:
    """Return the intervention that sets a place to zero."""
    return replace(at, 0.0)


def mean_ablation(run: actdb.Run, site: str, *, layer: int | None = None, by_pos: bool = False, **parts: Index) -> Hook:
    """Return the intervention that sets a place to its mean over the run's stored rows (of the position: `by_pos`)."""
    mean = stored_mean(run, site, layer=layer, by_pos=by_pos)
    return replace(place(run, site, layer=layer, **parts), mean)


def resample_ablation(
    run: actdb.Run, site: str, *, prompts: Sequence[int], seed: int, layer: int | None = None, **parts: Index
) -> Hook:
    """Return the intervention that gives every prompt of a batch the stored activation of another one.

    The other is drawn among the run's prompts of the same length; raises `SelectionError` where there is none. Source:
    Chan et al., "Causal scrubbing" (2022).
    """
    generator = np.random.default_rng(seed)
    lengths = np.array([len(run.tokens(prompt)) for prompt in range(run.n_prompts)])
    others = [np.flatnonzero((lengths == lengths[p]) & (np.arange(run.n_prompts) != p)) for p in prompts]
    if not all(len(candidates) for candidates in others):
        raise actdb.SelectionError("resample_ablation: a prompt has the only one of its length in the run")
    return patch_from(
        run, site, prompts=[int(generator.choice(candidates)) for candidates in others], layer=layer, **parts
    )


def patch_from(run: actdb.Run, site: str, *, prompts: Sequence[int], layer: int | None = None, **parts: Index) -> Hook:
    """Return the intervention that patches in what the run stored of other prompts, one for each of the batch.

    Activation patching (Meng et al. 2022; Vig et al. 2020): `parts` are the head, neuron or position to patch.
    """
    at = place(run, site, layer=layer, **parts)
    return replace(at, stored(run, at.hook, prompts))


def logits_of(model: Any, ids: torch.Tensor, hooks: Iterable[Hook] = ()) -> torch.Tensor:
    """Run a model on ids [batch, pos] with interventions; returns its logits [batch, pos, token] without gradient."""
    with torch.inference_mode(), actdb.hooked(model, list(hooks)):
        out = model(ids)
    return torch.as_tensor(getattr(out, "logits", out))


def effects(
    model: Any, ids: torch.Tensor, interventions: Mapping[str, Sequence[Hook]], metric: Metric
) -> dict[str, torch.Tensor]:
    """Return metric(intervened) − metric(clean) of each named intervention; a run of the model each, and one clean.

    `metric` maps logits to a value a prompt [batch], or any other shape.
    """
    clean = metric(logits_of(model, ids))
    return {name: metric(logits_of(model, ids, hooks)) - clean for name, hooks in interventions.items()}


@dataclass(frozen=True)
class Route:
    """A path from a sender's intervention to receivers, along which alone the change may travel.

    `frozen` are hooks held at their clean values meanwhile, those of the components between: see `components`.
    """

    sender: Hook
    receivers: Sequence[Place]
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)


def components(run: actdb.Run, prompts: Sequence[int], *, sites: Sequence[str] = ("z", "mlp_out")) -> dict[str, Any]:
    """Read what every head and MLP of a run wrote on these prompts: what a path patch holds fixed."""
    names = [hook_name(run, site, layer=layer) for site in sites for layer in run[site].layers]
    return {name: stored(run, name, prompts) for name in names}


def path_patch(model: Any, ids: torch.Tensor, route: Route) -> torch.Tensor:
    """Return the logits when only the receivers see the sender's change, directly through the residual stream.

    Path patching (Wang et al. 2022, appendix B; Goldowsky-Dill et al. 2023): with all other components frozen at their
    clean values the sender's change is run, and what arrives at the receivers recorded; then the model runs clean but
    for the receivers, which get that. Two forward passes. A receiver is a head's input (`attn.hook_q`), an MLP's
    (`mlp.hook_pre`), or the residual stream at some layer; the direct effect on the output has the last residual.
    """
    arrived: dict[str, torch.Tensor] = {}

    def record(activation: torch.Tensor, hook: Any, name: str) -> None:
        arrived[name] = activation.clone()

    held = [replace(Place(name), values) for name, values in route.frozen.items()]
    receiving = {receiver.hook for receiver in route.receivers}
    # The sender comes after the freeze, so that a head may send while the others of its layer are held.
    logits_of(model, ids, [*held, route.sender, *((name, partial(record, name=name)) for name in receiving)])
    return logits_of(model, ids, [replace(receiver, arrived[receiver.hook]) for receiver in route.receivers])
