"""The model of a run, as far as an `ActivationCache` asks for one: made of the weights that are stored with the run."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from actdb.errors import SelectionError
from actdb.unembedding import NORM_WEIGHTS, FinalNorm

if TYPE_CHECKING:
    from actdb.run import Run

NORMS = ("LN", "LNPre", "RMS", "RMSPre")
SCALED = "Granite"
"""Architectures of this kind scale what layers write by a factor that is not recorded."""
NEEDS = "give activation_cache(…, model=…) the model itself"


class Configuration(SimpleNamespace):
    """A model's shape and kind by TransformerLens' names."""

    @property
    def normalization_type(self) -> str | None:
        """LN, RMS and the like, or None for a model without; raises `SelectionError` where that is not recorded."""
        if self.normalization is None:
            raise SelectionError(f"the norms of {self.model_name} are not recorded; {NEEDS}")
        return None if self.normalization == "None" else str(self.normalization)


class StandIn:
    """The configuration, and weights read when a method of the cache uses them, in the cache's dtype.

    Shapes and names are TransformerLens': `blocks[layer].attn.W_O` [head, d_head, d_model], `W_U` [d_model, d_vocab],
    `ln_final`. It does not run. Raises `SelectionError` where a weight is not stored.
    """

    def __init__(self, run: "Run", dtype: torch.dtype) -> None:
        self._run, self._dtype = run, dtype
        known = dict(run.info.model)
        self.cfg = Configuration(
            **{"architecture": None, "normalization": None, **known},
            model_name=known.get("model"),
            attn_only=known.get("d_mlp") is None,
            eps=known.get("norm_eps"),
            device="cpu",
            dtype=dtype,
        )
        self.blocks = [Block(self, layer) for layer in range(int(known.get("n_layers") or 0))]

    @property
    def W_U(self) -> torch.Tensor:
        """The unembedding [d_model, d_vocab]."""
        return self._weight("W_U")

    @property
    def b_U(self) -> torch.Tensor:
        """The unembedding's bias [d_vocab], zero where the model has none."""
        bias = self.optional_weight("unembed.b_U")
        return torch.zeros(self.W_U.shape[1], dtype=self._dtype) if bias is None else bias

    @property
    def unembed(self) -> Any:
        """Raise `SelectionError`: a readout may transform logits in ways that are not recorded."""
        raise SelectionError(f"reading out logits needs the model; {NEEDS}, or use SQL's logit_lens()")

    @property
    def ln_final(self) -> Callable[[torch.Tensor], Any]:
        """The final norm of [batch, pos, d_model]; raises `SelectionError` for one that is not known."""
        kind = self.cfg.normalization_type
        if kind not in NORMS or self.cfg.eps is None:
            raise SelectionError(f"run {self._run.name!r}: its final norm is not recorded; {NEEDS}")
        return FinalNorm.make(
            {name: self.optional_weight(name) for name in NORM_WEIGHTS}, self._run.info.model
        ).normalised

    def tokens_to_residual_directions(self, tokens: "str | int | torch.Tensor") -> torch.Tensor:
        """Return the columns of W_U of tokens: [*tokens, d_model], without the axes of a single one."""
        if isinstance(tokens, torch.Tensor) and tokens.numel() > 1:
            return self.W_U[:, tokens].movedim(0, -1)
        return self.W_U[:, self.to_single_token(tokens) if isinstance(tokens, str) else int(tokens)]

    def to_single_token(self, text: str) -> int:
        """Return the id of a token by its text; raises `SelectionError` for one that no prompt of the run holds."""
        found = [token for token, known in self._run.vocabulary().items() if known == text]
        if len(found) != 1:
            raise SelectionError(f"{text!r} is the text of {len(found)} tokens of run {self._run.name!r}; give its id")
        return found[0]

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> torch.Tensor:
        """Return the sum of the output biases [d_model] below `layer`, with its attention's where `mlp_input`."""
        names = [(below, "b_O") for below in range(layer + mlp_input)]
        names += [(below, "b_out") for below in range(layer) if include_mlp_biases]
        total = torch.zeros(int(self.cfg.d_model), dtype=self._dtype)
        for below, name in names:
            bias = self.optional_weight(f"blocks.{below}.{'attn' if name == 'b_O' else 'mlp'}.{name}", layer=below)
            total = total if bias is None else total + bias
        return total

    def optional_weight(self, name: str, *, layer: int | None = None) -> torch.Tensor | None:
        """Return a weight by its full name, or None where the model has none of that name."""
        return self._weight(name, layer=layer) if name in self._run.weight_names(layer=layer) else None

    def _weight(self, name: str, *, layer: int | None = None) -> torch.Tensor:
        if layer is not None and str(self.cfg.architecture).startswith(SCALED):
            raise SelectionError(f"{self.cfg.architecture} scales what its layers write by an unknown factor; {NEEDS}")
        try:
            short = name.removeprefix(f"blocks.{layer}.")  # names of a layer's weights are looked up below the layer
            return self._run.torch_weight(short, layer=layer).to(self._dtype)
        except SelectionError as exc:
            raise SelectionError(f"{exc}; {NEEDS}") from exc


class Block:
    """One layer, with `attn.W_O` and `mlp.W_out`."""

    def __init__(self, model: StandIn, layer: int) -> None:
        self.attn, self.mlp = Weights(model, layer), Weights(model, layer)


class Weights:
    """A layer's weights as attributes, such as `W_O`."""

    def __init__(self, model: StandIn, layer: int) -> None:
        self._model, self._layer = model, layer

    def __getattr__(self, name: str) -> torch.Tensor:
        if not name.startswith(("W_", "b_")):
            raise AttributeError(name)
        return self._model._weight(name, layer=self._layer)
