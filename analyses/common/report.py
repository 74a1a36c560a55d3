"""Claims and what they are written to: `results.json`, `report.md`, the table `results` of the database."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import actdb
from analyses.common.significance import Estimate

COLUMNS = ("key", "value", "low", "high", "n", "seed", "null", "gold", "claimed", "verdict")
HEADINGS = ("key", "measured", "interval", "n", "null", "gold", "claimed", "verdict")


@dataclass(frozen=True)
class Claim:
    """One figure: measured, with its interval; what chance gives (`null`); what is known (`gold`) or was `claimed`.

    `verdict` is a short phrase; `about` says what the figure is, for the report. `seed` is that of the figure's own
    randomness.
    """

    key: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seed: int | None = None
    null: float | None = None
    gold: float | None = None
    claimed: float | None = None
    verdict: str = ""
    about: str = ""

    def judged(self, *, tolerance: float = 0.0) -> "Claim":
        """Fill the verdict where none is given: by the interval, against what was claimed, else gold, else the null.

        `tolerance` widens the interval by an absolute amount: for figures that were given in round numbers. Without an
        interval a figure is compared with a null alone.
        """
        if self.verdict or not math.isfinite(self.value):
            return replace(self, verdict=self.verdict or "not measurable")
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        for name, stated in (("the claim", self.claimed), ("gold", self.gold)):
            if stated is None or (self.low is None and not tolerance and stated != self.value):
                continue
            agrees = low - tolerance <= stated <= high + tolerance
            side = "above" if low > stated else "below"
            return replace(self, verdict=f"compatible with {name}" if agrees else f"{side} {name}")
        if self.null is not None:
            outside = "above chance" if low > self.null else "below chance" if high < self.null else "no effect"
            return replace(self, verdict=outside)
        return replace(self, verdict="measured")


def claim(key: str, estimate: Estimate | float, **other: Any) -> Claim:
    """Return a claim of an estimate with its interval, or of a plain number."""
    if isinstance(estimate, Estimate):
        return Claim(key, estimate.value, _end(estimate.low), _end(estimate.high), estimate.n, **other)
    return Claim(key, float(estimate), **other)


def claims_table(claims: Sequence[Claim]) -> list[tuple[str, ...]]:
    """Return the claims as rows of text, headings first."""
    return [HEADINGS, *(_row(entry) for entry in claims)]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows of text out in columns, a line under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_report(
    out: Path,
    analysis: str,
    claims: Sequence[Claim],
    *,
    text: Mapping[str, str] | None = None,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Write `results.json` and `report.md`; `text` are sections by heading, `figures` captions by file."""
    out.mkdir(parents=True, exist_ok=True)
    entries = [{name: _plain(getattr(entry, name)) for name in COLUMNS} for entry in claims]
    content = json.dumps({"analysis": analysis, "results": entries}, indent=1, allow_nan=False)
    (out / "results.json").write_text(content + "\n", encoding="utf-8")
    lines = [f"# {analysis.replace('_', ' ').capitalize()}", "", *_markdown([(*HEADINGS, "what it is")], claims), ""]
    for heading, body in (text or {}).items():
        lines += [f"## {heading}", "", body.strip(), ""]
    for file, caption in (figures or {}).items():
        lines += [f"![{caption}]({file})", "", caption, ""]
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")


def store_claims(path: str | Path, analysis: str, run: str, claims: Sequence[Claim]) -> None:
    """Put the claims into the table `results` of a database, for a run of it."""
    kept = [field.name for field in fields(Claim) if field.name in COLUMNS and field.name != "key"]
    values = {entry.key: {name: getattr(entry, name) for name in kept} for entry in claims}
    with actdb.open(path, mode="a") as db:
        db.add_results(analysis, run, values=values)


def _markdown(head: Sequence[Sequence[str]], claims: Sequence[Claim]) -> list[str]:
    rows = [*head, tuple("---" for _ in head[0]), *((*_row(entry), entry.about) for entry in claims)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _row(entry: Claim) -> tuple[str, ...]:
    interval = "" if entry.low is None or entry.high is None else f"{_number(entry.low)} … {_number(entry.high)}"
    rest = (_number(entry.null), _number(entry.gold), _number(entry.claimed), entry.verdict)
    return (entry.key, _number(entry.value), interval, "" if entry.n is None else str(entry.n), *rest)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _end(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, no NumPy scalar."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(float(value)) else None
