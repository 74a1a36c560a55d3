"""How far two vectors or two next-token distributions lie apart; in torch, over the last axis."""

from typing import Any

import torch
from torch.nn import functional

LN_2 = 0.6931471805599453


def cosine(a: Any, b: Any) -> torch.Tensor:
    """Return the cosine of vectors over the last axis, broadcast over the others; 0 where one of them is 0."""
    return functional.cosine_similarity(_wide(a), _wide(b), dim=-1)


def kl_divergence(logits: Any, other: Any) -> torch.Tensor:
    """Return KL(p ‖ q) in nats, p and q being the softmax of `logits` and `other` [..., token].

    Computed in float64 from log-softmax, so that near-equal distributions give no negative values beyond rounding.
    """
    p, q = _log_softmax(logits), _log_softmax(other)
    return (p.exp() * (p - q)).sum(-1)


def js_divergence(logits: Any, other: Any) -> torch.Tensor:
    """Return the Jensen–Shannon divergence in nats, ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½(p + q): 0 to ln 2."""
    p, q = _log_softmax(logits), _log_softmax(other)
    middle = torch.logaddexp(p, q) - LN_2
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


def logit_difference(logits: Any, correct: Any, wrong: Any) -> torch.Tensor:
    """Return logit(correct) − logit(wrong) of `logits` [..., token], for token ids that broadcast over [...]."""
    values = torch.as_tensor(logits)
    shape = values.shape[:-1]

    def pick(ids: Any) -> torch.Tensor:
        places = torch.as_tensor(ids, device=values.device).expand(shape)
        return values.gather(-1, places.unsqueeze(-1)).squeeze(-1)

    return pick(correct) - pick(wrong)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in nats [batch, pos − 1] of `logits` [batch, pos, token] on the next ids."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def _wide(values: Any) -> torch.Tensor:
    return torch.as_tensor(values).to(torch.float64)


def _log_softmax(logits: Any) -> torch.Tensor:
    return _wide(logits).log_softmax(-1)
