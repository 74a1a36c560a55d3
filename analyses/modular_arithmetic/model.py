"""Networks that compute (a + b) mod p: two transformers and two memories, all hooked, all called alike.

A model is called on ids [batch, pos], `a b =` or `a b`, and returns the logits of the answer [batch, p]; these pass
`hook_answer`, the prompt-level site that every architecture has. So one harvest, one ablation and one loss serve all.

- `one-layer`, after Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability": no norms,
  no biases, causal, `a b =`, the answer read at the last position.
- `pooled`: two pre-LN layers that look both ways, `a b`, the answer read from the mean over the two positions.
- `lookup`: a vector of its own for each pair, and nothing that two pairs share but the unembedding.
- `hybrid`: such a vector, and beside it a hidden layer that reads the embeddings of both numbers.
"""

import math
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

import actdb
from analyses.common.transformer import Embedding, Norm, PreNormBlock, Unembedding, copy_weights

ANSWER = "hook_answer"
"""The prompt-level site of the answer's logits."""
MEMORIES = ("lookup", "hybrid")
EPS = 1e-5
INITIAL_SCALE = 0.8
"""Weights begin as N(0, (0.8 / √d_model)²), as transformer-lens has it."""


@dataclass(frozen=True)
class Shape:
    """What a model is made of; `equals` adds the token `=` (id p) and reads the answer there unless `pooled`.

    The memories have no layers and no heads: d_mlp is the width of the hybrid's hidden layer.
    """

    kind: str
    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    norm: bool = False
    pooled: bool = False
    equals: bool = True
    biases: bool = False
    causal: bool = True

    @property
    def n_ctx(self) -> int:
        """Tokens of a prompt."""
        return 3 if self.equals else 2


SHAPES = {
    "one-layer": Shape("one-layer", n_layers=1, d_model=128, n_heads=4, d_mlp=512),
    "pooled": Shape(
        "pooled", n_layers=2, d_model=64, n_heads=4, d_mlp=256,
        norm=True, pooled=True, equals=False, biases=True, causal=False,
    ),
    "lookup": Shape("lookup", n_layers=0, d_model=64, n_heads=0, d_mlp=0, equals=False, biases=True, causal=False),
    "hybrid": Shape("hybrid", n_layers=0, d_model=64, n_heads=0, d_mlp=256, equals=False, biases=True, causal=False),
}  # fmt: skip


def shape_of(architecture: str, **changes: int) -> Shape:
    """Return an architecture's shape with some sizes changed; raises `SettingError` for an unknown one."""
    if architecture not in SHAPES:
        raise actdb.SettingError(f"architecture {architecture!r}: choose one of {', '.join(SHAPES)}")
    return replace(SHAPES[architecture], **changes)  # type: ignore[arg-type]


