"""Cases whose answer is known: heads in blocks, transformers built by hand, states on a circle, rings and blobs.

A hand-built transformer has attention alone, no norm, and weights that are nearly all zero. Its residual stream is the
token (one-hot), then what the heads write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

import actdb

Floats = npt.NDArray[np.float64]
MARKS = ("x", "y")
SHARP = 12.0
"""Attention logits between what attends and what it looks for: others get e^-12."""


def planted_fingerprints(
    *, n_blocks: int, heads_a_block: int, n_prompts: int, noise: float = 0.5, seed: int = 0
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return fingerprints [prompt, head] whose heads follow one signal a block, and each head's block.

    Without blocks (0) every head is noise of its own: the control.
    """
    generator = np.random.default_rng(seed)
    block = np.repeat(np.arange(max(n_blocks, 1)), heads_a_block)
    own = generator.standard_normal((n_prompts, len(block)))
    signals = generator.standard_normal((n_prompts, max(n_blocks, 1)))
    return 5 + (signals[:, block] + noise * own if n_blocks else own), block


def ring_cloud(*, n: int, width: int, spread: float = 0.05, seed: int = 0) -> Floats:
    """Return points [n, width] on a circle in a random plane, with some noise in every direction."""
    generator = np.random.default_rng(seed)
    plane = np.linalg.qr(generator.standard_normal((width, 2)))[0]
    angle = generator.uniform(0, 2 * np.pi, n)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.asarray(circle @ plane.T + spread * generator.standard_normal((n, width)))


def blob_cloud(*, n: int, width: int, seed: int = 0) -> Floats:
    """Return points [n, width] of a Gaussian with falling variances: no ring."""
    return np.asarray(np.random.default_rng(seed).standard_normal((n, width)) / np.sqrt(1 + np.arange(width)))


class HandBuilt(nn.Module):
    """Attention-only layers without norm, all weights zero until they are set; called on ids [batch, pos]."""

    def __init__(self, *, n_layers: int, n_heads: int, d_model: int, d_head: int, d_vocab: int, name: str) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            model_name=name,
            n_layers=n_layers,
            n_heads=n_heads,
            d_model=d_model,
            d_head=d_head,
            d_vocab=d_vocab,
            n_ctx=64,
        )
        self.embed = _weights(W_E=(d_vocab, d_model))
        self.blocks = nn.ModuleList(_block(n_heads, d_model, d_head) for _ in range(n_layers))
        self.unembed = _weights(W_U=(d_model, d_vocab))
        self.unembed.hook_in, self.unembed.hook_out = HookPoint(), HookPoint()

    def attention(self, layer: int) -> Any:
        """Return the weights of a layer's heads."""
        block: Any = self.blocks[layer]
        return block.attn

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, pos] → logits [batch, pos, token]."""
        found: Any = self.embed
        x = found.W_E[ids]
        for block in self.blocks:
            x = _attend(block, x)
        readout: Any = self.unembed
        out: torch.Tensor = readout.hook_out(readout.hook_in(x) @ readout.W_U)
        return out


def _weights(**shapes: tuple[int, ...]) -> Any:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
    return module


def _block(n_heads: int, d_model: int, d_head: int) -> Any:
    block: Any = nn.Module()
    into = (n_heads, d_model, d_head)
    block.attn = _weights(W_Q=into, W_K=into, W_V=into, W_O=(n_heads, d_head, d_model))
    for name in ("q", "k", "v", "z", "pattern"):
        setattr(block.attn, f"hook_{name}", HookPoint())
    block.hook_resid_pre, block.hook_resid_post = HookPoint(), HookPoint()
    return block


def _attend(block: Any, x: torch.Tensor) -> torch.Tensor:
    """One layer: [batch, pos, d_model] → the same."""
    attn, x = block.attn, block.hook_resid_pre(x)
    q, k, v = (
        getattr(attn, f"hook_{name}")(torch.einsum("bpd,hde->bphe", x, getattr(attn, f"W_{name.upper()}")))
        for name in "qkv"
    )
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k)
    ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    pattern = attn.hook_pattern(scores.masked_fill(ahead, -torch.inf).softmax(-1))
    z = attn.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v))
    out: torch.Tensor = block.hook_resid_post(x + torch.einsum("bqhe,hed->bqd", z, attn.W_O))
    return out


N_FILLERS, N_SIZES = 6, 4
FILLER = 0
MARK = {"x": N_FILLERS, "y": N_FILLERS + N_SIZES}
"""First token of each mark; a mark comes in `N_SIZES` sizes, and what a head writes of it grows with its size."""
ASKS = {"first": N_FILLERS + 2 * N_SIZES, "second": N_FILLERS + 2 * N_SIZES + 1}
"""The last token of a prompt, which tells its category."""
D_VOCAB = N_FILLERS + 2 * N_SIZES + 2


def build_reader(*, rewires: bool) -> HandBuilt:
    """Build a model in which head 1.0 reads what head 0.0 wrote in the category `first` only.

    Heads 0.0 and 0.1 look at the token itself and write the size of a mark x, and of a mark y. In `first` head 1.0
    looks at marks x, in `second` at marks y where it `rewires`, else at both in either. Head 1.1 looks at everything.
    """
    model = HandBuilt(n_layers=2, n_heads=2, d_model=D_VOCAB + 2, d_head=D_VOCAB, d_vocab=D_VOCAB, name="hand-built")
    below, above = model.attention(0), model.attention(1)
    model.embed.W_E[:, :D_VOCAB] = torch.eye(D_VOCAB)
    for head, mark in enumerate(MARKS):
        below.W_Q[head, :D_VOCAB] = SHARP * torch.eye(D_VOCAB)
        below.W_K[head, :D_VOCAB] = torch.eye(D_VOCAB)
        sizes = slice(MARK[mark], MARK[mark] + N_SIZES)
        below.W_V[head, sizes, 0] = 1 + torch.arange(N_SIZES) / N_SIZES
        below.W_O[head, 0, D_VOCAB + head] = 1.0
        above.W_K[0, sizes, head] = 1.0
    asks = {"first": (0,), "second": (1,)} if rewires else dict.fromkeys(ASKS, (0, 1))
    for category, looked_for in asks.items():
        above.W_Q[0, ASKS[category], list(looked_for)] = SHARP
    model.unembed.W_U[:] = torch.eye(D_VOCAB + 2)[:, :D_VOCAB]
    return model


def reader_prompts(*, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts of both categories in turn: fillers, one mark of each kind among them, then the asking token."""
    generator = np.random.default_rng(seed)
    prompts = []
    for i in range(n):
        category = tuple(ASKS)[i % 2]
        tokens = generator.integers(0, N_FILLERS, 8)
        places = generator.choice(8, 2, replace=False)
        for place, mark in zip(places, MARKS, strict=True):
            tokens[place] = MARK[mark] + generator.integers(0, N_SIZES)
        prompts.append({"tokens": [*tokens.tolist(), ASKS[category]], "category": category})
    return prompts


