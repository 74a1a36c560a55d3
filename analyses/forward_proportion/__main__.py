"""`python -m analyses.forward_proportion`: the whole study of one run."""

import argparse
import sys
from collections.abc import Sequence

from analyses.common import program
from analyses.forward_proportion.interaction import QUERIES
from analyses.forward_proportion.study import PROGRAMME, run_study

ABOUT = (
    "Forward proportion and combinatorial recruitment: communities of heads, interaction graphs, rewiring, pathways, "
    "what the state alone explains, rings. Without options: trains a small model on our own labelled prompts and "
    "studies it. With --model (and --prompts with a label): harvests and studies that. With --db of a database that is "
    "there: studies its run; --weights says where its model is, for the steps that run it."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this analysis alone."""
    parser.add_argument("--label", default="category", help="label that groups the prompts; default category")
    parser.add_argument("--query", choices=QUERIES, default="last", help="queries that read: the last, or all (mean)")
    parser.add_argument("--weights", help="with --db: the run's model, a name or a folder, for steps 6 and 8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis; returns the exit status."""
    return program.main(PROGRAMME, run_study, argv, about=ABOUT, extend=add_options)


if __name__ == "__main__":
    sys.exit(main())
