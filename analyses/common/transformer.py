"""The parts of toy transformers, with TransformerLens' hook points and weight names."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint


class Attention(nn.Module):
    """Attention with biases; every query sees every key unless `cfg.causal`."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.cfg = cfg
        for name in ("Q", "K", "V"):
            setattr(self, f"W_{name}", nn.Parameter(torch.empty(cfg.n_heads, cfg.d_model, cfg.d_head)))
            setattr(self, f"b_{name}", nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head)))
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.b_O = nn.Parameter(torch.empty(cfg.d_model))
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_pattern, self.hook_z = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, pos, d_model] → the same shape."""
        q, k, v = (
            hook(torch.einsum("bpd,hde->bphe", x, getattr(self, f"W_{name}")) + getattr(self, f"b_{name}"))
            for name, hook in (("Q", self.hook_q), ("K", self.hook_k), ("V", self.hook_v))
        )
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(self.cfg.d_head)
        if self.cfg.causal:
            n = x.shape[1]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), -torch.inf)
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        return torch.einsum("bqhe,hed->bqd", z, self.W_O) + self.b_O


class Mlp(nn.Module):
    """A ReLU layer of neurons and its output."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.W_in, self.b_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp)), nn.Parameter(torch.empty(cfg.d_mlp))
        self.W_out, self.b_out = (
            nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model)),
            nn.Parameter(torch.empty(cfg.d_model)),
        )
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, pos, d_model] → the same shape."""
        neurons: torch.Tensor = self.hook_post(self.hook_pre(x @ self.W_in + self.b_in).relu())
        return neurons @ self.W_out + self.b_out


class Norm(nn.Module):
    """LayerNorm with the weights `w` and `b` of TransformerLens."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.eps = float(cfg.eps)
        self.w, self.b = nn.Parameter(torch.ones(cfg.d_model)), nn.Parameter(torch.zeros(cfg.d_model))
        self.hook_normalized = HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_model] → the same shape."""
        out: torch.Tensor = self.hook_normalized(
            nn.functional.layer_norm(x, x.shape[-1:], self.w, self.b, eps=self.eps)
        )
        return out


class PreNormBlock(nn.Module):
    """A pre-LN layer: each component reads the residual stream through a norm, or as it is (`normalization_type` None).

    `ln1` and `ln2` are there only where the layer has norms.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg), Mlp(cfg)
        if cfg.normalization_type is not None:
            self.ln1, self.ln2 = Norm(cfg), Norm(cfg)
        self.is_normalised = cfg.normalization_type is not None
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, pos, d_model] → the same shape."""
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x) if self.is_normalised else x)))
        out: torch.Tensor = self.hook_resid_post(
            x + self.hook_mlp_out(self.mlp(self.ln2(x) if self.is_normalised else x))
        )
        return out


class Embedding(nn.Module):
    """Token embeddings W_E [d_vocab, d_model], or positions W_pos [n_ctx, d_model]."""

    def __init__(self, name: str, n_rows: int, d_model: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(n_rows, d_model)))


class Unembedding(nn.Module):
    """The linear output: logits = x W_U + b_U, of `n_out` tokens (None: the vocabulary)."""

    def __init__(self, cfg: SimpleNamespace, *, n_out: int | None = None) -> None:
        super().__init__()
        n = cfg.d_vocab if n_out is None else n_out
        self.W_U, self.b_U = nn.Parameter(torch.empty(cfg.d_model, n)), nn.Parameter(torch.empty(n))
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_model] → [..., n_out]."""
        out: torch.Tensor = self.hook_out(self.hook_in(x) @ self.W_U + self.b_U)
        return out


def copy_weights(model: nn.Module, run: Any) -> None:
    """Give a model the weights stored with a run of the same shape, those of all layers and the rest."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            layer = int(parts[1]) if parts[0] == "blocks" else None
            own = ".".join(parts[2:]) if layer is not None else name
            parameter.copy_(run.torch_weight(own, layer=layer))