class ModularTransformer(nn.Module):
    """A transformer over pairs: ids [batch, n_ctx] → logits of the answer [batch, p].

    Weights have TransformerLens' names; `unembed` has p outputs. Biases are always there, so that any TransformerLens
    state dict of this shape loads; without `shape.biases` they stay 0 and are not trained.
    """

    def __init__(self, shape: Shape, modulus: int, *, seed: int, name: str) -> None:
        super().__init__()
        self.shape, self.modulus = shape, modulus
        self.cfg = cfg = configuration(shape, modulus, name=name)
        self.embed = Embedding("W_E", cfg.d_vocab, cfg.d_model)
        self.pos_embed = Embedding("W_pos", cfg.n_ctx, cfg.d_model)
        self.blocks = nn.ModuleList(PreNormBlock(cfg) for _ in range(cfg.n_layers))
        if shape.norm:
            self.ln_final = Norm(cfg)
        self.unembed = Unembedding(cfg, n_out=modulus)
        self.hook_embed, self.hook_pos_embed, self.hook_answer = HookPoint(), HookPoint(), HookPoint()
        initialise(self, d_model=cfg.d_model, seed=seed)
        if not shape.biases:
            for own, parameter in self.named_parameters():
                if ".b_" in own:
                    parameter.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, n_ctx] → [batch, p]."""
        tokens: Any = self.embed.W_E
        positions: Any = self.pos_embed.W_pos
        placed = positions[: ids.shape[1]].expand(len(ids), -1, -1)
        x = self.hook_embed(functional.embedding(ids, tokens)) + self.hook_pos_embed(placed)
        for block in self.blocks:
            x = block(x)
        if self.shape.norm:
            x = self.ln_final(x)
        x = x.mean(1) if self.shape.pooled else x[:, -1]
        out: torch.Tensor = self.hook_answer(self.unembed(x))
        return out


class Memory(nn.Module):
    """A vector for each pair, alone (`lookup`) or beside a hidden layer (`hybrid`): ids [batch, 2] → answer [batch, p].

    The hidden layer reads the embeddings of a and b side by side, and adds to the pair's vector.
    """

    def __init__(self, shape: Shape, modulus: int, *, seed: int, name: str) -> None:
        super().__init__()
        self.shape, self.modulus = shape, modulus
        self.cfg = cfg = configuration(shape, modulus, name=name)
        self.memory = Embedding("W_M", modulus**2, cfg.d_model)
        self.embed = Embedding("W_E", modulus, cfg.d_model)
        if shape.d_mlp:
            self.hidden = nn.ParameterDict(
                {
                    "W_in": torch.empty(2 * cfg.d_model, shape.d_mlp),
                    "b_in": torch.empty(shape.d_mlp),
                    "W_out": torch.empty(shape.d_mlp, cfg.d_model),
                }
            )
        else:
            self.embed.requires_grad_(False)  # not read: `number_embedding` says what stands for it
        self.unembed = Unembedding(cfg, n_out=modulus)
        self.hook_embed, self.hook_memory, self.hook_hidden = HookPoint(), HookPoint(), HookPoint()
        self.hook_answer = HookPoint()
        initialise(self, d_model=cfg.d_model, seed=seed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, 2] → [batch, p]."""
        vectors: Any = self.memory.W_M
        x = self.hook_memory(functional.embedding(ids[:, 0] * self.modulus + ids[:, 1], vectors))
        tokens: Any = self.embed.W_E
        numbers = self.hook_embed(functional.embedding(ids, tokens))
        if self.shape.d_mlp:
            weights = self.hidden
            x = x + self.hook_hidden((numbers.flatten(1) @ weights["W_in"] + weights["b_in"]).relu()) @ weights["W_out"]
        out: torch.Tensor = self.hook_answer(self.unembed(x))
        return out


ModularModel = ModularTransformer | Memory


def build(architecture: str | Shape, modulus: int, *, seed: int, name: str | None = None) -> ModularModel:
    """Return a model with weights drawn from `seed`; raises `SettingError` for an unknown one and for p < 3."""
    shape = shape_of(architecture) if isinstance(architecture, str) else architecture
    if modulus < 3:
        raise actdb.SettingError(f"modulus {modulus}: at least 3")
    made = Memory if shape.kind in MEMORIES else ModularTransformer
    return made(shape, modulus, seed=seed, name=name or f"{shape.kind}-p{modulus}")


def restore(run: actdb.Run) -> ModularModel:
    """Rebuild a harvested model from the weights and sizes stored with its run, for interventions."""
    first = run.weight("W_E")
    config = run.info.model
    name = str(config["model"])
    kinds = {str(cls.__name__): cls for cls in (ModularTransformer, Memory)}
    if config["architecture"] not in kinds:
        raise actdb.ModelError(f"run {run.name!r} is of a {config['architecture']}, not of a model of this analysis")
    modulus = int(run.weight("W_U").shape[1])
    if config["architecture"] == "Memory":
        names = run.weight_names()
        width = int(run.weight("hidden.W_in").shape[1]) if "hidden.W_in" in names else 0
        shape = replace(SHAPES["hybrid" if width else "lookup"], d_model=int(first.shape[1]), d_mlp=width)
    else:
        shape = _stored_shape(run, modulus)
    model = build(shape, modulus, seed=0, name=name)
    copy_weights(model, run)
    return model.eval()


