"""`actdb compare`."""

from pathlib import Path

import click

from actdb.commands.option import DATABASE
from actdb.output import emit, output_options


@click.command()
@DATABASE
@click.argument("run_a")
@click.argument("run_b")
@click.option("--of", default="heads", show_default=True, metavar="heads|neurons", help="What to compare.")
@click.option("--measure", metavar="NAME", help="Rank by its change, such as induction_mass.")
@click.option("-k", type=int, default=20, show_default=True, metavar="N", help="How many are listed.")
@output_options
def compare(
    database: Path,
    run_a: str,
    run_b: str,
    of: str,
    measure: str | None,
    k: int,
    format: str | None,
    output: Path | None,
) -> None:
    """List the heads or neurons that changed most from RUN_A to RUN_B, two runs over the same prompts.

    Heads are compared prompt by prompt, and listed with the measure of head_stats (norms aside) that changed most.
    The views run_pairs, head_changes and neuron_changes hold every measure of all pairs of runs.

    \b
    actdb compare DB tiny-random0 tiny
    actdb compare DB tiny-step100 tiny-step200 --measure induction_mass
    actdb compare DB tiny-random0 tiny --of neurons -k 50 -o neurons.csv
    """
    from actdb.database import Database

    with Database(database) as db:
        result = db.compare(run_a, run_b, of=of, measure=measure, k=k)
        emit(result.columns, result.arrow(), format, output)
