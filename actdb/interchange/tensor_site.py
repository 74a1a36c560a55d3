"""From tensors by hook name to sites: which there are, of which shapes, and what they say about the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actdb.errors import ActivationsError, SiteError
from actdb.harvesting.sites import LAYER_SITES, MODEL_SITES, WIDTHS, HarvestSite
from actdb.schema import SITE_NAME

IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
STORES = {torch.float16: "float16", torch.float32: "float32", torch.bfloat16: "float32"}
"""What holds a dtype's values exactly."""
DTYPES = {torch.float16: "float16", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
HEADED = ("q", "k", "v", "z")


@dataclass(frozen=True)
class FoundSites:
    """The sites of a file: how each is stored, and its tensors in the order of its layers, with the batch first."""

    sites: tuple[HarvestSite, ...]
    names: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, torch.Tensor]

    @property
    def dtype(self) -> str:
        """The widest dtype of the tensors: what the model computed in, as far as one can tell."""
        dtypes = {self.tensors[name].dtype for names in self.names.values() for name in names}
        return DTYPES[max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))]

    @property
    def n_layers(self) -> int | None:
        """One more than the highest layer that any tensor of the file belongs to."""
        layers = [int(match[1]) for match in map(IN_BLOCK.fullmatch, self.tensors) if match]
        return max(layers) + 1 if layers else None

    def config(self, model: str) -> dict[str, Any]:
        """Return the columns of the table `models`, None for what the shapes do not tell."""
        widths = {site.width_dim: site.width for site in self.sites if site.kind == "row"}
        heads = {site.head_dim: site.n_heads for site in self.sites if site.head_dim}
        n_heads = heads.get("head")
        return {
            "model": model,
            "architecture": None,
            "n_layers": self.n_layers,
            "n_heads": n_heads,
            "n_kv_heads": heads.get("kv_head", n_heads),
            **{name: widths.get(name) for name in ("d_model", "d_head", "d_mlp", "d_vocab")},
            "n_ctx": None,
            "norm_eps": None,
            "normalization": None,
        }


def find_sites(
    tensors: Mapping[str, torch.Tensor],
    wanted: Sequence[str] | None,
    *,
    layers: Sequence[int] | None,
    n_prompts: int,
    n_pos: int,
) -> FoundSites:
    """Return the sites asked for, or every named one that the tensors hold, with shapes checked.

    Raises `SiteError` for a site that is not there and `ActivationsError`, naming the tensor, for a shape that does not
    fit the prompts or the other tensors.
    """
    names = {site: _tensor_names(tensors, site, layers) for site in wanted or (*LAYER_SITES, *MODEL_SITES)}
    lacking = [site for site, found in names.items() if not found]
    if (wanted and lacking) or len(lacking) == len(names):
        what = f"no site {lacking[0]!r}" if wanted else "no tensor of a known site"
        some = ", ".join(list(tensors)[:8])
        raise SiteError(f"the file holds {what}; its tensors: {some}{', …' if len(tensors) > 8 else ''}")
    kept = {site: found for site, found in names.items() if found}
    held = _with_batch(tensors, kept) if n_prompts == 1 else dict(tensors)
    n_heads = _query_heads(held, kept, n_pos)
    sites = tuple(_site(held, site, found, n_heads, (n_prompts, n_pos)) for site, found in kept.items())
    _check_together(sites, kept)
    return FoundSites(sites, {site: tuple(found.values()) for site, found in kept.items()}, held)


def _tensor_names(
    tensors: Mapping[str, torch.Tensor], site: str, layers: Sequence[int] | None
) -> dict[int | None, str]:
    """Return a site's tensors by layer, ascending, or under None for a site of the whole model."""
    if not SITE_NAME.fullmatch(site):
        raise SiteError(f"site {site!r} is not usable as a name")
    hook = MODEL_SITES.get(site) or LAYER_SITES.get(site, site)
    found = {int(m[1]): name for name in tensors if (m := IN_BLOCK.fullmatch(name)) and m[2] == hook}
    chosen: dict[int | None, str] = {n: found[n] for n in sorted(found) if layers is None or n in layers}
    if chosen or site in LAYER_SITES:
        return chosen
    return {None: hook} if hook in tensors else {}


