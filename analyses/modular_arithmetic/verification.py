"""Step 10: every claim of a finished study computed again from its database, and compared with what was stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import actdb
from analyses.common.report import Claim, format_table

TOLERANCE = 1e-3
"""Relative difference of a figure that is computed again: sums run in another order on another machine."""
LEAST = 1e-6
HEADINGS = ("", "key", "stored", "computed again", "null", "verdict")


@dataclass(frozen=True)
class Check:
    """One claim: as stored and as computed again (None: missing there), and its verdict, then and now."""

    key: str
    stored: float | None
    again: float | None
    null: float | None
    verdict: str
    verdict_again: str

    @property
    def passed(self) -> bool:
        """Whether figure and verdict are the same."""
        if self.stored is None or self.again is None:
            return False
        same = np.isclose(self.stored, self.again, rtol=TOLERANCE, atol=LEAST, equal_nan=True)
        return bool(same) and self.verdict == self.verdict_again


def stored_claims(path: Path, analysis: str, run: str) -> dict[str, dict[str, Any]]:
    """Read the claims that a finished study stored of a run; raises `SettingError` where there are none."""
    with actdb.open(path) as db:
        query = 'SELECT key, value, "null", verdict FROM results WHERE analysis = ? AND run = ?'
        rows = db.sql(query, [analysis, run]).arrow().to_pylist()
    if not rows:
        raise actdb.SettingError(f"{path} holds no finished study of run {run!r}; leave --verify out to make one")
    return {str(row["key"]): row for row in rows}


def compare(stored: Mapping[str, Mapping[str, Any]], claims: Sequence[Claim]) -> list[Check]:
    """Return a check of every claim that was stored or computed again, in the order of the latter."""
    again = {entry.key: entry for entry in claims}
    checks = []
    for key in [*again, *(key for key in stored if key not in again)]:
        before, now = stored.get(key), again.get(key)
        checks.append(
            Check(
                key,
                stored=None if before is None else _number(before["value"]),
                again=None if now is None else float(now.value),
                null=None if now is None else now.null,
                verdict="" if before is None else str(before["verdict"]),
                verdict_again="" if now is None else now.verdict,
            )
        )
    return checks


def report(checks: Sequence[Check]) -> str:
    """Return the checks as a table, pass or fail first, and how many passed."""
    rows = [HEADINGS, *(_row(check) for check in checks)]
    n_passed = sum(check.passed for check in checks)
    return f"{format_table(rows)}\n\n{n_passed} of {len(checks)} claims pass"


def _row(check: Check) -> tuple[str, ...]:
    figures = ("" if value is None else f"{value:.4g}" for value in (check.stored, check.again, check.null))
    changed = check.verdict != check.verdict_again and check.stored is not None and check.again is not None
    verdict = f"{check.verdict} → {check.verdict_again}" if changed else check.verdict_again or check.verdict
    return ("pass" if check.passed else "FAIL", check.key, *figures, verdict)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
