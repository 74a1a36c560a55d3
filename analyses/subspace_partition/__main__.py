"""`python -m analyses.subspace_partition`: the whole study, or the partition of a run or model of the user's."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analyses.common import program
from analyses.subspace_partition.circuit_study import run_circuit
from analyses.subspace_partition.existing import DEFAULT_NAME, DEFAULT_SITE, run_existing
from analyses.subspace_partition.external_study import run_external
from analyses.subspace_partition.study import PROGRAMME, run_study

ABOUT = (
    "Which orthogonal subspaces of one layer's activations hold one thing each? Trains a rotation by neighbour "
    "distance minimisation, and shows how heads carry information between subspaces. Without options: on toy models "
    "whose answer is known, trained here. With --db of a database that is there, or --model and --prompts: on one site "
    "and layer of theirs; the partition is stored in the database for `actdb nearest --partition`."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this analysis, for a run or model of the user's."""
    parser.add_argument("--site", default=DEFAULT_SITE, help="site to partition; default resid_post")
    parser.add_argument("--layer", type=int, help="its layer; default: a third of the way up")
    parser.add_argument("--unit", type=int, help="dimensions of a subspace to begin with; default width / 24")
    parser.add_argument("--steps", type=int, help="steps of training, merges in proportion; default 100,000")
    parser.add_argument("--rate", type=float, help="learning rate; default 3e-4")
    parser.add_argument("--threshold", type=float, help="normalised information above which pairs merge; default 0.04")
    parser.add_argument("--stop-at", type=int, metavar="N", help="merge no further than N subspaces")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--name", default=DEFAULT_NAME, help="name of the partition in the database")
    parser.add_argument("--pairs", type=Path, help="clean and corrupted prompts to patch between; see README")
    parser.add_argument("--circuit", action="store_true", help="with --db: the circuit of a run with stored partitions")
    parser.add_argument("--external", type=Path, metavar="FOLDER", help="a decompiled-transformers folder to study")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis; returns the exit status."""

    def study(options: program.Options) -> program.Study:
        if options.own.external is not None:
            return run_external(options)
        if options.own.circuit:
            return run_circuit(options)
        return run_existing(options) if options.foreign else run_study(options)

    return program.main(PROGRAMME, study, argv, about=ABOUT, extend=add_options)


if __name__ == "__main__":
    sys.exit(main())
