"""The original's 32-dimensional random network: never trained, with attention that has no weights of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

import actdb
from analyses.common.transformer import Embedding
from analyses.feature_persistence.model import N_VOCABULARY
from analyses.feature_persistence.task import probe_prompts, structured_prompts

N_POSITIONS = 4


class Layer(nn.Module):
    """Attention by scores x xᵀ, unscaled and causal, then a ReLU layer; both add to the residual stream."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.hook_pattern = HookPoint()
        self.mlp.hook_post = HookPoint()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.hook_attn_out, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, pos, d_model] → the same shape."""
        n = x.shape[1]
        scores = (x @ x.transpose(1, 2)).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        attention: Any = self.attn.hook_pattern
        neurons: Any = self.mlp.hook_post
        pattern = attention(scores.softmax(-1)[:, None])[:, 0]  # one head
        x = x + self.hook_attn_out(pattern @ x)
        out: torch.Tensor = self.hook_resid_post(x + self.hook_mlp_out(neurons((x @ self.W_in).relu()) @ self.W_out))
        return out


class RandomNetwork(nn.Module):
    """Two layers, d_model 32, 32 neurons each, 10 tokens at 4 positions; weights N(0, 1/fan-in), embeddings N(0, 1).

    Called on ids [batch, pos]; returns the residual stream after the last layer [batch, pos, d_model].
    """

    def __init__(self, *, seed: int, n_layers: int = 2, d_model: int = 32, d_mlp: int = 32) -> None:
        super().__init__()
        self.cfg = cfg = SimpleNamespace(
            model_name="random-network",
            n_layers=n_layers,
            n_heads=1,
            d_model=d_model,
            d_head=d_model,
            d_mlp=d_mlp,
            d_vocab=N_VOCABULARY,
            n_ctx=N_POSITIONS,
        )
        self.embed = Embedding("W_E", cfg.d_vocab, d_model)
        self.pos_embed = Embedding("W_pos", cfg.n_ctx, d_model)
        self.blocks = nn.ModuleList(Layer(cfg) for _ in range(n_layers))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                fan_in = 1 if name.startswith(("embed", "pos_embed")) else parameter.shape[0]
                parameter.normal_(0, fan_in**-0.5, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, pos] → [batch, pos, d_model]."""
        tokens: Any = self.embed.W_E
        positions: Any = self.pos_embed.W_pos
        x: torch.Tensor = functional.embedding(ids, tokens) + positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x


def harvest_random(name: str, db: Path, *, seed: int) -> None:
    """Harvest a random network on random sequences as run `name`, and on structured ones as `<name>-structured`."""
    network = RandomNetwork(seed=seed)
    prompts = {
        name: probe_prompts(n_positions=N_POSITIONS),
        f"{name}-structured": structured_prompts(n_positions=N_POSITIONS),
    }
    for run, chosen in prompts.items():
        actdb.harvest(network, chosen, out=db, run=run, sites=("mlp_post", "pattern"), store="float32")
