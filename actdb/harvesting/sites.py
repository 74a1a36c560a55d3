"""Sites: from a name to hook points, shapes and meaning, checked by running the model once."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from actdb.errors import ModelError, SettingError, SiteError
from actdb.harvesting.models import Model, evaluating
from actdb.schema import SITE_NAME

LAYER_SITES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_pre": "mlp.hook_pre",
    "mlp_pre_linear": "mlp.hook_pre_linear",
    "mlp_post": "mlp.hook_post",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
}
LOGITS = "unembed.hook_out"
MODEL_SITES = {"embed": "hook_embed", "ln_final": "ln_final.hook_normalized", "logits": LOGITS}
DEFAULT_SITES = ("resid_post", "z", "pattern", "mlp_post")
WIDTHS = {
    **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "ln_final"), "d_model"),
    **dict.fromkeys(("mlp_pre", "mlp_pre_linear", "mlp_post"), "d_mlp"),
    **dict.fromkeys(("q", "k", "v", "z"), "d_head"),
    "logits": "d_vocab",
}
FORK_FLAGS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in", "attn.hook_result")
UNEMBED = "unembed.hook_in"
PROBE_BATCH, PROBE_TOKENS = 2, 7
CAUSAL_TOLERANCE = 1e-5


@dataclass(frozen=True)
class HarvestSite:
    """A site as the model has it.

    `kind` is `row` ([batch, pos, …]), `entry` ([batch, head, query, key]) or `prompt` ([batch, feature]); `points` are
    the hook points in the order of `layers`, or one point where the site has no layers. `n_heads` is None without a
    head axis, `width` the last axis of rows; `transform` is what capture makes of the activation first.
    """

    name: str
    hook: str
    kind: str
    layers: tuple[int, ...]
    points: tuple[HookPoint, ...]
    head_dim: str | None
    n_heads: int | None
    width: int
    width_dim: str
    transform: str | None = None


@dataclass(frozen=True)
class Probe:
    """What one forward pass of the whole model showed: its sites, and whether attention looks back only.

    The points are those that statistics look at, by layer; `residual_points` hold the last layer's besides.
    """

    sites: tuple[HarvestSite, ...]
    causal: bool
    pattern_points: Mapping[int, HookPoint]
    z_points: Mapping[int, HookPoint]
    neuron_points: Mapping[int, HookPoint]
    has_logits: bool
    needs_unembed: bool
    layers: tuple[int, ...] = ()
    residual_points: Mapping[int, HookPoint] = field(default_factory=dict)


@dataclass(frozen=True)
class Sighting:
    """What a hook point saw in one pass: its activation, how often it fired, whether the unembedding had begun."""

    value: torch.Tensor
    n_times: int
    late: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation."""
        return tuple(self.value.shape)


class EndReached(Exception):
    """Raised by a hook to leave a forward pass before its end."""


def probe(model: Model, names: Sequence[str] | None, *, layers: Sequence[int] | None) -> Probe:
    """Find the sites asked for (None: the default ones that the model has) and check them by a forward pass.

    Raises `SiteError` for a site that the model does not have, or has with another meaning, listing what there is.
    """
    chosen = _layers(model, layers)
    wanted = list(dict.fromkeys(DEFAULT_SITES if names is None else names))
    found = {name: _points(model, name, chosen) for name in wanted}
    patterns = _present(model, LAYER_SITES["pattern"], chosen)
    z_points = _present(model, LAYER_SITES["z"], chosen)
    neurons = _points(model, "mlp_post", chosen)
    logits = _points(model, "logits", chosen)
    with_last = tuple(sorted({*chosen, model.n_layers - 1}))
    residuals = _points(model, "resid_post", with_last)
    every = {id(p): p for points in found.values() for p in points.values()}
    for points in (patterns, z_points, neurons, logits, residuals):
        every |= {id(point): point for point in points.values()}
    seen, causal = _run(model, every, patterns)
    sites = []
    for name in wanted:
        try:
            sites.append(_site(model, name, found[name], chosen, seen))
        except SiteError as exc:
            if names is not None:
                raise SiteError(f"{exc}; available: {', '.join(_available(model, chosen))}") from None
    if names is None and not sites:
        raise SiteError(
            f"{model.name} has none of the default sites {', '.join(DEFAULT_SITES)}; name --sites, or none for "
            f"statistics only; available: {', '.join(_available(model, chosen))}"
        )
    late = any(seen[id(point)].late for site in sites for point in site.points)
    return Probe(
        sites=tuple(sites),
        causal=causal,
        pattern_points=_usable(patterns, seen),
        z_points=_usable(z_points, seen),
        neuron_points=_as_site(model, "mlp_post", neurons, chosen, seen),
        has_logits=bool(_as_site(model, "logits", logits, chosen, seen)),
        needs_unembed=late,
        layers=chosen,
        residual_points=_as_site(model, "resid_post", residuals, with_last, seen),
    )


