"""The interventions of the study: lists of (hook name, function) pairs, harvested with `hooks=` and kept as runs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import actdb
from analyses.common.intervention import Hook, Place, replace, stored_mean

EMBED, POSITION = "embed", "pos"


def hook_names(model: Any) -> frozenset[str]:
    """Return the names of a model's hook points."""
    registry = getattr(model, "hook_dict", None)
    return frozenset(registry or (name for name, part in model.named_modules() if hasattr(part, "add_hook")))


def component_hooks(model: Any, layer: int) -> dict[str, str]:
    """Return the hooks of what sums up to the input of a layer, by component: embed, pos, attn 0, mlp 0, …"""
    named = {EMBED: "hook_embed", POSITION: "hook_pos_embed"}
    for below in range(layer):
        named |= {f"attn {below}": f"blocks.{below}.hook_attn_out", f"mlp {below}": f"blocks.{below}.hook_mlp_out"}
    names = hook_names(model)
    if getattr(model.cfg, "positional_embedding_type", "standard") != "standard":
        del named[POSITION]  # a bridge names the hook point all the same
    return {name: hook for name, hook in named.items() if hook in names}


def component_means(run: actdb.Run, components: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return each component's mean [d_model] over the run's prompts and positions, from its stored rows.

    That of the positional embedding comes from its weights, over the same positions.
    """
    means = {}
    for name in components:
        kind, _, layer = name.partition(" ")
        if name == POSITION:
            lengths = [len(run.tokens(prompt)) for prompt in run.prompt_ids()]
            places = torch.cat([torch.arange(length) for length in lengths])
            means[name] = run.torch_weight("W_pos").float()[places].mean(0)
        elif name == EMBED:
            means[name] = stored_mean(run, "embed")
        else:
            means[name] = stored_mean(run, f"{kind}_out", layer=int(layer))
    return means


def isolate_token(means: dict[str, torch.Tensor], components: dict[str, str]) -> list[Hook]:
    """Return what leaves a layer's input a function of the token alone: position and attention held at their means."""
    held = [name for name in components if name == POSITION or name.startswith("attn ")]
    return [replace(Place(components[name]), means[name]) for name in held]


def ablate_component(model: Any, name: str, mean: torch.Tensor, *, layer: int) -> list[Hook]:
    """Return the intervention that replaces one component in the input of `layer`, and nowhere else, by its mean.

    What the component does through other components (the MLP reads the embedding) stays.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        kept["value"] = activation

    def exchange(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation - kept["value"] + mean.to(activation)

    return [(component_hooks(model, layer)[name], keep), (f"blocks.{layer}.hook_resid_pre", exchange)]


def steer(run: actdb.Run, *, layer: int, head: int, rate: float, site: str) -> list[Hook]:
    """Return a gradient step on tr(W_Q W_Kᵀ), as what it does to the head's queries and keys.

    W_K ← W_K + rate·W_Q and W_Q ← W_Q + rate·W_K, at once; a negative rate suppresses. Queries and keys are linear in
    the head's normalised input, so adding rate·x W_K to the query and rate·x W_Q to the key is that step, exactly; with
    rotary positions too, since both come before the rotation. Under grouped queries the key belongs to several heads.
    """
    query, key = (run.torch_weight(name, layer=layer).float() for name in ("W_Q", "W_K"))
    kv_head = head * len(key) // len(query)
    kept: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        kept["value"] = activation

    def add(activation: torch.Tensor, hook: Any, *, weight: torch.Tensor, at: int) -> torch.Tensor:
        changed = activation.clone()
        changed[:, :, at] += rate * kept["value"] @ weight.to(activation)
        return changed

    add_query: Callable[..., Any] = partial(add, weight=key[kv_head], at=head)
    add_key: Callable[..., Any] = partial(add, weight=query[head], at=kv_head)
    block = f"blocks.{layer}"
    return [(f"{block}.{site}", keep), (f"{block}.attn.hook_q", add_query), (f"{block}.attn.hook_k", add_key)]
