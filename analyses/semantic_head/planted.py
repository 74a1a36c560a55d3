"""The known answer: a model built by hand of which one head is semantic, and the same shape with random weights.

The residual stream is cut into orthogonal subspaces, all orthogonal to the vector of ones, so that LayerNorm takes no
part of them away: C the category, I and J two identities of the token (random directions, nearly orthogonal), O what
every token has and B what BOS alone has, P the position, Y what the semantic head copies. The semantic head has

    W_Q W_Kᵀ ∝ β·(C) − α·(I) + δ·(J) + γ·o bᵀ

so that it attends within the category (+β), away from the token itself (−α + δ), and to BOS (γ, a skew part) where its
category was not seen. Its symmetric part has one positive eigenvalue for each dimension of C and J, one negative one
for each of I, and ±γ/2; with the negative ones set to 0 a token's own copy scores β + δ, more than any other.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot

from analyses.semantic_head.category import Categories

N_CATEGORIES, N_WORDS, N_FILLERS = 8, 24, 63
D_VOCAB = 1 + N_CATEGORIES * N_WORDS + N_FILLERS
N_CTX = 256
WIDTHS = {"C": N_CATEGORIES, "I": 48, "J": 16, "O": 1, "B": 1, "P": 16, "Y": 48}
D_HEAD = 76
D_MODEL = 144
N_HEADS = 4
SEMANTIC_HEAD = 2
NAME = "hand-built"
SAME, SELF_LOSS, SELF_GAIN, TO_BOS = 9.0, 9.0, 2.0, 5.5
"""Logits of the semantic head: within a category, lost and gained on the token itself, and on BOS."""
CATEGORY, IDENTITY, COMMON = 1.0, 1.0, 0.5
"""Lengths of a token's parts in C, in I and in J, and in O."""
POSITION = 0.5
DIRECT_CATEGORY = 0.4
"""Share of the category that the embedding carries where an MLP adds the rest."""
COPY_GAIN, SUCCESSOR_GAIN = 6.0, 3.0


@dataclass(frozen=True)
class Planted:
    """What was planted: the numbers of eigenvalues of the symmetric part by sign, and the place of the head."""

    layer: int
    head: int
    n_positive: int = WIDTHS["C"] + WIDTHS["J"] + 1
    n_negative: int = WIDTHS["I"] + 1


def planted_categories() -> Categories:
    """Return the categories of the hand-built model: BOS is 0, then the words, then tokens of no category."""
    groups = {f"group {i}": tuple(range(1 + i * N_WORDS, 1 + (i + 1) * N_WORDS)) for i in range(N_CATEGORIES)}
    return Categories("planted", groups, 0, successions=tuple(groups.values()))


def build_model(*, n_layers: int = 2, seed: int = 0) -> Any:
    """Build the model by hand as a TransformerLens-native bridge; the semantic head is the third of the last layer.

    With two layers the embedding carries `DIRECT_CATEGORY` of the category and MLP 0 adds the rest; with one layer the
    embedding carries it all. The other heads of the last layer look at the previous token, at the token's own copies
    and, weakly, at everything.
    """
    bridge = _boot(NAME, n_layers=n_layers, seed=seed)
    weights = {name: torch.zeros_like(value) for name, value in bridge.state_dict().items()}
    for name, value in weights.items():
        if (".ln" in name and name.endswith("weight")) or name == "ln_final.weight":
            value.fill_(1.0)
    space = _subspaces(seed)
    last = n_layers - 1
    _embed(weights, space, direct=1.0 if last == 0 else DIRECT_CATEGORY, seed=seed)
    if last > 0:
        _add_category(weights, space)
        _place_heads(weights, space, layer=0, semantic=False, norm=_norm(DIRECT_CATEGORY))
    _place_heads(weights, space, layer=last, semantic=True, norm=_norm(1.0))
    _unembed(weights, space)
    bridge.load_state_dict(weights)
    return _frozen(bridge)


def build_control(*, n_layers: int = 2, seed: int = 0) -> Any:
    """Build a model of the same shape with random weights: the structure is absent."""
    return _frozen(_boot("random-control", n_layers=n_layers, seed=seed + 1))


def planted_place(*, n_layers: int = 2) -> Planted:
    """Return where the semantic head was planted."""
    return Planted(layer=n_layers - 1, head=SEMANTIC_HEAD)


def _boot(name: str, *, n_layers: int, seed: int) -> Any:
    shape: dict[str, Any] = {
        "n_layers": n_layers,
        "d_model": D_MODEL,
        "n_heads": N_HEADS,
        "d_head": D_HEAD,
        "d_mlp": N_CATEGORIES,
    }
    config = TransformerBridgeConfig(
        **shape, n_ctx=N_CTX, d_vocab=D_VOCAB, act_fn="relu", normalization_type="LN", seed=seed, device="cpu"
    )
    with torch.random.fork_rng(devices=[]):
        return boot(config, model_name=name)


def _frozen(bridge: Any) -> Any:
    bridge.eval()
    bridge.original_model.eval()
    return bridge.requires_grad_(False)


def _subspaces(seed: int) -> dict[str, torch.Tensor]:
    """Return orthonormal columns [d_model, width] for each part of the stream, all orthogonal to the ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1.0
    basis = torch.linalg.qr(drawn).Q[:, 1:].float()
    return dict(zip(WIDTHS, basis[:, : sum(WIDTHS.values())].split(list(WIDTHS.values()), dim=1), strict=True))


def _units(n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)


def _norm(category: float) -> float:
    """Length of a token's stream, position included, when its category part has this share of `CATEGORY`."""
    return math.sqrt((category * CATEGORY) ** 2 + 2 * IDENTITY**2 + COMMON**2 + POSITION**2)


