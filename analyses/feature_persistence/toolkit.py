"""The shared toolkit on a trained tiny model: logit lens, roles of heads, ablation and patching with their effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import actdb
from analyses.common.intervention import (
    Hook,
    Place,
    Route,
    components,
    effects,
    logits_of,
    mean_ablation,
    patch_from,
    path_patch,
    place,
    resample_ablation,
    zero_ablation,
)
from analyses.common.lens import Lens, logit_lens
from analyses.common.metric import next_token_loss
from analyses.common.significance import Estimate, mean_interval
from analyses.feature_persistence.model import PostNormTransformer, restore
from analyses.feature_persistence.task import read_kinds, structured_prompts

SITES = ("resid_post", "z", "mlp_post", "mlp_out", "pattern")


@dataclass(frozen=True)
class Toolkit:
    """What the toolkit finds in one model, on structured sequences.

    `roles` maps (layer, head) to the role by the view `head_roles`; `ablations` the rise of the loss in nats a token
    when a component is ablated, `patches` the share of the loss between two inputs that patching a component restores,
    `paths` the same for the direct paths from heads of layer 0 to the MLP of layer 1.
    """

    lens: Lens
    roles: dict[tuple[int, int], str]
    ablations: dict[str, Estimate]
    patches: dict[str, Estimate]
    paths: dict[str, Estimate]


def harvest_structured(run: actdb.Run, db: Path) -> actdb.Run:
    """Harvest a trained model, rebuilt from its stored weights, on structured sequences."""
    return actdb.harvest(
        restore(run),
        structured_prompts(),
        out=db,
        run=f"{run.name}-structured",
        step=run.step,
        sites=SITES,
        stats=("heads", "neurons"),
        store="float32",
    )


def apply_toolkit(db: actdb.Database, run: actdb.Run, *, seed: int) -> Toolkit:
    """Apply all of it to a run of `harvest_structured`."""
    model = restore(run)
    kinds = read_kinds(db, run.name)
    prompts = [prompt for prompt, kind in enumerate(kinds) if kind != "random"]
    ascending = [prompt for prompt, kind in enumerate(kinds) if kind == "ascending"]
    return Toolkit(
        lens=logit_lens(run, model.unembed),
        roles=head_roles(db, run.name),
        ablations=ablate(run, model, prompts, seed=seed),
        patches=patch(run, model, ascending),
        paths=patch_paths(run, model, ascending),
    )


def head_roles(db: actdb.Database, run: str) -> dict[tuple[int, int], str]:
    """Return what each (layer, head) of a run does, by the view `head_roles` over its stored statistics."""
    found = db.sql("SELECT layer, head, role FROM head_roles WHERE run = $1 ORDER BY ALL", [run]).fetchall()
    return {(layer, head): role or "none" for layer, head, role in found}


def ablate(run: actdb.Run, model: PostNormTransformer, prompts: list[int], *, seed: int) -> dict[str, Estimate]:
    """Return the rise of the loss, a prompt, for each head and MLP set to zero, to its mean, to another prompt's."""
    ids = token_ids(run, prompts)
    hooks: dict[str, list[Hook]] = {}
    for layer in run.layers:
        for head in range(model.cfg.n_heads):
            at = place(run, "z", layer=layer, head=head)
            hooks[f"head {layer}.{head} zero"] = [zero_ablation(at)]
            hooks[f"head {layer}.{head} mean"] = [mean_ablation(run, "z", layer=layer, head=head)]
            other = resample_ablation(run, "z", prompts=prompts, seed=seed, layer=layer, head=head)
            hooks[f"head {layer}.{head} resample"] = [other]
        hooks[f"mlp {layer} mean"] = [mean_ablation(run, "mlp_out", layer=layer)]
    found = effects(model, ids, hooks, lambda logits: next_token_loss(logits, ids).mean(1))
    return {name: mean_interval(rise.numpy()) for name, rise in found.items()}


def patch(run: actdb.Run, model: PostNormTransformer, prompts: list[int]) -> dict[str, Estimate]:
    """Activation patching between sequences: each runs with a component of another, scored on its next tokens."""
    source, target = _pairs(run, prompts)
    hooks: dict[str, list[Hook]] = {}
    for layer in run.layers:
        for head in range(model.cfg.n_heads):
            hooks[f"head {layer}.{head}"] = [patch_from(run, "z", prompts=source, layer=layer, head=head)]
        hooks[f"mlp {layer}"] = [patch_from(run, "mlp_out", prompts=source, layer=layer)]
        hooks[f"residual {layer}"] = [patch_from(run, "resid_post", prompts=source, layer=layer)]
    logits = {name: logits_of(model, token_ids(run, target), found) for name, found in hooks.items()}
    return _restored(run, model, source, target, logits)


def patch_paths(run: actdb.Run, model: PostNormTransformer, prompts: list[int]) -> dict[str, Estimate]:
    """Path patching from each head of the first layer to the MLP of the last, everything between frozen."""
    source, target = _pairs(run, prompts)
    frozen = components(run, target)
    last = run.layers[-1]
    receiver = Place(f"blocks.{last}.mlp.hook_pre")
    logits = {}
    for head in range(model.cfg.n_heads):
        sender = patch_from(run, "z", prompts=source, layer=run.layers[0], head=head)
        route = Route(sender=sender, receivers=[receiver], frozen=frozen)
        logits[f"head {run.layers[0]}.{head} → mlp {last}"] = path_patch(model, token_ids(run, target), route)
    return _restored(run, model, source, target, logits)


def token_ids(run: actdb.Run, prompts: list[int]) -> torch.Tensor:
    """Return the tokens [batch, pos] of prompts of one length, as the model saw them."""
    return torch.from_numpy(np.stack([run.tokens(prompt) for prompt in prompts]).astype(np.int64))


def _pairs(run: actdb.Run, prompts: list[int]) -> tuple[list[int], list[int]]:
    """Pair each prompt with another that has other tokens: sources and targets."""
    ids = token_ids(run, prompts)
    turned = [prompts[(i + 1) % len(prompts)] for i in range(len(prompts))]
    differ = (ids != token_ids(run, turned)).all(1).tolist()
    kept = [i for i, differs in enumerate(differ) if differs]
    return [prompts[i] for i in kept], [turned[i] for i in kept]


def _restored(
    run: actdb.Run,
    model: PostNormTransformer,
    source: list[int],
    target: list[int],
    logits: Mapping[str, torch.Tensor],
) -> dict[str, Estimate]:
    """Share of the loss restored: (unpatched − patched) ÷ (unpatched − source), on the source's next tokens."""
    wanted = token_ids(run, source)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(values[:, :-1].transpose(1, 2), wanted[:, 1:], reduction="none").mean(1)

    unpatched = loss(logits_of(model, token_ids(run, target)))
    clean = loss(logits_of(model, wanted))
    scale = float((unpatched - clean).mean())
    return {name: mean_interval(((unpatched - loss(values)) / scale).numpy()) for name, values in logits.items()}
