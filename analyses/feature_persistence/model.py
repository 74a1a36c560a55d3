"""The original's tiny transformer: post-LN, no causal mask, with TransformerLens' hook points and weight names."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

import actdb
from analyses.common.transformer import Attention, Embedding, Mlp, Unembedding, copy_weights

N_VOCABULARY, N_POSITIONS = 10, 8
SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "d_mlp": 64}
SCHEMES = ("default", "xavier", "he", "small")
SMALL_STD = 0.02


class Block(nn.Module):
    """Post-LN: each sum is normalised before the next component reads it."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg), Mlp(cfg)
        self.ln1, self.ln2 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, pos, d_model] → the same shape."""
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(self.ln1(x + self.hook_attn_out(self.attn(x))))
        out: torch.Tensor = self.hook_resid_post(self.ln2(x + self.hook_mlp_out(self.mlp(x))))
        return out


class PostNormTransformer(nn.Module):
    """The original's model; `seed` and `scheme` draw its weights, and `causal` adds the mask that it lacks.

    Called on ids [batch, pos] up to `n_ctx`; returns logits [batch, pos, token].
    """

    def __init__(self, *, seed: int, scheme: str = "default", causal: bool = False, name: str = "post-norm") -> None:
        super().__init__()
        self.cfg = cfg = SimpleNamespace(
            **SHAPE, model_name=name, d_vocab=N_VOCABULARY, n_ctx=N_POSITIONS, causal=causal, act_fn="relu"
        )
        self.embed = Embedding("W_E", cfg.d_vocab, cfg.d_model)
        self.pos_embed = Embedding("W_pos", cfg.n_ctx, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.unembed = Unembedding(cfg)
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        initialise(self, scheme, seed=seed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, pos] → logits [batch, pos, token]."""
        tokens: Any = self.embed.W_E
        positions: Any = self.pos_embed.W_pos
        x = self.hook_embed(functional.embedding(ids, tokens)) + self.hook_pos_embed(positions[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.unembed(x)
        return out


def initialise(model: PostNormTransformer, scheme: str, *, seed: int) -> None:
    """Draw all weights. Raises `SettingError` for a scheme that is not one of `SCHEMES`.

    default: as torch's layers do, U(±1/√fan_in) for weights and biases, embeddings N(0, 1); xavier and he: uniform of
    Glorot and Bengio (2010), normal of He et al. (2015), biases 0; small: N(0, 0.02²) throughout, biases 0.
    """
    if scheme not in SCHEMES:
        raise actdb.SettingError(f"scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rpartition(".")[2]
            if "ln" in name.split(".")[-2]:
                continue  # norms begin as the identity
            fan_in, fan_out = _fans(kind, model.cfg)
            if kind in ("W_E", "W_pos"):
                parameter.normal_(0, SMALL_STD if scheme == "small" else 1.0, generator=generator)
            elif scheme == "default":
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            elif kind.startswith("b_"):
                parameter.zero_()
            elif scheme == "xavier":
                bound = math.sqrt(6 / (fan_in + fan_out))
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.normal_(0, SMALL_STD if scheme == "small" else math.sqrt(2 / fan_in), generator=generator)


def restore(run: actdb.Run) -> PostNormTransformer:
    """Rebuild a harvested model from the weights stored with its run, for interventions."""
    model = PostNormTransformer(seed=0, causal=run.info.causal, name=str(run.info.model["model"]))
    copy_weights(model, run)
    return model.eval()


def _fans(kind: str, cfg: SimpleNamespace) -> tuple[int, int]:
    """Inputs and outputs of the matrix that a weight, or the bias beside it, belongs to; heads side by side."""
    letter = kind.partition("_")[2]
    d_model, heads = cfg.d_model, cfg.n_heads * cfg.d_head
    fans = {"O": (heads, d_model), "in": (d_model, cfg.d_mlp), "out": (cfg.d_mlp, d_model), "U": (d_model, cfg.d_vocab)}
    return fans.get(letter, (d_model, heads))
