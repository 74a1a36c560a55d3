"""What pictures are made from: rows of statistics and positions of a prompt, or the error that says what is missing."""

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from actdb.catalog.explanation import nearest
from actdb.errors import SelectionError, SettingError

if TYPE_CHECKING:
    from actdb.database import Database
    from actdb.run import Run

Positions = SupportsIndex | slice | Sequence[int] | None


def statistic_rows(
    db: "Database", query: str, parameters: Sequence[Any], *, run: "Run", statistic: str
) -> list[tuple[Any, ...]]:
    """Return the rows of a query over a table of statistics; raises `SettingError` naming the option that makes it."""
    rows = db.sql(query, parameters).fetchall()
    if not rows:
        raise lacking(db, run, statistic)
    return rows


def lacking(db: "Database", run: "Run", statistic: str) -> SettingError:
    """Return the error for statistics that a run does not have, with both ways to get them."""
    return SettingError(
        f"run {run.name!r} has no {statistic} statistics; harvest it with --stats {statistic},"
        f" or compute them by: actdb stats {db.path} --run {run.name} --stats {statistic}"
    )


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """Return a name that is among others; raises `SettingError` with the nearest and all of them."""
    valid = list(names)
    if name in valid:
        return name
    like = nearest(name, valid)
    hint = "" if like is None else f"did you mean {like!r}? "
    raise SettingError(f"no {kind} {name!r}; {hint}choose {', '.join(valid)}")


def chosen_positions(n_tokens: int, pos: Positions) -> list[int]:
    """Return positions of a prompt in the order given: all, one, a slice or a list; negative ones count from the end.

    Raises `SelectionError` for one that the prompt lacks, and where none is left.
    """
    if pos is None or isinstance(pos, slice):
        chosen = list(range(n_tokens))[pos or slice(None)]
    else:
        given = [operator.index(place) for place in np.ravel(np.asarray(pos))]
        wrong = next((place for place in given if not -n_tokens <= place < n_tokens), None)
        if wrong is not None:
            raise SelectionError(f"pos {wrong}: the prompt has positions 0 to {n_tokens - 1}")
        chosen = [place % n_tokens for place in given]
    if not chosen:
        raise SelectionError(f"no position is selected; the prompt has positions 0 to {n_tokens - 1}")
    return chosen