def _with_batch(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, Mapping[int | None, str]]
) -> dict[str, torch.Tensor]:
    """Return the tensors of one prompt with the batch axis that `remove_batch_dim` took away."""
    known = [(tensors[name].ndim, _rank(site)) for site, found in names.items() for name in found.values()]
    lacks = any(rank for _, rank in known) and all(n_axes == rank - 1 for n_axes, rank in known if rank)
    return {name: tensor[None] if lacks else tensor for name, tensor in tensors.items()}


def _rank(site: str) -> int:
    """Return the axes of a named site's tensors with the batch; 0 for one that is not known by name."""
    if site in HEADED or site == "pattern":
        return 4
    return 3 if site in WIDTHS else 0


def _query_heads(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, Mapping[int | None, str]], n_pos: int
) -> int | None:
    for site, axis in (("pattern", 1), ("z", 2), ("q", 2)):
        for name in names.get(site, {}).values():
            if tensors[name].ndim == 4:
                return int(tensors[name].shape[axis])
    return None


def _site(
    tensors: Mapping[str, torch.Tensor],
    site: str,
    names: Mapping[int | None, str],
    n_heads: int | None,
    batch: tuple[int, int],
) -> HarvestSite:
    first, *others = names.values()
    shape = tuple(tensors[first].shape)
    for name in names.values():
        if tensors[name].dtype not in DTYPES:
            raise ActivationsError(f"{name} holds {tensors[name].dtype}, not floating-point numbers")
    for name in others:
        if tuple(tensors[name].shape) != shape:
            raise ActivationsError(f"{name} is {list(tensors[name].shape)}, but {first} is {list(shape)}")
    kind = _kind(site, first, shape, batch)
    heads = shape[1] if kind == "entry" else shape[2] if len(shape) == 4 else None
    grouped = site in ("k", "v") or (kind == "row" and site not in HEADED and n_heads not in (None, heads))
    return HarvestSite(
        name=site,
        hook=MODEL_SITES.get(site) or LAYER_SITES.get(site, site),
        kind=kind,
        layers=tuple(layer for layer in names if layer is not None),
        points=(),
        head_dim=None if heads is None else "kv_head" if grouped else "head",
        n_heads=heads,
        width=shape[-1],
        width_dim=WIDTHS.get(site, "feature"),
    )


def _kind(site: str, name: str, shape: tuple[int, ...], batch: tuple[int, int]) -> str:
    """Return what the axes of a tensor are: rows, pattern entries, or one vector a prompt."""
    n_prompts, n_pos = batch
    rank = _rank(site)
    square = len(shape) == 4 and shape[2:] == (n_pos, n_pos) and site not in HEADED
    rows = len(shape) in (3, 4) and shape[1] == n_pos
    if rank not in (0, len(shape)) or not shape or 0 in shape:
        axes = {3: "[batch, pos, feature]", 4: "[batch, pos, head, feature]"}.get(rank, "[batch, …]")
        raise ActivationsError(
            f"{name} is {list(shape)}, not {'[batch, head, query, key]' if site == 'pattern' else axes}"
        )
    if shape[0] != n_prompts:
        raise ActivationsError(f"{name} is {list(shape)}: {shape[0]} prompts, but there are {n_prompts} prompts")
    if site == "pattern" or (square and not rows):
        if not square:
            raise ActivationsError(f"{name} is {list(shape)}{_expected(n_pos)}")
        return "entry"
    if len(shape) == 2:
        return "prompt"
    if square or not rows:
        why = ": its axes can be read in two ways; leave its site out" if square else _expected(n_pos)
        raise ActivationsError(f"{name} is {list(shape)}{why}")
    return "row"


def _expected(n_pos: int) -> str:
    return (
        f", but the prompts have {n_pos} positions: the longest one's tokens, or --pad-to. "
        "Is a BOS missing from the prompts, or one too many?"
    )


def _check_together(sites: Sequence[HarvestSite], names: Mapping[str, Mapping[int | None, str]]) -> None:
    """Raise where two sites disagree about the width or the heads of the model."""
    seen: dict[str, tuple[int, str]] = {}
    for site in sites:
        name = next(iter(names[site.name].values()))
        known = {site.width_dim: site.width} if site.kind == "row" and site.width_dim != "feature" else {}
        if site.head_dim and site.n_heads:
            known[site.head_dim] = site.n_heads
        for dim, n in known.items():
            other, where = seen.setdefault(dim, (n, name))
            if other != n:
                raise ActivationsError(f"{name} has {dim} {n}, but {where} has {other}")
