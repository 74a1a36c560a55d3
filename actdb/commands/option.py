"""Options and types of parameters that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DATABASE = click.argument("database", type=click.Path(path_type=Path))
RUN = click.option("--run", metavar="NAME", help="The run; default: the only or newest one.")


class Integers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Layers and the like: `3`, `0,5,7`, or `0-5`."""

    name = "ints"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers: list[int] = []
            for word in str(value).split(","):
                first, dash, last = word.strip().partition("-")
                numbers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 3 or 0,5,7 or 0-5", param, ctx)
        return tuple(numbers)


class IndexType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """An index: `3` or `-1` drops the axis, `0,2,5` and `0:6` keep it."""

    name = "index"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return an int, a slice or a list of ints."""
        if not isinstance(value, str):
            return value
        try:
            if ":" in value:
                return slice(*(int(word) if word.strip() else None for word in value.split(":")))
            if "," in value:
                return [int(word) for word in value.split(",")]
            return int(value)
        except (TypeError, ValueError):
            self.fail(
                f"{value!r} is not an index: give a number, a list such as 0,2,5 or a range such as 0:6", param, ctx
            )


class WorkerType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A worker's share: `I/N`."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return (I, N)."""
        try:
            index, _, number = str(value).partition("/")
            return int(index), int(number)
        except ValueError:
            self.fail(f"{value!r} is not of the form I/N, such as 0/2", param, ctx)


def comma_separated(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Split a comma-separated option; "none" is the empty list."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    return () if names == ("none",) else names


def selection_options(command: Command) -> Command:
    """Add `--layer --head --neuron --prompt --pos --where` to a command: the arguments of `Selection.sel`."""
    condition = "Condition over labels and run_prompts, such as \"category = 'animals'\"."
    for option in (
        click.option("--where", metavar="SQL", help=condition),
        click.option("--pos", type=IndexType(), help="Position; -1 is each prompt's last."),
        click.option("--prompt", type=IndexType(), help="Prompt id."),
        click.option("--neuron", type=IndexType(), help="Place on the last axis."),
        click.option("--head", type=IndexType(), help="Head; the kv head for k and v."),
        click.option("--layer", type=IndexType(), help="Layer number; 0:6 or 0,2,5 for several."),
    ):
        command = option(command)
    return command
