"""The known answer of a circuit: a copy transformer built by hand, whose subspaces and edges are what was put in.

The stream is cut into four orthogonal subspaces, turned at random: this token, previous token, position and answer.
Head L0H0 attends one position back and writes this token as previous token; L1H0 looks with this token for the previous
token, and writes this token as answer, which alone is read out. There are no norms and no biases.
"""

from typing import Any

import numpy as np
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot

from analyses.subspace_partition.circuit import Plane
from analyses.subspace_partition.partition import Partition
from analyses.subspace_partition.sequence import Task
from analyses.subspace_partition.strength import random_rotation

TASK = Task(n_tokens=11, lengths=(3, 6))
N_TOKENS, N_CONTEXT = TASK.n_tokens + 1, TASK.n_context
NAMES = ("this token", "previous token", "position", "answer")
SIZES = (N_TOKENS, N_TOKENS, N_CONTEXT, N_TOKENS)
D_MODEL, D_HEAD = sum(SIZES), max(N_TOKENS, N_CONTEXT)
SHARPNESS, GAIN = 20.0, 12.0
"""Attention logits of a match, and logits of the answer."""


def build_hand_built(*, seed: int = 0) -> tuple[Any, Plane]:
    """Return the model, as a TransformerLens bridge, and the plane after its first layer as it was cut."""
    generator = np.random.default_rng((seed, 39))
    partition = Partition(random_rotation(generator, D_MODEL).astype(np.float32), SIZES)
    this, previous, position, answer = (torch.from_numpy(partition.basis(i).copy()) for i in range(len(SIZES)))
    bridge = _boot("hand-built-copier")
    weights = {name: torch.zeros_like(value) for name, value in bridge.state_dict().items()}
    weights["embed.weight"].copy_(this.T)
    weights["pos_embed.weight"].copy_(position.T)
    _place_head(weights, 0, query=position[:, 1:], key=position[:, :-1], value=this, output=previous)
    _place_head(weights, 1, query=this, key=previous, value=this, output=answer)
    weights["unembed.weight"].copy_(GAIN * answer.T)
    bridge.load_state_dict(weights)
    return bridge.eval().requires_grad_(False), Plane("resid_post", 0, partition, NAMES)


def build_random(*, seed: int = 0) -> Any:
    """Return a model of the same shape with random weights: the structure is absent."""
    return _boot("random-copier", seed=seed).eval().requires_grad_(False)


def _boot(name: str, seed: int = 0) -> Any:
    shape: dict[str, Any] = {"n_layers": 2, "d_model": D_MODEL, "n_heads": 1, "d_head": D_HEAD}
    config = TransformerBridgeConfig(
        **shape, n_ctx=N_CONTEXT, d_vocab=N_TOKENS, attn_only=True, normalization_type=None, seed=seed, device="cpu"
    )
    with torch.random.fork_rng(devices=[]):
        return boot(config, model_name=name)


def _place_head(
    weights: dict[str, torch.Tensor],
    layer: int,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Give a head its maps: the i-th columns of query and key match, the i-th of value becomes the i-th of output."""
    at = f"blocks.{layer}.attn"
    weights[f"{at}.q.weight"][: query.shape[1]] = query.T
    weights[f"{at}.k.weight"][: key.shape[1]] = SHARPNESS * D_HEAD**0.5 * key.T
    weights[f"{at}.v.weight"][: value.shape[1]] = value.T
    weights[f"{at}.o.weight"][:, : output.shape[1]] = output
