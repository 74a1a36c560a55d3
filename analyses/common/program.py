"""The command line that all analyses share: `python -m analyses.NAME [options]`."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import actdb
from analyses.common.report import Claim, claims_table, format_table, store_claims, write_report

SIZES = ("full", "small")
Extend = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line; `db` and `out` have their defaults filled in.

    `given_db` says that the user named a database that is there, whose runs are to be analysed rather than made; `own`
    holds the options of one analysis alone.
    """

    db: Path
    out: Path
    run: str | None
    model: str | None
    prompts: Path | None
    size: str
    seed: int
    given_db: bool
    own: argparse.Namespace = field(default_factory=argparse.Namespace)

    @property
    def foreign(self) -> bool:
        """Whether to analyse what the user names, a database or a model, rather than the study's own models."""
        return self.given_db or self.model is not None

    @property
    def small(self) -> bool:
        """Whether the study runs in a reduced size, for a first look."""
        return self.size == "small"

    @property
    def figures(self) -> Path:
        """The folder of the figures."""
        return self.out / "figures"


@dataclass(frozen=True)
class Study:
    """What an analysis found: claims for a run, sections of text for the report, captions by figure file."""

    run: str
    claims: Sequence[Claim]
    text: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)


def main(
    programme: str,
    study: Callable[[Options], Study],
    argv: Sequence[str] | None = None,
    *,
    about: str,
    extend: Extend | None = None,
) -> int:
    """Run an analysis as a program; returns its exit status: 1, with one line on stderr, for an `ActdbError`.

    Prints the table of claims, writes `results.json`, `report.md` and figures, and stores the claims in the database.
    `extend` adds options of its own: see `parse`.
    """
    options = parse(programme, argv, about=about, extend=extend)
    began = time.perf_counter()
    try:
        found = study(options)
        write_report(options.out, programme, found.claims, text=found.text, figures=found.figures)
        store_claims(options.db, programme, found.run, found.claims)
    except actdb.ActdbError as exc:
        print(f"{programme}: {exc}", file=sys.stderr)
        return 1
    print(format_table(claims_table(found.claims)))
    print(
        f"\nwritten to {options.out}, stored in {options.db}, in {time.perf_counter() - began:.0f} s", file=sys.stderr
    )
    return 0


def parse(programme: str, argv: Sequence[str] | None = None, *, about: str, extend: Extend | None = None) -> Options:
    """Parse the options that all analyses share, and those that `extend` adds to the parser: `Options.own`.

    An analysis with options of its own may do without prompts: it has its own for any model.
    """
    parser = argparse.ArgumentParser(prog=f"python -m analyses.{programme}", description=about)
    parser.add_argument("--db", type=Path, help="database to analyse or to make; default OUT/study.actdb")
    parser.add_argument("--run", help="run of the database; default the newest")
    parser.add_argument("--model", help="model to harvest: a name or a folder")
    parser.add_argument("--prompts", type=Path, help="prompts to harvest it on")
    parser.add_argument("--size", choices=SIZES, default="full", help="full: as specified; small: for a first look")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help=f"folder for results; default out/{programme}")
    shared = set(vars(parser.parse_args([])))
    if extend is not None:
        extend(parser)
    given = parser.parse_args(argv)
    if (given.model is None) != (given.prompts is None) and extend is None:
        parser.error("--model and --prompts go together")
    out = given.out or Path("out") / programme
    return Options(
        db=given.db or out / "study.actdb",
        out=out,
        run=given.run,
        model=given.model,
        prompts=given.prompts,
        size=given.size,
        seed=given.seed,
        given_db=given.model is None and given.db is not None and (given.db / "actdb.json").is_file(),
        own=argparse.Namespace(**{name: value for name, value in vars(given).items() if name not in shared}),
    )


def note(text: str) -> None:
    """Say on stderr what an analysis is doing."""
    print(text, file=sys.stderr, flush=True)
