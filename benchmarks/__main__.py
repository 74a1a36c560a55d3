"""Run benchmarks and write RESULTS.md; see the package."""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import SIZES, Goal, Table, cell, machine

CLAIMS = (
    *("harvest", "profile", "write", "slices", "scans", "stream", "volume", "sql", "functions", "neurons"),
    *("neighbors", "indexes", "million", "memory", "growth", "writer", "startup", "gpu", "subspaces"),
)
LIMIT_S = 900
LONG = {"indexes": LIMIT_S, "million": 5400}
"""Claims that run only where they are named, and their limits in seconds: they build graphs for minutes."""
TABLES = "tables"


def main() -> None:
    """Run the claims named, each in a process of its own, and print their tables.

    Each table is kept as JSON beside RESULTS.md, which is written anew from all: a claim may be run again alone.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "claims", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}; default: all but {', '.join(LONG)}"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of RESULTS.md")
    parser.add_argument("--json", type=Path, help="run one claim in this process, and write its table there")
    given = parser.parse_args()
    unknown = sorted(set(given.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(CLAIMS)}")
    if given.json is not None:
        run_claim(given.claims[0], given.size, given.json)
        return
    failures = []
    (given.out / TABLES).mkdir(parents=True, exist_ok=True)
    for claim in given.claims or [claim for claim in CLAIMS if claim not in LONG]:
        table = start_claim(claim, given.size)
        if table is None:
            failures.append(claim)
            continue
        print(table.markdown(), flush=True)
        (given.out / TABLES / f"{claim}.json").write_text(table.to_json(), encoding="utf-8")
        write_results(given.out)
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def run_claim(claim: str, size: str, out: Path) -> None:
    """Run one claim in this process."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="actdb-bench-") as folder:
        table = importlib.import_module(f"benchmarks.{claim}").run(size, Path(folder))
    table = replace(table, made=f"Size {size}, {time.perf_counter() - began:.0f} s; {machine()}")
    out.write_text(table.to_json(), encoding="utf-8")


def start_claim(claim: str, size: str) -> Table | None:
    """Run one claim in a fresh process; None where it fails or takes too long, which is printed and does not stop."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "table.json")
        command = [sys.executable, "-m", "benchmarks", claim, "--size", size, "--json", str(out)]
        try:
            subprocess.run(command, check=True, timeout=LONG.get(claim, LIMIT_S))
            return Table.from_json(out.read_text(encoding="utf-8"))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
            print(f"{claim}: {exc}", file=sys.stderr, flush=True)
            return None


def write_results(out: Path) -> None:
    """Write RESULTS.md from the tables kept beside it: the goals first, then a table and a picture a claim."""
    kept = {claim: out / TABLES / f"{claim}.json" for claim in CLAIMS}
    tables = {claim: Table.from_json(path.read_text()) for claim, path in kept.items() if path.exists()}
    goals = [goal for table in tables.values() for goal in table.goals]
    texts = [
        "# Results\n\nMade by `python -m benchmarks`. Figures are medians of turns taken within one run (A B A B):",
        "compare ratios within a table, not figures of two tables.\n",
        *([goals_table(goals)] if goals else []),
    ]
    for claim, table in tables.items():
        texts.append(table.markdown())
        texts.append(f"{table.made}\n")
        if table.plotted is not None:
            draw(table, out / "plots" / f"{claim}.png")
            texts.append(f"![{table.title}](plots/{claim}.png)\n")
    (out / "RESULTS.md").write_text("\n".join(texts), encoding="utf-8")


def goals_table(goals: list[Goal]) -> str:
    """Return the goals as Markdown."""
    lines = ["## Goals", "", "| claim | measured | to reach | reached |", "| --- | --- | --- | --- |"]
    for goal in goals:
        bound = f"{'≥' if goal.at_least else '≤'} {cell(goal.bound)} {goal.unit}"
        lines.append(f"| {goal.name} | {cell(goal.measured)} {goal.unit} | {bound} | {_verdict(goal)} |")
    return "\n".join(lines) + "\n"


def _verdict(goal: Goal) -> str:
    """Return whether a goal is reached; if not, which share of it, and why."""
    if goal.reached:
        return "yes"
    share = goal.measured / goal.bound
    return f"no: {share:.2f} × that" + (f"; {goal.why}" if goal.why else "")


def draw(table: Table, path: Path) -> None:
    """Draw one column of a table as bars, one a row."""
    from matplotlib.figure import Figure

    column = list(table.header).index(str(table.plotted))
    rows = [row for row in table.rows if isinstance(row[column], int | float)]
    labels = [" · ".join(str(value) for value in row if isinstance(value, str)) for row in rows]
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#0072b2" if "actdb" in label else "#b3b3b3" for label in labels]
    bars = axes.barh(range(len(rows)), [row[column] for row in rows], color=colours)
    axes.bar_label(bars, [cell(row[column]) for row in rows], padding=3)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(str(table.plotted))
    axes.set_title(table.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