def _as_site(
    model: Model,
    name: str,
    points: Mapping[int | None, HookPoint],
    layers: tuple[int, ...],
    seen: Mapping[int, Sighting],
) -> dict[int, HookPoint]:
    """Return a site's points by layer (0 for one of the whole model), none where the model has it not as it should."""
    try:
        site = _site(model, name, points, layers, seen)
    except SiteError:
        return {}
    return dict(zip(site.layers or (0,), site.points, strict=True))


def attach(stack: ExitStack, point: HookPoint, function: Any) -> None:
    """Add a hook to a point for as long as the stack is open."""
    handle: Any = point.add_hook(function)

    def detach() -> None:
        getattr(handle, "hook", handle).remove()
        if hasattr(point, "fwd_hooks"):  # a list of its own, which would keep alive all that the function holds
            point.fwd_hooks = [held for held in point.fwd_hooks if held is not handle]

    stack.callback(detach)


def forward(
    model: Model, ids: torch.Tensor, mask: torch.Tensor | None, *, unembed: bool, end: str | None = None
) -> Any:
    """Run a model; without `unembed`, leave right before the unembedding, or at the hook point `end`, if named."""
    with evaluating(model.module), torch.inference_mode(), ExitStack() as stack:
        ends = [model.hook_points[name] for name in (end, UNEMBED) if name is not None and name in model.hook_points]
        if not unembed and ends:
            for point in ends:
                attach(stack, point, _leave)
            try:
                return model.call(ids, mask)
            except EndReached:
                return None
        return model.call(ids, mask)


def _leave(tensor: torch.Tensor, hook: Any) -> None:
    raise EndReached


def _layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(model.n_layers))
    chosen = tuple(sorted(set(layers)))
    for layer in chosen:
        if not 0 <= layer < model.n_layers:
            raise SettingError(f"--layers {layer}: {model.name} has layers 0 to {model.n_layers - 1}")
    if not chosen:
        raise SettingError("--layers is empty")
    return chosen


def _points(model: Model, name: str, layers: tuple[int, ...]) -> dict[int | None, HookPoint]:
    """Return a site's hook points by layer, or under None for a site of the whole model; {} where it has none."""
    if name in MODEL_SITES:
        hook = MODEL_SITES[name]
        return {None: model.hook_points[hook]} if hook in model.hook_points else {}
    suffix = LAYER_SITES.get(name, name)
    by_layer: dict[int | None, HookPoint] = dict(_present(model, suffix, layers).items())
    if by_layer or name in LAYER_SITES:
        return by_layer
    return {None: model.hook_points[name]} if name in model.hook_points else {}


def _present(model: Model, suffix: str, layers: tuple[int, ...]) -> dict[int, HookPoint]:
    names = {layer: f"blocks.{layer}.{suffix}" for layer in layers}
    return {layer: model.hook_points[name] for layer, name in names.items() if name in model.hook_points}


