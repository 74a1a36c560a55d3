"""`actdb export` and `actdb import`."""

from pathlib import Path
from typing import Any

import click

from actdb.commands.option import DATABASE, RUN, Integers, selection_options
from actdb.interchange.export import FORMATS


@click.command()
@DATABASE
@click.argument("site")
@RUN
@selection_options
@click.option("--format", type=click.Choice(FORMATS), help="Default: by the suffix of -o. hf: a datasets folder.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file or folder to make.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
def export(
    database: Path, site: str, run: str | None, format: str | None, output: Path, overwrite: bool, **index: Any
) -> None:
    """Write activations of SITE for other tools, with prompt, position, token and labels beside them.

    parquet and hf hold a record a layer, head and row (of patterns: a query) in storage order; npz and safetensors hold
    arrays, as `actdb slice` does. Values keep their dtype, and memory stays bounded. hf is a folder for
    datasets.load_from_disk; datasets.load_dataset("parquet") reads the other.

    \b
    actdb export DB resid_post --layer 6 -o resid_post.parquet
    actdb export DB pattern --layer 1 --head 5 --where "category = 'animals'" --format hf -o patterns
    """
    from actdb.database import Database

    with Database(database) as db:
        selection = db.run(run)[site].sel(**index)
        path = selection.export(output, format=format, overwrite=overwrite)
        click.echo(f"{path}: {selection!r}", err=True)


@click.command(name="import", context_settings={"show_default": True})
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("-o", "--out", metavar="DB", required=True, type=click.Path(path_type=Path), help="The database.")
@click.option("--run", metavar="NAME", help="The run's name; default: the model's.")
@click.option("--model", metavar="NAME", help="The model's name; default: PATH without its suffix.")
@click.option("--step", type=int, help="Training step, recorded and appended to the run's name.")
@click.option("--sites", metavar="A,B", help="Sites to import; default: every known one in the file.")
@click.option("--layers", type=Integers(), metavar="0-5,8", help="Layers to import; default: all.")
@click.option("--padding", default="right", metavar="right|left", help="The side on which prompts are padded.")
@click.option("--pad-to", type=int, metavar="N", help="The padded length; default: the longest prompt's.")
@click.option("--causal/--bidirectional", default=None, show_default=False, help="Default: as the patterns are.")
@click.option("--store", metavar="float16|float32", help="What is kept; default: what holds the values exactly.")
@click.option("--codec", default="lz4", metavar="lz4|raw", help="As for harvest.")
@click.option("--precision", type=int, metavar="BITS", help="Round to this many mantissa bits; the error is recorded.")
@click.option("--part-tokens", type=int, metavar="N", help="Tokens of a part; default: about 1 GiB.")
@click.option("--tokenizer", metavar="NAME|FOLDER", help="A tokenizer, for prompts given as text.")
@click.option("--no-bos", "bos", flag_value=False, default=True, show_default=False, help="Text has no BOS before it.")
def import_(path: Path, prompts: Path, out: Path, **options: Any) -> None:
    """Store activations that were computed elsewhere as a run: PATH holds tensors by hook name, PROMPTS the prompts.

    PATH is a .pt (such as torch.save of cache.cache_dict; tensors only, nothing is unpickled), .safetensors or .npz
    file of tensors [batch, pos, ...]; PROMPTS is read as by harvest, with "tokens" or with --tokenizer.

    \b
    actdb import cache.pt prompts.jsonl -o study.actdb --run imported
    """
    click.echo("loading ...", err=True)
    from actdb.interchange import import_activations

    run = import_activations(path, prompts, out, **options)
    sites = ", ".join(run.sites)
    click.echo(f"{out}: run {run.name} {run.status}, {run.n_prompts:,} prompts, sites {sites}", err=True)
