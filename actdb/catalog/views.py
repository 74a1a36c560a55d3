"""Every view over the tables of the catalog, with its columns and the rule or formula behind them."""

from dataclasses import dataclass

from actdb.catalog.tables import BUILT_IN, Column, parse_columns


@dataclass(frozen=True)
class View:
    """A view of the catalog. In `query`, {labels} stands for `, p."x" AS "label_x"` of each label, p being prompts."""

    name: str
    meaning: str
    columns: tuple[Column, ...]
    query: str


_MEASURES = tuple(column for column in BUILT_IN["head_stats"].columns if column.name not in ("run", "prompt_id"))
VIEWS: tuple[View, ...] = (
    View(
        "head_stats_labelled",
        "head_stats with the run's model and step, and each label of the prompt as label_NAME",
        (
            *parse_columns("""
                run VARCHAR runs.run
                model VARCHAR runs.model
                step BIGINT runs.step, null where none was given
                prompt_id INTEGER prompts.prompt_id
            """),
            *_MEASURES,
        ),
        f"SELECT h.run, r.model, r.step, h.prompt_id, {', '.join(f'h.{c.name}' for c in _MEASURES)}{{labels}}"
        " FROM head_stats h JOIN runs r USING (run)"
        " JOIN prompts p ON p.prompt_set = r.prompt_set AND p.prompt_id = h.prompt_id",
    ),
    View(
        "head_roles",
        "one row a run, layer and head: what the head does, by a plain rule over its mean masses",
        parse_columns("""
            run VARCHAR runs.run
            layer INTEGER layer
            head INTEGER head
            role VARCHAR the greatest of the five masses if it is 0.4 or more; else uniform if that score is 0.9 or more
            previous DOUBLE mean of prev_mass over prompts
            first DOUBLE mean of first_mass
            self DOUBLE mean of self_mass
            duplicate DOUBLE mean of duplicate_mass; null where no token repeats
            induction DOUBLE mean of induction_mass; null where no token repeats
            uniform DOUBLE entropy ÷ that of even attention over the keys in reach, mean ln(q + 1), or ln n both ways
            n_prompts BIGINT prompts
        """),
        """
        WITH scores AS (
            SELECT h.run, h.layer, h.head, avg(h.prev_mass) AS previous, avg(h.first_mass) AS first,
                avg(h.self_mass) AS self, avg(h.duplicate_mass) AS duplicate, avg(h.induction_mass) AS induction,
                avg(h.entropy) / nullif(avg(CASE WHEN r.causal THEN lgamma(p.n_tokens + 1) / p.n_tokens
                    ELSE ln(p.n_tokens) END), 0) AS uniform,
                count(*) AS n_prompts
            FROM head_stats h JOIN runs r USING (run) JOIN run_prompts p USING (run, prompt_id) GROUP BY ALL
        ), greatest_of AS (
            SELECT *, greatest(previous, first, self, duplicate, induction) AS most FROM scores
        )
        SELECT run, layer, head,
            CASE WHEN most >= 0.4 THEN CASE most WHEN previous THEN 'previous' WHEN induction THEN 'induction'
                    WHEN duplicate THEN 'duplicate' WHEN first THEN 'first' ELSE 'self' END
                WHEN uniform >= 0.9 THEN 'uniform' END AS role,
            previous, first, self, duplicate, induction, uniform, n_prompts
        FROM greatest_of ORDER BY run, layer, head
        """,
    ),
    View(
        "neuron_stats",
        "one row a run, layer and neuron: moments over all rows of the committed parts, merged exactly",
        parse_columns("""
            run VARCHAR runs.run
            layer INTEGER layer
            neuron INTEGER neuron
            n BIGINT rows
            mean DOUBLE mean activation
            std DOUBLE standard deviation of the population, √(M2 / n)
            skew DOUBLE √n M3 / M2^1.5; null where std is 0
            max FLOAT highest activation
            active_fraction DOUBLE share of rows above 0
        """),
        """
        WITH means AS (
            SELECT *, sum(n) OVER neuron AS total, sum(n * mean) OVER neuron / sum(n) OVER neuron AS centre
            FROM neuron_moments WINDOW neuron AS (PARTITION BY run, layer, neuron)
        ), merged AS (
            SELECT run, layer, neuron, any_value(total)::BIGINT AS n, any_value(centre) AS mean,
                sum(m2 + n * (mean - centre) ** 2) AS m2,
                sum(m3 + 3 * (mean - centre) * m2 + n * (mean - centre) ** 3) AS m3,
                max(max) AS max, sum(n_active) AS n_active
            FROM means GROUP BY run, layer, neuron
        )
        SELECT run, layer, neuron, n, mean, sqrt(m2 / n) AS std,
            CASE WHEN m2 > 0 THEN sqrt(n) * m3 / m2 ** 1.5 END AS skew, max, n_active / n AS active_fraction
        FROM merged ORDER BY run, layer, neuron
        """,
    ),
)
"""Every view over the tables; made anew with each catalog, since labels differ."""
RELATION_NAMES = (*BUILT_IN, *(view.name for view in VIEWS))
