"""`actdb index` and `actdb nearest`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from actdb.commands.option import DATABASE, RUN, IndexType, comma_separated
from actdb.output import emit, output_options

Command = TypeVar("Command", bound=Callable[..., Any])


def comparison_options(command: Command) -> Command:
    """Add what is compared, and how, to a command: the same arguments find the index that was made with them."""
    condition = "Only prompts for which this holds, over labels and run_prompts: \"category = 'animals'\"."
    for option in (
        click.option("--where", metavar="SQL", help=condition),
        click.option("--subspace", type=IndexType(), metavar="N|A:B", help="A subspace of it, or a range of columns."),
        click.option("--partition", metavar="NAME", help="A stored rotation, before the metric."),
        click.option(
            "--map",
            callback=comma_separated,
            metavar="final_norm,unembed",
            help="Before the metric: the final norm, and lengths as the unembedding sees them.",
        ),
        click.option("--metric", default="cosine", show_default=True, metavar="cosine|l2|ip", help="The distance."),
        click.option("--head", type=int, metavar="N", help="Head; the kv head for k and v."),
        click.option("--layer", type=int, metavar="N", help="Layer number."),
    ):
        command = option(command)
    return command


@click.command()
@DATABASE
@click.argument("site")
@RUN
@comparison_options
@click.option("--kind", metavar="flat|ivf|hnsw|ivfpq", help="Default: by the number of rows.")
@click.option(
    "--recall", type=float, default=0.95, show_default=True, metavar="R", help="Search so widely that recall@10 is R."
)
def index(database: Path, site: str, run: str | None, **options: Any) -> None:
    """Make a FAISS index of SITE's rows, which `actdb nearest` with the same options then uses.

    Rows are streamed from the store. Safe to kill: the same command goes on where it stopped, leaves an index that fits
    as it is, and makes a stale one anew. Its recall@10 against exact search is measured on rows held out; `actdb info`
    lists it.

    \b
    actdb index DB resid_post --layer 6
    actdb index DB resid_post --layer 11 --map final_norm --kind hnsw --recall 0.99
    """
    from tqdm import tqdm

    from actdb.database import Database

    with Database(database, mode="a") as db, tqdm(unit="row", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = db.index(site, run=run, progress=progress, **options)
    click.echo(f"{database}: index of {made}, {made.n_rows:,} rows, {made.file.stored_bytes / 1e6:.1f} MB", err=True)


@click.command()
@DATABASE
@click.argument("site")
@RUN
@comparison_options
@click.option("--prompt", type=int, metavar="N", help="Query by a stored row: its prompt id.")
@click.option("--pos", type=int, metavar="N", help="Its position, -1 for the last; of --text, default the last.")
@click.option("--vector", type=click.Path(path_type=Path), metavar="FILE", help="Query by a vector: a .npy file.")
@click.option("--text", help="Query by a text, run through the model.")
@click.option("--model", metavar="NAME|FOLDER", help="The run's model, for --text; default: the name recorded.")
@click.option("--tokenizer", metavar="NAME|FOLDER", help="Its tokenizer, for --text; default: the model's own.")
@click.option("-k", type=int, metavar="N", help="How many [default: 10; with --radius: all]")
@click.option("--radius", type=float, metavar="D", help="Rows within this distance.")
@click.option("--exclude-prompt", is_flag=True, help="Leave out the query's own prompt.")
@click.option("--exclude-within", type=int, default=0, metavar="N", help="Leave out positions so near to the query's.")
@click.option("--exact", is_flag=True, help="Compare every row, also where there is an index.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU where there is one.")
@output_options
def nearest(
    database: Path, site: str, run: str | None, format: str | None, output: Path | None, **options: Any
) -> None:
    """List the stored rows of SITE nearest to a row, a vector or a text, with tokens in context, distance and labels.

    \b
    actdb nearest DB resid_post --layer 6 --prompt 17 --pos -1 -k 10
    actdb nearest DB resid_post --layer 6 --prompt 17 --pos -1 --exclude-prompt --where "category = 'animals'"
    actdb nearest DB resid_post --layer 6 --text "Once upon a time" --model ./tiny --metric l2
    """
    from actdb.database import Database

    with Database(database) as db:
        result = db.nearest(site, run=run, **options)
        emit(result.columns, result.arrow(), format, output)
        if result.recall is not None:
            click.echo(f"by an index of recall@10 {result.recall:.3f}; --exact compares every row", err=True)
