"""Comparing two runs over the same prompts: which heads and neurons changed most, from the views of all pairs."""

from typing import TYPE_CHECKING

from actdb.catalog.query import QueryResult, run_query
from actdb.catalog.tables import BUILT_IN
from actdb.errors import SettingError
from actdb.schema import RunInfo

if TYPE_CHECKING:
    import duckdb

HEAD_MEASURES = tuple(column.name for column in BUILT_IN["head_stats"].columns if column.type == "FLOAT")
NEURON_MEASURES = {
    "mean": "mean_effect",
    "std": "std_effect",
    "skew": "skew_change",
    "active_fraction": "active_fraction_change",
}
"""The columns of neuron_changes to rank by."""
MEASURES = {"heads": HEAD_MEASURES, "neurons": tuple(NEURON_MEASURES)}
"""What can be compared, and by which measures it can be ranked."""
SHAPES = {"heads": ("n_layers", "n_heads"), "neurons": ("n_layers", "d_mlp")}
# Norms are compared when asked for: they vary so little from prompt to prompt that they would always be first.
_HEADS = """
    WITH ranked AS (
        SELECT *, row_number() OVER (PARTITION BY layer, head ORDER BY abs(effect) DESC NULLS LAST, measure) AS place
        FROM head_changes WHERE run_a = $run_a AND run_b = $run_b
            AND CASE WHEN $measure IS NULL THEN NOT ends_with(measure, '_norm') ELSE measure = $measure END
    )
    SELECT (row_number() OVER (ORDER BY abs(effect) DESC NULLS LAST, layer, head) - 1)::INTEGER AS rank,
        layer, head, role_a, role_b, measure, mean_a, mean_b, change, effect, paired_effect, n_prompts
    FROM ranked WHERE place = 1 ORDER BY rank LIMIT $k
"""
_NEURONS = """
    SELECT (row_number() OVER (ORDER BY abs({column}) DESC NULLS LAST, layer, neuron) - 1)::INTEGER AS rank,
        * EXCLUDE (run_a, run_b)
    FROM neuron_changes WHERE run_a = $run_a AND run_b = $run_b ORDER BY rank LIMIT $k
"""


def compare_runs(
    connection: "duckdb.DuckDBPyConnection",
    before: RunInfo,
    after: RunInfo,
    *,
    of: str = "heads",
    measure: str | None = None,
    k: int | None = None,
) -> QueryResult:
    """Return what changed most between two runs; see `Database.compare`."""
    if of not in MEASURES:
        raise SettingError(f"of {of!r}: choose one of {', '.join(MEASURES)}")
    if measure is not None and measure not in MEASURES[of]:
        raise SettingError(f"measure {measure!r} of {of}: choose one of {', '.join(MEASURES[of])}")
    if k is not None and k < 1:
        raise SettingError(f"k {k}: must be at least 1")
    _check_comparable(before, after, of)
    for info in (before, after):
        _check_statistics(connection, info, of)
    parameters = {"run_a": before.name, "run_b": after.name, "k": k}
    if of == "heads":
        return run_query(connection, _HEADS, {**parameters, "measure": measure})
    return run_query(connection, _NEURONS.format(column=NEURON_MEASURES[measure or "mean"]), parameters)


def _check_comparable(before: RunInfo, after: RunInfo, of: str) -> None:
    """Raise `SettingError` unless the runs are two, over one prompt set, of models of one shape."""
    if before.name == after.name:
        raise SettingError(f"run {before.name!r} is given twice; name two runs to compare")
    sets = [str(info.plan.get("prompt_set")) for info in (before, after)]
    if sets[0] != sets[1]:
        raise SettingError(
            f"runs {before.name!r} and {after.name!r} are over different prompts (prompt sets {sets[0][:12]} and "
            f"{sets[1][:12]}); harvest both models over one prompts file"
        )
    for name in SHAPES[of]:
        sizes = [info.model.get(name) for info in (before, after)]
        if sizes[0] != sizes[1]:
            raise SettingError(
                f"the {of} of runs {before.name!r} and {after.name!r} do not correspond: {name} is {sizes[0]} and "
                f"{sizes[1]}; compare runs of models of one shape"
            )


def _check_statistics(connection: "duckdb.DuckDBPyConnection", info: RunInfo, of: str) -> None:
    """Raise `SettingError` where a run has no statistics of heads or neurons, or those of neurons not of all its rows.

    Heads are compared over the prompts that both runs hold, but a neuron's figures are of all rows together.
    """
    query = "SELECT sum(n_parts) FROM statistics WHERE run = ? AND statistic = ? AND n_parts > 0"
    ((n_parts,),) = run_query(connection, query, [info.name, of]).fetchall()
    if n_parts is None:
        raise SettingError(
            f"run {info.name!r} has no statistics of {of}: harvest with --stats {of}, or compute them from stored "
            f"arrays by actdb stats --run {info.name} --stats {of}"
        )
    if of == "neurons" and n_parts < info.n_parts:
        raise SettingError(
            f"run {info.name!r} has neuron statistics of {n_parts} of {info.n_parts} parts, which are other rows than "
            "the other run's; run the same harvest (or actdb stats) again to complete them"
        )
