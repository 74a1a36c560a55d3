"""A tiny hooked module: everything that a harvest looks at, small enough to run hundreds of times in a test.

Run as a program it is a harvest for the fault tests: `python -m tests.hooked OUT '{"run": "a"}'`.
"""

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint


class Attention(nn.Module):
    """Attention with fewer key and value heads than query heads."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_Q = nn.Parameter(torch.randn(cfg.n_heads, cfg.d_model, cfg.d_head))
        self.W_K = nn.Parameter(torch.randn(cfg.n_key_value_heads, cfg.d_model, cfg.d_head))
        self.W_V = nn.Parameter(torch.randn(cfg.n_key_value_heads, cfg.d_model, cfg.d_head))
        self.W_O = nn.Parameter(torch.randn(cfg.n_heads, cfg.d_head, cfg.d_model) / cfg.d_model)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_pattern, self.hook_z = HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q = self.hook_q(torch.einsum("bpd,hde->bphe", x, self.W_Q))
        k = self.hook_k(torch.einsum("bpd,hde->bphe", x, self.W_K))
        v = self.hook_v(torch.einsum("bpd,hde->bphe", x, self.W_V))
        share = self.cfg.n_heads // self.cfg.n_key_value_heads
        k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / self.cfg.d_head**0.5
        if self.cfg.causal:
            n = x.shape[1]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        elif mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        return torch.einsum("bqhe,hed->bqd", z, self.W_O)


class Mlp(nn.Module):
    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp) / cfg.d_model)
        self.W_out = nn.Parameter(torch.randn(cfg.d_mlp, cfg.d_model) / cfg.d_mlp)
        self.hook_post = HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.hook_post((x @ self.W_in).relu()) @ self.W_out
        return out


class Block(nn.Module):
    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg), Mlp(cfg)
        self.hook_resid_post = HookPoint()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn(x, mask)
        out: torch.Tensor = self.hook_resid_post(x + self.mlp(x))
        return out


class TinyModel(nn.Module):
    """A transformer with `embed` (no layers), the default sites, `k`, `v`, and the prompt-level site `hook_pooled`."""

    def __init__(
        self,
        *,
        n_layers: int = 2,
        n_heads: int = 2,
        n_kv_heads: int = 1,
        d_model: int = 8,
        d_vocab: int = 16,
        n_ctx: int = 32,
        causal: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name="tiny",
            n_layers=n_layers,
            n_heads=n_heads,
            n_key_value_heads=n_kv_heads,
            d_model=d_model,
            d_head=d_model // n_heads,
            d_mlp=2 * d_model,
            d_vocab=d_vocab,
            n_ctx=n_ctx,
            causal=causal,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.W_E = nn.Parameter(torch.randn(d_vocab, d_model))
            self.blocks = nn.ModuleList(Block(self.cfg) for _ in range(n_layers))
        self.hook_embed, self.hook_pooled = HookPoint(), HookPoint()

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        n = ids.shape[1]
        x = self.hook_embed(self.W_E[ids] + torch.arange(n)[:, None] / n_positions(self.cfg))
        for block in self.blocks:
            x = block(x, attention_mask)
        self.hook_pooled(x[:, 0])  # position 0: does not depend on padding
        return x @ self.W_E.T


def n_positions(cfg: SimpleNamespace) -> int:
    """The context length, as a scale of the position's feature."""
    return int(cfg.n_ctx)


def random_prompts(n: int, *, longest: int = 12, d_vocab: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts of random lengths with a label column `kind` and a number `i`."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, n).tolist()
    return [
        {"tokens": generator.integers(0, d_vocab, length).tolist(), "kind": "ab"[i % 2], "i": i}
        for i, length in enumerate(lengths)
    ]
