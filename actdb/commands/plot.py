"""`actdb plot`: pictures of a database, one command a kind."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actdb.commands.option import DATABASE, RUN, IndexType, comma_separated

if TYPE_CHECKING:
    from actdb.database import Database

PROMPT = click.option("--prompt", required=True, type=int, help="Prompt id.")
POS = click.option("--pos", type=IndexType(), metavar="I|I,J|I:J", help="Positions to show; default: all.")


class PictureGroup(click.Group):
    """Kinds of picture behind the database: `actdb plot DB KIND`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let `actdb plot KIND --help` show the help of a kind without a database."""
        if len(args) == 2 and args[0] in self.commands and args[1] in ctx.help_option_names:
            args = [".", *args]
        return super().parse_args(ctx, args)


@click.group(cls=PictureGroup, subcommand_metavar="heads|pattern|neurons|lens|tokens [OPTIONS]")
@DATABASE
@click.pass_context
def plot(ctx: click.Context, database: Path) -> None:
    """Draw a picture: .png, .svg or .pdf, and for pattern and tokens a self-contained .html page to explore.

    \b
    actdb plot DB heads -o heads.png
    actdb plot DB pattern --layer 1 --head 5 --prompt 17 -o l1h5.png
    actdb plot DB pattern --prompt 17 -o attention.html
    """
    ctx.obj = database


def _output(valid: str) -> Callable[[Any], Any]:
    """Return the option for the file to make."""
    return click.option(
        "-o", "--output", required=True, type=click.Path(path_type=Path), help=f"The file to make: {valid}."
    )


FIGURE, FIGURE_OR_PAGE = _output(".png, .svg or .pdf"), _output(".png, .svg, .pdf or .html")


@plot.command()
@click.option(
    "--column", "columns", callback=comma_separated, metavar="A,B", help="Columns of head_stats; default: six of them."
)
@click.option("--where", metavar="SQL", help="Average over the prompts that meet this condition over labels.")
@RUN
@FIGURE
@click.pass_obj
def heads(database: Path, columns: tuple[str, ...] | None, where: str | None, run: str | None, output: Path) -> None:
    """Head statistics as grids of layers × heads.

    A cell is the mean over prompts.

    \b
    actdb plot DB heads --column induction_mass --where "category = 'coding'" -o induction.png
    """
    from actdb import plots

    with _open(database) as db:
        plots.save(output, lambda: plots.heads(db, columns, run=run, where=where))


@plot.command()
@PROMPT
@click.option("--layer", type=int, help="Layer number; a page may show all.")
@click.option("--head", type=int, help="Head; default: all of the layer, as small multiples.")
@RUN
@FIGURE_OR_PAGE
@click.pass_obj
def pattern(database: Path, prompt: int, layer: int | None, head: int | None, run: str | None, output: Path) -> None:
    """Attention of one head, a layer, or a page of all.

    \b
    actdb plot DB pattern --layer 1 --head 5 --prompt 17 -o l1h5.png
    actdb plot DB pattern --layer 1 --prompt 17 -o layer1.png
    actdb plot DB pattern --prompt 17 -o attention.html
    """
    from actdb import plots

    with _open(database) as db:
        plots.save(
            output,
            lambda: plots.pattern(db, prompt, layer=layer, head=head, run=run),
            page=lambda: plots.attention_page(db, prompt, layer=layer, head=head, run=run),
        )


@plot.command(context_settings={"show_default": True})
@click.option("--site", default="mlp_post", metavar="NAME", help="A site of rows without heads.")
@click.option("--layer", type=int, help="Layer number.")
@click.option("--neuron", required=True, type=int, help="Place on the last axis.")
@click.option("-k", "n_contexts", type=int, default=10, help="Contexts to show.")
@RUN
@FIGURE
@click.pass_obj
def neurons(
    database: Path, site: str, layer: int | None, neuron: int, n_contexts: int, run: str | None, output: Path
) -> None:
    """Histogram of one neuron, with its top contexts.

    \b
    actdb plot DB neurons --layer 3 --neuron 42 -o neuron.png
    """
    from actdb import plots

    with _open(database) as db:
        plots.save(
            output, lambda: plots.neurons(db, layer=layer, neuron=neuron, site=site, n_contexts=n_contexts, run=run)
        )


@plot.command(context_settings={"show_default": True})
@PROMPT
@POS
@click.option("--colour", "--color", default="probability", metavar="probability|entropy|kl", help="What colours show.")
@RUN
@FIGURE
@click.pass_obj
def lens(database: Path, prompt: int, pos: Any, colour: str, run: str | None, output: Path) -> None:
    """Logit lens: the likeliest token after each layer.

    A framed cell has the token that really comes next; above 32 positions cells hold no text.

    \b
    actdb plot DB lens --prompt 17 --pos 0:24 -o lens.png
    """
    from actdb import plots

    with _open(database) as db:
        plots.save(output, lambda: plots.lens(db, prompt, colour=colour, pos=pos, run=run))


@plot.command(context_settings={"show_default": True})
@PROMPT
@POS
@click.option("--column", default="loss", metavar="loss|entropy|rank", help="What colours show.")
@RUN
@FIGURE_OR_PAGE
@click.pass_obj
def tokens(database: Path, prompt: int, pos: Any, column: str, run: str | None, output: Path) -> None:
    """Text of a prompt, coloured by how it is predicted.

    Each token has the colour of its loss or rank given those before it, or of the prediction's entropy.

    \b
    actdb plot DB tokens --prompt 17 -o tokens.png
    actdb plot DB tokens --prompt 17 --column rank -o tokens.html
    """
    from actdb import plots

    with _open(database) as db:
        plots.save(
            output,
            lambda: plots.tokens(db, prompt, column=column, pos=pos, run=run),
            page=lambda: plots.tokens_page(db, prompt, column=column, pos=pos, run=run),
        )


def _open(database: Path) -> "Database":
    from actdb.database import Database

    return Database(database)