N_STATES = 12


def build_decider(*, by_last: bool) -> HandBuilt:
    """Build a model whose output follows from its last token alone, or from its first alone (head 1.0 fetches it).

    Tokens are `N_STATES` contents; the first position holds one of them shifted by `N_STATES`, so that it can be found.
    """
    d_vocab = 2 * N_STATES
    model = HandBuilt(n_layers=2, n_heads=1, d_model=2 * d_vocab, d_head=d_vocab, d_vocab=d_vocab, name="decider")
    model.embed.W_E[:, :d_vocab] = torch.eye(d_vocab)
    above = model.attention(1)
    above.W_Q[0, :N_STATES, 0] = SHARP  # every content asks for the first position
    above.W_K[0, N_STATES:d_vocab, 0] = 1.0
    above.W_V[0, :d_vocab] = torch.eye(d_vocab)
    above.W_O[0, :, d_vocab:] = torch.eye(d_vocab)
    read = slice(0, d_vocab) if by_last else slice(d_vocab, 2 * d_vocab)
    model.unembed.W_U[read] = 3 * torch.randn(d_vocab, d_vocab, generator=torch.Generator().manual_seed(0))
    return model


def decider_prompts(*, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts of several lengths whose first and last tokens are independent."""
    generator = np.random.default_rng(seed)
    prompts = []
    for i in range(n):
        tokens = generator.integers(0, N_STATES, generator.integers(4, 8))
        tokens[0] += N_STATES
        prompts.append({"tokens": tokens.tolist(), "category": "ab"[i % 2]})
    return prompts


def build_circle(*, n_states: int = 24, nuisance: float = 3.0, seed: int = 0) -> HandBuilt:
    """Build a model whose states lie on a circle in what W_U reads, so that KL follows from their distance there.

    Token t is the angle 2πt ÷ n, and logits are cosines with the same angles: by symmetry KL(a ‖ b) depends on the
    angle between a and b alone, as does ‖W_Uᵀ Δ‖. Further dimensions, which W_U does not read, disturb every other
    distance.
    """
    model = HandBuilt(n_layers=1, n_heads=1, d_model=2 + 6, d_head=2, d_vocab=n_states, name="circle")
    angle = 2 * torch.pi * torch.arange(n_states) / n_states
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    generator = torch.Generator().manual_seed(seed)
    model.embed.W_E[:, :2] = circle
    model.embed.W_E[:, 2:] = nuisance * torch.rand(n_states, 6, generator=generator)
    model.unembed.W_U[:2] = 2 * circle.T
    return model


@dataclass(frozen=True)
class Harvested:
    """A hand-built model and its run, in float32."""

    model: HandBuilt
    run: actdb.Run


def harvest(model: HandBuilt, prompts: Sequence[dict[str, Any]], db: Path, *, run: str) -> Harvested:
    """Harvest what the study reads."""
    sites = ("resid_post", "z", "pattern")
    return Harvested(
        model, actdb.harvest(model, prompts, out=db, run=run, sites=sites, store="float32", stats=(), bos=False)
    )
