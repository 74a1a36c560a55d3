"""`actdb demo`: harvest the shipped model, find its induction circuit by one query, draw the patterns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actdb.database import Database, open
from actdb.demo import MODEL, PROMPTS
from actdb.making import harvest
from actdb.plots import patterns_figure, save_figure

QUERY = """
SELECT layer, head, round(avg(prev_mass), 3) AS previous_token, round(avg(induction_mass), 3) AS induction
FROM head_stats JOIN prompts USING (prompt_id)
WHERE kind = 'repeated' AND run = 'demo'
GROUP BY ALL ORDER BY greatest(avg(prev_mass), avg(induction_mass)) DESC
""".strip()
HEAD_QUERY = """
SELECT arg_max((layer, head), mass) FROM (
    SELECT layer, head, avg({column}) AS mass FROM head_stats JOIN prompts USING (prompt_id)
    WHERE kind = 'repeated' AND run = 'demo' GROUP BY ALL)
"""
PROMPT_QUERY = """
SELECT prompt_id FROM prompts JOIN run_prompts USING (prompt_id)
WHERE kind = 'repeated' AND run = 'demo' AND n_tokens BETWEEN 20 AND 40 ORDER BY n_tokens, prompt_id LIMIT 1
"""


def show_demo(
    out: Path, picture: Path, *, say: Callable[[str], None], emit: Callable[[Sequence[str], Any], None]
) -> None:
    """Make the database and the picture, and print the table of heads."""
    say(f"harvesting a two-layer attention-only transformer over 96 prompts into {out} ...")
    run = harvest(MODEL, PROMPTS, out, run="demo")
    say(f"{run.status}: {run.n_prompts} prompts, {run.info.plan['n_tokens']:,} tokens, sites {', '.join(run.sites)}\n")
    say(f'actdb sql {out} "{QUERY}"\n')
    with open(out) as db:
        result = db.sql(QUERY)
        emit(result.columns, result.arrow())
        draw(db, picture)
    say(f"\nThe induction circuit, drawn from the stored patterns: {picture}")


def draw(db: Database, picture: Path) -> None:
    """Draw the previous-token head and the induction head on one repeated sequence."""
    run = db.run("demo")
    prompt = int(_scalar(db, PROMPT_QUERY))
    patterns, titles = [], []
    for column, name in (("prev_mass", "previous-token head"), ("induction_mass", "induction head")):
        layer, head = _scalar(db, HEAD_QUERY.format(column=column))
        patterns.append(run["pattern"].sel(layer=layer, head=head, prompt=prompt).numpy())
        titles.append(f"L{layer}H{head}: {name}")
    title = f"Attention on prompt {prompt}: a random sequence, repeated"
    save_figure(patterns_figure(patterns, titles=titles, tokens=run.token_texts(prompt), title=title), picture)


def _scalar(db: Database, query: str) -> Any:
    row = db.sql(query).fetchone()
    assert row is not None
    return row[0]
