"""Stored activations as TransformerLens' `ActivationCache`, read when a notebook asks for them."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from transformer_lens import ActivationCache

from actdb.errors import SelectionError, SettingError, SiteError
from actdb.harvesting.sites import LAYER_SITES, MODEL_SITES
from actdb.interchange.stand_in import NORMS, StandIn
from actdb.interchange.tensor_site import IN_BLOCK
from actdb.schema import SiteSpec

if TYPE_CHECKING:
    from actdb.run import Run

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FINAL_SCALE, POSITIONS = "ln_final.hook_scale", "hook_pos_embed"


class MissingActivation(SiteError, KeyError):
    """An activation that the run does not store; a `KeyError` too, as TransformerLens expects of a mapping."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


def open_cache(
    run: "Run", prompts: SupportsIndex | Sequence[int], *, model: Any = None, dtype: str | None = None
) -> ActivationCache:
    """Return prompts of one length as a TransformerLens cache; see `Run.activation_cache`."""
    ids = [int(prompts)] if isinstance(prompts, SupportsIndex) else [int(prompt) for prompt in prompts]
    if not ids:
        raise SelectionError("activation_cache: no prompt given")
    lengths = {len(run.tokens(prompt)) for prompt in ids}
    if len(lengths) > 1:
        raise SelectionError(
            f"activation_cache: prompts of {min(lengths)} to {max(lengths)} tokens; a batch holds prompts of one length"
        )
    name = dtype or str(run.info.plan.get("dtype"))
    if name not in DTYPES:
        raise SettingError(f"activation_cache: dtype {name!r}; choose one of {', '.join(DTYPES)}")
    stored: Any = StoredActivations(run, ids, DTYPES[name])
    return ActivationCache(stored, StandIn(run, DTYPES[name]) if model is None else model)


def site_of(name: str) -> str:
    """Return the site that a hook name belongs to: its short name, or the hook's suffix."""
    match = IN_BLOCK.fullmatch(name)
    known = LAYER_SITES if match else MODEL_SITES
    hook = match[2] if match else name
    return next((site for site, suffix in known.items() if suffix == hook), hook)


class StoredActivations(MutableMapping[str, torch.Tensor]):
    """Tensors by hook name, with the batch first: what `run_with_cache` gives, as far as it is stored.

    A tensor is read at its first use and kept, so that what a notebook changes in it stays. Two are made of what is
    stored: the final norm's scale of the last `resid_post`, and position embeddings of the weights.
    """

    def __init__(self, run: "Run", prompts: Sequence[int], dtype: torch.dtype) -> None:
        self._run, self._prompts, self._dtype = run, list(prompts), dtype
        self._sites: dict[str, tuple[SiteSpec, int | None]] = {}
        for spec in run.info.sites:
            if "rank" in spec.dims or spec.added:
                continue  # the largest weights of a pattern go by the pattern's hook, but are not it
            for layer in spec.layers or (None,):
                self._sites[spec.hook if layer is None else f"blocks.{layer}.{spec.hook}"] = (spec, layer)
        self._last = f"blocks.{int(run.info.model.get('n_layers') or 0) - 1}.hook_resid_post"
        made = {FINAL_SCALE: self._final_scale} if self._scale_follows() else {}
        made |= {POSITIONS: self._position_embeddings} if self._positions_follow() else {}
        self._made = {name: make for name, make in made.items() if name not in self._sites}
        self._known = dict.fromkeys((*self._sites, *self._made))
        self._values: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._values:
            if name not in self._known:
                sites = self._run.sites
                raise MissingActivation(
                    f"run {self._run.name!r} does not store {name!r}; it holds {', '.join(sites) or 'none'}: "
                    f"harvest with --sites {','.join([*sites, site_of(name)])}"
                )
            self._values[name] = self._made[name]() if name in self._made else self._read(*self._sites[name])
        return self._values[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._values[name] = value
        self._known[name] = None

    def __delitem__(self, name: str) -> None:
        if name not in self._known:
            raise MissingActivation(f"there is no {name!r} to delete")
        del self._known[name]
        self._values.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._known))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def _read(self, spec: SiteSpec, layer: int | None) -> torch.Tensor:
        selection = self._run[spec.name].sel(layer=layer, prompt=self._prompts)
        if spec.dims[-1] == "entry":
            values = np.stack(selection.numpy())  # [batch, head, query, key]
        elif "prompt" in spec.dims:
            values = np.asarray(selection.numpy())  # [batch, feature]
        else:
            rows = np.asarray(selection.numpy())  # [head, batch·pos, d_head] or [batch·pos, d_model]
            rows = rows.swapaxes(0, 1) if rows.ndim == 3 else rows
            values = rows.reshape(len(self._prompts), -1, *rows.shape[1:])
        return torch.from_numpy(np.array(values)).to(self._dtype)

    def _scale_follows(self) -> bool:
        model = self._run.info.model
        known = model.get("normalization") in NORMS and model.get("norm_eps") is not None
        return known and self._last in self._sites

    def _positions_follow(self) -> bool:
        """Whether there is a table with a row for each position; some models keep further ones, and shift it."""
        run = self._run
        return "pos_embed.W_pos" in run.weight_names() and len(run.weight("W_pos")) == run.info.model.get("n_ctx")

    def _position_embeddings(self) -> torch.Tensor:
        """The first rows of W_pos for each prompt: [batch, pos, d_model]."""
        n_tokens = len(self._run.tokens(self._prompts[0]))
        first = n_tokens - 1 if self._run.info.plan.get("positions") == "last" else 0
        rows = self._run.torch_weight("W_pos")[first:n_tokens].to(self._dtype)
        return rows.repeat(len(self._prompts), 1, 1)

    def _final_scale(self) -> torch.Tensor:
        """√(mean x² + ε) of the last residual stream, centred first for a LayerNorm: [batch, pos, 1]."""
        model = self._run.info.model
        residual = self[self._last].float()
        if str(model["normalization"]).startswith("LN"):
            residual = residual - residual.mean(-1, keepdim=True)
        scale = (residual.square().mean(-1, keepdim=True) + float(model["norm_eps"])).sqrt()
        return scale.to(self._dtype)
