"""Which collectors a part needs, by the names that `--stats` takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformer_lens.hook_points import HookPoint

from actdb.harvesting.statistics import PartStatistic
from actdb.harvesting.statistics.heads import HeadStatistics
from actdb.harvesting.statistics.lens import LensStatistics
from actdb.harvesting.statistics.neurons import NeuronStatistics
from actdb.harvesting.statistics.tokens import TokenStatistics
from actdb.unembedding import Readout


@dataclass(frozen=True)
class Points:
    """The hook points that statistics look at, by layer; those that no statistic asks for may be absent."""

    patterns: Mapping[int, HookPoint] = field(default_factory=dict)
    z: Mapping[int, HookPoint] = field(default_factory=dict)
    neurons: Mapping[int, HookPoint] = field(default_factory=dict)
    residuals: Mapping[int, HookPoint] = field(default_factory=dict)
    logits: HookPoint | None = None


@dataclass(frozen=True)
class Constants:
    """What statistics take from the weights, in float32: W_O W_Oᵀ and W_O by layer, final norm and unembedding."""

    grams: Mapping[int, torch.Tensor] = field(default_factory=dict)
    outputs: Mapping[int, torch.Tensor] = field(default_factory=dict)
    readout: Readout | None = None


def make_statistics(
    names: Sequence[str], points: Points, constants: Constants, layers: Sequence[int]
) -> list[PartStatistic]:
    """Return new collectors of a part; `layers` are those whose lens statistics are kept."""

    def tokens() -> PartStatistic:
        assert points.logits is not None, "planned without logits"
        return TokenStatistics(points.logits)

    def lens() -> PartStatistic:
        assert constants.readout is not None, "planned without an unembedding"
        return LensStatistics(points.residuals, layers, constants.readout, points.z, constants.outputs)

    makers: dict[str, Callable[[], PartStatistic]] = {
        "heads": lambda: HeadStatistics(points.patterns, points.z, constants.grams),
        "neurons": lambda: NeuronStatistics(points.neurons),
        "tokens": tokens,
        "lens": lens,
    }
    return [makers[name]() for name in names]
