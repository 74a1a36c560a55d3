"""`actdb stats`."""

from pathlib import Path

import click

from actdb.commands.option import DATABASE, RUN, comma_separated
from actdb.errors import SettingError


@click.command()
@DATABASE
@click.option("--stats", callback=comma_separated, metavar="A,B", required=True, help="heads, neurons, tokens, lens.")
@RUN
def stats(database: Path, stats: tuple[str, ...], run: str | None) -> None:
    """Compute statistics of a stored run from its arrays, without the model.

    They agree with those of a harvest to the stored precision; SQL's table statistics says which is which. What is
    there already is left; an interrupted command goes on where it stopped, and damaged parts are computed anew.

    \b
    actdb stats DB --stats neurons,lens
    """
    from tqdm import tqdm

    from actdb.database import Database

    if not stats:
        raise SettingError("--stats none: name what to compute of heads, neurons, tokens, lens")
    with Database(database, mode="a") as db, tqdm(unit="part", disable=None, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        name = db.run(run).name
        computed = db.compute_statistics(stats, run=name, progress=progress)
    kept = [kind for kind in stats if kind not in computed]
    if computed:
        click.echo(f"{database}: {', '.join(computed)} statistics of run {name} computed from stored arrays", err=True)
    if kept:
        click.echo(f"{database}: run {name} has {', '.join(kept)} statistics already", err=True)