def _embed(weights: dict[str, torch.Tensor], space: dict[str, torch.Tensor], *, direct: float, seed: int) -> None:
    first, second = _units(D_VOCAB, WIDTHS["I"], seed + 1), _units(D_VOCAB, WIDTHS["J"], seed + 2)
    embed = IDENTITY * (first @ space["I"].T + second @ space["J"].T) + COMMON * space["O"].T  # [token, d_model]
    words = torch.arange(N_CATEGORIES * N_WORDS)
    embed[1 + words] += direct * CATEGORY * space["C"].T[words // N_WORDS]
    # Tokens of no category have no part in I either, and are as long by their part in J.
    length = math.sqrt(_norm(1.0) ** 2 - COMMON**2 - POSITION**2)
    embed[1 + len(words) :] = length * second[1 + len(words) :] @ space["J"].T + COMMON * space["O"].T
    embed[0] = _norm(direct) * space["B"][:, 0]
    weights["embed.weight"].copy_(embed)
    angles = torch.arange(N_CTX)[:, None] / 10.0 ** torch.linspace(0, 2, WIDTHS["P"] // 2)  # [pos, frequency]
    waves = torch.cat([angles.sin(), angles.cos()], 1) / math.sqrt(WIDTHS["P"] // 2)
    weights["pos_embed.weight"].copy_(POSITION * waves @ space["P"].T)


def _add_category(weights: dict[str, torch.Tensor], space: dict[str, torch.Tensor]) -> None:
    """MLP 0: a neuron for each category, which reads its weak direction and writes the rest of it."""
    scale = math.sqrt(D_MODEL) / _norm(DIRECT_CATEGORY)  # what the norm multiplies by
    read = 1.0 / (scale * DIRECT_CATEGORY * CATEGORY)
    weights["blocks.0.mlp.in.weight"].copy_(read * space["C"].T)
    weights["blocks.0.mlp.out.weight"].copy_((1 - DIRECT_CATEGORY) * CATEGORY * space["C"])


def _place_heads(
    weights: dict[str, torch.Tensor], space: dict[str, torch.Tensor], *, layer: int, semantic: bool, norm: float
) -> None:
    """Give the four heads of a layer their maps; what is `per` logit makes a bilinear form of the normalised stream."""
    per = math.sqrt(D_HEAD) * norm**2 / D_MODEL
    own = torch.cat([space["I"], space["J"]], 1)
    none = torch.zeros(D_MODEL, 1)
    forms = [
        (space["P"], _turn_back(space["P"]) * (40.0 / POSITION**2) * per),  # the previous token
        (own, own * (8.0 / (2 * IDENTITY**2)) * per),  # the token's own copies
        _semantic_form(space, per) if semantic else (none, none),
        (space["C"], space["C"] * 0.5 * per),  # everything, its own category a little more
    ]
    query, key = weights[f"blocks.{layer}.attn.q.weight"], weights[f"blocks.{layer}.attn.k.weight"]
    for head, (left, right) in enumerate(forms):
        rows = slice(head * D_HEAD, head * D_HEAD + left.shape[1])
        query[rows], key[rows] = left.T, right.T
    if semantic:
        rows = slice(SEMANTIC_HEAD * D_HEAD, SEMANTIC_HEAD * D_HEAD + WIDTHS["Y"])
        weights[f"blocks.{layer}.attn.v.weight"][rows] = space["I"].T
        weights[f"blocks.{layer}.attn.o.weight"][:, rows] = space["Y"] * norm / math.sqrt(D_MODEL)


def _semantic_form(space: dict[str, torch.Tensor], per: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W_Q and W_K [d_model, 74]: balanced, so that steering by their sum treats both alike."""
    same, lost = SAME / CATEGORY**2 * per, SELF_LOSS / IDENTITY**2 * per
    gained, to_bos = SELF_GAIN / IDENTITY**2 * per, TO_BOS / (COMMON * _norm(1.0)) * per
    left = [space["C"] * same**0.5, space["I"] * lost**0.5, space["J"] * gained**0.5, space["O"] * to_bos**0.5]
    right = [space["C"] * same**0.5, -space["I"] * lost**0.5, space["J"] * gained**0.5, space["B"] * to_bos**0.5]
    return torch.cat(left, 1), torch.cat(right, 1)


def _turn_back(position: torch.Tensor) -> torch.Tensor:
    """Turn each wave of the positions by one step, so that the key before a query fits it."""
    half = WIDTHS["P"] // 2
    step = 1.0 / 10.0 ** torch.linspace(0, 2, half)
    sines, cosines = position[:, :half], position[:, half:]
    return torch.cat([sines * step.cos() - cosines * step.sin(), cosines * step.cos() + sines * step.sin()], 1)


def _unembed(weights: dict[str, torch.Tensor], space: dict[str, torch.Tensor]) -> None:
    """Logits: what the semantic head copied, and the successor of the token itself within its category."""
    identity = weights["embed.weight"] @ space["I"]  # [token, width]
    words = torch.arange(1, 1 + N_CATEGORIES * N_WORDS)
    before = 1 + (words - 1) // N_WORDS * N_WORDS + (words - 2) % N_WORDS
    weights["unembed.weight"].addmm_(identity, space["Y"].T, alpha=COPY_GAIN / math.sqrt(D_MODEL) * 2)
    weights["unembed.weight"][words] += SUCCESSOR_GAIN / math.sqrt(D_MODEL) * 2 * identity[before] @ space["I"].T
