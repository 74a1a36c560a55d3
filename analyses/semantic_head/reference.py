"""What is known beforehand: of gpt2-small's L1H5, and how a measured figure is judged by it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from analyses.common.report import Claim

NEEDS_WEIGHTS = "needs gpt2-small's weights"


@dataclass(frozen=True)
class Known:
    """What is known of a figure beforehand: gold or claimed, given to `tolerance` (half the last digit)."""

    gold: float | None = None
    claimed: float | None = None
    tolerance: float = 0.0


GPT2: Mapping[str, Known] = {
    "score": Known(gold=0.6, tolerance=0.05),
    "ranking.2": Known(gold=1.2, tolerance=0.05),
    "ranking.3": Known(gold=1.3, tolerance=0.05),
    "ablate.none": Known(claimed=0.66, tolerance=0.005),
    "ablate.embed": Known(claimed=2.09, tolerance=0.005),
    "ablate.pos": Known(claimed=0.63, tolerance=0.005),
    "ablate.attn0": Known(claimed=0.66, tolerance=0.005),
    "ablate.mlp0": Known(claimed=1.75, tolerance=0.005),
    "cosine.crossing": Known(claimed=0.90, tolerance=0.0125),
    "cosine.peak": Known(claimed=0.93, tolerance=0.0125),
    "symmetric.rank": Known(gold=128),
    "symmetric.n_positive": Known(gold=64),
    "symmetric.n_negative": Known(gold=64),
    "symmetric.n_negative_of_largest": Known(gold=33),
    "symmetric.lowest": Known(gold=-1.87, tolerance=0.005),
    "symmetric.highest": Known(gold=1.52, tolerance=0.005),
    "symmetric.norm": Known(gold=9.25, tolerance=0.005),
    "skew.norm": Known(gold=7.67, tolerance=0.005),
    "symmetric.share": Known(gold=0.593, tolerance=0.0005),
    "trace": Known(gold=-7.2, tolerance=0.05),
}
"""L1H5 of gpt2-small with folded layer norms: recomputed independently (gold), or as the original reports (claimed)."""


@dataclass(frozen=True)
class Reference:
    """What is known of the head under study, and whether its weights are those that it is known of."""

    known: Mapping[str, Known] = field(default_factory=dict)
    is_present: bool = True

    def judge(self, entry: Claim) -> Claim:
        """Put what is known beside a claim and judge it by that; without the weights it only stands beside."""
        known = self.known.get(entry.key)
        if known is None:
            return entry.judged()
        beside = replace(entry, gold=known.gold, claimed=known.claimed)
        if not self.is_present:
            return replace(beside, verdict=NEEDS_WEIGHTS)
        if known.gold is not None and entry.low is None:
            agrees = abs(entry.value - known.gold) <= known.tolerance
            return replace(beside, verdict="agrees with gold" if agrees else "differs from gold")
        return replace(beside, verdict="").judged(tolerance=known.tolerance)
