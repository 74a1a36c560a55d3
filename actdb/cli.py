"""The command line: parse, call, print. Data goes to stdout, progress and notes to stderr."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actdb.commands import compare, interchange, neighbor, neuron, plot, statistic
from actdb.commands.option import DATABASE, RUN, Integers, WorkerType, comma_separated, selection_options
from actdb.errors import ActdbError
from actdb.output import emit, output_options
from actdb.version import __version__

if TYPE_CHECKING:
    from actdb.database import Database


class Group(click.Group):
    """Commands in the order in which they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names as they were added."""
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="actdb")
def cli() -> None:
    """Harvest a language model once; then every question about its activations is a query.

    \b
    actdb harvest gpt2-small prompts.jsonl        -> gpt2-small.actdb/
    actdb info gpt2-small.actdb
    actdb sql gpt2-small.actdb "SELECT layer, head, avg(entropy) FROM head_stats GROUP BY ALL"
    actdb slice gpt2-small.actdb z --layer 1 --head 5 --prompt 17 -o z.npy
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an `ActdbError` is one line on stderr and exit code 1."""
    try:
        code = cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command to go on", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away: nothing to say, also not at exit
        sys.exit(0)
    except ActdbError as exc:
        click.echo(f"actdb: {' '.join(str(exc).split())}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


@cli.command(context_settings={"show_default": True})
@click.argument("model")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", metavar="DB", type=click.Path(path_type=Path), help="The database; default: MODEL.actdb here."
)
@click.option("--run", metavar="NAME", help="The run's name; default: the model's, with seed and step.")
@click.option("--step", type=int, help="Training step, recorded and appended to the run's name.")
@click.option("--random-init", type=int, metavar="SEED", help="Fresh weights of the same architecture: a control.")
@click.option("--tokenizer", metavar="NAME|FOLDER", help="A tokenizer; default: the model's own.")
@click.option(
    "--no-bos", "bos", flag_value=False, default=True, show_default=False, help="Do not prepend the tokenizer's BOS."
)
@click.option(
    "--sites",
    metavar="A,B|none",
    help="Sites to store; default: those of resid_post,z,pattern,mlp_post that the model has. none: statistics only.",
)
@click.option("--layers", type=Integers(), metavar="0-5,8", help="Layers to store; default: all.")
@click.option("--positions", default="all", metavar="all|last", help="Store every position, or each prompt's last.")
@click.option(
    "--pattern",
    default="full",
    metavar="full|topk:N|none",
    help="Attention patterns: packed whole, the N largest weights of each query, or none.",
)
@click.option(
    "--stats",
    callback=comma_separated,
    metavar="A,B|none",
    help="Statistics: heads, neurons, tokens, lens; default: heads, and neurons where mlp_post is stored.",
)
@click.option("--dtype", metavar="float32|float16|bfloat16", help="What the model computes in; default: float32.")
@click.option("--store", metavar="float16|float32", help="What is kept; default: float16, float32 for bfloat16 models.")
@click.option(
    "--codec", default="lz4", metavar="lz4|raw", help="lz4: Blosc with bit-shuffling. raw: plain bytes, memory-mapped."
)
@click.option(
    "--precision", type=int, metavar="BITS", help="Round to this many mantissa bits first; the error is recorded."
)
@click.option("--max-length", type=int, metavar="N", help="Cut prompts at N tokens; default: the model's context.")
@click.option("--strict", is_flag=True, help="Refuse prompts that are too long instead of cutting them.")
@click.option(
    "--batch-tokens", type=int, metavar="N", help="Padded tokens of a batch; default: 2048 on a CPU, 16384 on a GPU."
)
@click.option("--part-tokens", type=int, metavar="N", help="Tokens of a part; default: about 1 GiB, or 30 s on a CPU.")
@click.option("--buffer-mb", type=int, default=128, metavar="N", help="MiB that may wait to be written; default: 128.")
@click.option("--worker", type=WorkerType(), metavar="I/N", help="Take every N-th part from the I-th (from 0).")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU where there is one.")
@click.option(
    "--processing",
    default="raw",
    metavar="raw|folded",
    help="Weights as they are, or LayerNorm folded and weights centred.",
)
@click.option("--dry-run", is_flag=True, help="Print rows, bytes of each site and free disk; write nothing.")
def harvest(model: str, prompts: Path, out: Path | None, dry_run: bool, **options: Any) -> None:
    """Run MODEL over PROMPTS once and store its activations.

    MODEL is a name, a Hugging Face folder, or a TransformerLens-native folder; PROMPTS a .jsonl, .txt, .csv or .parquet
    file. Safe to kill: the same command goes on where it stopped, and checks and repairs a complete run.

    \b
    actdb harvest gpt2-small prompts.jsonl
    actdb harvest ./checkpoint-500 prompts.jsonl --step 500 -o training.actdb
    actdb harvest gpt2-small prompts.jsonl --random-init 0 --sites none
    """
    click.echo("loading ...", err=True)
    from actdb.harvesting.execution import run_harvest
    from actdb.harvesting.harvest import plan_harvest
    from actdb.harvesting.report import progress_bar, summary
    from actdb.harvesting.settings import Settings, parse_sites

    options["sites"] = parse_sites(options["sites"])
    planned = plan_harvest(model, prompts, Settings(**options))
    path = out if out is not None else Path(f"{planned.model.name}.actdb")
    if dry_run:
        click.echo(summary(planned, path))
        return
    click.echo(summary(planned, path), err=True)
    with progress_bar() as progress:
        run_harvest(planned, path, progress=progress)
    click.echo(f"{path}: run {planned.info.name} " + _run_state(path, planned.info.name), err=True)


@cli.command()
@DATABASE
@output_options
def info(database: Path, format: str | None, output: Path | None) -> None:
    """List the runs of a database: what was harvested, how much of it is there, and its size."""
    from actdb.info import run_rows

    with _open(database) as db:
        columns, rows = run_rows(db)
        if not rows:
            click.echo(f"{database} holds no runs yet", err=True)
        emit(columns, rows, format, output)
        for message in db.snapshot.damaged.values():
            click.echo(message, err=True)


@cli.command()
@DATABASE
@RUN
@output_options
def sites(database: Path, run: str | None, format: str | None, output: Path | None) -> None:
    """List the stored sites of a run: axes, shape, dtype, bytes, largest rounding error."""
    with _open(database) as db:
        query = "SELECT * EXCLUDE (run) FROM sites WHERE run = ?"
        result = db.sql(query, [db.run(run).name])
        emit(result.columns, result.arrow(), format, output)


@cli.command()
@DATABASE
@click.argument("query", required=False)
@click.option("--schema", is_flag=True, help="Describe every table, column and function instead.")
@output_options
def sql(database: Path, query: str | None, schema: bool, format: str | None, output: Path | None) -> None:
    """Answer an SQL QUERY over statistics, prompts, tokens and results; without one, start a shell.

    QUERY may be - to read it from standard input. Only reads: nothing is changed, no other file is touched.

    \b
    actdb sql DB "SELECT layer, head, avg(entropy) e FROM head_stats GROUP BY ALL ORDER BY e LIMIT 10"
    actdb sql DB "SELECT category, count(*) FROM prompts GROUP BY ALL" --format json
    """
    from actdb import catalog

    if schema:
        click.echo(catalog.schema_text())
        return
    with _open(database) as db:
        if query is None and sys.stdin.isatty():
            from actdb.shell import run_shell

            run_shell(db.sql, db.sql_words())
            return
        result = db.sql(sys.stdin.read() if query in (None, "-") else str(query))
        emit(result.columns, result.arrow(), format, output)


@cli.command(name="slice")
@DATABASE
@click.argument("site")
@RUN
@selection_options
@click.option("--pad", is_flag=True, help="Patterns of several prompts as one array, NaN beyond each.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .npy, .npz or .safetensors file; default: describe and preview.",
)
def slice_(database: Path, site: str, run: str | None, pad: bool, output: Path | None, **index: Any) -> None:
    """Read stored activations of SITE by layer, head, prompt and position.

    \b
    actdb slice DB z --layer 1 --head 5 --where "category = 'animals'" --pos -1 -o z.npy
    actdb slice DB pattern --layer 1 --head 5 --prompt 17 -o pattern.npy
    """
    from actdb.info import preview, save_selection

    with _open(database) as db:
        selection = db.run(run)[site].sel(**index)
        if output is None:
            click.echo(repr(selection))
            click.echo(preview(selection.numpy(pad=pad)))
            return
        click.echo(f"{output}: {save_selection(selection, output, pad=pad)}", err=True)


@cli.command()
@DATABASE
def verify(database: Path) -> None:
    """Check every stored byte against its checksum; exit 1 and name what is damaged."""
    with _open(database) as db:
        damages = db.verify()
        for damage in damages:
            part = "" if damage.part is None else f" (run {damage.run}, part {damage.part})"
            click.echo(f"{damage.message}{part}")
        partial = [run.name for run in db.runs() if run.status == "partial"]
    for name in partial:
        click.echo(f"run {name} is partial: run the same harvest again to go on", err=True)
    if damages:
        click.echo(f"{len(damages)} damaged; the harvest that made a run repairs its parts", err=True)
        sys.exit(1)
    click.echo(f"{database}: every byte matches its checksum", err=True)


@cli.command()
@DATABASE
@click.option("--run", required=True, metavar="NAME", help="The run to delete.")
def rm(database: Path, run: str) -> None:
    """Delete a run: arrays, statistics, and weights that no other run uses."""
    with _open(database) as db:
        freed = db.remove(run)
    click.echo(f"{database}: removed run {run}, {freed / 1e6:.1f} MB freed", err=True)


@cli.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo.actdb"),
    show_default=True,
    help="The database to make.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default=Path("demo.png"),
    show_default=True,
    help="The picture to make.",
)
def demo(out: Path, picture: Path) -> None:
    """Harvest a small model that ships with actdb and find its induction heads by SQL."""
    from actdb.demo.show import show_demo

    show_demo(out, picture, say=lambda line: click.echo(line, err=True), emit=_emit_table)


cli.add_command(neuron.top)
cli.add_command(neuron.transpose)
cli.add_command(neighbor.index)
cli.add_command(neighbor.nearest)
cli.add_command(statistic.stats)
cli.add_command(compare.compare)
cli.add_command(interchange.export)
cli.add_command(interchange.import_)
cli.add_command(plot.plot)


def _emit_table(columns: Sequence[str], rows: Any) -> None:
    emit(columns, rows, "table")


def _open(database: Path) -> "Database":
    from actdb.database import Database

    return Database(database)


def _run_state(path: Path, name: str) -> str:
    with _open(path) as db:
        run = db.run(name)
        return f"{run.status}, {len(run._snapshot.parts)} of {run.info.n_parts} parts"