def _usable(points: Mapping[int, HookPoint], seen: Mapping[int, Sighting]) -> dict[int, HookPoint]:
    """Return the hook points that statistics can use: fired once, on four axes."""
    sightings = {layer: seen.get(id(point)) for layer, point in points.items()}
    return {layer: points[layer] for layer, s in sightings.items() if s and s.n_times == 1 and s.value.ndim == 4}


def _run(
    model: Model, points: Mapping[int, HookPoint], patterns: Mapping[int, HookPoint]
) -> tuple[dict[int, Sighting], bool]:
    """Run a small random batch twice, the second time with the last token changed.

    Returns what each hook point saw, and whether nothing before the last position changed (and no pattern looks
    ahead): causality is measured, not read from the configuration.
    """
    ids = _probe_ids(model)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(model.config["d_vocab"] or 2)
    before, after = _record(model, points, ids), _record(model, points, changed)
    looking = {id(point) for point in patterns.values()}
    causal = True
    for key, sighting in before.items():
        value = sighting.value
        if key in looking:
            causal &= not bool(torch.triu(value, diagonal=1).any())
        elif value.ndim >= 3 and value.shape[:2] == ids.shape:
            causal &= _unchanged(value[:, :-1], after[key].value[:, :-1])
    return before, causal


def _unchanged(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two activations [batch, pos, …] agree to rounding, measured on each position's own scale."""
    if not before.numel() or not before.is_floating_point():
        return bool(torch.equal(before, after))
    wide, other = before.flatten(2).double(), after.flatten(2).double()
    tolerance = max(CAUSAL_TOLERANCE, 4 * torch.finfo(before.dtype).eps)
    near = (wide - other).abs() <= tolerance * wide.abs().amax(-1, keepdim=True)
    return bool((near | (wide == other) | (wide.isnan() & other.isnan())).all())


def _record(model: Model, points: Mapping[int, HookPoint], ids: torch.Tensor) -> dict[int, Sighting]:
    """Run a batch and return what each hook point saw, by the identity of the point."""
    seen: dict[int, Sighting] = {}
    unembedding: list[bool] = []
    with ExitStack() as stack:
        for key, point in points.items():

            def keep(tensor: Any, hook: Any, key: int = key) -> None:
                if isinstance(tensor, torch.Tensor):
                    n_times = seen[key].n_times + 1 if key in seen else 1
                    seen[key] = Sighting(tensor.detach().clone(), n_times, bool(unembedding))

            attach(stack, point, keep)
        if UNEMBED in model.hook_points:
            attach(stack, model.hook_points[UNEMBED], lambda tensor, hook: unembedding.append(True))
        mask = torch.ones_like(ids) if model.takes_mask else None
        try:
            forward(model, ids, mask, unembed=True)
        except (RuntimeError, ValueError, TypeError, IndexError) as exc:
            first = (str(exc).splitlines() or [type(exc).__name__])[0]
            raise ModelError(f"{model.name} does not run on token ids [batch, pos]: {first}") from exc
    return seen


def _site(
    model: Model,
    name: str,
    points: Mapping[int | None, HookPoint],
    layers: tuple[int, ...],
    seen: Mapping[int, Sighting],
) -> HarvestSite:
    """Check one site's shape against the configuration; raises `SiteError` where it does not fit its name."""
    if not SITE_NAME.fullmatch(name):
        raise SiteError(f"site {name!r} is not usable as a name")
    fired = {layer: seen[id(point)].shape for layer, point in points.items() if id(point) in seen}
    if not fired:
        gated = " (switched off in this model)" if name.endswith(FORK_FLAGS) else ""
        raise SiteError(f"{model.name} has no site {name!r}{gated}")
    if None not in fired and len(fired) != len(layers) and set(fired) != set(layers):
        missing = sorted(set(layers) - {layer for layer in fired if layer is not None})
        raise SiteError(f"{model.name} has no site {name!r} in layers {missing}; choose --layers that have it")
    n_times = max(seen[id(points[layer])].n_times for layer in fired)
    if n_times > 1:
        raise SiteError(f"{model.name} passes site {name!r} {n_times} times in one run, which cannot be stored")
    if len(set(fired.values())) != 1:
        raise SiteError(f"{model.name} has site {name!r} in several shapes: {sorted(set(fired.values()))}")
    shape = next(iter(fired.values()))
    kind, head_dim, n_heads = _kind(model, name, shape)
    width_dim = WIDTHS.get(name, "feature")
    _check_width(model, name, shape, width_dim, kind, n_heads)
    in_layers = () if None in fired else layers
    return HarvestSite(
        name=name,
        hook=MODEL_SITES.get(name) or LAYER_SITES.get(name, name),
        kind=kind,
        layers=in_layers,
        points=tuple(points[layer] for layer in in_layers) if in_layers else (points[None],),
        head_dim=head_dim,
        n_heads=n_heads,
        width=shape[-1],
        width_dim=width_dim,
    )


def _kind(model: Model, name: str, shape: tuple[int, ...]) -> tuple[str, str | None, int | None]:
    """Return (kind, head dimension's name, heads) of an activation of this shape."""
    n_heads, n_kv = model.config["n_heads"], model.config["n_kv_heads"]
    n_tokens = _probe_length(model)
    batched = shape[:1] == (PROBE_BATCH,)
    square = len(shape) == 4 and shape[1:] == (n_heads, n_tokens, n_tokens)
    if batched and square and WIDTHS.get(name) != "d_head":
        return "entry", "head", n_heads
    if batched and len(shape) == 4 and shape[1] == n_tokens and shape[2] in (n_heads, n_kv):
        kv = name in ("k", "v") or (shape[2] == n_kv and n_kv != n_heads)
        return "row", "kv_head" if kv else "head", shape[2]
    if batched and len(shape) == 3 and shape[1] == n_tokens:
        return "row", None, None
    if batched and len(shape) == 2 and name not in WIDTHS:
        return "prompt", None, None
    raise SiteError(f"{model.name} has site {name!r}, but of shape {list(shape)} for a batch of [2, {n_tokens}]")


def _check_width(
    model: Model, name: str, shape: tuple[int, ...], width_dim: str, kind: str, n_heads: int | None
) -> None:
    expected = model.config.get(width_dim)
    if name.startswith("mlp_p") and getattr(model.module.cfg, "num_experts", None):
        raise SiteError(f"{model.name} is a mixture of experts: its {name!r} is not one vector of neurons")
    if kind == "row" and expected is not None and shape[-1] != expected:
        raise SiteError(f"{model.name} has site {name!r} with {shape[-1]} features, not its {width_dim} of {expected}")
    if name in ("q", "z", "pattern") and n_heads != model.config["n_heads"]:
        raise SiteError(f"{model.name} has site {name!r} with {n_heads} heads, not {model.config['n_heads']}")


def _available(model: Model, layers: tuple[int, ...]) -> list[str]:
    """Return the named sites that would pass, with a hint at other hooks."""
    names = []
    candidates = {name: _points(model, name, layers) for name in (*LAYER_SITES, *MODEL_SITES)}
    every = {id(p): p for points in candidates.values() for p in points.values()}
    seen = _record(model, every, _probe_ids(model))
    for name, points in candidates.items():
        try:
            _site(model, name, points, layers, seen)
        except SiteError:
            continue
        names.append(name)
    return [*names, "and any hook suffix such as ln1.hook_normalized"]


def _probe_ids(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_BATCH, _probe_length(model))
    return torch.randint(0, int(model.config["d_vocab"] or 2), shape, generator=generator).to(model.device)


def _probe_length(model: Model) -> int:
    """Return the probe's tokens a prompt: as many as no other axis has, so that a shape tells its axes apart."""
    longest = min(PROBE_TOKENS, int(model.config["n_ctx"] or PROBE_TOKENS))
    taken = {PROBE_BATCH, *(model.config[name] for name in ("n_heads", "n_kv_heads", *set(WIDTHS.values())))}
    return next((n for n in range(longest, 1, -1) if n not in taken), longest)
