"""`actdb top` and `actdb transpose`."""

from pathlib import Path

import click

from actdb.commands.option import DATABASE, RUN, Integers
from actdb.output import emit, output_options


@click.command(context_settings={"show_default": True})
@DATABASE
@click.argument("site")
@RUN
@click.option("--layer", type=int, help="Layer number.")
@click.option(
    "--neuron",
    "neurons",
    type=Integers(),
    required=True,
    metavar="N|A,B",
    help="Place on the last axis; several are a group, by the sum of its activations.",
)
@click.option("-k", type=int, default=10, help="Rows to return.")
@click.option("--like", nargs=2, type=int, metavar="PROMPT POS", help="Rows most like this one within the group.")
@click.option("--metric", default="l2", metavar="l2|l1|cosine", help="How rows are compared with --like.")
@output_options
def top(
    database: Path,
    site: str,
    run: str | None,
    layer: int | None,
    neurons: tuple[int, ...],
    k: int,
    like: tuple[int, int] | None,
    metric: str,
    format: str | None,
    output: Path | None,
) -> None:
    """Show where a neuron of SITE, or a group, is highest, each token in its context; exact.

    \b
    actdb top DB mlp_post --layer 3 --neuron 42 -k 20
    actdb top DB mlp_post --layer 3 --neuron 42,7,1011
    actdb top DB mlp_post --layer 3 --neuron 42,7,1011 --like 17 -1
    """
    from actdb.database import Database

    with Database(database) as db:
        if like is None:
            result = db.top(site, layer=layer, neurons=neurons, k=k, run=run)
        else:
            result = db.most_similar(
                site, layer=layer, neurons=neurons, prompt=like[0], pos=like[1], k=k, metric=metric, run=run
            )
        emit(result.columns, result.arrow(), format, output)


@click.command()
@DATABASE
@click.argument("site")
@RUN
@click.option("--layer", type=int, help="Layer number.")
def transpose(database: Path, site: str, run: str | None, layer: int | None) -> None:
    """Keep a neuron-major copy of a layer of SITE, so that `actdb top` reads the neurons asked for alone.

    \b
    actdb transpose DB mlp_post --layer 3
    """
    from tqdm import tqdm

    from actdb.database import Database
    from actdb.storage.folder import readable_bytes

    with Database(database, mode="a") as db, tqdm(unit="row", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        size = db.transpose(site, layer=layer, run=run, progress=progress)
    place = "" if layer is None else f" layer {layer}"
    click.echo(f"{database}: neuron-major copy of {site}{place}, {readable_bytes(size)}", err=True)
