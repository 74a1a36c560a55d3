"""`python -m analyses.semantic_head`: the whole study of one head, or the ranking of all."""

import argparse
import sys
from collections.abc import Sequence

from analyses.common import program
from analyses.semantic_head.plan import run_study
from analyses.semantic_head.study import PROGRAMME

ABOUT = (
    "One attention head taken apart: why does it attend to its token's semantic category, and away from its copies? "
    "Without options: builds a model by hand of which one head is semantic, and the same shape with random weights, "
    "and does the whole study. With --model: any model and head; for gpt2-small L1H5, else the best-ranked head. With "
    "--db of a database that is there: ranks the heads of a stored run and takes the best one's weights apart."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this analysis."""
    parser.add_argument("--layer", type=int, help="layer of the head; default: 1 for gpt2-small, else the best-ranked")
    parser.add_argument("--head", type=int, help="head; default: 5 for gpt2-small, else the best-ranked")
    parser.add_argument(
        "--all-heads", action="store_true", help="rank every head by its semantic score, and stop there"
    )
    parser.add_argument("--vocabulary", type=int, help="tokens of the vocabulary to harvest; default 8192")
    parser.add_argument("--tokenizer", help="tokenizer of the model: a name or a folder")
    parser.add_argument("--random-init", type=int, metavar="SEED", help="the model's shape with random weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis; returns the exit status."""
    return program.main(PROGRAMME, run_study, argv, about=ABOUT, extend=add_options)


if __name__ == "__main__":
    sys.exit(main())
