"""`python -m analyses.modular_arithmetic`: the whole study, one training, models of yours, or a study checked again."""

import argparse
import sys
from collections.abc import Sequence

import actdb
from analyses.common import program
from analyses.modular_arithmetic.model import SHAPES
from analyses.modular_arithmetic.study import PROGRAMME, run_study, verify

ABOUT = (
    "How does a network add modulo p? Without options: trains a transformer until it groks, a control, and the other "
    "architectures, and does the whole study. With --modulus or --architecture: trains that one model as specified and "
    "studies it. With --model: weights from a file or folder. With --db of a database that is there: its checkpoints."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this analysis."""
    parser.add_argument("--modulus", type=int, metavar="P", help="train one model of this modulus; 113 as published")
    parser.add_argument("--architecture", choices=tuple(SHAPES), help="what to train; default: one-layer")
    parser.add_argument("--epochs", type=int, help="epochs of that training at most; a longer one goes on where it was")
    parser.add_argument("--train-share", type=float, metavar="SHARE", help="share of the pairs that it is trained on")
    parser.add_argument("--weight-decay", type=float, metavar="RATE", help="its weight decay")
    parser.add_argument("--every", type=int, metavar="EPOCHS", help="epochs between its checkpoints")
    parser.add_argument(
        "--verify", action="store_true", help="compute every claim of a finished study again from its database"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis; returns the exit status: of --verify 1 where a claim fails."""
    options = program.parse(PROGRAMME, argv, about=ABOUT, extend=add_options)
    if not options.own.verify:
        return program.main(PROGRAMME, run_study, argv, about=ABOUT, extend=add_options)
    try:
        table, passed = verify(options)
    except actdb.ActdbError as exc:
        print(f"{PROGRAMME}: {exc}", file=sys.stderr)
        return 1
    print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