def _stored_shape(run: actdb.Run, modulus: int) -> Shape:
    """The shape of a stored transformer: sizes from its configuration, the rest from its weights and its causality."""
    config = run.info.model
    normed = "ln_final.w" in run.weight_names()
    biased = any(bool(run.weight(name, layer=layer).any()) for layer in run.layers for name in ("b_Q", "b_in", "b_out"))
    causal = bool(run.info.causal)
    return Shape(
        "one-layer" if causal else "pooled",
        n_layers=int(config["n_layers"]),
        d_model=int(config["d_model"]),
        n_heads=int(config["n_heads"]),
        d_mlp=int(config["d_mlp"]),
        norm=normed,
        pooled=not causal,
        equals=int(config["n_ctx"]) == 3,
        biases=biased,
        causal=causal,
    )


def configuration(shape: Shape, modulus: int, *, name: str) -> SimpleNamespace:
    """Return the `cfg` that a harvest reads."""
    sizes = {key: value for key, value in asdict(shape).items() if key in ("n_layers", "d_model")}
    return SimpleNamespace(
        **sizes,
        model_name=name,
        n_heads=shape.n_heads or None,
        d_head=shape.d_model // shape.n_heads if shape.n_heads else None,
        d_mlp=shape.d_mlp or None,
        d_vocab=modulus + 1 if shape.equals else modulus,
        d_vocab_out=modulus,
        n_ctx=shape.n_ctx,
        causal=shape.causal,
        act_fn="relu",
        eps=EPS,
        normalization_type="LN" if shape.norm else None,
    )


def initialise(model: nn.Module, *, d_model: int, seed: int) -> None:
    """Draw the weights as N(0, (0.8 / √d_model)²); biases begin at 0, norms as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rpartition(".")[2]
            if kind.startswith("W_"):
                parameter.normal_(0, INITIAL_SCALE / math.sqrt(d_model), generator=generator)
            elif kind.startswith("b_"):
                parameter.zero_()


def number_embedding(weights: ModularModel | actdb.Run) -> npt.NDArray[np.float32]:
    """Return what stands for each number [p, d_model]: its row of W_E; for `lookup` the mean of its pairs' vectors.

    Takes a model or a run; a mean over pairs counts those with the number in the first place.
    """
    if isinstance(weights, actdb.Run):
        modulus = int(weights.weight("W_U").shape[1])
        names = weights.weight_names()
        is_lookup = "memory.W_M" in names and "hidden.W_in" not in names
        table = weights.weight("memory.W_M" if is_lookup else "W_E")
    else:
        modulus, is_lookup = weights.modulus, weights.shape.kind == "lookup"
        source: Any = weights.memory.W_M if isinstance(weights, Memory) and is_lookup else weights.embed.W_E
        table = source.detach().cpu().numpy()
    rows = table.reshape(modulus, modulus, -1).mean(1) if is_lookup else table[:modulus]
    return np.asarray(rows, np.float32)


def pair_ids(modulus: int, *, equals: bool) -> npt.NDArray[np.int64]:
    """Return the prompts of the grid in (a, b) order [p², 2 or 3]: pair a, b is prompt a·p + b."""
    a, b = np.divmod(np.arange(modulus**2), modulus)
    return np.stack([a, b, np.full_like(a, modulus)] if equals else [a, b], axis=1)


def answers(modulus: int) -> npt.NDArray[np.int64]:
    """Return (a + b) mod p of each pair of the grid [p²]."""
    return np.asarray(pair_ids(modulus, equals=False).sum(1) % modulus)
