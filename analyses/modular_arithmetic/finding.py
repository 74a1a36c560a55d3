"""What a step of the study found."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from analyses.common.report import Claim


@dataclass(frozen=True)
class Findings:
    """Claims, sections of the report by heading, and captions by figure file."""

    claims: Sequence[Claim]
    sections: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)


def join(parts: Iterable[Findings]) -> Findings:
    """Return findings one after the other."""
    claims: list[Claim] = []
    sections: dict[str, str] = {}
    figures: dict[str, str] = {}
    for part in parts:
        claims += part.claims
        sections |= part.sections
        figures |= part.figures
    return Findings(claims, sections, figures)
