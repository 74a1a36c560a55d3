"""Rows that a search found, as a table: each with its token in context and the labels of its prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actdb.catalog.names import distinct_names, quote
from actdb.catalog.query import QueryResult
from actdb.catalog.tables import BUILT_IN

BEFORE, AFTER = 8, 4
"""Tokens of context on either side."""
_OWN = tuple(column.name for column in BUILT_IN["prompts"].columns)
_QUERY = """
    WITH found AS (
        SELECT unnest($rank::INTEGER[]) rank, unnest($prompt_id::INTEGER[]) prompt_id,
            unnest($pos::INTEGER[]) pos{given}
    ), marked AS (
        SELECT f.rank, t.pos, t.pos = f.pos mine, coalesce(t.token, ' ' || t.token_id) token
        FROM found f JOIN tokens t ON t.run = $run AND t.prompt_id = f.prompt_id
            AND t.pos BETWEEN f.pos - {before} AND f.pos + {after}
    ), contexts AS (
        SELECT rank, any_value(token) FILTER (mine) token, string_agg(
            CASE WHEN mine THEN regexp_extract(token, '^ *') || '[' || ltrim(token, ' ') || ']' ELSE token END,
            '' ORDER BY pos
        ) context
        FROM marked GROUP BY rank
    )
    SELECT $run run, rank, f.prompt_id, f.pos{values}, token, context{labels}
    FROM found f LEFT JOIN contexts USING (rank) JOIN runs r ON r.run = $run
        JOIN prompts p ON p.prompt_set = r.prompt_set AND p.prompt_id = f.prompt_id
    ORDER BY rank
"""


def rows_in_context(
    sql: Callable[..., QueryResult],
    run: str,
    prompt: Sequence[int],
    pos: Sequence[int | None],
    values: Mapping[str, tuple[str, Sequence[Any]]],
) -> QueryResult:
    """Return found rows in the order given: run, rank, prompt_id, pos, `values`, token, context, then labels.

    `values` maps names of columns to an SQL type and a value a row. `context` holds the tokens around, its own in
    brackets. `pos`, token and context are null for sites without positions.
    """
    columns = ("run", "rank", "prompt_id", "pos", *values, "token", "context")
    names = [str(name) for name, *_ in sql("DESCRIBE prompts").fetchall()]
    labels = distinct_names((name for name in names if name not in _OWN), taken=columns)
    query = _QUERY.format(
        before=BEFORE,
        after=AFTER,
        given="".join(f", unnest(${name}::{kind}[]) {name}" for name, (kind, _) in values.items()),
        values="".join(f", f.{name}" for name in values),
        labels="".join(f", p.{quote(label)} AS {quote(name)}" for label, name in labels.items()),
    )
    found = {name: list(held) for name, (_, held) in values.items()}
    return sql(query, {"run": run, "rank": [*range(len(prompt))], "prompt_id": list(prompt), "pos": list(pos), **found})
