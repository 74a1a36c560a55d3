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


def _head_changes() -> str:
    """Return the query of head_changes: runs are paired and summed up a head first, then each measure is a row."""
    names = [column.name for column in _MEASURES if column.type == "FLOAT"]
    both = "FILTER (WHERE a.{0} IS NOT NULL AND b.{0} IS NOT NULL)"
    sums = (
        f"struct_pack(n := count(*) {both}, a := avg(a.{{0}}) {both}, b := avg(b.{{0}}) {both},"
        " change := avg(b.{0}::DOUBLE - a.{0}), spread := stddev_samp(b.{0}::DOUBLE - a.{0}),"
        f" own := (stddev_samp(a.{{0}}) {both} + stddev_samp(b.{{0}}) {both}) / 2) AS {{0}}"
    )
    return f"""
        WITH paired AS (
            SELECT p.run_a, p.run_b, a.layer, a.head, {", ".join(sums.format(name) for name in names)}
            FROM run_pairs p JOIN head_stats a ON a.run = p.run_a
                JOIN head_stats b ON b.run = p.run_b AND b.prompt_id = a.prompt_id
                    AND b.layer = a.layer AND b.head = a.head
            GROUP BY p.run_a, p.run_b, a.layer, a.head
        ), listed AS (
            SELECT run_a, run_b, layer, head, unnest(['{"', '".join(names)}']) AS measure,
                unnest([{", ".join(names)}]) AS found
            FROM paired
        )
        SELECT l.run_a, l.run_b, l.layer, l.head, measure, found.a AS mean_a, found.b AS mean_b, found.change,
            CASE WHEN found.own > 0 THEN found.change / found.own WHEN found.change = 0 THEN 0 END AS effect,
            CASE WHEN found.spread > 0 THEN found.change / found.spread WHEN found.change = 0 THEN 0
                END AS paired_effect,
            found.n AS n_prompts, ra.role AS role_a, rb.role AS role_b
        FROM listed l JOIN head_roles ra ON ra.run = l.run_a AND ra.layer = l.layer AND ra.head = l.head
            JOIN head_roles rb ON rb.run = l.run_b AND rb.layer = l.layer AND rb.head = l.head
        WHERE found.n > 0 ORDER BY l.run_a, l.run_b, l.layer, l.head, measure
        """


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
    View(
        "run_pairs",
        "each two runs over one prompt set, in both orders; prompts go by their prompt_id in all of them",
        parse_columns("""
            run_a VARCHAR runs.run, before
            run_b VARCHAR runs.run, after
            prompt_set VARCHAR content hash of the prompts that both are over
            model_a VARCHAR runs.model of run_a
            model_b VARCHAR runs.model of run_b
            step_a BIGINT runs.step of run_a
            step_b BIGINT runs.step of run_b
            random_seed_a BIGINT runs.random_seed of run_a, null for trained weights
            random_seed_b BIGINT runs.random_seed of run_b
        """),
        """
        SELECT a.run AS run_a, b.run AS run_b, prompt_set, a.model AS model_a, b.model AS model_b,
            a.step AS step_a, b.step AS step_b, a.random_seed AS random_seed_a, b.random_seed AS random_seed_b
        FROM runs a JOIN runs b USING (prompt_set) WHERE a.run <> b.run ORDER BY run_a, run_b
        """,
    ),
    View(
        "head_changes",
        "one row a pair of runs, layer, head and measure of head_stats: its change over the prompts that both hold",
        parse_columns("""
            run_a VARCHAR run_pairs.run_a, before
            run_b VARCHAR run_pairs.run_b, after
            layer INTEGER layer; layers and heads that one of the runs lacks are left out
            head INTEGER head
            measure VARCHAR column of head_stats that is compared
            mean_a DOUBLE its mean in run_a over the prompts where neither run has null
            mean_b DOUBLE the same in run_b
            change DOUBLE mean_b - mean_a, in the measure's unit
            effect DOUBLE change ÷ ((s_a + s_b) / 2), s the sample standard deviation over prompts: Cohen's d_av
            paired_effect DOUBLE change ÷ sample standard deviation of the prompts' differences: Cohen's d_z
            n_prompts BIGINT prompts compared; effects are null below 2, and where nothing varies but the means differ
            role_a VARCHAR head_roles.role in run_a
            role_b VARCHAR head_roles.role in run_b
        """),
        _head_changes(),
    ),
    View(
        "neuron_changes",
        "one row a pair of runs, layer and neuron: how its activations over all rows moved",
        parse_columns("""
            run_a VARCHAR run_pairs.run_a, before
            run_b VARCHAR run_pairs.run_b, after
            layer INTEGER layer
            neuron INTEGER neuron
            mean_a DOUBLE neuron_stats.mean in run_a
            mean_b DOUBLE the same in run_b
            mean_effect DOUBLE (mean_b - mean_a) ÷ √((std_a² + std_b²) / 2); null where both std are 0
            std_a DOUBLE neuron_stats.std in run_a
            std_b DOUBLE the same in run_b
            std_effect DOUBLE (std_b - std_a) ÷ √((std_a² + std_b²) / 2), from -√2 to √2; null where both are 0
            skew_a DOUBLE neuron_stats.skew in run_a
            skew_b DOUBLE the same in run_b
            skew_change DOUBLE skew_b - skew_a
            active_fraction_a DOUBLE neuron_stats.active_fraction in run_a
            active_fraction_b DOUBLE the same in run_b
            active_fraction_change DOUBLE active_fraction_b - active_fraction_a
        """),
        """
        SELECT p.run_a, p.run_b, a.layer, a.neuron, a.mean AS mean_a, b.mean AS mean_b,
            (b.mean - a.mean) / nullif(sqrt((a.std ** 2 + b.std ** 2) / 2), 0) AS mean_effect,
            a.std AS std_a, b.std AS std_b,
            (b.std - a.std) / nullif(sqrt((a.std ** 2 + b.std ** 2) / 2), 0) AS std_effect,
            a.skew AS skew_a, b.skew AS skew_b, b.skew - a.skew AS skew_change,
            a.active_fraction AS active_fraction_a, b.active_fraction AS active_fraction_b,
            b.active_fraction - a.active_fraction AS active_fraction_change
        FROM run_pairs p JOIN neuron_stats a ON a.run = p.run_a
            JOIN neuron_stats b ON b.run = p.run_b AND b.layer = a.layer AND b.neuron = a.neuron
        ORDER BY p.run_a, p.run_b, a.layer, a.neuron
        """,
    ),
)
"""Every view over the tables; made anew with each catalog, since labels differ."""
RELATION_NAMES = (*BUILT_IN, *(view.name for view in VIEWS))
