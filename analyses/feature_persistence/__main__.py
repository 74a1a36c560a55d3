"""`python -m analyses.feature_persistence`: the whole study, or the selectivity of a database's own runs."""

import sys
from collections.abc import Sequence

from analyses.common import program
from analyses.feature_persistence.existing import run_existing
from analyses.feature_persistence.study import PROGRAMME, run_study

ABOUT = (
    "Selective neurons before and through training. Without options: trains tiny models, harvests every checkpoint, "
    "and does the whole study. With --db of a database that is there, or --model and --prompts: measures its neurons, "
    "and follows them where several steps of one model were harvested."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis; returns the exit status."""

    def study(options: program.Options) -> program.Study:
        return run_existing(options) if options.foreign else run_study(options)

    return program.main(PROGRAMME, study, argv, about=ABOUT)


if __name__ == "__main__":
    sys.exit(main())
